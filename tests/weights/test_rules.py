"""Tables: exact in both directions, and everything that does not fit is named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sana_jax.errors import CheckpointError
from sana_jax.weights import layouts
from sana_jax.weights.converted import lazy_saved_tree, load_params, save_params
from sana_jax.weights.lazy import GROUP_BYTES, LazyArray, in_groups
from sana_jax.weights.rules import (
    Rule,
    TreeSource,
    lazy_params,
    linear,
    misfits,
    norm,
    places,
    read_params,
)
from sana_jax.weights.safetensors_files import SafetensorsSource, write_safetensors
from tests.weights.written import write_params

RULES = (
    *linear("blocks/dense", "layers.{layer}.dense"),
    *linear("blocks/depth", "layers.{layer}.depth", layouts.DEPTHWISE),
    *norm("down_{block}/norm", "down.{block}.norm"),
    *linear("patch", "embed.proj", layouts.patch(2)),
    Rule("table", "table"),
)


def tree(dtype=np.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return {
        "blocks": {"dense": {"kernel": draw(3, 4, 5), "bias": draw(3, 5)}, "depth": {"kernel": draw(3, 3, 3, 4)}},
        "down_0": {"norm": {"scale": draw(4)}},
        "down_10": {"norm": {"scale": draw(4), "bias": draw(4)}},
        "patch": {"kernel": draw(2 * 2 * 3, 6), "bias": draw(6)},
        "table": draw(2, 4),
    }


def abstract(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        assert one.tobytes() == two.tobytes()


def write(path, params):
    infos, tensors = write_params(params, RULES)
    write_safetensors(path, infos, tensors)
    return SafetensorsSource(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_there_and_back(tmp_path, dtype):
    params = tree(dtype)
    source = write(tmp_path / "a.safetensors", params)
    assert source.tensors["layers.2.dense.weight"].shape == (5, 4)
    assert source.tensors["layers.0.depth.weight"].shape == (4, 1, 3, 3)
    assert source.tensors["embed.proj.weight"].shape == (6, 3, 2, 2)
    assert source.tensors["down.10.norm.bias"].shape == (4,)
    assert_same(read_params(source, RULES, abstract(params)), params)


def test_lazy_trees_through_orbax(tmp_path):
    params = tree(ml_dtypes.bfloat16)
    source = write(tmp_path / "a.safetensors", params)
    lazy = lazy_params(source, RULES, abstract(params))
    assert all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(lazy))
    save_params(tmp_path / "params", lazy)
    assert_same(jax.tree.map(np.asarray, load_params(tmp_path / "params", params)), params)
    saved = lazy_saved_tree(tmp_path / "params")
    assert_same(jax.tree.map(lambda leaf: leaf.read(), saved), params)
    back = TreeSource(saved, RULES)
    assert back.tensors == source.tensors
    names = list(back.tensors)
    for name in [*names, *reversed(names)]:  # in any order, and more than once
        assert back.read(name).tobytes() == source.read(name).tobytes()


def test_what_save_params_wrote_before_is_read_alike(tmp_path):
    """Arrays on a device, NumPy arrays and LazyArrays end as the same files."""
    params = tree()
    for name, given in {
        "numpy": params,
        "jax": jax.tree.map(jnp.asarray, params),
        "lazy": jax.tree.map(LazyArray.of, params),
    }.items():
        save_params(tmp_path / name, given)
        assert_same(jax.tree.map(np.asarray, load_params(tmp_path / name, params)), params)


def test_a_lazy_array_that_cannot_be_read_leaves_nothing(tmp_path):
    def fail():
        raise CheckpointError("the tensor x has values that are not finite")

    params = {"a": np.zeros(3, np.float32), "b": LazyArray((2,), np.dtype(np.float32), fail)}
    with pytest.raises(CheckpointError, match="not finite"):
        save_params(tmp_path / "params", params)
    assert not list(tmp_path.iterdir())


def test_everything_that_does_not_fit_is_named(tmp_path):
    params = tree()
    infos, tensors = write_params(params, RULES)
    arrays = dict(tensors)
    del arrays["layers.1.dense.weight"]
    arrays["colour"] = np.zeros(2, np.float32)
    arrays["table"] = np.zeros((4, 2), np.float32)
    arrays["embed.proj.bias"] = np.zeros(6, np.int32)
    infos = {name: type(next(iter(infos.values())))(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(tmp_path / "a.safetensors", infos, arrays.items())
    source = SafetensorsSource(tmp_path / "a.safetensors")
    found = misfits(source, places(RULES, abstract(params)))
    assert found.missing == ("layers.1.dense.weight [5, 4]",)
    assert found.unexpected == ("colour float32[2]",)
    assert found.misshapen == ("table float32[4,2], not [2, 4]", "embed.proj.bias int32[6], not floating-point numbers")
    with pytest.raises(CheckpointError, match=r"layers.1.dense.weight.*colour.*table.*embed.proj.bias"):
        read_params(source, RULES, abstract(params))
    assert not misfits(source, places(RULES, abstract(params)), ["colour"]).unexpected


def test_layers_of_two_dtypes(tmp_path):
    infos, tensors = write_params(tree(), RULES)
    arrays = dict(tensors)
    arrays["layers.1.dense.weight"] = arrays["layers.1.dense.weight"].astype(ml_dtypes.bfloat16)
    kind = type(next(iter(infos.values())))
    write_safetensors(
        tmp_path / "a.safetensors", {n: kind(a.dtype, a.shape) for n, a in arrays.items()}, arrays.items()
    )
    source = SafetensorsSource(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="blocks/dense/kernel have dtypes bfloat16, float32"):
        lazy_params(source, RULES, abstract(tree()))
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    arrays["table"] = arrays["table"].astype(np.float16)
    write_safetensors(
        tmp_path / "b.safetensors", {n: kind(a.dtype, a.shape) for n, a in arrays.items()}, arrays.items()
    )
    found = misfits(SafetensorsSource(tmp_path / "b.safetensors"), places(RULES, abstract(tree())))
    assert found.misshapen == ("table is float16 among others",)


def test_a_leaf_without_a_rule_is_a_mistake_in_the_table():
    with pytest.raises(ValueError, match="extra has 0 rules"):
        places(RULES, {"extra": np.zeros(2)})
    with pytest.raises(ValueError, match="table has 2 rules"):
        places((*RULES, Rule("table", "other")), {"table": np.zeros(2)})
    with pytest.raises(ValueError, match="both want"):
        places((Rule("a", "x"), Rule("b", "x")), {"a": np.zeros(2), "b": np.zeros(2)})


def test_absurd_depths_are_refused_before_they_take_memory():
    absurd = {"blocks": {"dense": {"kernel": jax.ShapeDtypeStruct((10**9, 4, 5), jnp.float32)}}}
    with pytest.raises(CheckpointError, match="1000000000 layers"):
        places(RULES, absurd)
    wide = {"blocks": {"dense": {"kernel": jax.ShapeDtypeStruct((2, 10**9, 10**9), jnp.float32)}}}
    assert len(places(RULES, wide)) == 2


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (layouts.LINEAR, (3, 5)),
        (layouts.POINTWISE, (3, 5)),
        (layouts.DEPTHWISE, (3, 3, 6)),
        (layouts.CONV, (3, 2, 4, 6)),
        (layouts.patch(2), (2 * 2 * 3, 5)),
        (layouts.grouped_pointwise(3), (3, 4, 5)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_layouts_are_their_own_inverse(layout, shape):
    ours = np.arange(np.prod(shape)).reshape(shape)
    theirs = layout.to_theirs(ours)
    assert theirs.shape == layout.shape_in_theirs(shape)
    assert np.array_equal(layout.to_ours(theirs), ours)


def test_groups():
    sizes = [1, GROUP_BYTES, GROUP_BYTES + 1, 5, 6, GROUP_BYTES - 11, 1]
    groups = list(in_groups(sizes, lambda size: size))
    assert groups == [[1], [GROUP_BYTES], [GROUP_BYTES + 1], [5, 6, GROUP_BYTES - 11], [1]]
    assert list(in_groups([], len)) == []
