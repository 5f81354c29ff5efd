"""Random mutations of a whole model directory, opened as a pipeline opens it: an error in words, or a pipeline."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.errors import UserError
from tests.convert import test_untrusted as mutations

SECONDS = 60
CHUNKS, PER_CHUNK = 4, 30
QUICK_CHUNKS = 2  # in make test; the others are in make prove
OTHER_CONFIGS = (
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
)
OTHER_WEIGHTS = ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


@pytest.fixture(scope="module")
def good(published, tmp_path_factory) -> Path:
    """A tiny SANA whose transformer is in two shards, as the mutations expect."""
    from diffusers import SanaTransformer2DModel

    directory = tmp_path_factory.mktemp("good") / "model"
    shutil.copytree(published("sana-1.0"), directory)
    transformer = SanaTransformer2DModel.from_pretrained(directory / "transformer")
    shutil.rmtree(directory / "transformer")
    transformer.save_pretrained(directory / "transformer", max_shard_size="200KB")
    assert (directory / mutations.WEIGHTS).is_file()
    return directory


def mutate_other(source: Path, rng: np.random.Generator, trap: Path) -> None:
    """A field or the bytes of a file of the text encoder, the tokenizer or the autoencoder."""
    if rng.integers(3) == 0:
        path = source / rng.choice(OTHER_WEIGHTS)
        content = bytearray(path.read_bytes())
        if rng.integers(2):
            content = content[: rng.integers(len(content))]
        else:
            content[rng.integers(2000)] = rng.integers(256)
        path.write_bytes(content)
        return
    path = source / rng.choice(OTHER_CONFIGS)
    content = json.loads(path.read_text())
    name = rng.choice(list(content))
    value = mutations.ODD_VALUES[rng.integers(len(mutations.ODD_VALUES))]
    if rng.integers(3) == 0:
        del content[name]
    else:
        content[name] = value
    path.write_text(json.dumps(content))


def open_all(source: Path) -> str | None:
    """Opens the model and reads every network's weights: the error in words, or None."""
    signal.signal(signal.SIGALRM, mutations.time_out)
    signal.alarm(SECONDS)
    try:
        pipeline = SanaPipeline.from_pretrained(source)
        for weights in pipeline.networks.values():
            jax.block_until_ready(weights.params)
    except (UserError, FileNotFoundError) as error:
        return str(error)
    finally:
        signal.alarm(0)
    return None


@pytest.mark.parametrize(
    "chunk", [pytest.param(chunk, marks=pytest.mark.prove if chunk >= QUICK_CHUNKS else ()) for chunk in range(CHUNKS)]
)
def test_every_mutation_ends_in_words(chunk, good, tmp_path, capsys):
    refused = 0
    for number in range(PER_CHUNK):
        rng = np.random.default_rng([chunk, number, 1])
        source, trap = tmp_path / str(number), tmp_path / f"executed {number}"
        shutil.copytree(good, source)
        kinds = (mutate_other, *mutations.DIRECTORY)
        mutate = mutate_other if number % 2 else kinds[(chunk * PER_CHUNK + number) // 2 % len(kinds)]
        mutate(source, rng, trap)
        try:
            problem = open_all(source)
        except Exception as error:
            raise AssertionError(f"{mutate.__name__} {chunk}/{number}: {type(error).__name__}: {error}") from error
        assert problem is None or problem.strip()
        refused += problem is not None
        assert not trap.exists(), f"{mutate.__name__} {chunk}/{number} was executed"
        shutil.rmtree(source)
    assert refused > PER_CHUNK / 3
    capsys.readouterr()


def test_the_good_one_opens(good, capsys):
    assert open_all(good) is None
    capsys.readouterr()
