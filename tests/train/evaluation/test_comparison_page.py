"""The page of a comparison: large pictures are made small inside it, markup in texts stays text."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from train.evaluation.comparison_page import LONGEST_SIDE, Cell, Group, Page, render, thumbnail


def save(path, width: int, height: int):
    ramp = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.stack([ramp, ramp[::-1], ramp], -1)).save(path)
    return path


def test_large_pictures_are_embedded_small(tmp_path):
    source, width, height, small = thumbnail(save(tmp_path / "large.png", 1000, 500))
    assert (width, height, small) == (LONGEST_SIDE, LONGEST_SIDE // 2, False)
    kind, _, data = source.partition(";base64,")
    assert kind == "data:image/jpeg"
    with Image.open(io.BytesIO(base64.b64decode(data))) as embedded, Image.open(tmp_path / "large.png") as original:
        assert embedded.size == (width, height)
        expected = np.asarray(original.resize((width, height), Image.Resampling.LANCZOS), int)
        assert np.abs(np.asarray(embedded, int) - expected).mean() < 5
    assert len(source) < 30_000
    path = save(tmp_path / "small.png", 40, 30)
    assert thumbnail(path) == (f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", 40, 30, True)


def test_texts_and_names_are_escaped(tmp_path):
    save(tmp_path / "pictures" / "a #1.png", 8, 8)
    save(tmp_path / "strips" / "s.png", 8, 8)
    cells = [Cell("pictures/a #1.png", 'one "quoted" & <b>'), Cell(None, "two")]
    page = Page(
        title="<script>alert(1)</script>",
        summary="1 & 2",
        settings={"sampler": "DPM<2>"},
        columns=["step 1\nguidance <2>", "step 2"],
        groups=[Group("a <i>prompt</i>", [("seed 0", cells)])],
        strips={"over <steps>": "strips/s.png"},
    )
    text = render(page, tmp_path)
    assert "<script" not in text
    assert "<i>" not in text
    for part in (
        "&lt;script&gt;",
        "step 1<br>guidance &lt;2&gt;",
        "DPM&lt;2&gt;",
        'href="pictures/a%20%231.png"',
        'alt="one &quot;quoted&quot; &amp; &lt;b&gt;"',
        '<td class="missing">not drawn</td>',
        "over &lt;steps&gt;",
    ):
        assert part in text
