"""Which rows train, which decide and which are kept for the last word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deploykit.errors import DataError
from deploykit.seeds import stable_seed


def cut_stratified(
    labels: np.ndarray,
    fractions: Mapping[str, float],
    *,
    seed: int,
    classes: Sequence[str],
    name: str,
    rest: str = "train",
) -> dict[str, np.ndarray]:
    """Cut parts out of the rows, each with its share of every class.

    A class gives each part ``round(fraction * count)`` rows, at least one, and always
    keeps one for the rest. Which rows depends on the seed and the class alone: more
    rows of one class move nothing in another. (scikit-learn's stratified splits may
    leave a part without a sample of a rare class.)

    Args:
        labels: class numbers, int64 ``(n,)``.
        fractions: part to its share, for example ``{"validation": 0.15, "test": 0.15}``.
        seed: the recipe's.
        classes: class names, for messages.
        name: the file, for messages.
        rest: the split that gets the other rows.

    Returns:
        Sorted rows of the rest and of each part, int64, disjoint, covering all rows.

    Raises:
        DataError: the shares leave nothing over, or a class has too few rows.
    """
    for part, fraction in fractions.items():
        if fraction <= 0:
            raise DataError(
                f"data.{part}: expected a share above 0 or a file, got {fraction:g}; "
                f"the {part} split would be empty"
            )
    if sum(fractions.values()) >= 1:
        raise DataError(
            f"{' + '.join(f'data.{part}' for part in fractions)}: expected less than 1 together, "
            f"got {sum(fractions.values()):g}; nothing would be left to train on"
        )
    parts: dict[str, list[np.ndarray]] = {part: [] for part in (rest, *fractions)}
    for number in range(len(classes)):
        rows = np.flatnonzero(labels == number)
        if 0 < len(rows) < len(parts):
            raise DataError(
                f"{name}: expected at least {len(parts)} rows of class {classes[number]!r} so that "
                f"{', '.join(parts)} have one each, got {len(rows)}"
            )
        shuffled = np.random.default_rng(stable_seed(seed, "split", number)).permutation(rows)
        counts = _part_sizes(len(rows), list(fractions.values()))
        bounds = np.cumsum([len(rows) - sum(counts), *counts])[:-1]
        for part, chunk in zip(parts, np.split(shuffled, bounds), strict=True):
            parts[part].append(chunk)
    return {part: np.sort(np.concatenate(chunks)) for part, chunks in parts.items()}


def _part_sizes(count: int, fractions: Sequence[float]) -> list[int]:
    if count == 0:
        return [0 for _ in fractions]
    sizes = [max(1, round(fraction * count)) for fraction in fractions]
    while sum(sizes) >= count:  # rounding up must not take the last row of the rest
        sizes[sizes.index(max(sizes))] -= 1
    return sizes


def limit_rows(labels: Sequence[str] | np.ndarray, limit: int | None, *, seed: int) -> np.ndarray:
    """Choose at most ``limit`` rows, in order; classes keep their shares as well as they can.

    Args:
        labels: class numbers or names, ``(n,)``.
        limit: how many; ``None`` for all.
        seed: the recipe's.

    Returns:
        Sorted rows, int64.
    """
    count = len(labels)
    if limit is None or limit >= count:
        return np.arange(count)
    # Rank every row within its class, then take the lowest relative ranks over all.
    _, numbers = np.unique(np.asarray(labels), return_inverse=True)
    rank = np.empty(count)
    for number in range(int(numbers.max()) + 1):
        rows = np.flatnonzero(numbers == number)
        order = np.random.default_rng(stable_seed(seed, "limit", number)).permutation(len(rows))
        rank[rows] = order / len(rows)
    chosen = np.lexsort((np.arange(count), rank))[:limit]
    return np.sort(chosen)


def find_duplicates(
    digests: Mapping[str, Sequence[bytes]], origins: Mapping[str, Callable[[int], str]]
) -> tuple[str, ...]:
    """Report samples that are identical in two splits.

    Args:
        digests: split to the digest of each of its samples, as decoded.
        origins: split to the function that names a sample.

    Returns:
        One sentence for each pair of splits that share samples.
    """
    names = list(digests)
    warnings = []
    for index, first in enumerate(names):
        places = {digest: row for row, digest in reversed(list(enumerate(digests[first])))}
        for second in names[index + 1 :]:
            shared = [row for row, digest in enumerate(digests[second]) if digest in places]
            if shared:
                twin = origins[first](places[digests[second][shared[0]]])
                warnings.append(
                    f"{len(shared)} of {len(digests[second])} {second} samples are also in {first} "
                    f"(first: {origins[second](shared[0])} equals {twin}); "
                    f"{second} accuracy is flattered"
                )
    return tuple(warnings)
