"""Charts as plain SVG: lines and histograms on linear or logarithmic axes, with a description for those who do not see them.

Knows numbers and their names. Colours, strokes and fonts are the style sheet's; nothing here needs a script, and text is escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from influence.report import spelling, words

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 44
MOST_TICKS = 7


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What is measured along it and in which unit, its ends, and whether equal steps are equal factors."""

    title: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        low, high, at = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return start + (end - start) * ((at - low) / (high - low) if high > low else 0.5)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, how it is written) for a few round values between the ends."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, -(-(last - first + 1) // MOST_TICKS))
            powers = range(first, last + 1, step)
            plain = bool(powers) and powers[0] >= -2 and powers[-1] <= 4
            found = [(10.0**power, f"{10.0**power:,.{max(0, -power)}f}" if plain else words.power_of_ten(power)) for power in powers]
            return found if len(found) > 1 else [(value, words.number(value)) for value in (self.low, self.high)]
        round_step = _nice((self.high - self.low) / 4)
        places = range(math.ceil(self.low / round_step - 1e-9), math.floor(self.high / round_step + 1e-9) + 1)
        return [(place * round_step, _written(place * round_step, round_step)) for place in places]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve of (x, y), from left to right; `mark` is a point on it, `strength`, up to 1, how strongly it is drawn, `style` its class in the style
    sheet."""

    name: str
    points: Sequence[tuple[float, float]]
    mark: tuple[float, float] | None = None
    mark_name: str = ""
    strength: float = 1.0
    style: str = "curve"
    dots: bool = False


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, description: str) -> Markup:
    """The curves over the axes. Points outside of the axes are left out."""
    parts = [_frame(x, y)]
    for line in lines:
        inside = [(a, b) for a, b in line.points if x.low <= a <= x.high and y.low <= b <= y.high]
        if not inside:
            continue
        path = "L".join(f"{_x(x, a)} {_y(y, b)}" for a, b in inside)
        parts.append(
            f'<path class="{line.style}" stroke-opacity="{line.strength:.2f}" d="M{path}"><title>{_text(line.name)}</title></path>'
        )
        for a, b in inside if line.dots else ():
            said = _text(f"{line.name}: {words.number(b)} at {words.number(a)}")
            parts.append(f'<circle class="{line.style} point" cx="{_x(x, a)}" cy="{_y(y, b)}" r="3.5"><title>{said}</title></circle>')
        if line.mark and x.low <= line.mark[0] <= x.high and y.low <= line.mark[1] <= y.high:
            said = _text(f"{line.name}: {line.mark_name}")
            parts.append(f'<circle class="dot" cx="{_x(x, line.mark[0])}" cy="{_y(y, line.mark[1])}" r="4"><title>{said}</title></circle>')
    return _picture(parts, description)


def histogram(edges: Sequence[float], counts: Sequence[int], title: str, description: str, *, log: bool = False) -> Markup:
    """Bars of counts between the edges."""
    x, y = Axis(title=title, low=edges[0], high=edges[-1], log=log), Axis(title="sequences", low=0, high=max(1, *counts))
    parts = [_frame(x, y)]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        start, end, top = _x(x, low), _x(x, high), _y(y, count)
        said = f"{words.plain(count)} {'sequence' if count == 1 else 'sequences'} from {words.number(low)} to {words.number(high)}"
        if count:
            parts.append(
                f'<rect class="bar" x="{start}" y="{top}" width="{max(0.5, end - start - 0.7):.2f}" height="{HEIGHT - BOTTOM - top:.2f}">'
                f"<title>{_text(said)}</title></rect>"
            )
    return _picture(parts, description)


def sparkline(points: Sequence[tuple[float, float]], x: Axis, y: Axis, mark: tuple[float, float] | None, description: str) -> Markup:
    """A curve in the height of a line of text, without axes, and a point on it."""
    width, height = 110, 34
    inside = [(a, b) for a, b in points if x.low <= a <= x.high and y.low <= b <= y.high]
    path = "L".join(f"{x.place(a, 2, width - 2):.1f} {y.place(b, height - 2, 2):.1f}" for a, b in inside)
    dot = ""
    if mark and x.low <= mark[0] <= x.high and y.low <= mark[1] <= y.high:
        dot = f'<circle class="dot" cx="{x.place(mark[0], 2, width - 2):.1f}" cy="{y.place(mark[1], height - 2, 2):.1f}" r="3"></circle>'
    curve = f'<path class="curve" d="M{path}"></path>' if inside else ""
    return Markup(
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{_text(description)}">'
        f"{curve}{dot}</svg>"
    )


def _picture(parts: Sequence[str], description: str) -> Markup:
    head = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{_text(description)}">'
    )
    return Markup(head + "".join(parts) + "</svg>")


def _frame(x: Axis, y: Axis) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    for value, written in y.ticks():
        at = _y(y, value)
        parts.append(
            f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"></path><text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{written}</text>'
        )
    for value, written in x.ticks():
        parts.append(f'<text x="{_x(x, value)}" y="{floor + 16}" text-anchor="middle">{written}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"></path>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{_text(x.title)}</text>')
    parts.append(f'<text class="faint" x="4" y="10">{_text(y.title)}</text>')
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return round(axis.place(value, LEFT, WIDTH - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(axis.place(value, HEIGHT - BOTTOM, TOP + 8), 1)


def _text(text: str) -> Markup:
    return escape(spelling.shown(text))


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, near `step`."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999) if step > 0 else 1.0


def _written(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}".replace("-", words.MINUS)
