"""Charts as self-contained SVG text: points with intervals, lines, and curves on logarithmic axes. Light and dark, a shape as well as a colour a series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_LIGHT = {"back": "#fff", "ink": "#1b1f24", "soft": "#59636e", "grid": "#d9dee3", "band": "#f4f6f8"}
_DARK = {"back": "#12161b", "ink": "#e8ecf0", "soft": "#a3adb8", "grid": "#343c45", "band": "#1a2027"}
_LIGHT_SERIES = ("#7a828c", "#b35900", "#0969b3", "#00795e", "#b3206b", "#6a3fb5")
_DARK_SERIES = ("#9aa4af", "#ff9a3d", "#58b0ff", "#3ed0a4", "#ff7fc0", "#b79bff")


def _colours(plain: dict[str, str], series: Sequence[str]) -> str:
    """Written out, without CSS variables, which SVG renderers outside browsers do not know."""
    rules = [f".xc text{{fill:{plain['ink']}}}", f".xc .grid{{stroke:{plain['grid']}}}"]
    rules += [f".xc .{name}{{fill:{plain[name]}}}" for name in ("soft", "back", "band")]
    for i, colour in enumerate(series):
        rules.append(f".xc .c{i}{{fill:{colour};stroke:{colour}}}.xc .l{i}{{fill:none;stroke:{colour}}}")
    return "".join(rules)


STYLE = (
    '.xc{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}.xc .t{font-weight:600;font-size:15px}.xc .b{font-weight:600}'
    f"{_colours(_LIGHT, _LIGHT_SERIES)}@media(prefers-color-scheme:dark){{{_colours(_DARK, _DARK_SERIES)}}}"
)

# Unit shapes around (0, 0), one a series: circle, square, diamond, triangle, hexagon.
_SHAPES = (
    "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0-4.5 0Z",
    "M-4-4H4V4H-4Z",
    "M0-5.6L5.6 0L0 5.6L-5.6 0Z",
    "M0-5.4L5.2 4H-5.2Z",
    "M-5.2 0L-2.6-4.6H2.6L5.2 0L2.6 4.6H-2.6Z",
    "M0 5.4L5.2-4H-5.2Z",
)


@dataclass(frozen=True)
class Series:
    """One method: its name, and one value a group (None: nothing to show), with interval and reference (a published value)."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[Sequence[float] | None] = ()
    references: Sequence[float | None] = ()
    colour: int = 0
    labelled: bool = False


@dataclass(frozen=True)
class Line:
    """One curve: (x, value, low, high) a point."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    colour: int = 0


@dataclass(frozen=True)
class Panel:
    """One line chart of a row: its title and curves."""

    title: str
    lines: Sequence[Line] = field(default=())


def points(title: str, groups: Sequence[str], series: Sequence[Series], note: str = "", width: int = 880) -> str:
    """Groups (languages) side by side; in each, one point a series with its interval, and a bar where a reference is known."""
    left, right, top, bottom, height = 44, 14, 74, 48, 430
    low, high = _span([x for one in series for x in (*one.values, *one.references) if x is not None])
    room = (width - left - right) / max(len(groups), 1)

    def y(value: float) -> float:  # an interval that reaches below the scale ends at it
        return top + (height - top - bottom) * (high - max(value, low)) / (high - low)

    parts = [_grid(left, width - right, low, high, y)]
    for g, group in enumerate(groups):
        x0 = left + g * room
        if g % 2 == 0:
            parts.insert(0, _rect(x0, top, room, height - top - bottom))
        parts.append(
            f'<text class="b" x="{x0 + room / 2:.1f}" y="{height - bottom + 20}" text-anchor="middle">{escape(group)}</text>'
        )
        for s, one in enumerate(series):
            x = x0 + room * (s + 1) / (len(series) + 1)
            value = one.values[g]
            if value is None:
                continue
            interval = one.intervals[g] if g < len(one.intervals) else None
            reference = one.references[g] if g < len(one.references) else None
            parts.append(_point(x, y, value, interval, reference, one, group))
    parts.append(_legend([(one.name, one.colour) for one in series], left, any(any(one.references) for one in series)))
    parts.append(f'<text class="soft" x="{left}" y="{height - 8}">{escape(note)}</text>')
    return _document(title, parts, width, height)


def lines(title: str, panels: Sequence[Panel], x_label: str, note: str = "", width: int = 880) -> str:
    """Panels side by side on one percent scale; x is logarithmic, its ticks are the points measured."""
    left, right, top, bottom, height, gap = 44, 14, 96, 62, 400, 54
    low, high = _span([point[1] for panel in panels for line in panel.lines for point in line.points])
    room = (width - left - right - gap * (len(panels) - 1)) / max(len(panels), 1)
    ticks = sorted({point[0] for panel in panels for line in panel.lines for point in line.points})
    first, last = math.log(ticks[0]), math.log(ticks[-1])

    def y(value: float) -> float:  # an interval that reaches below the scale ends at it
        return top + (height - top - bottom) * (high - max(value, low)) / (high - low)

    parts = []
    for p, panel in enumerate(panels):
        x0 = left + p * (room + gap)

        def x(count: float, x0: float = x0) -> float:
            return x0 + 16 + (room - 32) * ((math.log(count) - first) / (last - first) if last > first else 0.5)

        parts.append(_grid(x0, x0 + room, low, high, y))
        parts.append(f'<text class="b" x="{x0}" y="{top - 12}">{escape(panel.title)}</text>')
        for i, tick in enumerate(ticks):
            if i + 1 < len(ticks) and x(ticks[i + 1]) - x(tick) < 30:
                continue  # the next label would touch this one
            parts.append(
                f'<text class="soft" x="{x(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}</text>'
            )
        parts.append(
            f'<text class="soft" x="{x0 + room / 2:.1f}" y="{height - bottom + 36}" text-anchor="middle">{escape(x_label)}</text>'
        )
        for line in panel.lines:
            path = " ".join(f"{x(count):.1f},{y(value):.1f}" for count, value, _, _ in line.points)
            parts.append(f'<polyline class="l{line.colour}" stroke-width="2" points="{path}"/>')
            one = Series(line.name, (), colour=line.colour)
            for count, value, under, over in line.points:
                parts.append(_point(x(count), y, value, (under, over), None, one, f"{count:g} patches"))
    shown = {line.name: line.colour for panel in panels for line in panel.lines}
    parts.append(_legend(list(shown.items()), left, False))
    parts.append(f'<text class="soft" x="{left}" y="{height - 6}">{escape(note)}</text>')
    return _document(title, parts, width, height)


def curves(title: str, panels: Sequence[Panel], x_label: str, y_label: str, note: str = "", width: int = 880) -> str:
    """Panels side by side, both axes logarithmic; a point's interval is drawn as a bar. Values and x are positive."""
    left, right, top, bottom, height, gap = 54, 14, 96, 62, 440, 62
    found = [point for panel in panels for line in panel.lines for point in line.points]
    columns = _decades([point[0] for point in found])
    rows = _decades([point[1] for point in found])
    room = (width - left - right - gap * (len(panels) - 1)) / max(len(panels), 1)

    def y(value: float) -> float:  # an interval that reaches below the scale ends at it
        return top + (height - top - bottom) * (1 - _along(max(value, rows[0]), rows))

    parts = []
    for p, panel in enumerate(panels):
        x0 = left + p * (room + gap)
        for tick in rows:
            parts.append(
                f'<line class="grid" x1="{x0:.1f}" x2="{x0 + room:.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            )
            parts.append(f'<text class="soft" x="{x0 - 8:.1f}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in columns:
            place = x0 + 12 + (room - 24) * _along(tick, columns)
            parts.append(
                f'<text class="soft" x="{place:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:,.0f}</text>'
            )
        parts.append(f'<text class="b" x="{x0:.1f}" y="{top - 12}">{escape(panel.title)}</text>')
        parts.append(
            f'<text class="soft" x="{x0 + room / 2:.1f}" y="{height - bottom + 36}" text-anchor="middle">{escape(x_label)}</text>'
        )
        for line in panel.lines:
            places = [(x0 + 12 + (room - 24) * _along(point[0], columns), point) for point in line.points]
            path = " ".join(f"{x:.1f},{y(point[1]):.1f}" for x, point in places)
            parts.append(f'<polyline class="l{line.colour}" stroke-width="2" points="{path}"/>')
            for x, (count, value, low, high) in places:
                told = escape(f"{line.name}, {count:,.0f}: {value:.3g} {y_label} ({low:.3g} to {high:.3g})")
                parts.append(
                    f'<g><title>{told}</title><line class="c{line.colour}" stroke-width="2" x1="{x:.1f}" x2="{x:.1f}" y1="{y(low):.1f}" '
                    f'y2="{y(high):.1f}"/><path class="c{line.colour}" transform="translate({x:.1f} {y(value):.1f})" d="{_SHAPES[line.colour % len(_SHAPES)]}"/></g>'
                )
    parts.append(
        _legend(list({line.name: line.colour for panel in panels for line in panel.lines}.items()), left, False)
    )
    parts.append(f'<text class="soft" x="{left}" y="{height - 6}">{escape(note)}</text>')
    return _document(title, parts, width, height)


def _decades(found: Sequence[float]) -> list[float]:
    """Powers of ten around the values, at least two."""
    known = [value for value in found if value > 0] or [1.0]
    first, last = math.floor(math.log10(min(known)) + 1e-9), math.ceil(math.log10(max(known)) - 1e-9)
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _along(value: float, decades: Sequence[float]) -> float:
    """Where a value lies between the first decade (0) and the last (1)."""
    return math.log(value / decades[0]) / math.log(decades[-1] / decades[0])


def _span(found: Sequence[float]) -> tuple[float, float]:
    """The percent scale: up to 100, down to the tens below the smallest value."""
    lowest = min(found, default=0.0)
    return max(0.0, 10.0 * math.floor((lowest - 1) / 10)), 100.0


def _grid(left: float, right: float, low: float, high: float, y) -> str:  # type: ignore[no-untyped-def]
    step = 5 if high - low <= 30 else 10
    made = []
    for value in range(int(low), int(high) + 1, step):
        made.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        made.append(f'<text class="soft" x="{left - 8:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>')
    return "".join(made)


def _rect(x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="band" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _point(x, y, value, interval, reference, one: Series, where: str) -> str:  # type: ignore[no-untyped-def]
    made, told = [], f"{one.name}, {where}: {value:.1f} %"
    if interval is not None:
        told += f" (95 % interval {interval[0]:.1f} to {interval[1]:.1f})"
        made.append(
            f'<line class="c{one.colour}" stroke-width="2" x1="{x:.1f}" x2="{x:.1f}" y1="{y(interval[0]):.1f}" y2="{y(interval[1]):.1f}"/>'
        )
    if reference is not None:
        told += f"; published: {reference:.1f} %"
        made.append(
            f'<line class="c{one.colour}" stroke-width="3" x1="{x - 9:.1f}" x2="{x + 9:.1f}" y1="{y(reference):.1f}" y2="{y(reference):.1f}" opacity=".55"/>'
        )
    made.append(
        f'<path class="c{one.colour}" transform="translate({x:.1f} {y(value):.1f})" d="{_SHAPES[one.colour % len(_SHAPES)]}"/>'
    )
    if one.labelled:
        made.append(f'<text class="b" x="{x:.1f}" y="{y(value) - 10:.1f}" text-anchor="middle">{value:.1f}</text>')
    return f"<g><title>{escape(told)}</title>{''.join(made)}</g>"


def _legend(names: Sequence[tuple[str, int]], left: float, reference: bool) -> str:
    made, x = [], left + 6.0
    for name, colour in names:
        made.append(
            f'<path class="c{colour}" transform="translate({x:.1f} 46)" d="{_SHAPES[colour % len(_SHAPES)]}"/><text x="{x + 11:.1f}" y="50">{escape(name)}</text>'
        )
        x += 30 + 7.2 * len(name)
    if reference:
        made.append(
            f'<line class="c0" stroke-width="3" x1="{x:.1f}" x2="{x + 18:.1f}" y1="46" y2="46" opacity=".55"/><text class="soft" x="{x + 24:.1f}" y="50">published</text>'
        )
    return "".join(made)


def _document(title: str, parts: Sequence[str], width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="xc" viewBox="0 0 {width} {height}" width="100%" role="img" '
        f'aria-label="{escape(title, quote=True)}"><style>{STYLE}</style><rect class="back" width="100%" height="100%" rx="8"/><text class="t" x="44" y="24">{escape(title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )
