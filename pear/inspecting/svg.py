"""Pictures as inline SVG: axes, lines and bars as text; colours are the page's, by class."""

import html
from collections.abc import Callable, Iterable, Sequence

Point = tuple[float, float]


class Plot:
    """One pair of axes. Positions go through `x` and `y`, from data to pixels; `parts` is what has been drawn."""

    def __init__(
        self,
        width: int,
        height: int,
        x: tuple[float, float],  # the data at the left and at the right edge
        y: tuple[float, float],  # at the lower and at the upper edge
        *,
        label: str,  # what a screen reader says
        margin: tuple[int, int, int, int] = (10, 12, 34, 46),  # top, right, bottom, left
    ):
        self.width, self.height, self.label = width, height, label
        self.top, right, bottom, self.left = margin
        self.right, self.bottom = width - right, height - bottom
        self._x, self._y = x, y
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        return self.left + (value - self._x[0]) / (self._x[1] - self._x[0]) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self._y[0]) / (self._y[1] - self._y[0]) * (self.bottom - self.top)

    def line(self, points: Iterable[Point], kind: str) -> None:
        self.parts.append(f'<polyline class="{kind}" points="{self._points(points)}"/>')

    def band(self, upper: Sequence[Point], lower: Sequence[Point], kind: str) -> None:
        self.parts.append(f'<polygon class="{kind}" points="{self._points([*upper, *reversed(lower)])}"/>')

    def bar(self, x: tuple[float, float], y: tuple[float, float], kind: str, title: str = "") -> None:
        left, right, low, high = self.x(x[0]), self.x(x[1]), self.y(y[0]), self.y(y[1])
        shown = f"<title>{html.escape(title)}</title>" if title else ""
        self.parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{high:.1f}" width="{max(right - left, 0.0):.1f}" '
            f'height="{max(low - high, 0.0):.1f}">{shown}</rect>'
        )

    def vertical(self, x: float, kind: str) -> None:
        self.parts.append(
            f'<line class="{kind}" x1="{self.x(x):.1f}" x2="{self.x(x):.1f}" y1="{self.top}" y2="{self.bottom}"/>'
        )

    def horizontal(self, y: float, kind: str) -> None:
        self.parts.append(
            f'<line class="{kind}" x1="{self.left}" x2="{self.right}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"/>'
        )

    def text(self, x: float, y: float, words: str, kind: str = "tick", anchor: str = "middle") -> None:
        """At pixels."""
        self.parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
        )

    def axes(
        self,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
        x_label: str = "",
        y_label: str = "",
    ) -> None:
        for value, words in y_ticks:
            self.horizontal(value, "grid")
            self.text(self.left - 6, self.y(value) + 4, words, anchor="end")
        for value, words in x_ticks:
            self.text(self.x(value), self.bottom + 15, words)
        self.parts.append(
            f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>'
        )
        if x_label:
            self.text((self.left + self.right) / 2, self.height - 4, x_label, "label")
        if y_label:
            middle = (self.top + self.bottom) / 2
            self.parts.append(
                f'<text class="label" text-anchor="middle" transform="translate(11 {middle:.1f}) rotate(-90)">'
                f"{html.escape(y_label)}</text>"
            )

    def __str__(self) -> str:
        label = html.escape(self.label)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}">{"".join(self.parts)}</svg>'
        )

    def _points(self, points: Iterable[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def labelled(
    values: Iterable[float], inside: tuple[float, float], words: Callable[[float], str]
) -> list[tuple[float, str]]:
    """Ticks at those of the values that lie inside."""
    return [(value, words(value)) for value in values if inside[0] <= value <= inside[1]]
