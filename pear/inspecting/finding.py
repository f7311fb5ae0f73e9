"""What `pear inspect` says in words."""

from typing import NamedTuple

from pear.io import line_list

SEVERITIES = ("problem", "warning", "note", "fine")  # in this order


class Option(NamedTuple):
    """Flags of `pear sft`, and what they would change."""

    flags: str
    effect: str
    trains: float  # the predicted share of tokens that train
    ess: float


class Finding(NamedTuple):
    kind: str
    severity: str
    text: str
    options: tuple[Option, ...] = ()


def share(value: float) -> str:
    """A share in percent: 0 % and 100 % only where that is exact."""
    if 0 < value < 0.01:
        return f"{100 * value:.2g}%" if value >= 0.001 else "under 0.1%"
    if 0.99 < value < 1:
        return f"{100 * value:.1f}%" if value < 0.999 else "over 99.9%"
    return f"{100 * value:.0f}%"


def listed(numbers: list[int]) -> str:
    return line_list(numbers, most=10)


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def worst_first(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
