"""JSON as every program reads it: no key twice, no nesting without bound; and where a value holds what JSON cannot."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 100  # of nesting: json, copies and templates recurse, and Python's stack ends at about 1000
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half of a surrogate pair


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with a ValueError for too deep nesting, too long integers and a key that is given twice."""
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        raise ValueError("an integer of more than 4300 digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {ascii(twice):.60} is given twice in one object")
    return found


def _deeper(value: Any, depth: int) -> bool:
    """Whether a list or dict nests deeper than `depth`, found without recursion."""
    level = [value]
    for _ in range(depth):
        inner = (item.values() if type(item) is dict else item for item in level)
        level = [item for items in inner for item in items if type(item) in (dict, list)]
    return bool(level)


def find_half_pair(value: Any) -> str | None:
    """Where a parsed JSON value holds half of a surrogate pair: "`note[0].text`", say; None where nowhere."""
    return _find(value, lambda item: isinstance(item, str) and not _is_text(item))


def unwritable(value: Any) -> str | None:
    """Why a parsed JSON value cannot be written as JSON in UTF-8; None where it can."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        if found := find_non_finite(value):
            return f"{found[0]} is {found[1]!r}, for which JSON has no form: write null, or leave the key out"
        return f"{find_half_pair(value)} holds half of a surrogate pair, which is no character"
    return None


def find_non_finite(value: Any) -> tuple[str, float] | None:
    """Where a parsed JSON value holds NaN or an infinity, which JSON has no form for, and which."""
    found: list[float] = []

    def bad(item: Any) -> bool:
        if isinstance(item, float) and not math.isfinite(item):
            found.append(item)
        return bool(found)

    place = _find(value, bad)
    return None if place is None else (place, found[0])


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find(value: Any, bad: Callable[[Any], bool]) -> str | None:
    """The place of the first item, or key, for which `bad` holds."""
    stack = [("", value)]
    while stack:
        place, item = stack.pop()
        if isinstance(item, dict):
            for key in item:
                if bad(key):
                    return f"key {ascii(key):.60}"
            named = [(f"{place}.{key}" if place else key, inner) for key, inner in item.items()]
            stack.extend(reversed(named))
        elif isinstance(item, list):
            stack.extend(reversed([(f"{place}[{i}]", inner) for i, inner in enumerate(item)]))
        elif bad(item):
            return f"`{place:.60}`"
    return None
