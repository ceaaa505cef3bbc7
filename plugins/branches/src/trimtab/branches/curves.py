"""Pictures of curves: lines over a number, with axes, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 380.0, 220.0, 52.0, 12.0, 62.0, 38.0
_TICKS = 5


def curves_picture(
    lines: Mapping[str, Sequence[Point]],
    *,
    across: str,
    chosen: Point,
    chosen_line: str = "",
) -> str:
    """Lines by name, both axes from what there is to show; ``chosen`` is marked on them.

    Args:
        lines: of each line its points, by x.
        across: what the lower axis shows.
        chosen: the point of the plan.
        chosen_line: the name of the line that is drawn strong.
    """
    points = [point for line in lines.values() for point in line] + [chosen]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    # A few pairs that hardly keep up would press all others flat.
    ceiling = min(max(y for _, y in points), 4 * max(chosen[1], _median([y for _, y in points])))
    scale = _Scale(low, max(high, low + 1e-9), ceiling)
    parts = [_axes(scale, across)]
    taken: list[float] = []
    # Labels are put down from the top, so that none is pushed far from its line.
    for name, line in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        parts.append(_line(scale, name, line, taken, strong=name == chosen_line))
    x, y = scale.place(chosen)
    parts.append(f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg role="img" {size}>{"".join(parts)}</svg>'


class _Scale:
    """Where values lie in the picture; y begins at 0."""

    def __init__(self, low: float, high: float, ceiling: float) -> None:
        self.low, self.high, self.ceiling = low, high, max(ceiling, 1e-12)

    def place(self, point: Point) -> Point:
        """A point's place in the picture."""
        x = (point[0] - self.low) / (self.high - self.low)
        return _LEFT + _WIDTH * x, _TOP + _HEIGHT * (1 - min(point[1] / self.ceiling, 1.0))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _axes(scale: _Scale, across: str) -> str:
    bottom, right = _TOP + _HEIGHT, _LEFT + _WIDTH
    parts = [f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>']
    for value in _ticks(scale.ceiling):
        y = scale.place((scale.low, value))[1]
        parts.append(f'<path class="grid" d="M{_LEFT},{y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{_short(value)}</text>')
    first = math.ceil(scale.low)
    step = _step(scale.high - scale.low)
    value = step * math.ceil(first / step) if step < 1 else math.ceil(scale.low / step) * step
    while value <= scale.high + 1e-9:
        x = scale.place((value, 0))[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" class="middle">{value:.3g}</text>')
        value += step
    parts.append(f'<text x="{right}" y="{bottom + 31}" class="end">{escape(across)}</text>')
    return "".join(parts)


def _short(value: float) -> str:
    """A value of an axis, thousands as k."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _ticks(ceiling: float) -> list[float]:
    step = _step(ceiling)
    return [round(step * i, 12) for i in range(int(ceiling / step) + 1)]


def _step(span: float) -> float:
    """A round distance of which about five fit into a span."""
    rough = max(span, 1e-12) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def _line(
    scale: _Scale, name: str, line: Sequence[Point], taken: list[float], *, strong: bool
) -> str:
    shown = [point for point in line if point[1] <= scale.ceiling]
    if not shown:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(scale.place, shown))
    x, y = scale.place(shown[-1])
    while any(abs(y - other) < 12 for other in taken):
        y += 12
    taken.append(y)
    kind = "ours" if strong else "other"
    return (
        f'<polyline class="{kind}" points="{path}"/>'
        f'<text x="{x + 6:.1f}" y="{y + 4:.1f}">{escape(name)}</text>'
    )
