"""Single properties of reading pictures that a whole folder does not show."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from sana_jax.errors import UserError
from tests.train.data.damage import encoded, exif, pixels
from train.data import decoding
from train.data.decoding import BadPicture, decode_picture, read_header


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(kind, orientation):
    from PIL import features

    if kind == "AVIF" and not features.check("avif"):
        return  # Pillow was built without it
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(pixels(24, 40), kind, exif=exif(orientation), **options)
    found = decode_picture(data, name="x", channels=3)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(found, expected)
    assert read_header(io.BytesIO(data), name="x")[:2] == found.shape[:2] == ((24, 40), (40, 24))[orientation > 4]


def test_an_orientation_that_is_none():
    data = encoded(pixels(24, 40), "JPEG", exif=exif(77))
    assert decode_picture(data, name="x", channels=3).shape == (24, 40, 3)


def test_transparency_is_put_on_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 255, 51)
    rgba[1, :, :3], rgba[1, :, 3] = 100, (0, 255, 51)
    found = decode_picture(encoded(rgba, "PNG"), name="x", channels=3)[..., 0]
    assert np.array_equal(found, [[255, 0, 204], [255, 100, 224]])
    assert np.array_equal(decode_picture(encoded(rgba, "PNG"), name="x", channels=1)[..., 0], found)


def test_16_bits_are_rounded():
    values = np.asarray([[0, 128, 129, 257, 65535], [32768, 65406, 65407, 1, 300]], np.uint16)
    for kind in ("PNG", "TIFF"):
        found = decode_picture(encoded(values, kind), name="x", channels=1)[..., 0]
        assert np.array_equal(found, np.round(values / 257))


def test_a_transparent_value_of_16_bits_is_white():
    values = np.asarray([[0, 1000, 1001, 65535]] * 2, np.uint16)
    data = encoded(values, "PNG", transparency=1000)
    assert decode_picture(data, name="x", channels=3)[0, :, 0].tolist() == [0, 255, 4, 255]


def test_floats_are_of_0_to_1_or_0_to_255():
    for white in (1, 255):
        values = np.asarray([[0.0, 0.25], [0.5, 1.0]], np.float32) * white
        found = decode_picture(encoded(values, "TIFF"), name="x", channels=1)[..., 0]
        assert np.array_equal(found, [[0, 64], [128, 255]])
    with pytest.raises(BadPicture, match="holds values from 0 to 1000; allowed are 0 to 255"):
        decode_picture(encoded(np.asarray([[0.0, 1000.0]] * 2, np.float32), "TIFF"), name="x", channels=1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "x is empty"), (b"a", "x is not a picture"), (encoded(pixels(), "PNG")[:-60], "x is damaged .*truncated")],
)
def test_reasons_name_the_file(data, reason):
    with pytest.raises(BadPicture, match=reason):
        decode_picture(data, name="x", channels=3)


def test_the_limit_on_pixels(monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 48 * 64 - 1)
    with pytest.raises(BadPicture, match="has 48x64 pixels; the most that are read are 3071"):
        decode_picture(encoded(pixels(), "PNG"), name="x", channels=3)


def test_channels():
    with pytest.raises(UserError, match="channels 4 is not allowed"):
        decode_picture(encoded(pixels(), "PNG"), name="x", channels=4)


def test_a_header_is_read_without_the_pixels():
    data = encoded(np.random.default_rng(0).integers(0, 255, (500, 700, 3), np.uint8), "PNG")
    assert read_header(io.BytesIO(data[:200]), name="x")[:2] == (500, 700)
