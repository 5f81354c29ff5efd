"""A table of pictures as one HTML page that needs nothing beside it: small copies are inside, no script, no network.

The page alone can be sent to somebody or read on a telephone. The small copies lead to the whole pictures, which open
where the folder with them lies beside the page; a page with a hundred whole pictures of 1024x1024 inside would have
200 MB.
"""

from __future__ import annotations

import base64
import html
import io
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LONGEST_SIDE = 384  # px of a small copy: sharp at 160 px on a telephone, about 30 kB
_LONGEST_STRIP = 2048  # px of a strip inside the page
_LARGEST_GIF = 1 << 21  # bytes of a GIF inside the page

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --head: #f2f2f2; --text: #111; --line: #ccc; --soft: #666; }
@media (prefers-color-scheme: dark) {
  :root { --back: #161616; --head: #242424; --text: #eee; --line: #444; --soft: #aaa; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.4 system-ui, sans-serif; }
h1 { font-size: 1.2rem; margin: .6rem .6rem .2rem; }
p, details { margin: .2rem .6rem .5rem; }
details table { border-collapse: collapse; margin-top: .4rem; }
details th, details td { text-align: left; padding: .1rem .8rem .1rem 0; font-weight: normal; overflow-wrap: anywhere; }
details th { color: var(--soft); white-space: nowrap; }
input[type=radio] { margin: 0 .2rem 0 .6rem; }
.scroll { --side: 160px; overflow: auto; max-height: 100vh; max-height: 100dvh; border-top: 1px solid var(--line); }
#small:checked ~ .scroll { --side: 96px; }
#large:checked ~ .scroll { --side: 320px; }
#whole:checked ~ .scroll { --side: 90vw; }
.scroll table { border-collapse: separate; border-spacing: 0; }
.scroll thead th { position: sticky; top: 0; z-index: 2; background: var(--head); font-weight: 600; font-size: .8rem;
  padding: .3rem; border-bottom: 1px solid var(--line); text-align: center; vertical-align: bottom;
  overflow-wrap: anywhere; max-width: var(--side); }
.scroll tbody th.row { position: sticky; left: 0; z-index: 1; background: var(--head); font-weight: normal;
  font-size: .8rem; padding: .3rem; border-right: 1px solid var(--line); max-width: 7rem; }
.scroll thead th.corner { left: 0; z-index: 3; border-right: 1px solid var(--line); }
.scroll th.prompt { text-align: left; font-weight: 600; padding: .5rem .3rem .2rem; border-top: 1px solid var(--line); }
.scroll th.prompt span { position: sticky; left: .3rem; display: inline-block; max-width: 90vw; }
.scroll td { padding: 3px; text-align: center; vertical-align: top; }
.scroll img { display: block; width: var(--side); height: auto; background: var(--head); }
.scroll img.pixels { image-rendering: pixelated; }
.missing { color: var(--soft); font-size: .8rem; min-width: 5rem; }
.strips img { max-width: 100%; margin: .2rem .6rem; }
"""


@dataclass(frozen=True)
class Cell:
    """A picture's file, relative to the page, and what it shows; the file is None where it has not been drawn."""

    file: str | None
    description: str


@dataclass(frozen=True)
class Group:
    """Rows under one heading, a prompt: each with its label and as many cells as there are columns."""

    heading: str
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        title: of the page.
        summary: a line below it.
        settings: what is the same for all pictures, by name.
        columns: labels, of one line or several.
        groups: the table's body.
        strips: files of strips or GIFs, relative to the page, by what they show.
    """

    title: str
    summary: str
    settings: Mapping[str, str]
    columns: Sequence[str]
    groups: Sequence[Group]
    strips: Mapping[str, str] = field(default_factory=dict)


def render(page: Page, folder: Path) -> str:
    """The page as HTML; ``folder`` is where it will lie, from which the pictures' files are read."""
    body = [
        f"<h1>{_text(page.title)}</h1>",
        f"<p>{_text(page.summary)}</p>",
        _settings(page.settings),
        '<input type="radio" name="size" id="small"><label for="small">small</label>',
        '<input type="radio" name="size" id="medium" checked><label for="medium">medium</label>',
        '<input type="radio" name="size" id="large"><label for="large">large</label>',
        '<input type="radio" name="size" id="whole"><label for="whole">whole screen</label>',
        _table(page, folder),
        *_strips(page, folder),
    ]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(page.title)}</title>\n<style>{_STYLE}</style>"
    )
    start = f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n'
    return start + "\n".join(body) + "\n</body>\n</html>\n"


def _settings(settings: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in settings.items())
    return f"<details><summary>the same for all pictures</summary><table>{rows}</table></details>"


def _table(page: Page, folder: Path) -> str:
    heads = "".join(f"<th>{_text(label)}</th>" for label in page.columns)
    lines = [f'<div class="scroll"><table>\n<thead><tr><th class="corner"></th>{heads}</tr></thead>']
    for group in page.groups:
        heading = f'<th class="prompt" colspan="{len(page.columns) + 1}"><span>{_text(group.heading)}</span></th>'
        lines.append(f"<tbody>\n<tr>{heading}</tr>")
        for label, cells in group.rows:
            row = "".join(_cell(cell, folder) for cell in cells)
            lines.append(f'<tr><th class="row">{_text(label)}</th>{row}</tr>')
        lines.append("</tbody>")
    return "\n".join([*lines, "</table></div>"])


def _cell(cell: Cell, folder: Path) -> str:
    if cell.file is None:
        return '<td class="missing">not drawn</td>'
    if cell.file.endswith(".gif"):
        source, (width, height), small = _moving(folder, cell.file), _size(folder / cell.file), True
    else:
        source, width, height, small = thumbnail(folder / cell.file)
    pixels = ' class="pixels"' if small else ""
    description = _text(cell.description, newline=", ")
    image = f'<img src="{source}" width="{width}" height="{height}" alt="{description}"{pixels}>'
    return f'<td><a href="{_address(cell.file)}">{image}</a></td>'


def _strips(page: Page, folder: Path) -> list[str]:
    if not page.strips:
        return []
    lines = ['<div class="strips">']
    for what, file in page.strips.items():
        source = thumbnail(folder / file, _LONGEST_STRIP)[0] if file.endswith(".png") else _moving(folder, file)
        lines.append(f'<p><a href="{_address(file)}">{_text(what)}</a></p>')
        lines.append(f'<img src="{source}" alt="{_text(what)}">')
    return [*lines, "</div>"]


def _moving(folder: Path, file: str) -> str:
    """A GIF in the page; a large one moves only where its file lies beside it."""
    path = folder / file
    if path.stat().st_size > _LARGEST_GIF:
        return _address(file)
    return f"data:image/gif;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


def thumbnail(path: Path, side: int = LONGEST_SIDE) -> tuple[str, int, int, bool]:
    """A picture as a ``data:`` address of at most ``side`` px a side, its width and height, and whether it was small.

    Small pictures are embedded as they are, larger ones scaled down as JPEG.
    """
    from PIL import Image

    with Image.open(path) as picture:
        small = max(picture.size) <= side
        if small:
            kind, data, size = "png", path.read_bytes(), picture.size
        else:
            reduced = picture.convert("RGB")
            reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            reduced.save(buffer, format="JPEG", quality=88)
            kind, data, size = "jpeg", buffer.getvalue(), reduced.size
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *size, small


def _text(text: str, newline: str = "<br>") -> str:
    return html.escape(text).replace("\n", newline)


def _address(file: str) -> str:
    return html.escape(urllib.parse.quote(file))
