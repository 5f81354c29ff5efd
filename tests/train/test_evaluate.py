"""``python -m train.evaluate``: what is measured and recorded, for models and for folders of pictures."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.errors import UserError, run_command_line
from sana_jax.images import save_png, to_pil
from sana_jax.weights.identity import weights_id
from tests.parity.test_siglip_text import whole_siglip
from tests.train.evaluation.models import DIGITS, SEVEN, THREE, digits_run, lora_file
from train import evaluate, evaluate_digits
from train.data.digits import load_images
from train.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from train.evaluation.drawing import check_draws_from_text
from train.evaluation.features import pixel_features
from train.evaluation.text_score import TextScorer

PIXELS = ("--features", "pixels:8")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return digits_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*words, main=evaluate.main) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command_line(lambda: main([str(word) for word in words]))
    return caught.value.code


def records(path="evaluations.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def features(pictures) -> np.ndarray:
    return pixel_features(pictures, 8)


def real_pictures() -> list:
    return [to_pil(image / 2 + 0.5) for image in load_images(DIGITS)[0]]


def test_several_metrics_of_one_set_of_samples(run, capsys):
    words = ("--model", run, "--reference", "digits", *PIXELS, "--samples", 30, "--seed", 3, "--batch-size", 12)
    assert call("fid", "kid", "similarity", "diversity", "digits", *words, "--checkpoint-step", 5) == 0
    out = capsys.readouterr().out
    found = {record["metric"]: record for record in records()}
    assert list(found) == ["fid", "kid", "similarity", "diversity", "digits"]
    assert out.count("compiling the transformer") == 1  # 12, 12 and 6 pictures, filled up to 12

    pipe = SanaPipeline.from_pretrained(run, checkpoint_step=5)
    prompts, drawn = [THREE] * 15 + [SEVEN] * 15, []
    for index, first in enumerate((0, 12, 24)):
        texts = (prompts[first : first + 12] + [SEVEN] * 12)[:12]
        drawn += pipe(texts, seed=evaluate.batch_seed(3, index)).images
    samples, reference = features(drawn[:30]), features(real_pictures())
    expected = frechet_distance(fit_gaussian(samples), fit_gaussian(reference))
    assert found["fid"]["value"] == pytest.approx(expected, rel=1e-9)
    assert found["fid"]["details"]["fewer_samples_than_features"]
    kernel = kernel_distance(samples, reference, seed=3)
    assert found["kid"]["value"] == pytest.approx(kernel.mean, rel=1e-9)
    assert found["kid"]["details"]["subset_size"] == 30
    settings = {
        "model": str(run), "checkpoint_step": 5, "weights": "ema", "samples": 30, "batch_size": 12, "seed": 3,
        "steps": 2, "guidance_scale": 2.0, "dtype": "float32", "features": "pixels 8x8 RGB", "reference": "digits",
        "reference_pictures": len(reference), "sampled_size": "8x8", "device": "cpu",
        "checkpoint_id": weights_id(run / "checkpoints" / "5"),
    }  # fmt: skip
    assert settings.items() <= found["kid"].items()
    assert found["fid"]["versions"]["jax"] == jax.__version__
    assert "features" not in found["digits"]
    for part in ("fid ", "kid ", "step 5 (ema)", "30 pictures", "2 steps of FlowEuler", "guidance 2", "seed 3", "cpu"):
        assert part in out
    assert found["diversity"]["details"]["copies"] == 0


def test_digits_is_the_older_command(run, capsys):
    assert call("digits", "--model", run, "--samples", 20, "--batch-size", 20, "--seed", 1) == 0
    assert call("--model", run, "--per-caption", 10, "--json", "figures.json", main=evaluate_digits.main) == 0
    assert records()[0]["details"] == json.loads(Path("figures.json").read_text())
    assert "recognised as the digit asked for" in capsys.readouterr().out


def test_kept_pictures_and_saved_reference_measure_the_same(run, capsys):
    words = ("--model", run, "--reference", "digits", *PIXELS, "--samples", 8, "--prompts", SEVEN)
    assert call("fid", "kid", *words, "--keep", "kept", "--save-reference", "reference.npz") == 0
    assert call("fid", "kid", "--pictures", "kept", "--reference", "reference.npz", *PIXELS) == 0
    first, second = records()[:2], records()[2:]
    for one, other in zip(first, second):
        assert one["value"] == pytest.approx(other["value"], rel=1e-9)
    assert second[0]["pictures"] == "kept"
    assert second[0]["reference_pictures"] == len(real_pictures())
    assert "dtype" not in second[0]
    assert "seed" in second[1]
    with Image.open("kept/000007.png") as picture:
        assert {"prompt": SEVEN, "number": "7"}.items() <= picture.text.items()
    assert call("fid", "--pictures", "kept", "--reference", "reference.npz") == 2
    assert "'pixels 8x8 RGB'" in capsys.readouterr().err


def test_a_folder_holds_the_pictures_of_one_evaluation(run, tmp_path, capsys):
    words = ("similarity", "--model", run, "--reference", "digits", *PIXELS, "--prompts", SEVEN, "--keep", "kept")
    assert call(*words, "--samples", 4) == 0
    assert call(*words, "--samples", 2) == 0
    assert "removed 4 pictures of an earlier evaluation" in capsys.readouterr().out
    assert sorted(path.name for path in Path("kept").iterdir()) == ["000000.png", "000001.png"]
    save_png(tmp_path / "kept" / "000007.png", real_pictures()[0])  # a name alone does not make it one of these
    assert call(*words, "--samples", 2) == 2
    assert "000007.png; name a folder that is new" in capsys.readouterr().err
    assert len(list(Path("kept").iterdir())) == 3


def test_the_reference_itself(tmp_path):
    """The real digits: as far from themselves as nothing, all of them copies; beside a folder of any sizes."""
    for index, picture in enumerate(real_pictures()[:40]):
        save_png(tmp_path / "real" / f"{index % 3}" / f"{index}.png", picture)
    words = ("--pictures", "real", "--reference", "real", *PIXELS)
    assert call("fid", "similarity", "diversity", *words) == 0
    fid, similarity, diversity = records()
    assert fid["value"] == pytest.approx(0, abs=1e-9)
    assert similarity["value"] == pytest.approx(1)
    assert diversity["value"] == pytest.approx(1)
    assert diversity["details"]["copies"] == 40
    assert call("diversity", "--pictures", "real", *PIXELS) == 0
    assert records()[-1]["value"] == pytest.approx(diversity["details"]["distance"])


def test_lora_and_captions_beside_the_reference(run, tmp_path, capsys):
    for index, picture in enumerate(real_pictures()[:6]):
        save_png(tmp_path / "real" / f"{index}.png", picture)
        (tmp_path / "real" / f"{index}.txt").write_text(SEVEN if index % 2 else THREE)
    saved = tmp_path / "saved"  # without captions of its own
    SanaPipeline.from_pretrained(run).save_pretrained(saved)
    lora = f"{lora_file(tmp_path / 'style.safetensors', 1)}:0.5"
    words = ("--model", saved, "--reference", "real", *PIXELS, "--samples", 5, "--lora", lora)
    assert call("kid", *words) == 0
    assert "the first 5 of 6 captions" in capsys.readouterr().out
    assert records()[0]["lora"] == lora
    assert call("kid", *words[:-2]) == 0
    assert records()[0]["value"] != records()[1]["value"]


def test_features_of_an_image_encoder(tmp_path):
    from sana_jax.image_encoders import SiglipImageEncoder
    from sana_jax.models.siglip import SiglipVision, SiglipVisionConfig, init_params
    from sana_jax.weights import save_params
    from train.evaluation.features import load_features

    size = 16
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=size, patch_size=8
    )
    model = tmp_path / "siglip"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    (model / "preprocessor_config.json").write_text(json.dumps({"size": {"height": size, "width": size}}))
    save_params(model / "params", init_params(SiglipVision(config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    for index in range(4):
        save_png(tmp_path / "photos" / f"{index}.png", rng.random((20, 30, 3)).astype(np.float32))
    assert call("similarity", "--pictures", "photos", "--reference", "photos", "--features", f"siglip:{model}") == 0
    assert records()[0]["value"] == pytest.approx(1, abs=1e-6)
    function = load_features(f"siglip:{model}")
    assert records()[0]["features"] == function.name
    encoder = SiglipImageEncoder.from_directory(model)
    pictures = [tmp_path / "photos" / f"{index}.png" for index in range(4)]
    np.testing.assert_allclose(function([Image.open(path) for path in pictures]), encoder.encode(pictures), rtol=1e-5)


def test_score_of_pictures_with_their_texts(run, tmp_path, capsys):
    siglip = tmp_path / "siglip"
    whole_siglip(siglip)
    size = ("--height", 16, "--width", 16, "--binning", "off")
    drawn = ("score", "kid", "--model", run, "--reference", "digits", *PIXELS, "--samples", 6, *size)
    assert call(*drawn, "--scorer", siglip, "--keep", "kept") == 0
    score = records()[0]
    scorer = TextScorer.from_directory(siglip)
    pictures = [Image.open(path) for path in sorted(Path("kept").glob("*.png"))]
    expected = scorer.score(scorer.encode_pictures(pictures), [THREE] * 3 + [SEVEN] * 3)
    assert score["value"] == pytest.approx(expected.cosine.mean(), abs=1e-6)
    assert score["details"]["probability"] == pytest.approx(expected.probability.mean(), abs=1e-6)
    assert np.ptp(expected.cosine) > 1e-3
    settings = {
        "metric": "score", "samples": 6, "dtype": "float32", "scorer": str(siglip), "scorer_id": scorer.name,
        "scorer_dtype": "float32",
    }  # fmt: skip
    assert settings.items() <= score.items()
    assert "scorer" not in records()[1]
    assert f"{scorer.name} of {siglip} in float32" in capsys.readouterr().out

    # pictures that were drawn here carry their prompts; a text beside one counts before it
    assert call("score", "--pictures", "kept", "--scorer", siglip) == 0
    assert records()[2]["value"] == pytest.approx(score["value"], abs=1e-6)
    Path("kept/000000.txt").write_text(f"{SEVEN}\n")
    assert call("score", "--pictures", "kept", "--scorer", siglip) == 0
    assert records()[3]["value"] != pytest.approx(score["value"], abs=1e-6)
    save_png(tmp_path / "kept" / "000006.png", pictures[0])
    assert call("score", "--pictures", "kept", "--scorer", siglip) == 2
    assert "1 of 7 pictures have no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "RUN"), "name each once"),
        (("fid", "fid", "--model", "RUN"), "name each once"),
        (("fid",), "give either --model"),
        (("fid", "--model", "RUN", "--pictures", "x"), "give either --model"),
        (("score", "--model", "RUN"), "score needs --scorer"),
        (("score", "--model", "RUN", "--scorer", "nowhere"), "nowhere/config.json is missing"),
        (("fid", "--model", "RUN", "--reference", "digits", "--scorer", "x"), "--scorer would not be used by fid"),
        (("fid", "--model", "RUN"), "fid needs --reference"),
        (("fid", "--model", "RUN", "--reference", "nowhere"), "neither a folder"),
        (("fid", "--model", "RUN", "--reference", "x.npz"), "is not a file"),
        (("digits", "--model", "RUN", *PIXELS), "--features would not be used by digits"),
        (("digits", "--model", "RUN", "--prompts", SEVEN), "--prompts would not be used by digits"),
        (("digits", "--model", "RUN", "--samples", 3), "2 or more pictures of each of 2 prompts"),
        (("digits", "--pictures", "x"), "give --model"),
        (("fid", "--model", "RUN", "--reference", "digits", "--subsets", 3), "--subsets would not be used by fid"),
        (("fid", "--pictures", "x", "--reference", "digits", "--samples", 3), "--samples would not be used"),
        (("fid", "--pictures", "x", "--reference", "digits", "--seed", 3), "--seed would not be used"),
        (("kid", "--model", "RUN", "--reference", "digits", "--subset-size", 1), "--subset-size 1 is not allowed"),
        (("kid", "--model", "RUN", "--reference", "digits", "--features", "pixel"), "features 'pixel' are not allowed"),
        (("kid", "--model", "RUN", "--reference", "digits", "--features", "pixels:0"), "size from 1 to 256"),
        (("kid", "--model", "RUN", "--reference", "digits", "--features", "siglip"), "need a directory"),
        (("kid", "--model", "RUN", "--reference", "digits", "--seed", -1), "--seed -1 is not allowed"),
        (("kid", "--model", "RUN", "--reference", "digits", "--samples", 1), "--samples 1 is not allowed"),
        (("kid", "--model", "nowhere/at/all", "--reference", "digits"), "is not a directory"),
        (("diversity", "--model", "RUN", "--save-reference", "x.npz"), "--save-reference would not be used"),
        (("fid", "--model", "RUN", "--reference", "digits", "--save-reference", "x.npy"), "ends in .npz"),
    ],
)
def test_bad_options(run, capsys, words, message):
    assert call(*(run if word == "RUN" else word for word in words)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert message in error[-1]
    assert not Path("evaluations.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "videos", "says"),
    [
        ("SanaWMPipeline", True, "continues a picture along a camera's path"),
        ("SanaWMPipeline", False, "makes videos, and pictures are measured here"),
        ("LongSanaVideoPipeline", False, "makes videos, and pictures are measured here"),
        ("SanaControlNetPipeline", True, "follows a control picture"),
        ("LongSanaVideoPipeline", True, None),
        ("SanaSprintPipeline", False, None),
    ],
)
def test_models_that_are_not_drawn_from_texts_alone(tmp_path, name, videos, says):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        check_draws_from_text(tmp_path, videos)
