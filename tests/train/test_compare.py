"""``python -m train.compare``: the pictures, page and table that it leaves, and what happens when it is repeated."""

from __future__ import annotations

import base64
import csv
import gc
import html.parser
import io
import json
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaPipeline, SanaSprintPipeline
from sana_jax.errors import run_command_line
from sana_jax.images import save_png
from sana_jax.lora.reading import FILE_NAME
from sana_jax.weights.identity import weights_id
from tests.train.evaluation.models import SEVEN, THREE, digits_run, lora_file, save_checkpoints
from train import compare
from train.evaluation import drawing

PROMPTS = ("--prompts", SEVEN, THREE)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return digits_run(tmp_path_factory.mktemp("runs") / "digits")


def call(*words) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command_line(lambda: compare.main([str(word) for word in words]))
    return caught.value.code


def rows(output: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO((output / "comparison.csv").read_text())))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


class Links(html.parser.HTMLParser):
    """What a page shows and leads to; fails on tags that are not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images, self.links, self.cells, self.text, self.open = [], [], 0, [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        if tag == "a":
            self.links.append(attributes["href"])
        self.cells += tag == "td"
        assert tag != "script"
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("br", "img", "input"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() else []


def unfinished(output: Path) -> list[Path]:
    return [path for path in output.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory) -> tuple[Path, str]:
    """The whole table of a run, and what was printed."""
    output = tmp_path_factory.mktemp("drawn") / "out"
    capture = pytest.MonkeyPatch()
    said = io.StringIO()
    capture.setattr("sys.stdout", said)
    status = call(
        run, *PROMPTS, "--seeds", 4, 1, "--guidance-scales", 1, 2.5, "--strip", "--gif", "--sheet", "--output", output
    )
    capture.undo()
    assert status == 0
    return output, said.getvalue()


def test_every_picture_is_what_generate_draws(run, drawn):
    output, _ = drawn
    table = rows(output)
    assert len(table) == 2 * 2 * 2 * 2
    for step in (5, 10):
        pipe = SanaPipeline.from_pretrained(run, checkpoint_step=step)
        for row in (row for row in table if row["checkpoint_step"] == str(step)):
            arguments = {"seed": int(row["seed"]), "guidance_scale": float(row["guidance_scale"])}
            np.testing.assert_array_equal(pixels(output / row["file"]), pipe(row["prompt"], **arguments).images[0])
            assert row["checkpoint_id"] == weights_id(run / "checkpoints" / str(step))
    assert {row["weights"] for row in table} == {"ema"}
    assert {(row["num_inference_steps"], row["dtype"], row["sampled_size"]) for row in table} == {
        ("2", "float32", "8x8")
    }
    assert all(float(row["seconds"]) > 0 for row in table)
    assert all(row["lora"] == row["lora_scale"] == "" for row in table)


def test_metadata_and_record_of_a_picture(run, drawn):
    output, _ = drawn
    row = rows(output)[-1]
    with Image.open(output / row["file"]) as image:
        expected = {"prompt": THREE, "seed": "1", "guidance_scale": "2.5", "steps": "2", "model": str(run)}
        assert expected.items() <= image.text.items()
        assert image.text["sampler"].startswith("FlowEuler")
    record = json.loads((output / row["file"]).with_suffix(".json").read_text())
    assert record["settings"]["prompt"] == THREE
    assert record["seconds"] == float(row["seconds"])
    assert unfinished(output) == []


def test_compiled_once_for_all_checkpoints(drawn):
    _, said = drawn
    assert said.count("compiling the transformer") == 2  # with guidance and without
    assert "16 pictures; 0 are in" in said
    assert "step 5: 8 pictures in" in said


def test_the_page(run, drawn):
    output, _ = drawn
    page = Links(output / "comparison.html")
    table = rows(output)
    shown = page.images[: len(table)]
    assert page.cells >= len(table)
    for image in shown:
        assert image["src"].startswith("data:image/png;base64,")
        assert image["class"] == "pixels"
    files = {row["file"]: row for row in table}
    for image, link in zip(shown, page.links):
        embedded = base64.b64decode(image["src"].partition(",")[2])
        assert embedded == (output / link).read_bytes()
        row = files[link]
        for part in (row["prompt"], f"seed {row['seed']}", f"step {row['checkpoint_step']}"):
            assert part in image["alt"]
    assert [text for text in page.text if text in (SEVEN, THREE)] == [SEVEN, THREE]
    text = (output / "comparison.html").read_text()
    assert "http" not in text
    for part in ("viewport", "position: sticky; top: 0", "position: sticky; left: 0"):
        assert part in text
    assert all((output / link).is_file() for link in page.links)


def test_strips_gifs_and_sheet(drawn):
    output, _ = drawn
    strips = sorted((output / "strips").iterdir())
    assert [path.suffix for path in strips].count(".png") == [path.suffix for path in strips].count(".gif") == 8
    row = {(r["checkpoint_step"], r["seed"], r["guidance_scale"], r["prompt"]): r["file"] for r in rows(output)}
    first = np.repeat(np.repeat(pixels(output / row["5", "4", "1.0", SEVEN]), 16, 0), 16, 1)
    second = np.repeat(np.repeat(pixels(output / row["10", "4", "1.0", SEVEN]), 16, 0), 16, 1)
    found = [path for path in strips if path.suffix == ".png" and "seven-seed4" in path.name]
    assert any(
        np.array_equal(pixels(path)[4:132, 4:132], first) and np.array_equal(pixels(path)[4:132, 140:268], second)
        for path in found
    )
    with Image.open(next(path for path in strips if path.suffix == ".gif")) as moving:
        assert moving.n_frames == 2
        assert moving.info["duration"] == 500
    with Image.open(output / "comparison.png") as sheet:
        assert sheet.width >= 4 * 128
        assert sheet.height >= 4 * 128


def test_nothing_is_drawn_again(run, drawn, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    shutil.copytree(drawn[0], output)
    words = (run, *PROMPTS, "--seeds", 4, 1, "--guidance-scales", 1, 2.5, "--output", output)
    before = rows(output)

    def refuse(config):
        raise AssertionError("a model was opened")

    with monkeypatch.context() as patched:
        patched.setattr(drawing, "open_pipeline", refuse)
        assert call(*words) == 0
    assert rows(output) == before
    # only what is missing, damaged, or new is drawn
    (output / before[0]["file"]).unlink()
    (output / before[3]["file"]).with_suffix(".json").write_text("{torn")
    capsys.readouterr()
    assert call(*words) == 0
    assert "14 are in" in capsys.readouterr().out
    assert [{**row, "seconds": 0} for row in rows(output)] == [{**row, "seconds": 0} for row in before]
    assert call(run, *PROMPTS, "--seeds", 4, 2, "--guidance-scales", 1, 2.5, "--output", output) == 0
    assert "8 are in" in capsys.readouterr().out
    assert len(rows(output)) == 16


def test_other_weights_under_the_same_name_are_drawn_anew(tmp_path, capsys):
    run, words = tmp_path / "run", ("--prompts", SEVEN, "--output", tmp_path / "out")
    digits_run(run, steps=(5,), first_seed=0)
    assert call(run, *words) == 0
    first = rows(tmp_path / "out")
    shutil.rmtree(run / "checkpoints")
    save_checkpoints(run, (5,), first_seed=1)
    capsys.readouterr()
    assert call(run, *words) == 0
    assert "0 are in" in capsys.readouterr().out
    second = rows(tmp_path / "out")
    assert first[0]["file"] != second[0]["file"]
    assert call(run, *words, "--weights", "params", "--checkpoint-steps", 5) == 0
    assert rows(tmp_path / "out")[0]["weights"] == "params"


def test_an_interruption_keeps_what_was_drawn(run, tmp_path, monkeypatch, capsys):
    output, count = tmp_path / "out", []
    real = save_png

    def interrupt(path, *arguments, **options):
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(compare, "save_png", interrupt)
        with pytest.raises(KeyboardInterrupt, match="what was drawn is kept, the same command continues"):
            compare.main([str(word) for word in (run, *PROMPTS, "--output", output)])
    page = Links(output / "comparison.html")
    assert len(page.images) == len(rows(output)) == 2
    assert page.text.count("not drawn") == 2
    # what a command that was killed outright leaves
    (output / "pictures" / ".half.png.999999999.tmp").write_bytes(b"half")
    capsys.readouterr()
    assert call(run, *PROMPTS, "--output", output) == 0
    said = capsys.readouterr().out
    assert "2 are in" in said
    assert "removed 1 unfinished file" in said
    assert unfinished(output) == []
    assert len(rows(output)) == 4


def test_one_transformer_is_in_memory_at_a_time(run, tmp_path, monkeypatch):
    opened: list[list] = []
    real = drawing.open_pipeline

    def watch(config):
        gc.collect()
        assert all(reference() is None for references in opened for reference in references)
        pipeline = real(config)
        opened.append([weakref.ref(leaf) for leaf in jax.tree.leaves(pipeline.params)])
        return pipeline

    monkeypatch.setattr(drawing, "open_pipeline", watch)
    assert call(run, "--prompts", SEVEN, "--output", tmp_path / "out") == 0
    assert len(opened) == 2


def test_numbers_of_steps_are_columns(run, tmp_path):
    words = ("--checkpoint-steps", 10, "--prompts", SEVEN, "--num-inference-steps", 1, 3, "--output", tmp_path)
    assert call(run, *words) == 0
    pipe = SanaPipeline.from_pretrained(run)
    for row, steps in zip(rows(tmp_path), (1, 3), strict=True):
        assert row["num_inference_steps"] == str(steps)
        np.testing.assert_array_equal(pixels(tmp_path / row["file"]), pipe(SEVEN, num_inference_steps=steps).images[0])
    assert {"1 steps", "3 steps"} <= set(Links(tmp_path / "comparison.html").text)


def test_lora_files_and_their_weights(run, tmp_path, capsys):
    files = [lora_file(tmp_path / f"style{seed}.safetensors", seed) for seed in (1, 2)]
    words = ("--checkpoint-steps", "newest", "--prompts", SEVEN, "--output", tmp_path / "out")
    assert call(run, *words, "--lora", *files, "--lora-scales", 0, 0.5, 1, "--sheet") == 0
    assert capsys.readouterr().out.count("compiling the transformer") == 2  # with a LoRA and without
    table = rows(tmp_path / "out")
    expected = [("", "")] + [(str(file), scale) for file in files for scale in ("0.5", "1.0")]
    assert [(row["lora"], row["lora_scale"]) for row in table] == expected
    pipe = SanaPipeline.from_pretrained(run)
    for row in table:
        if row["lora"]:
            pipe.load_lora_weights(row["lora"], "this", weights=float(row["lora_scale"]))
        np.testing.assert_array_equal(pixels(tmp_path / "out" / row["file"]), pipe(SEVEN).images[0])
        pipe.unload_lora_weights()
    text = Links(tmp_path / "out" / "comparison.html").text
    assert "no LoRA" in text
    assert "style2.safetensors x 0.5" in text
    # another file of the same name
    lora_file(files[0], 3)
    assert call(run, *words, "--lora", files[0]) == 0
    assert "0 are in" in capsys.readouterr().out
    # a directory with a LoRA, as generate takes it and model cards write it
    drawn = [pixels(tmp_path / "out" / row["file"]) for row in table]
    lora_file(tmp_path / "lora" / FILE_NAME, 2)
    assert call(run, *words, "--lora", tmp_path / "lora") == 0
    (row,) = rows(tmp_path / "out")
    np.testing.assert_array_equal(pixels(tmp_path / "out" / row["file"]), drawn[-1])


def test_several_models_and_a_list_of_prompts(run, tmp_path):
    """Checkpoints of two runs beside a model without steps; a prompt that would be markup; the newest checkpoints."""
    other, saved = digits_run(tmp_path / "<b>other", steps=(7,), first_seed=5), tmp_path / "saved"
    SanaPipeline.from_pretrained(run).save_pretrained(saved)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"\n{SEVEN}\r\n  {THREE}  \n\n", encoding="utf-8-sig")
    words = ("--prompts-file", prompts, "--checkpoint-steps", "newest", "--output", tmp_path / "out")
    assert call(run, other, saved, *words, "--num-inference-steps", 1) == 0
    table = rows(tmp_path / "out")
    assert [(row["model"], row["checkpoint_step"], row["prompt"]) for row in table] == [
        (str(model), step, prompt)
        for model, step in ((run, "10"), (other, "7"), (saved, ""))
        for prompt in (SEVEN, THREE)
    ]
    same = [pixels(tmp_path / "out" / table[index]["file"]) for index in (0, 4)]
    np.testing.assert_array_equal(*same)
    page = tmp_path / "out" / "comparison.html"
    assert "<b>other" not in page.read_text()
    assert any("<b>other" in text for text in Links(page).text)


@pytest.mark.parametrize("kind", ["sana-1.0", pytest.param("sprint", marks=pytest.mark.prove)])
def test_published_models(kind, tmp_path, capsys):
    """Texts are encoded once, for all pictures, and are what the pipeline itself makes of them."""
    from tests.parity import pipeline_oracle

    model = tmp_path / "model"
    pipeline_oracle.save(kind, model)
    size = {"height": 64, "width": 96, "binning": "off"}
    words = [word for name, value in size.items() for word in (f"--{name}", value)]
    prompts = ("a red panda", "two birds <on> a wire")
    assert call(model, "--prompts", *prompts, *words, "--num-inference-steps", 1, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("compiling the transformer") == 1
    pipe = (SanaSprintPipeline if kind == "sprint" else SanaPipeline).from_pretrained(model)
    for row, prompt in zip(rows(tmp_path / "out"), prompts, strict=True):
        expected = pipe(prompt, num_inference_steps=1, **size).images[0]
        np.testing.assert_array_equal(pixels(tmp_path / "out" / row["file"]), np.asarray(expected))
        assert row["sampled_size"] == "64x96"
    assert call(model, "--prompts", "a", "--checkpoint-steps", 5) == 2
    assert "none of the models is a training run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no prompts given"),
        (("--prompts", ""), "is empty"),
        (("--prompts", SEVEN, SEVEN), "is given twice"),
        (("--prompts", SEVEN, "--prompts-file", "x.txt"), "only one of them"),
        (("--prompts-file", "missing.txt"), "is not a file"),
        (("--prompts", "an unknown word"), "unknown"),
        ((*PROMPTS, "--seeds", 1, 1), "seed 1 is given twice"),
        ((*PROMPTS, "--seeds", -1), "--seeds -1 is not allowed"),
        ((*PROMPTS, "--checkpoint-steps", 6), "no checkpoint of step 6"),
        ((*PROMPTS, "--checkpoint-steps", "all", 5), "--checkpoint-steps all 5 is not allowed"),
        ((*PROMPTS, "--checkpoint-steps", "last"), "--checkpoint-steps last is not allowed"),
        ((*PROMPTS, "--guidance-scales", "nan"), "finite"),
        ((*PROMPTS, "--num-inference-steps", 0), "--num-inference-steps 0 is not allowed"),
        ((*PROMPTS, "--lora-scales", 1), "--lora-scales would not be used"),
        ((*PROMPTS, "--lora", "missing.safetensors"), "there is no LoRA file missing.safetensors"),
        ((*PROMPTS, "--checkpoint-steps", 5, "--strip"), "only one is drawn"),
        ((*PROMPTS, "--milliseconds", 100), "--milliseconds would not be used"),
        ((*PROMPTS, "--gif", "--milliseconds", 15), "--milliseconds 15 is not allowed"),
        ((*PROMPTS, "--negative-prompt", "a", "--guidance-scales", 1), "--negative-prompt would not be used"),
        ((*PROMPTS, "--previews"), "--prompts would not be used with --previews"),
        ((*PROMPTS, "--variant", "fp16"), "leave variant out"),
    ],
)
def test_bad_options(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert call(run, *words) == 2
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert message in error[-1]
    assert not (tmp_path / "comparison" / "comparison.html").exists()


def test_bad_models(run, tmp_path, capsys):
    from tests.parity import pipeline_oracle

    pipeline_oracle.save("controlnet", tmp_path / "controlnet")
    shutil.copytree(run, tmp_path / "empty", ignore=shutil.ignore_patterns("5", "10"))
    (tmp_path / "file").write_text("")
    for words, message in {
        ("--prompts", "a"): "no model given",
        (tmp_path / "missing", *PROMPTS): "is not a directory here",
        (run, run, *PROMPTS): "is given twice",
        (tmp_path / "controlnet", "--prompts", "a"): "control picture",
        (tmp_path / "empty", *PROMPTS): "no checkpoint in",
        (run, *PROMPTS, "--output", tmp_path / "file"): "cannot be a directory",
    }.items():
        assert call(*words) == 2
        assert message in capsys.readouterr().err


# -- previews of the run itself ----------------------------------------------------------------------------------------


def test_previews_are_joined(tmp_path, capsys):
    run = tmp_path / "run"
    for step, value in {0: 10, 1000: 250, 200: 120}.items():
        save_png(run / "samples" / f"step_{step:06d}.png", Image.new("L", (60, 20), value))
    (run / "samples" / "other.png").write_bytes(b"")
    assert call(run, "--previews", "--output", tmp_path / "out") == 0
    assert "strip of 3 previews" in capsys.readouterr().out
    found = pixels(tmp_path / "out" / "run-previews.png")
    heights = [np.argmax((found == value).sum(axis=1) >= 60) for value in (10, 120, 250)]
    assert heights == sorted(heights)  # wide ones stand below one another, by their steps as numbers
    assert call(run, "--previews", "--gif", "--milliseconds", 200, "--output", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "run-previews.gif") as moving:
        assert (moving.n_frames, moving.info["duration"]) == (3, 200)
        assert json.loads(moving.info["comment"])["steps"] == [0, 200, 1000]
    save_png(run / "samples" / "step_002000.png", Image.new("L", (60, 30)))
    assert call(run, "--previews", "--output", tmp_path / "out") == 2
    assert "of sizes" in capsys.readouterr().err
    assert call(tmp_path, "--previews") == 2
    assert "has no step_*.png" in capsys.readouterr().err
