"""Tables of texts, a header and rows, and how they are printed in plain text and in Markdown."""

from typing import NamedTuple


class Table(NamedTuple):
    """A header and rows of as many cells."""

    header: list[str]
    rows: list[list[str]]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their longest cell; the first is aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    pad = lambda cell, i: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
    lines = ["  ".join(pad(cell, i) for i, cell in enumerate(row)) for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The same in Markdown."""
    line = lambda cells: "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
    return "\n".join([line(header), "|---" + "|---:" * (len(header) - 1) + "|", *map(line, rows)])
