"""LTX-2's video half by itself: its forms agree, the prefix is a ring of frames, what does not fit is refused."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.errors import UserError
from sana_jax.lora import init_lora
from sana_jax.models import ltx2, ltx2_connectors
from sana_jax.models.ltx2 import LTX2VideoTransformer
from sana_jax.models.ltx2_config import LTX2Config
from sana_jax.models.ltx2_connectors import LTX2Connectors, LTX2ConnectorsConfig
from sana_jax.models.ltx2_prefix import LTX2Prefix, append_history, init_prefix, prefix_mask
from sana_jax.models.sharding_rules import LTX2, LTX2_CONNECTORS, lora_rules
from sana_jax.nn.ltx2_layers import KeysValues
from sana_jax.nn.ltx2_rope import video_rotation
from train.sharding import parameter_paths

CONFIG = LTX2Config.ltx2(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    num_layers=2,
    caption_channels=6,
    gated_attn=True,
)
BATCH, FRAMES, SIZE = 2, 3, (2, 3)
GRID = (FRAMES, *SIZE)
TOKENS, PER_FRAME = 18, 6


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def drawn_params(init_params, network) -> dict:
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: init_params(network, jax.random.key(0))))
    return jax.tree.unflatten(structure, [0.3 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


@functools.cache
def params() -> dict:
    return drawn_params(ltx2.init_params, LTX2VideoTransformer(CONFIG))


LATENTS, PROMPT = normal(BATCH, *GRID, 4), normal(BATCH, 5, 6, seed=1)
TIMES = jnp.asarray([[900.0, 0.0, 31.5], [3.0, 500.0, 1000.0]])


@functools.partial(jax.jit, static_argnames="capture")
def apply(params, latents, times, mask, capture=None, **arrays):
    model = LTX2VideoTransformer(CONFIG)
    return model.apply({"params": params}, latents, PROMPT, times, mask, capture=capture, **arrays)


def run(latents=LATENTS, times=TIMES, mask=None, first_frame=0, **arrays):
    rotation = CONFIG.rotation(latents.shape[1:4], fps=16, first_frame=first_frame)
    return apply(params(), latents, times, mask, rotation=rotation, **arrays)


def drawn_prefix() -> LTX2Prefix:
    heads = (CONFIG.num_attention_heads, CONFIG.attention_head_dim)
    pairs = [
        KeysValues(*(normal(CONFIG.num_layers, BATCH, tokens, *heads, seed=seed + i) for i in range(2)))
        for seed, tokens in ((20, PER_FRAME), (30, 2 * PER_FRAME))
    ]
    return append_history(init_prefix(pairs[0], 1, 4), pairs[1])


def close(found, expected, tolerance=2e-6):
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(theirs)) <= tolerance


def test_scanned_is_unrolled():
    """Values, keys and values, and all blocks' outputs, with a prefix. Rematerialised: tests/parity."""
    arrays = {"prefix": drawn_prefix(), "sink_rotation": CONFIG.rotation((1, *SIZE), fps=16, first_frame=1)}
    arrays |= {"rotation": CONFIG.rotation(GRID, fps=16, first_frame=4)}

    def results(model):
        apply = functools.partial(model.apply, capture="unrotated", mutable=["intermediates"])
        return jax.jit(apply)({"params": params()}, LATENTS, PROMPT, TIMES, **arrays)

    scanned = results(LTX2VideoTransformer(CONFIG))
    close(results(LTX2VideoTransformer(CONFIG, scan_blocks=False)), scanned)
    (_, captured), sown = scanned
    assert captured.key.shape == captured.value.shape == (2, BATCH, TOKENS, 2, 8)
    assert sown["intermediates"]["block_outputs"][0].shape == (2, BATCH, TOKENS, 16)


def test_times_of_samples_frames_and_tokens():
    by_frame = run()
    close(run(times=jnp.repeat(TIMES, PER_FRAME, axis=1)), by_frame)
    close(run(times=TIMES[:, 0]), run(times=jnp.broadcast_to(TIMES[:, :1], TIMES.shape)))
    assert float(jnp.abs(by_frame - run(times=TIMES[:, ::-1])).max()) > 1e-2


def test_frames_that_fill_up_are_not_seen():
    expected = run(LATENTS[:, :2], TIMES[:, :2], first_frame=5)
    seen = jnp.asarray([[True, True, False]] * BATCH)
    for filling in (0.0, 1e4):
        latents = LATENTS.at[:, 2].set(filling)
        close(run(latents, first_frame=5, frame_valid_mask=seen)[:, :2], expected)


def test_prompt_mask():
    mask = jnp.asarray([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = run(mask=mask)
    close(found[1], run()[1])  # all padding: as if unmasked
    assert float(jnp.abs(found[0] - run()[0]).max()) > 1e-3


def test_without_history_the_prefix_is_the_sink():
    """What is not filled yet has no influence, whatever stands there."""
    prefix = drawn_prefix()
    arrays = {"sink_rotation": CONFIG.rotation((1, *SIZE), fps=16), "first_frame": 1}
    empty = prefix._replace(appended=jnp.zeros((), jnp.int32))
    found = run(prefix=empty, **arrays)
    close(run(prefix=init_prefix(prefix.sink, 1, 4), **arrays), found)
    assert float(jnp.abs(found - run(first_frame=1)).max()) > 1e-3  # the sink is seen
    assert float(jnp.abs(found - run(prefix=prefix, **arrays)).max()) > 1e-3  # and the history


@pytest.mark.parametrize(("capacity", "blocks"), [(4, (3, 3, 2, 3)), (2, (3, 1, 3)), (10, (3, 3)), (1, (1, 2))])
def test_the_history_is_a_ring_of_the_last_frames(capacity, blocks):
    sink = KeysValues(*(jnp.zeros((1, 1, PER_FRAME, 1, 2)) for _ in range(2)))
    append = jax.jit(append_history)
    prefix, all_frames = init_prefix(sink, 1, capacity), []
    for count in blocks:
        numbers = len(all_frames) + np.arange(3) + 1.0
        all_frames += list(numbers[:count])
        numbers[count:] = -1.0  # fills the block up
        tokens = jnp.asarray(np.repeat(numbers, PER_FRAME))[None, None, :, None, None] * jnp.ones((1, 1, 1, 1, 2))
        prefix = append(prefix, KeysValues(tokens, -tokens), count)
        held = np.asarray(prefix.history.key)[0, 0, :, :, 0, 0]
        filled = np.asarray(prefix_mask(prefix))[PER_FRAME:].reshape(capacity, PER_FRAME)
        assert (
            int(prefix.history_frames) == min(len(all_frames), capacity) == filled.all(1).sum() == filled.any(1).sum()
        )
        assert sorted(held[filled[:, 0], 0]) == all_frames[-capacity:]
        assert (held == held[:, :1]).all()
        np.testing.assert_array_equal(prefix.history.value, -prefix.history.key)


def test_connectors_unrolled():
    config = LTX2ConnectorsConfig.ltx2(
        caption_channels=8,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_learnable_registers=4,
    )
    states, mask = normal(2, 8, 8, 3), jnp.arange(8) >= jnp.asarray([[3], [0]])
    weights = drawn_params(ltx2_connectors.init_params, LTX2Connectors(config))
    results = [
        jax.jit(LTX2Connectors(config, scan_blocks=scan_blocks).apply)({"params": weights}, states, mask)[0]
        for scan_blocks in (True, False)
    ]
    close(*results)
    with pytest.raises(UserError, match="6 tokens, padding included, is not a multiple of the connectors' 4"):
        jax.eval_shape(LTX2Connectors(config).apply, {"params": weights}, states[:, :6], mask[:, :6])
    with pytest.raises(UserError, match=r"allowed are \(texts, tokens, 8, 3\)"):
        jax.eval_shape(LTX2Connectors(config).apply, {"params": weights}, states[..., :2], mask)


@pytest.mark.parametrize(
    ("rules", "make", "count"),
    [
        (LTX2, lambda: ltx2.init_params(LTX2VideoTransformer(LTX2Config.ltx2()), jax.random.key(0)), 13_041_520_768),
        (
            LTX2_CONNECTORS,
            lambda: ltx2_connectors.init_params(LTX2Connectors(LTX2ConnectorsConfig.ltx2()), jax.random.key(0)),
            1_077_004_800,
        ),
    ],
    ids=["transformer", "connectors"],
)
def test_every_parameter_has_one_sharding_rule(rules, make, count):
    shapes = jax.eval_shape(make)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    for path, leaf in parameter_paths(shapes).items():
        matches = [axes for pattern, axes in rules if re.fullmatch(pattern, path)]
        assert len(matches) == 1, path
        assert len(matches[0]) == leaf.ndim, path
        cut = [axis for axis in matches[0] if axis]
        assert len(cut) == len(set(cut)), path
        assert all(axis is None or length % 8 == 0 for length, axis in zip(leaf.shape, matches[0])), path
        assert cut or leaf.size <= 48 * 6 * 4096, path
    lora = {"lora": jax.eval_shape(lambda: init_lora(shapes, ["all_linear"], 4, jax.random.key(0)))}
    for path in parameter_paths(lora):
        assert sum(bool(re.fullmatch(pattern, path)) for pattern, _ in lora_rules(rules)) == 1, path


def test_configurations_come_back():
    for config in (CONFIG, LTX2Config(), LTX2ConnectorsConfig.ltx2(audio_connector_num_learnable_registers=None)):
        assert type(config).from_dict(config.to_dict()) == config
    assert LTX2Config.from_dict({"norm_eps": 1, "causal_offset": 0} | {"norm_eps": 1e-5}).causal_offset == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attn_mod": True}, "that is LTX-2.3"),
        ({"use_prompt_embeddings": False}, "LTX-2.3 has no projection"),
        ({"patch_size": 2}, "every latent is a token"),
        ({"rope_double_precision": False}, "powers in float64"),
        ({"rope_type": "half"}, "choose split or interleaved"),
        ({"vae_scale_factors": [8, 32]}, "three whole numbers"),
        ({"causal_offset": 2}, "allowed are 0 and 1"),
        ({"cross_attention_dim": 2048}, "= 4096; set it to that"),
        ({"attention_head_dim": 127, "cross_attention_dim": 32 * 127}, "an even head size"),
        ({"num_layers": 0}, "a whole number from 1"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LTX2Config.from_dict(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_modality_projections": True}, "that is LTX-2.3"),
        ({"caption_channels": 3000}, "30 heads of 128 must make up that width"),
        ({"rope_type": "half"}, "choose split or interleaved"),
    ],
)
def test_connectors_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LTX2ConnectorsConfig.from_dict(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": TIMES[:, :2]}, r"one per latent frame \(2, 3\) or one per token \(2, 18\)"),
        ({"latents": LATENTS[..., :3]}, "latents have 3 channels and this network takes 4"),
        ({"frame_valid_mask": jnp.ones((BATCH, 2), bool)}, r"allowed is \(2, 3\)"),
        ({"capture": "both"}, "choose None or one of unrotated, rotated"),
        ({"prefix": drawn_prefix}, "belong together"),
        (
            {"prefix": drawn_prefix, "sink_rotation": CONFIG.rotation((2, *SIZE), fps=16)},
            r"this block has \(2, 2, 12, 2, 8\)",
        ),
    ],
)
def test_calls_that_are_refused(changes, message):
    changes = {name: value() if callable(value) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        run(**changes)


def test_rotations_that_are_refused():
    arguments = {"grid": (2, 2, 2), "features": 16, "fps": 16}
    for changes, message in (
        ({"first_frame": -1}, "first_frame=-1"),
        ({"fps": 0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"grid": (0, 2, 2)}, "is empty"),
    ):
        with pytest.raises(UserError, match=message):
            video_rotation(**{**arguments, **changes})
    for changed, message in (
        (video_rotation((3, 2, 3), 32, fps=16), "5 frequencies"),
        (CONFIG.rotation((2, 2, 3), fps=16), "make it so"),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(
                LTX2VideoTransformer(CONFIG).apply, {"params": params()}, LATENTS, PROMPT, TIMES, rotation=changed
            )
