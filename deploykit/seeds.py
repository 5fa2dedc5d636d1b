"""Seeds for everything random, derived from where in a run the randomness is used."""

import hashlib
import operator


def stable_seed(*parts: int | str) -> int:
    """Derive a seed from its parts; equal parts give an equal seed on every machine.

    Types count (``1`` and ``"1"`` differ), and so do borders (``"ab", "c"`` and
    ``"a", "bc"`` differ).

    Args:
        parts: what the randomness belongs to, such as ``(seed, "train", epoch, step)``.

    Returns:
        A seed in ``[0, 2**63)``, which torch and numpy both take.

    Raises:
        TypeError: a part is neither an integer nor a string.

    Example:
        >>> stable_seed(0, "train", 1) == stable_seed(0, "train", 1)
        True
    """
    digest = hashlib.sha256()
    for part in parts:
        kind, text = ("s", part) if isinstance(part, str) else ("i", str(operator.index(part)))
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{kind}{len(data)}:".encode())
        digest.update(data)
    return int.from_bytes(digest.digest()[:8], "big") >> 1
