"""Pictures as files: PNGs that say how they were made, sheets, strips and tables of pictures, moving GIFs."""

from __future__ import annotations

import math
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError, reason_of
from sana_jax.files import atomic_file

if TYPE_CHECKING:
    from PIL import Image

_SMALLEST_SHOWN = 128  # px: below this a picture can hardly be seen
_NARROWEST_LABEL, _WIDEST_ROW_LABEL = 96, 180  # px: a column's label is wrapped to the picture or this, a row's to this


def to_pil(image: Float[np.ndarray, "H W C"]) -> Image.Image:
    """A picture (H, W, C) in [0, 1] as a PIL image: mode ``L`` for one channel, ``RGB`` for three.

    Values are clamped to [0, 1] and rounded to 8 bits.

    Raises:
        UserError: a value that is not finite, or another number of axes or channels.
    """
    from PIL import Image

    image = np.asarray(image, dtype=np.float32)
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise UserError(f"picture of shape {image.shape}; allowed is (H, W, 1) or (H, W, 3): bring it to that shape")
    if not np.isfinite(image).all():
        raise UserError("the picture holds values that are not finite; they cannot be drawn: look at how it was made")
    pixels = np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def automatic_enlargement(height: int, width: int) -> int:
    """The whole number by which to enlarge a picture so that its shorter side is seen: 1 from 128 px on."""
    return max(1, math.ceil(_SMALLEST_SHOWN / min(height, width)))


def enlarge_image(image: Image.Image, factor: int) -> Image.Image:
    """Every pixel becomes a square of ``factor`` x ``factor`` pixels.

    Raises:
        UserError: a factor below 1.
    """
    from PIL import Image

    if factor < 1:
        raise UserError(f"enlarge {factor} is not allowed; choose a whole number from 1 on")
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def image_grid(
    images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None, *, margin: int = 4
) -> Image.Image:
    """Pictures of one size side by side, row by row, on white, each with its label below it.

    Args:
        images: at least one picture.
        columns: pictures in a row; by default about as many as there are rows.
        labels: one text per picture; cells widen to fit.
        margin: pixels around each cell.

    Raises:
        UserError: no pictures, several sizes, or another number of labels.
    """
    from PIL import Image, ImageDraw, ImageFont

    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise UserError(
            f"a grid of {len(images)} pictures of sizes {sorted(sizes)}; allowed is one or more of one size"
        )
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{len(labels)} labels for {len(images)} pictures; give one label per picture")
    if columns is not None and columns < 1:
        raise UserError(f"columns {columns} is not allowed; choose a whole number from 1 on")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    width, height = images[0].size
    font = ImageFont.load_default()
    boxes = [font.getbbox(label) for label in labels or ()]
    cell_width = max([width, *(math.ceil(box[2]) for box in boxes)]) + 2 * margin
    text_height = max((math.ceil(box[3]) for box in boxes), default=0)
    cell_height = height + 2 * margin + (text_height + margin if text_height else 0)
    rows = math.ceil(len(images) / columns)
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    white = 255 if mode == "L" else (255, 255, 255)
    sheet = Image.new(mode, (columns * cell_width, rows * cell_height), white)
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = (index % columns) * cell_width, (index // columns) * cell_height
        sheet.paste(image, (left + (cell_width - width) // 2, top + margin))
        if labels is not None:
            text_left = left + (cell_width - math.ceil(boxes[index][2])) // 2
            draw.text(
                (text_left, top + 2 * margin + height), labels[index], fill=0 if mode == "L" else (0, 0, 0), font=font
            )
    return sheet


def strip(images: Sequence[Image.Image], labels: Sequence[str], *, vertical: bool = False) -> Image.Image:
    """Pictures of one size in a row, or one below the other, each with its label below it.

    Raises:
        UserError: as ``image_grid``.
    """
    return image_grid(images, 1 if vertical else max(1, len(images)), labels)


def labelled_table(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    margin: int = 4,
) -> Image.Image:
    """A table of pictures on white: labels of the columns above it, those of the rows on its left.

    Args:
        rows: as many pictures in each as there are columns, of any sizes; None leaves a place empty.
        row_labels: one text per row; long ones are wrapped.
        column_labels: one text per column, likewise.
        margin: pixels around each cell.

    Raises:
        UserError: no pictures at all, or another number of labels.
    """
    from PIL import Image, ImageDraw, ImageFont

    pictures = [picture for row in rows for picture in row if picture is not None]
    if not pictures:
        raise UserError("a table without pictures; give one or more")
    if len(rows) != len(row_labels) or any(len(row) != len(column_labels) for row in rows):
        raise UserError(
            f"{len(row_labels)} and {len(column_labels)} labels for {len(rows)} rows of "
            f"{sorted({len(row) for row in rows})} pictures; give one label for every row and every column"
        )
    font = ImageFont.load_default()
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    character = max(1.0, draw.textlength("n", font=font))
    above = [_wrapped(label, max(width, _NARROWEST_LABEL) / character) for label in column_labels]
    beside = [_wrapped(label, _WIDEST_ROW_LABEL / character) for label in row_labels]

    def extent(text: str) -> tuple[int, int]:
        box = draw.multiline_textbbox((0, 0), text, font=font)
        return math.ceil(box[2]), math.ceil(box[3])

    cell_width = max([width, *(extent(label)[0] for label in above)]) + 2 * margin
    cell_height = max([height, *(extent(label)[1] for label in beside)]) + 2 * margin
    left = max(extent(label)[0] for label in beside) + 2 * margin
    top = max(extent(label)[1] for label in above) + 2 * margin
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    white, black = (255, 0) if mode == "L" else ((255, 255, 255), (0, 0, 0))
    table = Image.new(mode, (left + cell_width * len(above), top + cell_height * len(beside)), white)
    draw = ImageDraw.Draw(table)
    for column, label in enumerate(above):
        draw.multiline_text((left + column * cell_width + margin, margin), label, fill=black, font=font)
    for row, label in enumerate(beside):
        draw.multiline_text((margin, top + row * cell_height + margin), label, fill=black, font=font)
        for column, picture in enumerate(rows[row]):
            if picture is not None:
                table.paste(picture, (left + column * cell_width + margin, top + row * cell_height + margin))
    return table


def _wrapped(text: str, characters: float) -> str:
    lines = [textwrap.wrap(line, max(1, int(characters))) or [""] for line in text.splitlines() or [""]]
    return "\n".join(part for parts in lines for part in parts)


def save_gif(
    path: str | os.PathLike[str],
    frames: Sequence[Image.Image],
    milliseconds: int | Sequence[int] = 500,
    *,
    comment: str | None = None,
) -> pathlib.Path:
    """Writes a GIF that shows the frames one after another, for ever; it appears whole or not at all.

    A GIF has 256 colours in each frame. Equal frames that follow one another are stored once, and shown as long as
    they would be.

    Args:
        path: where; missing folders are made.
        frames: one or more pictures of one size.
        milliseconds: for which each is shown, one number for all or one each; multiples of 10 from 20 on: what browsers
            keep to.
        comment: a text in the file, at most 255 bytes.

    Raises:
        UserError: the name does not end in ``.gif``, is a folder or cannot be written; no frames, several sizes, or a
            time that is not allowed.
    """
    path = check_picture_path(path, ".gif")
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise UserError(
            f"a GIF of {len(frames)} frames of sizes {sorted(sizes)}; allowed is one or more frames of one size"
        )
    times = [milliseconds] if isinstance(milliseconds, int) else list(milliseconds)
    if any(time < 20 or time % 10 for time in times) or len(times) not in (1, len(frames)):
        raise UserError(f"{milliseconds} milliseconds is not allowed; choose a multiple of 10 from 20 on")
    first, *others = (frame if frame.mode == "L" else frame.convert("RGB") for frame in frames)
    options = {} if comment is None else {"comment": comment.encode()[:255]}
    duration = times[0] if len(times) == 1 else times
    try:
        with atomic_file(path) as file:
            first.save(file, format="GIF", save_all=True, append_images=others, duration=duration, loop=0, **options)
    except OSError as error:
        reason = error.strerror or reason_of(error)
        raise UserError(f"cannot write {path} ({reason}); choose a folder that can be written to") from error
    return path


def save_png(
    path: str | os.PathLike[str],
    image: Image.Image | Float[np.ndarray, "H W C"],
    *,
    enlarge: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a PNG under a temporary name, then renames it, so that no half picture is ever seen.

    Args:
        path: where; missing folders are made.
        image: a PIL image, or an array (H, W, C) in [0, 1].
        enlarge: see ``enlarge_image``.
        metadata: text chunks such as ``prompt`` and ``seed``; ``None`` values are left out.

    Raises:
        UserError: the name does not end in ``.png``, is a folder, or cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = check_png_path(path)
    picture = enlarge_image(image if isinstance(image, Image.Image) else to_pil(image), enlarge)
    chunks = PngInfo()
    for key, value in (metadata or {}).items():
        if value is not None:
            chunks.add_text(key, str(value))
    try:
        with atomic_file(path) as file:
            picture.save(file, format="PNG", pnginfo=chunks)
    except OSError as error:
        reason = error.strerror or reason_of(error)
        raise UserError(f"cannot write {path} ({reason}); choose a folder that can be written to") from error
    return path


def check_png_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, if a PNG can have that name: asked before minutes of sampling, not after.

    Raises:
        UserError: the name does not end in ``.png`` or is a folder.
    """
    return check_picture_path(path, ".png")


def check_picture_path(path: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    """The path, if a picture of this kind, ``.png`` or ``.gif``, can have that name.

    Raises:
        UserError: the name does not end so, or is a folder.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() != suffix:
        raise UserError(
            f"output {str(path)!r} is not allowed; a picture's name ends in {suffix}: try {path.with_suffix(suffix)}"
        )
    if path.is_dir():
        raise UserError(f"output {path} is a folder; allowed is a file's name: try {path / f'out{suffix}'}")
    return path
