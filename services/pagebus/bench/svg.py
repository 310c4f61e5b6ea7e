"""Draws small panels of bars and lines as one SVG file. Needs no library, knows no benchmark."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 58, 44
COLORS = ("#2563a8", "#7aa6d6", "#c9c9c9", "#ececec")
TEXT = "#333333"


class Series(NamedTuple):
    """Values of one color, one a place on the x axis; None: nothing is drawn there."""

    name: str
    color: str
    values: Sequence[float | None]


class Panel(NamedTuple):
    """One drawing. `kind` is "stacked" (shares of 100, the first one's number above), "bars" or "lines"."""

    title: str
    kind: str
    places: Sequence[str]
    series: Sequence[Series]


def draw(panels: Sequence[Panel]) -> str:
    """The whole SVG document, two panels a row."""
    panels = [panel for panel in panels if panel.places]
    num_rows = -(-len(panels) // 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {num_rows * HEIGHT}" '
        f'font-family="sans-serif" font-size="11" fill="{TEXT}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        parts.append(f'<g transform="translate({i % 2 * WIDTH} {i // 2 * HEIGHT})">')
        parts += _panel(panel)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> Iterator[str]:
    yield f'<text x="{LEFT}" y="20" font-size="13" font-weight="bold">{escape(panel.title)}</text>'
    x = LEFT
    for series in panel.series:
        yield f'<rect x="{x}" y="30" width="9" height="9" fill="{series.color}" stroke="#999"/>'
        yield f'<text x="{x + 13}" y="38">{escape(series.name)}</text>'
        x += 26 + 6 * len(series.name)
    top = _top(panel)
    for i in range(5):
        y = _y(top * i / 4, top)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * i / 4:g}</text>'
    step = (WIDTH - LEFT - RIGHT) / len(panel.places)
    for i, place in enumerate(panel.places):
        middle = LEFT + (i + 0.5) * step
        yield f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(place)}</text>'
    if panel.kind == "lines":
        yield from _lines(panel, step, top)
    else:
        yield from _bars(panel, step, top)


def _top(panel: Panel) -> float:
    """A round number that no drawn value exceeds."""
    columns = zip(*(series.values for series in panel.series), strict=True)
    if panel.kind == "stacked":
        return 100.0
    most = max((value for column in columns for value in column if value is not None), default=1.0)
    unit = 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
    return next(unit * factor for factor in (1, 2, 4, 6, 8, 10, 20) if unit * factor >= most)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)


def _bars(panel: Panel, step: float, top: float) -> Iterator[str]:
    is_stacked = panel.kind == "stacked"
    width = step * 0.6 / (1 if is_stacked else len(panel.series))
    for i in range(len(panel.places)):
        base = 0.0
        for k, series in enumerate(panel.series):
            value = series.values[i]
            if value is None:
                continue
            x = LEFT + (i + 0.2) * step + (0 if is_stacked else k * width)
            y, bottom = _y(base + value, top), _y(base, top)
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{bottom - y:.1f}" '
                f'fill="{series.color}"/>'
            )
            if k == 0 or not is_stacked:
                above = _y(top, top) if is_stacked else y
                yield (
                    f'<text x="{x + width / 2:.1f}" y="{above - 3:.1f}" text-anchor="middle">'
                    f"{value:.3g}</text>"
                )
            base += value if is_stacked else 0.0


def _lines(panel: Panel, step: float, top: float) -> Iterator[str]:
    for series in panel.series:
        points = [
            (LEFT + (i + 0.5) * step, _y(value, top), value)
            for i, value in enumerate(series.values)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        yield f'<polyline points="{path}" fill="none" stroke="{series.color}" stroke-width="2"/>'
        for x, y, value in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{series.color}"/>'
            yield f'<text x="{x:.1f}" y="{y - 7:.1f}" text-anchor="middle">{value:.0f}</text>'
