"""``python -m sana_jax.benchmark`` and ``python -m train.benchmark`` at tiny sizes, in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import train.benchmark
from sana_jax import benchmark
from sana_jax.benchmarking import command, growth
from sana_jax.benchmarking.plot import draw_growth
from sana_jax.benchmarking.sides import OURS, Setting
from sana_jax.errors import UserError


def run(main, tmp_path, *words: str) -> dict:
    assert main([*words, "--repetitions", "2", "--output", str(tmp_path / "out")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


def by_stage(report: dict, implementation: str = OURS) -> dict[str, dict]:
    return {row["what"]: row for row in report["rows"] if row.get("implementation") == implementation}


def check_times(rows: dict[str, dict]) -> None:
    for row in rows.values():
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"], row


def test_a_picture_stage_by_stage(tmp_path, capsys):
    report = run(benchmark.main, tmp_path, "--cases", "sana", "--steps", "3")
    stages = by_stage(report)
    assert list(stages) == ["text", "denoise", "decode", "total"]
    check_times(stages)
    assert stages["denoise"]["figures"]["s/step"] == pytest.approx(stages["denoise"]["median_s"] / 3)
    assert stages["denoise"]["shape"] == "1 picture, 3 steps"
    assert 0 < stages["denoise"]["roofline_share"] < 1
    table = (tmp_path / "out.md").read_text()
    assert "CPU figures" in table
    assert report["device"] in table
    capsys.readouterr()
    assert benchmark.main(["--compare", *[str(tmp_path / "out.json")] * 2]) == 0
    assert "over 4 rows: 1.00" in capsys.readouterr().out


@pytest.mark.prove
@pytest.mark.parametrize(
    ("case", "stage", "figure"),
    [
        ("sprint", "denoise", "s/step"),
        ("video", "total", "reckoned for 50 steps, without text, s"),
        ("longsana", "later block", "frames/s"),
        ("world", "later chunk", "times real time"),
        ("network", "forward", "first run, compiling included, s"),
        ("video_network", "forward", "first run, compiling included, s"),
    ],
)
def test_other_cases(tmp_path, case, stage, figure):
    stages = by_stage(run(benchmark.main, tmp_path, "--cases", case))
    check_times(stages)
    assert stages[stage]["figures"][figure] > 0


def test_growth_is_fitted_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(growth.TOKENS, "tiny", (256, 512))
    report = run(benchmark.main, tmp_path, "--cases", "growth_time", "growth_memory")
    last = {row["case"]: row["figures"] for row in report["rows"]}
    assert set(last) == {"growth of time: linear attention", "growth of memory: softmax attention"}
    assert all(np.isfinite(figures["exponent"]) and figures["exponent allowed"] == 1.05 for figures in last.values())
    with Image.open(tmp_path / "out.growth.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 10


def test_exponents_and_plots_of_known_laws():
    sizes = [1000, 2000, 4000, 16000]
    assert growth.exponent(sizes, [3.0 * size for size in sizes]) == pytest.approx(1)
    assert growth.exponent(sizes, [0.1 * size**2 for size in sizes]) == pytest.approx(2)
    draw_growth({"square": (sizes, [0.1 * size**2 for size in sizes])}, "growth")
    with pytest.raises(ValueError, match="above 0"):
        draw_growth({"none": ([1.0], [0.0])}, "growth")


def test_softmax_memory_is_linear():
    """Of full-width heads at lengths where blocks are a small part; all scores at once grow by the square."""
    setting = Setting("full", "bfloat16", 1)
    *_, last = growth.memory_case(setting)
    assert last["figures"]["exponent"] <= growth.LIMIT
    assert last["temporary_MB"] < 0.2 * last["figures"]["all scores, MB"]


def test_beside_diffusers(tmp_path):
    report = run(benchmark.main, tmp_path, "--cases", "decode", "--against", "diffusers", "--torch-threads", "1")
    ours, theirs = by_stage(report)["forward"], by_stage(report, "diffusers eager")["forward"]
    check_times({"ours": ours, "theirs": theirs})
    assert ours["figures"]["diffusers eager / ours"] == pytest.approx(theirs["median_s"] / ours["median_s"])


@pytest.mark.prove
@pytest.mark.parametrize("case", ["sana", "sprint", "network", "video_network", "video", "image_video"])
def test_other_cases_beside_diffusers(tmp_path, case):
    report = run(benchmark.main, tmp_path, "--cases", case, "--against", "diffusers", "--torch-threads", "1")
    ours = by_stage(report)
    assert list(ours) == list(by_stage(report, "diffusers eager"))
    if "total" in ours:  # tiny pipelines are faster
        assert ours["total"]["figures"]["diffusers eager / ours"] > 1


@pytest.mark.parametrize("against", [(), pytest.param(("--against", "diffusers"), marks=pytest.mark.prove)])
def test_a_training_step(tmp_path, monkeypatch, against):
    monkeypatch.setitem(command._PEAK_SIZES, "cpu", (128, 1 << 16))
    report = run(train.benchmark.main, tmp_path, "--cases", "tiny", "--batch-size", "4", *against)
    for side in (OURS, "diffusers eager") if against else (OURS,):
        row = by_stage(report, side)["step"]
        assert row["figures"]["images/s"] == pytest.approx(4 / row["median_s"])
        assert row["figures"]["MFU"] > 0
    case = train.benchmark.CASES["tiny"]
    # attention's products beside those with weights, which every token meets twice for each parameter
    weights = 2 * case.batch_size * case.tokens * case.config.num_layers * 6 * case.config.inner_dim**2
    assert train.benchmark.forward_flops(case) > weights


def test_what_the_time_does_not_allow_is_named(tmp_path):
    report = run(benchmark.main, tmp_path, "--cases", "growth_time", "decode", "--seconds", "1e-9")
    assert [row["note"].split(":")[0] for row in report["rows"]] == ["left out", "left out"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cases", "flux"], "choose from sana, sprint"),
        (["--repetitions", "0"], "choose 1 or more"),
        (["--steps", "0"], "choose 1 or more"),
        (["--torch-threads", "2"], "--against diffusers"),
        (["--across-devices"], "--compare"),
        (["--compare", "/nowhere/a.json", "/nowhere/b.json"], "is not a file"),
        (["--compare", "a.json", "b.json", "--cases", "sana", "--steps=3"], "--cases, --steps would not .* --compare"),
        (["--compare", "a.json", "b.json", "--output", "c"], "--output would not be used with --compare"),
    ],
)
def test_mistakes(words, told):
    with pytest.raises(UserError, match=told):
        benchmark.main(words)


def test_training_has_one_size():
    with pytest.raises(UserError, match="--cases tiny"):
        train.benchmark.main(["--size", "full"])
    with pytest.raises(UserError, match="--batch-size would not be used with --compare"):
        train.benchmark.main(["--compare", "a.json", "b.json", "--batch-size", "4"])


def test_without_torch_the_other_side_is_refused(monkeypatch):
    from sana_jax.benchmarking import other_side

    monkeypatch.setattr(other_side.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torch, diffusers, transformers not installed"):
        benchmark.main(["--against", "diffusers"])


def test_a_failure_of_the_other_side_is_told():
    from sana_jax.benchmarking.other_side import OtherSide

    with pytest.raises(UserError, match="KeyError: 'flux'"):
        OtherSide({"kind": "flux"})
