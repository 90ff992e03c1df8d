"""Tables of results: as Markdown, as aligned text, as JSON."""

import json
from pathlib import Path


def write_json(path: Path, result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def markdown(header, rows) -> str:
    """A Markdown table of a header and rows of cells."""
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (header, ["---"] * len(header), *rows))


def aligned(header, rows) -> str:
    """The same as text in aligned columns."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
