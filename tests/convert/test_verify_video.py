"""``verify`` of the video pipelines: tiny ones pass, and a planted fault is named."""

from __future__ import annotations

import pytest

from convert.verify import verify_model
from sana_jax.autoencoders import blockwise
from sana_jax.diffusion.flow import shift_sigma
from sana_jax.errors import UserError
from tests.parity import video_pipeline_oracle, wan_oracle

SIZE = {"height": 32, "width": 64}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """kind -> a tiny random model as diffusers saves it."""
    made = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            video_pipeline_oracle.save(kind, made[kind])
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(blockwise, "compile_ahead", wan_oracle.quick_compile)


def verify(source, *components, **options) -> tuple[bool, str]:
    lines: list[str] = []
    fine = verify_model(source, components=components, report=lines.append, **SIZE, **options)
    return fine, "\n".join(lines)


@pytest.mark.parametrize("kind", ["video", pytest.param("image-to-video", marks=pytest.mark.prove)])
def test_pipelines_pass(published, kind):
    fine, said = verify(published(kind), "pipeline", steps=2)
    assert fine, said
    assert "latents after step 2" in said
    assert "pixels" in said


def test_a_fault_of_the_pipeline_is_named(published, monkeypatch):
    """Noise levels of another shift."""
    monkeypatch.setattr(
        "sana_jax.diffusion.samplers.dpm_solver.shift_sigma", lambda sigma, shift: shift_sigma(sigma, 7)
    )
    fine, said = verify(published("video"), "pipeline", steps=2)
    assert not fine
    assert "latents after step 1" in said.splitlines()[-1]


def test_sizes(published):
    with pytest.raises(UserError, match="--height 48; allowed is a multiple of 32"):
        verify_model(published("video"), components=("pipeline",), height=48, width=64, report=lambda _: None)
