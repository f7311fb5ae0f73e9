"""Tables of reports, in markdown: cells that cannot break out, shares as percentages, differences as points."""

from pear.curves import plain
from pear.eval import percent
from pear.intervals import Interval

NONE = "–"  # in a cell that has nothing to say


def table(head: list[str], rows: list[list[str]], text: int = 1) -> str:
    """The first `text` columns to the left, all others to the right."""
    rule = "|" + " --- |" * text + " ---: |" * (len(head) - text)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(text: str) -> str:
    """Text that cannot break out of its cell of a markdown table."""
    return plain(text).replace("\\", "\\\\").replace("|", "\\|")


def rate(interval: Interval | None) -> str:
    """A share, in percent."""
    if interval is None:
        return NONE
    return f"{percent(interval.mean)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval: Interval | None) -> str:
    """A difference of shares, in percentage points."""
    if interval is None:
        return NONE
    mean, low, high = (100 * value + 0.0 for value in interval)  # + 0.0: no "-0.0"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"
