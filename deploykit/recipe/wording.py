"""How values, keys and expectations read in a fault."""

import re
from typing import Any

MAX_SHOWN = 60


def shown(value: Any) -> str:
    """Show a value on one line, shortened, in the recipe's own spelling."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        value = value[: 2 * MAX_SHOWN]
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge integer"
    if isinstance(value, dict):
        return "a section" if value else "{}"
    text = "[" + ", ".join(map(shown, value[:10])) + "]" if isinstance(value, list) else repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def shown_key(key: str | int) -> str:
    """Show a key as it stands, or quoted where that could mislead."""
    return str(key) if re.fullmatch(r"[\w./*:-]{1,60}", str(key)) else shown(str(key))
