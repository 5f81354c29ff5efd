"""A folder with everything that users' folders hold: pictures that look odd, that are damaged, and that are none."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

Outcome = Literal["used", "header", "pixels", "ignored"]


class Damage(NamedTuple):
    """What is odd about a file, and what becomes of it.

    ``used``: it is trained; ``header``: indexing finds it to be unusable; ``pixels``: decoding does; ``ignored``: it is
    not taken for a picture at all. ``caption`` is the file's own caption, None where it has none.
    """

    what: str
    outcome: Outcome
    caption: str | None = None


def pixels(height: int = 48, width: int = 64, seed: int = 0, channels: int = 3) -> np.ndarray:
    """A smooth picture with an upper left corner that is darker than the lower right one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    tint = rng.uniform(0.4, 1.0, channels)
    return np.round(40 + 190 * (0.6 * y + 0.4 * x)[..., None] * tint).astype(np.uint8)


def encoded(picture: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    """A picture's file."""
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A valid PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def with_broken_checksum(png: bytes, kind: bytes) -> bytes:
    at = png.index(kind)
    length = struct.unpack(">I", png[at - 4 : at])[0]
    end = at + 4 + length
    return png[:end] + bytes([png[end] ^ 0xFF]) + png[end + 1 :]


def with_changed_byte(png: bytes) -> bytes:
    at = png.index(b"IDAT") + 100
    return png[:at] + bytes([png[at] ^ 0xFF]) + png[at + 1 :]


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def _contents() -> dict[str, tuple[str, Outcome, Callable[[], bytes]]]:
    """Files that are nothing but their bytes: name -> what, outcome, bytes."""
    picture, gray = pixels(), pixels(channels=1)[..., 0]
    rgba = np.concatenate([picture, np.broadcast_to(gray[..., None], (*gray.shape, 1))], -1)
    frames = [Image.fromarray(pixels(seed=seed)) for seed in range(3)]
    floats = gray.astype(np.float32) / 255

    def animated(kind: str) -> bytes:
        return encoded(frames[0], kind, save_all=True, append_images=frames[1:])

    def broken(chunk: str) -> bytes:
        return with_broken_checksum(encoded(picture, "PNG"), chunk.encode())

    def cut(data: bytes, share: float = 0.5) -> bytes:
        return data[: int(len(data) * share)]

    return {
        # what looks odd and is used
        "good.jpg": ("nothing", "used", lambda: encoded(picture, "JPEG")),
        "good.png": ("the same name as good.jpg", "used", lambda: encoded(pixels(seed=3), "PNG")),
        "good.webp": ("the same name again", "used", lambda: encoded(picture, "WEBP")),
        "bitmap.bmp": ("BMP", "used", lambda: encoded(picture, "BMP")),
        "cmyk.jpg": ("CMYK", "used", lambda: encoded(Image.fromarray(picture).convert("CMYK"), "JPEG")),
        "16bit.png": ("16 bits", "used", lambda: encoded(gray.astype(np.uint16) * 257, "PNG")),
        "sixteen.tiff": ("16 bits", "used", lambda: encoded(gray.astype(np.uint16) * 257, "TIFF")),
        "float.tiff": ("floats", "used", lambda: encoded(floats, "TIFF")),
        "rotated.jpg": ("EXIF rotation", "used", lambda: encoded(picture, "JPEG", exif=exif(6))),
        "mirrored.png": ("EXIF mirroring", "used", lambda: encoded(picture, "PNG", exif=exif(2))),
        "broken_exif.jpg": ("noise as EXIF", "used", lambda: encoded(picture, "JPEG", exif=b"Exif\0\0" + b"\7" * 40)),
        "animated.gif": ("three frames", "used", lambda: animated("GIF")),
        "moving.webp": ("three frames", "used", lambda: animated("WEBP")),
        "pages.tiff": ("three pages", "used", lambda: animated("TIFF")),
        "palette.png": ("a palette", "used", lambda: encoded(frames[0].quantize(16), "PNG", transparency=0)),
        "alpha.png": ("transparency", "used", lambda: encoded(rgba, "PNG")),
        "gray.jpg": ("gray", "used", lambda: encoded(gray, "JPEG")),
        "gray_alpha.png": ("gray and transparent", "used", lambda: encoded(Image.fromarray(rgba).convert("LA"), "PNG")),
        "black_and_white.png": ("1 bit", "used", lambda: encoded(Image.fromarray(gray).convert("1"), "PNG")),
        "progressive.jpg": ("progressive", "used", lambda: encoded(picture, "JPEG", progressive=True)),
        "profile.jpg": ("a colour profile of noise", "used", lambda: encoded(picture, "JPEG", icc_profile=b"\1" * 200)),
        "png_named.jpg": ("wrong extension", "used", lambda: encoded(picture, "PNG")),
        "UPPER.JPG": ("capitals", "used", lambda: encoded(picture, "JPEG")),
        "tiny.png": ("5x4 pixels", "used", lambda: encoded(pixels(5, 4), "PNG")),
        "strip.png": ("a strip of 6x300", "used", lambda: encoded(pixels(6, 300), "PNG")),
        "spaces and 'quotes'.png": ("spaces and quotes", "used", lambda: encoded(picture, "PNG")),
        "köln 北京.png": ("Unicode", "used", lambda: encoded(picture, "PNG")),
        "cafe\u0301.png": ("decomposed Unicode", "used", lambda: encoded(picture, "PNG")),
        "two\nlines.png": ("a line break in its name", "used", lambda: encoded(picture, "PNG")),
        "n" * 240 + ".png": ("a very long name", "used", lambda: encoded(picture, "PNG")),
        os.fsdecode(b"latin\xe9.png"): ("a name that is not UTF-8", "used", lambda: encoded(picture, "PNG")),
        "folder.jpg/inside.png": ("in a folder named like a picture", "used", lambda: encoded(picture, "PNG")),
        "a/b/c/d/e/deep.png": ("deep down", "used", lambda: encoded(picture, "PNG")),
        # the checksum around the pixels is wrong, the one within them is right
        "broken_checksum.png": ("broken checksum", "used", lambda: broken("IDAT")),
        # what is damaged
        "lab.tiff": ("LAB", "header", lambda: encoded(Image.merge("LAB", Image.fromarray(picture).split()), "TIFF")),
        "empty.jpg": ("empty", "header", lambda: b""),
        "truncated.jpg": ("truncated", "pixels", lambda: cut(encoded(picture, "JPEG"), 0.85)),
        "cut_png.png": ("truncated", "pixels", lambda: cut(encoded(picture, "PNG"))),
        "cut_gif.gif": ("truncated", "pixels", lambda: cut(encoded(picture, "GIF"), 0.9)),
        "cut_webp.webp": ("truncated", "header", lambda: cut(encoded(picture, "WEBP"), 0.1)),
        "cut_in_header.jpg": ("cut in its header", "header", lambda: encoded(picture, "JPEG")[:12]),
        "text.jpg": ("a text", "header", lambda: b"This is not a picture.\n" * 40),
        "page.png": ("a web page", "header", lambda: b"<!DOCTYPE html><html><body>404</body></html>"),
        "zeros.jpg": ("zeros", "header", lambda: bytes(5000)),
        "pointer.png": ("a pointer of git lfs", "header", lambda: b"version https://git-lfs.github.com/spec/v1\n"),
        "broken_pixels.png": ("a changed byte", "pixels", lambda: with_changed_byte(encoded(picture, "PNG"))),
        "broken_header.png": ("a broken header", "header", lambda: broken("IHDR")),
        "bomb.png": ("huge", "header", bomb),
        "one_pixel.png": ("one pixel", "header", lambda: encoded(pixels(1, 1), "PNG")),
        "line.png": ("a line of 1x90", "header", lambda: encoded(pixels(1, 90), "PNG")),
        "nan.tiff": ("not finite", "pixels", lambda: encoded(floats * np.float32("nan"), "TIFF")),
        "negative.tiff": ("values below 0", "pixels", lambda: encoded(floats - 0.5, "TIFF")),
        # what is no picture
        ".hidden.jpg": ("hidden", "ignored", lambda: encoded(picture, "JPEG")),
        ".DS_Store": ("of the system", "ignored", lambda: bytes(100)),
        "__MACOSX/._good.jpg": ("of the system", "ignored", lambda: bytes(100)),
        "__MACOSX/copy.jpg": ("of the system", "ignored", lambda: encoded(picture, "JPEG")),
        "Thumbs.db": ("of the system", "ignored", lambda: bytes(100)),
        "phone.heic": ("a kind that is not read", "ignored", lambda: bytes(100)),
        "notes.pdf": ("a document", "ignored", lambda: b"%PDF-1.4"),
        "no_suffix": ("without a suffix", "ignored", lambda: encoded(picture, "PNG")),
    }


def _odd_captions() -> dict[str, tuple[str, bytes, str | None]]:
    """Caption files of pictures that are good: stem -> what, bytes, the text that is to be read."""
    return {
        "caption_latin": ("a caption that is not UTF-8", "un café".encode("cp1252"), "un café"),
        "caption_utf16": ("a caption in UTF-16", "a cat, très bien".encode("utf-16"), "a cat, très bien"),
        "caption_mark": ("a caption after a byte order mark", b"\xef\xbb\xbfa dog", "a dog"),
        "caption_lines": ("a caption of two lines", b"a dog\r\nin the rain\n", "a dog in the rain"),
        "caption_zero": ("a caption of no bytes", b"", None),
        "caption_blank": ("a caption of spaces", b" \n\t ", None),
        "caption_control": ("control characters in a caption", b"a \x00bird\x07 flies", "a bird flies"),
        "caption_long": ("a caption of 100 kB", b"word " * 20000, ("word " * 20000).strip()),
    }


def make_damaged_folder(path: Path) -> dict[str, Damage]:
    """Fills a new folder and says what it holds, by relative name. Pictures without an odd caption have a plain one."""
    path = Path(path)
    made: dict[str, Damage] = {}
    for name, (what, outcome, content) in _contents().items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content())
        caption = f"a picture with {what}"
        if outcome != "ignored" and not name.startswith("good.") and len(name) < 250:
            file.with_suffix(".txt").write_text(caption)
        made[name] = Damage(what, outcome, None if outcome == "ignored" else caption)
    (path / "good.txt").write_text("good pictures")
    for name in ("good.jpg", "good.png", "good.webp"):
        made[name] = made[name]._replace(caption="good pictures")
    for seed, (stem, (what, text, read)) in enumerate(_odd_captions().items()):
        (path / f"{stem}.png").write_bytes(encoded(pixels(seed=seed), "PNG"))
        (path / f"{stem}.txt").write_bytes(text)
        made[f"{stem}.png"] = Damage(what, "used", read)
    (path / "caption_folder.png").write_bytes(encoded(pixels(), "PNG"))
    (path / "caption_folder.txt").mkdir()
    made["caption_folder.png"] = Damage("a folder where its caption should be", "used", None)
    (path / "lonely.txt").write_text("a caption without a picture")
    made["lonely.txt"] = Damage("a caption without a picture", "ignored")
    made |= _special_files(path)
    return made


def _special_files(path: Path) -> dict[str, Damage]:
    """Links, pipes and permissions."""
    (path / "loop.jpg").symlink_to("loop.jpg")
    (path / "nowhere.jpg").symlink_to("not-there.jpg")
    (path / "linked.jpg").symlink_to("good.jpg")
    (path / "linked.txt").write_text("a link")
    (path / "a" / "up").symlink_to("..", target_is_directory=True)
    os.mkfifo(path / "pipe.jpg")
    unreadable = path / "unreadable.jpg"
    unreadable.write_bytes(encoded(pixels(), "JPEG"))
    (path / "unreadable.txt").write_text("unreadable")
    unreadable.chmod(0)
    all_powerful = os.access(unreadable, os.R_OK)  # the administrator reads everything
    return {
        "loop.jpg": Damage("a link to itself", "header"),
        "nowhere.jpg": Damage("a link to nothing", "header"),
        "linked.jpg": Damage("a link to a picture", "used", "a link"),
        "a/up": Damage("a link to the folder above", "ignored"),
        "pipe.jpg": Damage("a pipe", "header"),
        "unreadable.jpg": Damage("unreadable", "used" if all_powerful else "header", "unreadable"),
    }
