"""LoRA trees: several files at once, padding, merging to the bit, fresh ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.errors import UserError
from sana_jax.lora import init_lora, lora_tree, merge_lora, scaled_lora, with_dropout
from sana_jax.weights.rules import flatten
from tests.lora.files import QUERY, WIDTH, abstract, delta, good, pair, read, tree, write

Q = ("transformer_blocks", "attn1", "to_q")
OUT = ("proj_out",)


def random_params(dtype=jnp.float32) -> dict:
    leaves, structure = jax.tree.flatten(abstract())
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, leaf.shape).astype(dtype) for k, leaf in zip(keys, leaves)]
    )


@pytest.fixture
def two(tmp_path):
    write(tmp_path / "a.safetensors", good(2) | pair("proj_out", WIDTH, 16, 3))
    write(tmp_path / "b.safetensors", good(4, seed=5) | pair(QUERY.format(1), rank=1))
    return read(tmp_path / "a.safetensors"), read(tmp_path / "b.safetensors")


def test_several_add_up(two):
    first, second = two
    both = tree((first, 0.5), (second, -2.0))
    alone = tree((first, 1.0)), tree((second, 1.0))
    assert both[(*Q, "down")].shape == (3, WIDTH, 2 + 4)
    assert both[(*Q, "up")].shape == (3, 2 + 4, WIDTH)
    assert both[(*OUT, "down")].shape == (WIDTH, 3)
    expected = 0.5 * delta(alone[0], *Q) - 2.0 * delta(alone[1], *Q)
    np.testing.assert_allclose(delta(both, *Q), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(delta(both, *OUT), 0.5 * delta(alone[0], *OUT), rtol=1e-6)
    assert delta(alone[1], *Q)[1].any()  # rank 1 among layers of rank 4


def test_dtype(two):
    assert {leaf.dtype.name for leaf in tree((two[0], 1.0), dtype=jnp.bfloat16).values()} == {"bfloat16"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merging(two, dtype):
    params = random_params(dtype)
    lora = lora_tree([(two[0], 1.0)], abstract())
    before, leaves = flatten(params), flatten(lora)
    after = flatten(merge_lora(params, lora))
    for path, leaf in before.items():
        assert after[path].dtype == dtype
        if path[:-1] not in (Q, OUT) or path[-1] != "kernel":
            assert after[path] is leaf
    wide = np.asarray(before[(*Q, "kernel")], np.float32)
    expected = (wide + delta(leaves, *Q)).astype(dtype)
    np.testing.assert_allclose(
        np.asarray(after[(*Q, "kernel")], np.float32), np.asarray(expected, np.float32), rtol=1e-2, atol=1e-5
    )
    # the block without a LoRA keeps its bits
    assert np.asarray(after[(*Q, "kernel")][1]).tobytes() == np.asarray(before[(*Q, "kernel")][1]).tobytes()
    assert not np.array_equal(after[(*OUT, "kernel")], before[(*OUT, "kernel")])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weight_zero_keeps_every_bit(two, dtype):
    params = jax.tree.map(lambda leaf: leaf.at[..., 0].set(-0.0), random_params(dtype))
    merged = merge_lora(params, lora_tree([(two[0], 0.0), (two[1], 0.0)], abstract()))
    for found, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(params)):
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_a_change_lost_in_rounding_is_said(two, capsys):
    lora = lora_tree([(two[0], 1e-9)], abstract())
    merge_lora(random_params(jnp.bfloat16), lora)
    assert "leaves 2 kernels as they were" in capsys.readouterr().out
    merge_lora(random_params(jnp.bfloat16), lora_tree([(two[0], 1.0)], abstract()))
    assert capsys.readouterr().out == ""


def test_fresh():
    lora = init_lora(abstract(), ("qkv", "proj_out"), 4, jax.random.key(1))
    leaves = flatten(lora)
    assert len(leaves) == 2 * 7
    assert leaves[(*Q, "down")].shape == (3, WIDTH, 4)
    assert leaves[(*OUT, "up")].shape == (4, 16)
    assert not any(leaf.any() for path, leaf in leaves.items() if path[-1] == "up")
    down = np.concatenate([np.ravel(leaf) for path, leaf in leaves.items() if path[-1] == "down"])
    assert down.std() == pytest.approx(1 / 4, rel=0.1)
    again = flatten(init_lora(abstract(), ("attention",), 4, jax.random.key(1)))
    np.testing.assert_array_equal(again[(*Q, "down")], leaves[(*Q, "down")])
    with pytest.raises(UserError, match="matches no layer"):
        init_lora(abstract(), ("attn3",), 4, jax.random.key(0))
    with pytest.raises(UserError, match="matches no layer"):
        init_lora(abstract(), ("transformer_blocks/ff/conv_depth",), 4, jax.random.key(0))
    with pytest.raises(UserError, match="rank 0"):
        init_lora(abstract(), ("attention",), 0, jax.random.key(0))
    with pytest.raises(UserError, match="init 'zeros'"):
        init_lora(abstract(), ("attention",), 2, jax.random.key(0), init="zeros")


def test_kaiming_init():
    leaves = flatten(init_lora(abstract(), ("all_linear",), 8, jax.random.key(1), init="kaiming"))
    for path, leaf in leaves.items():
        if path[-1] == "down":
            bound = leaf.shape[-2] ** -0.5  # of kaiming_uniform with a = sqrt(5)
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            assert leaf.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_scale_and_dropout_of_the_trained_tree():
    """What is trained has the file's values; the collection that networks take has the scale in ``up``."""
    fresh = init_lora(abstract(), ("attention",), 4, jax.random.key(1))
    trained = jax.tree.map(lambda leaf: leaf + 1.0, fresh)
    scaled = flatten(scaled_lora(trained, 0.3))
    for path, leaf in flatten(trained).items():
        np.testing.assert_array_equal(scaled[path], leaf * np.float32(0.3) if path[-1] == "up" else leaf)
    keys = jax.random.split(jax.random.key(2), 5)
    assert with_dropout(trained, 0.0, keys) is trained
    dropped = flatten(with_dropout(trained, 0.25, keys))
    assert dropped[(*Q, "dropout_keys")].shape == (3, 5)
    np.testing.assert_array_equal(dropped[(*Q, "dropout_rate")], np.full(3, 0.25, np.float32))
    drawn = [jax.random.key_data(leaf).reshape(-1, 2) for path, leaf in dropped.items() if path[-1] == "dropout_keys"]
    drawn = np.concatenate(drawn)
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 8 * 3 * 5  # no layer and no sample shares a key
    # a part of the batch draws what it draws within the whole
    part = flatten(with_dropout(trained, 0.25, keys[1::2]))[(*Q, "dropout_keys")]
    assert (part == dropped[(*Q, "dropout_keys")][:, 1::2]).all()
    with pytest.raises(UserError, match="dropout 1"):
        with_dropout(trained, 1.0, keys)
