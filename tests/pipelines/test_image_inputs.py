"""Pictures and masks that users hand in: one printed line where something is changed, one error line where refused."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from sana_jax.pipelines import image_inputs
from sana_jax.pipelines.image_inputs import mask_at, place, read_mask, read_picture, read_pictures, to_network_range
from sana_jax.pipelines.resolution import kept_window, resize_and_crop, size_to_sample

HEIGHT, WIDTH = 20, 30
RED = (255, 0, 0)


def gradient() -> Image.Image:
    """Every pixel of another colour."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([rows * 12, columns * 8, rows + columns], -1).astype(np.uint8))


def said(capsys) -> list[str]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def refused(picture, *parts: str, error: type = UserError) -> str:
    with pytest.raises(error) as caught:
        read_picture(picture)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for part in ("image", *parts):
        assert part in message
    return message


# -- colour models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp"])
def test_plain_files_say_nothing(tmp_path, capsys, suffix):
    gradient().save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    picture = read_picture(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(picture, gradient())
    assert said(capsys) == []


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_colour_models(tmp_path, capsys, mode):
    original = gradient()
    converted = original.convert("YCbCr" if mode == "LAB" else mode)
    if mode == "LAB":
        converted = Image.frombytes(
            "LAB", original.size, np.full((HEIGHT, WIDTH, 3), [128, 128, 128], np.uint8).tobytes()
        )
    suffix = {"CMYK": "jpg", "YCbCr": None, "HSV": None, "LAB": None}.get(mode, "png")
    if suffix:
        converted.save(tmp_path / f"a.{suffix}")
    picture = read_picture(tmp_path / f"a.{suffix}" if suffix else converted)
    assert (picture.mode, picture.size) == ("RGB", (WIDTH, HEIGHT))
    (line,) = said(capsys)
    assert line == f"image: {mode} becomes 8-bit RGB"
    if mode in ("CMYK", "YCbCr", "HSV"):
        assert np.abs(np.asarray(picture, int) - np.asarray(original, int)).mean() < 12


def test_a_transparent_value_of_16_bits_is_white(tmp_path):
    values = np.full((HEIGHT, WIDTH), 1000, np.uint16)
    values[0] = 500
    Image.fromarray(values).save(tmp_path / "a.png", transparency=500)
    found = np.asarray(read_picture(tmp_path / "a.png"))
    assert (found[0] == 255).all()
    assert (found[1:] == 4).all()


def test_sixteen_bits_keep_their_range(tmp_path, capsys):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(picture)[..., 1], np.round(values / 257))
    (line,) = said(capsys)
    assert "becomes 8-bit RGB, 65535 being white" in line


def test_floats_are_in_zero_to_one(tmp_path, capsys):
    values = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    picture = read_picture(tmp_path / "a.tiff")
    np.testing.assert_array_equal(np.asarray(picture)[..., 0], np.round(values.astype(np.float64) * 255))
    assert said(capsys) == ["image: F becomes 8-bit RGB, 1 being white"]
    for wrong in (values * 255, values - 0.5, np.where(values > 0.9, np.nan, values)):
        refused(Image.fromarray(wrong), "mode F", "0 to 1", "8-bit png")
    refused(Image.fromarray(np.full((HEIGHT, WIDTH), 70_000, np.int32)), "mode I", "0 to 65535")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB"])
def test_transparency_is_on_white(tmp_path, capsys, mode):
    """The left half is transparent; its hidden colour must not show."""
    colours = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    colours[:, WIDTH // 2 :] = (*RED, 255)
    picture = Image.fromarray(colours)
    options = {}
    if mode == "P":
        indices = np.zeros((HEIGHT, WIDTH), np.uint8)
        indices[:, WIDTH // 2 :] = 1
        picture = Image.fromarray(indices).convert("P")
        picture.putpalette([0, 0, 0, *RED])
        options = {"transparency": 0}
    elif mode == "RGB":
        picture, options = picture.convert("RGB"), {"transparency": (0, 0, 0)}
    else:
        picture = picture.convert(mode)
    if mode == "PA":
        found = read_picture(picture)
    else:
        picture.save(tmp_path / "a.png", **options)
        found = read_picture(tmp_path / "a.png")
    assert said(capsys) == [f"image: {mode} becomes 8-bit RGB, on white"]
    pixels = np.asarray(found)
    assert (pixels[:, : WIDTH // 2] == 255).all()
    assert (pixels[:, WIDTH // 2 :] != 255).any(axis=-1).all()
    if mode != "LA":
        assert (pixels[:, WIDTH // 2 :] == RED).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, capsys, orientation):
    """The right way up afterwards, from files that are stored turned."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = gradient() if orientation == 1 else gradient().transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(picture, gradient())
    lines = said(capsys)
    assert lines == ([] if orientation == 1 else [f"image: turned as its EXIF orientation {orientation} asks"])
    np.testing.assert_array_equal(read_picture(picture), gradient())  # not turned a second time


def test_exif_that_is_damaged(tmp_path, capsys):
    gradient().save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), gradient())
    assert len(said(capsys)) <= 1


# -- files that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_animations_are_refused(tmp_path, suffix):
    frames = [gradient().convert("P") if suffix == "gif" else gradient()]
    frames += [frame.rotate(90 * (i + 1)) for i, frame in enumerate(frames * 2)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    refused(tmp_path / f"a.{suffix}", "animated (3 frames)", "save one frame")
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        refused(picture, "animated (3 frames)")


def test_one_frame_of_a_gif_is_a_picture(tmp_path, capsys):
    gradient().convert("P").save(tmp_path / "a.gif")
    assert read_picture(tmp_path / "a.gif").mode == "RGB"
    assert said(capsys) == ["image: P becomes 8-bit RGB"]


def test_a_photograph_with_a_second_picture_in_its_file(tmp_path, capsys):
    gradient().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[gradient().rotate(180)], quality=95)
    picture = read_picture(tmp_path / "a.jpg")
    assert np.abs(np.asarray(picture, int) - np.asarray(gradient(), int)).mean() < 5
    (line,) = said(capsys)
    assert "holds 2 pictures" in line
    assert "the first is taken" in line


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_take_no_memory(tmp_path, size):
    """Above the limit by much, where the library raises, and by little, where it warns."""
    (tmp_path / "a.png").write_bytes(png_header(*size))
    tracemalloc.start()
    try:
        refused(tmp_path / "a.png", "more pixels than are read", str(Image.MAX_IMAGE_PIXELS), "smaller")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff"])
@pytest.mark.parametrize("kept", [0.3, 0.8])
def test_truncated_files(tmp_path, suffix, kept):
    path = tmp_path / f"a.{suffix}"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (noise.convert("P") if suffix == "gif" else noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, path.name)


@pytest.mark.parametrize("content", [b"", b"a red panda", b"\x89PNG\r\n\x1a\n", b"version https://git-lfs.github.com"])
def test_files_that_are_no_pictures(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "a.png", "png or jpg")


def test_files_that_are_not_there(tmp_path):
    refused(tmp_path / "b.png", "b.png is not a file", error=FileNotFoundError)
    refused(tmp_path, "is not a file", error=FileNotFoundError)
    refused(str(tmp_path / "b.png"), "b.png is not a file", error=FileNotFoundError)


def test_random_damage_is_one_clear_error(tmp_path, capsys):
    """200 files with bytes changed at random: a picture or a ``UserError``, nothing else."""
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("png", "jpg", "webp", "gif", "tiff"):
        gradient().save(tmp_path / f"a.{kind}", **({"exif": exif} if kind in ("png", "jpg", "webp") else {}))
        content = (tmp_path / f"a.{kind}").read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            for position in rng.integers(0, min(len(content), 400), rng.integers(1, 8)):
                damaged[position] = rng.integers(256)
            (tmp_path / f"b.{kind}").write_bytes(damaged)
            message = ""
            try:
                assert read_picture(tmp_path / f"b.{kind}").mode == "RGB"
            except UserError as error:
                message = str(error)
            assert "\n" not in message
    capsys.readouterr()


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 1)])
def test_too_small(size):
    refused(Image.new("RGB", size), f"{size[1]}x{size[0]} pixels is too small", "16 or more")


# -- arrays --------------------------------------------------------------------------------------------------------


def test_arrays(capsys):
    pixels = np.asarray(gradient())
    np.testing.assert_array_equal(read_picture(pixels), pixels)
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(read_picture((pixels / 255).astype(dtype)), pixels)
    assert said(capsys) == []


@pytest.mark.parametrize(
    ("array", "parts"),
    [
        (np.zeros((20, 30)), ("(20, 30)", "(H, W, 3)")),
        (np.zeros((3, 20, 30)), ("(3, 20, 30)", "(H, W, 3)")),
        (np.zeros((20, 30, 4)), ("(20, 30, 4)",)),
        (np.zeros((0, 0, 3)), ("0x0 pixels is too small",)),
        (np.full((20, 30, 3), 1.5), ("float64", "[0, 1]")),
        (np.full((20, 30, 3), -0.1), ("[0, 1]",)),
        (np.full((20, 30, 3), np.nan), ("[0, 1]",)),
        (np.full((20, 30, 3), 200, np.int64), ("int64", "bytes")),
        (np.ones((20, 30, 3), bool), ("bool",)),
        (np.full((20, 30, 3), "a"), ("<U1",)),
        (7, ("()",)),
        ({"file": "a.png"}, ("()",)),
    ],
)
def test_arrays_that_are_refused(array, parts):
    refused(array, *parts)


def test_lists_and_stacks():
    pixels = np.asarray(gradient())
    assert read_pictures(None, "image") is None
    for several in ([pixels, pixels], (gradient(), pixels), np.stack([pixels, pixels])):
        assert [picture.size for picture in read_pictures(several, "image")] == [(WIDTH, HEIGHT)] * 2
    assert len(read_pictures(gradient(), "image")) == 1
    with pytest.raises(UserError, match="image is an empty list"):
        read_pictures([], "image")


def test_network_range():
    values = to_network_range(gradient(), HEIGHT, WIDTH)
    assert values.shape == (1, HEIGHT, WIDTH, 3)
    np.testing.assert_allclose((values[0] + 1) * 127.5, np.asarray(gradient()), atol=1e-4)
    assert to_network_range(gradient(), 64, 96).shape == (1, 64, 96, 3)


# -- masks ---------------------------------------------------------------------------------------------------------

SQUARE = np.zeros((HEIGHT, WIDTH), bool)
SQUARE[5:9, 10:20] = True


@pytest.mark.parametrize("make", [
    lambda: SQUARE,
    lambda: SQUARE.astype(np.uint8),
    lambda: SQUARE.astype(np.uint8) * 255,
    lambda: SQUARE.astype(np.float32),
    lambda: SQUARE * 0.9,
    lambda: SQUARE.astype(np.int64),
    lambda: Image.fromarray(SQUARE),
    lambda: Image.fromarray(SQUARE.astype(np.uint8) * 255),
    lambda: Image.fromarray(SQUARE.astype(np.uint8) * 255).convert("RGB"),
    lambda: Image.fromarray(SQUARE.astype(np.uint16) * 65535),
    lambda: Image.fromarray(SQUARE.astype(np.float32)),
])  # fmt: skip
def test_masks_of_every_kind(tmp_path, make):
    mask = read_mask(make(), gradient())
    assert mask.mode == "L"
    np.testing.assert_array_equal(mask_at(mask, HEIGHT, WIDTH), SQUARE)
    mask.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(mask_at(read_mask(tmp_path / "mask.png", gradient()), HEIGHT, WIDTH), SQUARE)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_in_a_mask_is_not_drawn_anew(capsys, mode):
    """White that nobody sees, as drawing programs leave it around a stroke."""
    colours = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    colours[..., 3] = SQUARE * 255
    mask = read_mask(Image.fromarray(colours).convert(mode), gradient())
    np.testing.assert_array_equal(mask_at(mask, HEIGHT, WIDTH), SQUARE)
    assert said(capsys) == ["mask_image: what is transparent in it is not drawn anew"]


def test_a_mask_is_turned_as_its_file_asks(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SQUARE.astype(np.uint8) * 255).transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "a.png", exif=exif
    )
    np.testing.assert_array_equal(mask_at(read_mask(tmp_path / "a.png", gradient()), HEIGHT, WIDTH), SQUARE)


@pytest.mark.parametrize(
    ("mask", "parts"),
    [
        (np.ones((HEIGHT, WIDTH + 1)), ("20x31 for an image of 20x30", "resize")),
        (np.ones((WIDTH, HEIGHT)), ("30x20 for an image of 20x30",)),
        (np.zeros((HEIGHT, WIDTH)), ("no white",)),
        (np.full((HEIGHT, WIDTH), 127, np.uint8), ("no white",)),
        (np.ones((HEIGHT, WIDTH, 1)), ("(20, 30, 1)", "(H, W)")),
        (np.ones((0, 0)), ("(0, 0)",)),
        (np.full((HEIGHT, WIDTH), np.nan), ("[0, 1]",)),
        (np.full((HEIGHT, WIDTH), 255.0), ("float64", "[0, 1]")),
        (np.full((HEIGHT, WIDTH), "a"), ("[0, 1]",)),
    ],
)
def test_masks_that_are_refused(mask, parts):
    with pytest.raises(UserError) as caught:
        read_mask(mask, gradient())
    assert "\n" not in str(caught.value)
    for part in ("mask_image", *parts):
        assert part in str(caught.value)


def test_mask_files_that_are_refused(tmp_path):
    frames = [gradient().convert("P"), gradient().rotate(180).convert("P")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="mask_image is animated"):
        read_mask(tmp_path / "a.gif", gradient())
    with pytest.raises(FileNotFoundError, match=r"mask_image .*nowhere"):
        read_mask(tmp_path / "nowhere.png", gradient())


@pytest.mark.parametrize("size", [(20, 30), (10, 15), (7, 11), (1, 1), (20, 7), (33, 31), (96, 64), (640, 960)])
def test_a_cell_is_drawn_anew_if_any_part_of_it_is_white(size):
    """Beside a count in exact fractions, for sizes that do not divide, smaller and larger ones."""
    rng = np.random.default_rng(2)
    for white in (SQUARE, rng.random((HEIGHT, WIDTH)) < 0.02, np.eye(HEIGHT, WIDTH, dtype=bool)):
        mask = Image.fromarray(white.astype(np.uint8) * 255)
        expected = np.zeros(size, bool)
        for row, column in np.argwhere(white):
            rows = slice(row * size[0] // HEIGHT, -(-(row + 1) * size[0] // HEIGHT))
            columns = slice(column * size[1] // WIDTH, -(-(column + 1) * size[1] // WIDTH))
            expected[rows, columns] = True
        np.testing.assert_array_equal(mask_at(mask, *size), expected)
        np.testing.assert_array_equal(mask_at(mask_at(mask, HEIGHT, WIDTH), *size), expected)


# -- where a picture lies in what is sampled -----------------------------------------------------------------------


@pytest.mark.parametrize("requested", [(720, 1280), (1000, 1500), (1920, 500), (1024, 1024), (513, 511), (200, 900)])
def test_cropping_gives_a_picture_its_place_back(requested):
    """A picture at the sampled size, cropped as results are, is the picture again; stretched, it is not."""
    sampled = size_to_sample(*requested, None, 32, 32)
    rows, columns = (np.linspace(-1, 1, length) for length in requested)
    wave = np.sin(9 * rows[:, None] + 7 * columns[None, :] ** 2)[..., None].repeat(3, -1)
    picture = Image.fromarray(np.round((wave / 2 + 0.5) * 255).astype(np.uint8))
    window = kept_window(sampled, requested)
    placed = place(to_network_range(picture, *window)[0], sampled)
    assert placed.shape == (*sampled, 3)
    back = resize_and_crop(placed[None], *requested)[0]
    error = np.abs(back - wave)[8:-8, 8:-8].mean()
    stretched = resize_and_crop(to_network_range(picture, *sampled), *requested)[0]
    assert error < 0.02
    if max(abs(window[axis] - sampled[axis]) for axis in (0, 1)) > 20:
        assert np.abs(stretched - wave)[8:-8, 8:-8].mean() > 2 * error


def test_sizes_that_would_take_all_memory():
    with pytest.raises(UserError, match=r"size 1x100000: .*more than 268435456 pixels"):
        size_to_sample(1, 100_000, "nearest", 32, 32)
    with pytest.raises(UserError, match="smaller size"):
        size_to_sample(1_000_000, 1_000_000, None, 32, 32)
    assert size_to_sample(8192, 8192, None, 128, 32) == (4096, 4096)


def test_pillow_is_imported_late():
    assert "Image" not in vars(image_inputs)
