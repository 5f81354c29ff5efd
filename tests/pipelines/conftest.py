"""Tiny models for all tests of pipelines: a training run, and published directories of every kind."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from sana_jax import SanaControlNetPipeline, SanaSprintPipeline
from sana_jax.pipelines.text_to_image import SanaPipeline
from tests.pipelines.tiny_model import Run, random_params, tiny_config, write_run

CLASSES = {"sprint": SanaSprintPipeline, "sprint-img2img": SanaSprintPipeline, "controlnet": SanaControlNetPipeline}


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """A gray model of 8 x 8 pixels with raw and averaged weights."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    config = tiny_config()
    params, ema = random_params(config, 1), random_params(config, 2)
    write_run(directory, params, ema, config)
    return Run(directory, config, params, ema)


@pytest.fixture(scope="session")
def pipe(run) -> SanaPipeline:
    return SanaPipeline.from_pretrained(run.directory)


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[[str], pathlib.Path]:
    """kind -> a tiny random model as diffusers saves it, 32 pixels per latent; do not change it."""
    from tests.parity import pipeline_oracle

    made: dict[str, pathlib.Path] = {}

    def get(kind: str) -> pathlib.Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            pipeline_oracle.save(kind, made[kind])
        return made[kind]

    return get


@pytest.fixture(scope="session")
def opened(published) -> Callable[[str], Any]:
    """kind -> its pipeline with every network kept, so that its compiled programs serve all tests."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = CLASSES.get(kind, SanaPipeline).from_pretrained(published(kind), residency="all")
        return made[kind]

    return get


@pytest.fixture(scope="module")
def quick_programs():
    """Programs are compiled without LLVM's optimiser, which is most of the time that compiling takes."""
    from sana_jax import compilation
    from sana_jax.autoencoders import blockwise
    from tests.parity.wan_oracle import quick_compile

    with pytest.MonkeyPatch.context() as patched:
        for module in (compilation, blockwise):
            patched.setattr(module, "compile_ahead", quick_compile)
        yield


@pytest.fixture(scope="session")
def world_model(tmp_path_factory) -> pathlib.Path:
    """A tiny random world model as diffusers saves it; do not change it."""
    from tests.parity import world_pipeline_oracle

    directory = tmp_path_factory.mktemp("world")
    world_pipeline_oracle.save(directory)
    return directory


@pytest.fixture(scope="session")
def video_model(tmp_path_factory) -> pathlib.Path:
    """A tiny random video model as diffusers saves it; do not change it."""
    from tests.parity import video_pipeline_oracle

    directory = tmp_path_factory.mktemp("video")
    video_pipeline_oracle.save("video", directory)
    return directory
