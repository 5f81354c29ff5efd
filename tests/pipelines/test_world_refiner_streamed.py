"""SANA-WM's refiner with LTX-2's blocks in host memory: the same numbers, and two blocks on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.engine import import_model
from sana_jax import SanaWMRefiner
from sana_jax.diffusion.samplers.world_refiner import RefinerSampler
from sana_jax.errors import UserError
from sana_jax.models.ltx2 import LTX2VideoTransformer, init_params
from sana_jax.models.ltx2_config import LTX2Config
from sana_jax.pipelines import world_refiner_opening
from sana_jax.pipelines.residency import describe_plan
from sana_jax.pipelines.world_refiner_streamed import BLOCKS
from sana_jax.weights import streamed
from sana_jax.weights.streamed import StreamedResident
from sana_jax.weights.trees import abstract_tree, tree_bytes
from tests.parity import refiner_oracle
from tests.pipelines.tiny_refiner import draw_latents, draw_prompt, tiny_refiner

LAYERS, FRAMES = 5, 6
OPTIONS = {"block_size": 2, "kv_max_frames": 3, "sigmas": (0.9, 0.4, 0.0), "say": lambda line: None}


def streaming(refiner: SanaWMRefiner) -> SanaWMRefiner:
    weights = StreamedResident.from_params("transformer", refiner.transformer_weights.params, BLOCKS)
    return SanaWMRefiner(refiner.transformer, weights, refiner.connectors, refiner.connectors_weights)


@pytest.fixture(scope="module")
def pair() -> tuple[SanaWMRefiner, SanaWMRefiner]:
    """Scanned and streamed, of one set of weights, in bfloat16."""
    scanned = tiny_refiner(layers=LAYERS)
    return scanned, streaming(scanned)


def test_the_numbers_of_the_scanned_form(pair):
    """Two videos; three blocks, of which the last is short and the window slides."""
    scanned, streamed = pair
    latents = draw_latents(FRAMES, batch=2)
    expected = scanned(latents, prompt_embeds=draw_prompt(), **OPTIONS)
    found = streamed(latents, prompt_embeds=draw_prompt(), **OPTIONS)
    np.testing.assert_array_equal(found.frames, expected.frames)
    assert found.block_count == expected.block_count == 3
    assert found.compile_seconds > 0
    programs = len(streamed.programs)
    assert streamed(draw_latents(FRAMES + 2, batch=2), prompt_embeds=draw_prompt(), **OPTIONS).compile_seconds == 0
    assert len(streamed.programs) == programs


def test_the_state_of_the_scanned_form(pair):
    sampler, video = RefinerSampler((0.9, 0.4, 0.0), 2, 1, 3), np.moveaxis(draw_latents(5, batch=2), 1, -1)
    prompt = np.repeat(draw_prompt(), 2, axis=0)
    states = []
    for refiner in pair:
        state = refiner.start(video[:, :1], prompt, sampler, 16.0)
        states.append([jax.tree.map(np.asarray, state)])
        for block in range(2):
            state = refiner.read(video[:, 1 + 2 * block : 3 + 2 * block], block, prompt, state, sampler, 16.0)
            states[-1].append(jax.tree.map(np.asarray, state))
    scanned, found = states
    assert [int(state.appended) for state in found] == [0, 2, 4]
    assert np.abs(found[2].history.key.astype(np.float32)).min(axis=(2, 3, 4, 5)).min() > 0
    jax.tree.map(np.testing.assert_array_equal, found, scanned)


def test_two_blocks_on_the_device(pair, monkeypatch):
    """At every copy, the arrays of device memory that have a block's shapes are those of two blocks at most."""
    refiner, (block, *_) = pair[1], pair[1].transformer_weights.params.blocks
    shapes = {leaf.shape for leaf in jax.tree.leaves(block) if leaf.size > 200}
    assert len(shapes) > 2
    per_block = sum(leaf.shape in shapes for leaf in jax.tree.leaves(block))
    before, there = [id(array) for array in jax.live_arrays()], []
    put = streamed._put

    def counted(tree):
        made = put(tree)
        live = [array for array in jax.live_arrays() if id(array) not in before and array.shape in shapes]
        there.append(sum(array.sharding.memory_kind == "device" for array in live))
        return made

    monkeypatch.setattr(streamed, "_put", counted)
    sampler = RefinerSampler((0.9, 0.4, 0.0), 2, 1, 3)
    video, prompt = np.moveaxis(draw_latents(3, batch=2), 1, -1), np.repeat(draw_prompt(), 2, axis=0)
    state = refiner.start(video[:, :1], prompt, sampler, 16.0)
    refiner.refine(video[:, 1:], np.zeros_like(video[:, 1:]), 0, prompt, state, sampler, 16.0)
    assert len(there) == 3 * LAYERS
    assert max(there) == 2 * per_block
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(block)} == {"pinned_host"}


def test_what_the_plan_and_a_run_say(pair):
    scanned, found = pair
    params = scanned.transformer_weights.params
    blocks, whole = tree_bytes(params[BLOCKS]), tree_bytes(params)
    weights = found.transformer_weights
    assert weights.num_bytes == whole - blocks + 2 * blocks // LAYERS
    assert (weights.host_bytes, weights.block_count) == (blocks, LAYERS)
    lines = describe_plan("one_at_a_time", found.networks)
    assert any(line.startswith("connect: text connectors") for line in lines)
    assert any("transformer" in line and "in host memory" in line for line in lines)
    # what is not a block's own is freed between calls, and the blocks stay
    kept = weights.params.blocks
    weights.free()
    assert not weights.loaded
    assert weights.params.blocks is kept
    assert weights.loaded
    # the program's and, beside its own block, another one and what is outside the blocks
    latents = draw_latents(3, batch=2)
    held = [refiner(latents, prompt_embeds=draw_prompt(), **OPTIONS).device_bytes for refiner in pair]
    assert held[1] > weights.bytes_beside_a_block
    assert held[1] < held[0]


def test_full_size():
    transformer = LTX2VideoTransformer(LTX2Config.ltx2())
    shapes = jax.eval_shape(lambda: init_params(transformer, jax.random.key(0)))
    weights = StreamedResident("transformer", abstract_tree(shapes, jnp.bfloat16), BLOCKS, dict)
    assert weights.block_count == 48
    assert weights.num_bytes + weights.host_bytes * 46 // 48 == 2 * 13_041_520_768
    assert 1.3e9 < weights.num_bytes < 1.45e9


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("refiner")
    refiner_oracle.save(directory)
    return directory


@pytest.mark.parametrize("converted", [False, True])
def test_from_a_directory(published, tmp_path, converted):
    directory = tmp_path / "converted" if converted else published
    if converted:
        import_model(published, directory)
    plain = SanaWMRefiner.from_pretrained(directory)
    found = SanaWMRefiner.from_pretrained(directory, stream_blocks=True, dtype="float32")
    weights = found.transformer_weights
    assert not weights.loaded
    params, expected = weights.params, dict(plain.transformer_weights.params)
    stacks = expected.pop(BLOCKS)
    jax.tree.map(np.testing.assert_array_equal, params.outside, expected)
    for layer, block in enumerate(params.blocks):
        jax.tree.map(lambda own, stack, layer=layer: np.testing.assert_array_equal(own, stack[layer]), block, stacks)
    half = SanaWMRefiner.from_pretrained(directory, stream_blocks=True, dtype="bfloat16").transformer_weights
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    assert half.num_bytes == weights.num_bytes // 2


@pytest.mark.parametrize("converted", [False, True])
def test_a_budget_that_streams_the_blocks_opens_the_directory_once(published, tmp_path, monkeypatch, converted):
    directory = tmp_path / "converted" if converted else published
    if converted:
        import_model(published, directory)
    opened, open_component = [], world_refiner_opening.open_component
    monkeypatch.setattr(
        world_refiner_opening, "open_component", lambda *a, **k: opened.append(a[0].name) or open_component(*a, **k)
    )
    fitted = {"stream_blocks": True, "quantization": {}}
    monkeypatch.setattr(world_refiner_opening, "refiner_choices", lambda *a, **k: fitted)
    found = SanaWMRefiner.from_pretrained(directory, memory="24g")
    assert opened == ["transformer", "connectors"]
    assert found.residency == "one_at_a_time"
    expected = SanaWMRefiner.from_pretrained(directory, stream_blocks=True)
    jax.tree.map(np.testing.assert_array_equal, found.transformer_weights.params, expected.transformer_weights.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residency": "all", "memory": "24g"}, "residency 'all' and memory '24g': memory chooses one_at_a_time"),
        ({"held_bytes": 1}, "would not be used without memory"),
        ({"frame_size": (64, 64)}, "would not be used without memory"),
        ({"memory": "lots"}, "allowed are 24g, 16g, 12g"),
    ],
)
def test_arguments_of_a_budget_are_looked_at_before_a_directory(options, message):
    with pytest.raises(UserError, match=message):
        SanaWMRefiner.from_pretrained("nowhere/at/all", **options)
