"""A bar chart as SVG: one row per contestant, a bar of seconds and below it a thin one of CPU seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_ROW = 34
_LABELS = 190
_BARS = 520
_RIGHT = 120
_TOP = 58
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.t{font-weight:600;font-size:15px}.n{fill:#666;font-size:11px}"
    ".a{fill:#1f6f8b}.b{fill:#b9c2c8}.c{opacity:.5}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.n{fill:#aaa}.b{fill:#66717a}.a{fill:#4db3d1}}"
)


@dataclass(frozen=True)
class Bar:
    """Seconds of one contestant; ours are drawn in colour."""

    name: str
    wall_s: float
    cpu_s: float
    ours: bool = False


def bars(title: str, rows: Sequence[Bar]) -> str:
    """The picture, rows in the order given. Its scale ends at the longest bar."""
    longest = max((max(row.wall_s, row.cpu_s) for row in rows), default=1.0) or 1.0
    width, height = _LABELS + _BARS + _RIGHT, _TOP + _ROW * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<style>{_STYLE}</style>",
        f'<text class="t" x="12" y="24">{escape(title)}</text>',
        '<text class="n" x="12" y="42">seconds: wall (thick), client CPU (thin); less is better</text>',
    ]
    for number, row in enumerate(rows):
        y = _TOP + number * _ROW
        colour = "a" if row.ours else "b"
        seconds = f"{row.wall_s:.2f} / {row.cpu_s:.2f}"
        wall, cpu = (max(1.0, _BARS * value / longest) for value in (row.wall_s, row.cpu_s))
        parts += [
            f'<text x="{_LABELS - 8}" y="{y + 15}" text-anchor="end">{escape(row.name)}</text>',
            f'<rect class="{colour}" x="{_LABELS}" y="{y + 2}" width="{wall:.1f}" height="14" rx="2"/>',
            f'<rect class="{colour} c" x="{_LABELS}" y="{y + 18}" width="{cpu:.1f}" height="5" rx="2"/>',
            f'<text class="n" x="{_LABELS + max(wall, cpu) + 6:.1f}" y="{y + 15}">{seconds}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
