"""Text tables that fit a width: horizontal rules only, human-sized numbers, ASCII when the stream needs it.

>>> count(8_030_261_248), flops(352_321_536), size(16_060_522_496)
('8.03B', '352M', '16.1 GB')
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from tabulate import tabulate

DEFAULT_WIDTH = 108  # what a README shows without a scroll bar
MIN_WRAPPED = 24  # least width of a wrapped column while another column can be dropped
LEAST_WRAPPED = 20  # and when no column is left to drop

_ASCII = str.maketrans({"─": "-", "×": "x", "→": "->", "…": "~", "·": "-", "✓": "ok"})
_ASCII |= str.maketrans("▁▂▃▄▅▆▇█", "12345678")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    When the table is too wide, the column with the highest ``drop`` goes first; 0 means never. ``wrap`` lets the text
    of the column continue on further lines.
    """

    title: str
    align: str = "left"
    drop: int = 0
    wrap: bool = False


def draw(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> str:
    """The table, in at most ``width`` columns where possible: text wraps first, then columns are dropped."""
    kept = list(range(len(columns)))
    while True:
        victims = sorted((i for i in kept if columns[i].drop), key=lambda i: -columns[i].drop)
        text = _draw(columns, rows, kept, width, MIN_WRAPPED if victims else LEAST_WRAPPED)
        if _width(text) <= width or not victims:
            return text
        kept.remove(victims[0])


def count(number: int) -> str:
    """A count of parameters: three digits and K, M, B (1e9) or T."""
    return _scaled(number, ("", "K", "M", "B", "T", "Q"))


def flops(number: int) -> str:
    """A number of floating-point operations: three digits and K, M, G, T or P."""
    return _scaled(number, ("", "K", "M", "G", "T", "P"))


def size(bytes_: int) -> str:
    """A number of bytes in decimal units."""
    return _scaled(bytes_, (" B", " KB", " MB", " GB", " TB", " PB"))


def stream_width(stream: TextIO | None = None) -> int:
    """Columns of the terminal, or 108 where there is no terminal."""
    stream = sys.stdout if stream is None else stream
    if _is_terminal(stream):
        return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
    return DEFAULT_WIDTH


def encodable(text: str, stream: TextIO | None = None) -> str:
    """``text``, in ASCII if ``stream`` (by default stdout) cannot encode it."""
    encoding = getattr(stream if stream is not None else sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return to_ascii(text)
    return text


def to_ascii(text: str) -> str:
    """``text`` in ASCII: signs that moefy draws get their ASCII form, any other sign becomes ``?``."""
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def _draw(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], kept: list[int], width: int, least: int
) -> str:
    limits: list[int | None] = [None] * len(kept)
    wrapped = [at for at, i in enumerate(kept) if columns[i].wrap]
    if wrapped:
        fixed = sum(_cell_width(columns[i], rows, i) for i in kept if not columns[i].wrap)
        room = (width - fixed - 2 * (len(kept) - 1)) // len(wrapped)
        for at in wrapped:
            limits[at] = min(max(room, least), _cell_width(columns[kept[at]], rows, kept[at]))
    # The titles go in as a row: tabulate pads every header by two columns, which a narrow terminal lacks.
    titles = [columns[i].title for i in kept]
    text = tabulate(
        [titles, *([row[i] for i in kept] for row in rows)],
        tablefmt="plain",
        colalign=[columns[i].align for i in kept],
        rowalign=["bottom", *["top"] * len(rows)],
        disable_numparse=True,
        maxcolwidths=limits if wrapped and rows else None,
    )
    return _ruled(text, max(title.count("\n") + 1 for title in titles))


def _ruled(text: str, header_lines: int) -> str:
    """``text`` with a thin line under its header."""
    lines = [line.rstrip() for line in text.split("\n")]
    lines.insert(header_lines, "─" * max(map(len, lines)))
    return "\n".join(lines)


def _cell_width(column: Column, rows: Sequence[Sequence[str]], index: int) -> int:
    cells = [*column.title.split("\n"), *(line for row in rows for line in row[index].split("\n"))]
    return max(map(len, cells))


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def _scaled(number: int, units: Sequence[str]) -> str:
    value, unit = float(number), 0
    while abs(value) >= 999.5 and unit + 1 < len(units):
        value, unit = value / 1000, unit + 1
    digits = f"{value:.0f}" if unit == 0 else f"{value:#.3g}".rstrip(".")
    return digits + units[unit]


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):  # a replaced or a closed stream
        return False
