"""One tiny model for all tests of pipelines."""

from __future__ import annotations

import pytest

from sana_jax.pipelines.text_to_image import SanaPipeline
from tests.pipelines.tiny_model import Run, random_params, tiny_config, write_run


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
