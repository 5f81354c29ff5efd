"""``verify`` and ``inspect`` of directories of SANA-WM and its refiner: tiny ones pass, a planted fault is named."""

from __future__ import annotations

import dataclasses

import pytest

from convert.engine import import_model
from convert.inspection import inspect_model
from convert.verify import refiner_pipelines, verify_model
from sana_jax.autoencoders import blockwise
from sana_jax.errors import UserError
from sana_jax.nn import camera_attention
from tests.parity import refiner_oracle, wan_oracle, world_pipeline_oracle

WORLD_SIZE = {"height": 32, "width": 64}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    world_pipeline_oracle.save(directory)
    return directory


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    directory = tmp_path_factory.mktemp("refiner")
    refiner_oracle.save(directory)
    return directory


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(blockwise, "compile_ahead", wan_oracle.quick_compile)


def verify(source, *components, **options) -> tuple[bool, str]:
    lines: list[str] = []
    fine = verify_model(source, components=components, report=lines.append, **options)
    return fine, "\n".join(lines)


@pytest.mark.prove
def test_a_world_model(world):
    fine, said = verify(world, "transformer", **WORLD_SIZE)
    assert fine, said
    for part in ("without their rounding to bfloat16", "blocks.1.attn", "blocks.0.mlp", "final_layer.linear", "output"):
        assert part in said


@pytest.mark.prove
def test_the_pipeline_of_a_world_model(world):
    """The first of the two prompts, a moving camera, guidance; PyTorch draws no noise of its own."""
    fine, said = verify(world, "pipeline", **WORLD_SIZE, steps=2)
    assert fine, said
    for part in ("of 2 prompts the first is compared", "latents after step 2", "pixels"):
        assert part in said


@pytest.mark.prove
def test_a_fault_of_a_world_model_is_named(world, monkeypatch):
    """A camera branch with another scale, in the softmax block alone."""
    monkeypatch.setattr(camera_attention, "_camera_scale", lambda shape: 1.0)
    fine, said = verify(world, "transformer", **WORLD_SIZE)
    assert not fine
    assert "blocks.1.attn" in said.splitlines()[-1]


@pytest.mark.prove
@pytest.mark.parametrize("converted", [False, True])
def test_a_refiner(refiner, tmp_path, converted):
    """All of it; an import has left the audio half out, which PyTorch then has none of either."""
    source = refiner
    if converted:
        import_model(refiner, tmp_path / "converted", report=lambda line: None)
        source = tmp_path / "converted"
    fine, said = verify(source, *(("connectors", "transformer") if converted else ()))
    assert fine, said
    for part in ("transformer_blocks.1.attn1", "text_proj_in", "prompt"):
        assert part in said
    if not converted:
        assert "encoding" in said  # of the text encoder
        assert "latents of block 2" in said  # of the pipeline


@pytest.mark.prove
def test_the_pipeline_of_a_refiner(refiner, monkeypatch):
    """Gemma-3, connectors and the blocks with their window; a fault in the loop alone is named."""
    fine, said = verify(refiner, "pipeline")
    assert fine, said
    for part in ("of 2 prompts the first is compared", "prompt", "latents of block 1", "latents of block 2"):
        assert part in said
    with pytest.raises(UserError, match="--steps 3 would not be used: a refiner's noise levels are given"):
        verify(refiner, "pipeline", steps=3)
    run = refiner_pipelines.run_ours
    monkeypatch.setattr(
        refiner_pipelines, "run_ours", lambda case, *rest: run(dataclasses.replace(case, noise=-case.noise), *rest)
    )
    fine, said = verify(refiner, "pipeline")
    assert not fine
    assert "latents of block 1" in said.splitlines()[-1]


def test_inspect(world, refiner, tmp_path):
    """Both directories, published and converted."""
    for source, parts in (
        (world, ("SanaWMPipeline", "transformer: SANA-WM of 2 blocks, width 48", "vae: LTX-2 autoencoder")),
        (
            refiner,
            ("transformer: video half of LTX-2 of 2 blocks, width 28", "connectors: LTX-2's video connector"),
        ),
    ):
        for converted in (False, True):
            directory = tmp_path / f"{source.name}-converted" if converted else source
            if converted:
                import_model(source, directory, report=lambda line: None)
            lines: list[str] = []
            assert inspect_model(directory, report=lines.append), lines
            said = "\n".join(lines)
            for part in (*parts, "text_encoder: Gemma-", "contract: ", "everything fits"):
                assert part in said, part
            assert ("converted" if converted else "published") in lines[0]
