"""Condition tokens: a start without effect, gradients that are right and move, masks, and the network's every form."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sana_jax.errors import UserError
from sana_jax.lora import init_lora
from sana_jax.models.condition_tokens import (
    SMALLEST_WEIGHT,
    WEIGHT_PER_PARAMETER,
    ConditionEncoders,
    TokenEncoderConfig,
    apply_tokens,
    draw_dropped,
    init_tokens,
    null_tokens,
    scalar_features,
)
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.models.sharding_rules import CONDITION_TOKENS
from sana_jax.pipelines.opening import abstract_params
from sana_jax.weights.rules import flatten
from train.sharding import make_mesh, parameter_shardings

CONFIG = SanaConfig(
    in_channels=3, out_channels=3, num_attention_heads=4, attention_head_dim=6, num_layers=2,
    num_cross_attention_heads=3, cross_attention_head_dim=8, cross_attention_dim=24, caption_channels=10, sample_size=8,
    qk_norm="rms_norm_across_heads",
)  # fmt: skip
BATCH, LENGTH = 3, 5
MASK = np.ones((BATCH, LENGTH), np.int32)
MASK[0, 3:] = 0
# A caption of nothing but padding is read as if it were unmasked, at -10000, which leaves its logits three decimals.
MASK_WITH_EMPTY_ROW = MASK.copy()
MASK_WITH_EMPTY_ROW[2] = 0
VECTOR = TokenEncoderConfig("vector", width=7, normalize=True, num_tokens=2, hidden=9)
SCALAR = TokenEncoderConfig("scalar", frequencies=3, inject="after", activation="gelu", null="zero")
ENCODERS = ConditionEncoders({"object": VECTOR, "zoom": SCALAR}, CONFIG.caption_channels, CONFIG.inner_dim)
# Compiling takes most of the time, and speed does not matter here.
QUICKLY = {"xla_backend_optimization_level": 0}
# Two ways of adding up the same softmax, in float32.
ROUNDING = 2e-6


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def jit(function):
    return jax.jit(function, compiler_options=QUICKLY)


def randomised(tree, seed: int):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def random_network(seed: int) -> dict:
    """Parameters with which every input reaches the output, of size 1 throughout."""
    rng, tree = np.random.default_rng(seed), {}
    for path, leaf in flatten(abstract_params(SanaTransformer(CONFIG))).items():
        draw = rng.standard_normal(leaf.shape)
        if path[-1] == "kernel":
            draw /= np.sqrt(np.prod(leaf.shape[-3 if "conv_depth" in path else -2 : -1]))
        elif path[-1] == "scale":
            draw = 1 + 0.2 * draw
        else:
            draw *= 0.4
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jnp.asarray(draw, jnp.float32)
    return tree


PARAMS = random_network(0)
CONDITIONS = {
    "object": jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, 7)), jnp.float32),
    "zoom": jnp.array([0.0, 0.3, 1.0]),
    "loss_weight": jnp.ones(BATCH),
}


def arguments() -> dict:
    rng = np.random.default_rng(2)
    return {
        "hidden_states": rng.standard_normal((BATCH, 4, 6, 3)).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((BATCH, LENGTH, 10)).astype(np.float32),
        "timestep": np.array([900.0, 30.0, 500.0], np.float32),
        "encoder_attention_mask": MASK,
    }


def plain_output(tokens, params=PARAMS, lora=None, transformer=None, **changes):
    """The network's output, for use inside a compiled function."""
    given = jax.tree.map(jnp.asarray, {**arguments(), **changes})
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    return (transformer or SanaTransformer(CONFIG)).apply(variables, **given, condition_tokens=tokens)


def output(tokens, transformer=None, **changes):
    return _compiled(transformer or SanaTransformer(CONFIG), tokens, changes)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def _compiled(transformer, tokens, changes):
    return plain_output(tokens, transformer=transformer, **changes)


def with_weight(params, weight: float):
    """The encoders' parameters with all weights w set."""
    return {
        name: {**encoder, "attention_weight": jnp.float32(weight / WEIGHT_PER_PARAMETER)}
        for name, encoder in params.items()
    }


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


FRESH = init_tokens(ENCODERS, jax.random.key(3))


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [MASK, MASK_WITH_EMPTY_ROW, None], ids=["masked", "no caption", "unmasked"])
def test_fresh_tokens_change_nothing(mask):
    base = output(None, encoder_attention_mask=mask)
    for params in (FRESH, with_weight(FRESH, -0.5)):
        fresh = output(apply_tokens(ENCODERS, params, CONDITIONS), encoder_attention_mask=mask)
        for sample in range(BATCH):
            assert relative(fresh[sample], base[sample]) <= ROUNDING
    weighed = output(apply_tokens(ENCODERS, with_weight(FRESH, 1.0), CONDITIONS), encoder_attention_mask=mask)
    for sample in range(BATCH):
        assert relative(weighed[sample], base[sample]) > 1e-3


def test_without_tokens_the_program_is_the_one_of_before():
    """No operation is added where there are no tokens, so the result keeps its bits."""
    given = jax.tree.map(jnp.asarray, arguments())

    def plain(params):
        return SanaTransformer(CONFIG).apply({"params": params}, **given)

    def without(params):
        return SanaTransformer(CONFIG).apply({"params": params}, **given, condition_tokens=None)

    assert str(jax.make_jaxpr(plain)(PARAMS)) == str(jax.make_jaxpr(without)(PARAMS))
    np.testing.assert_array_equal(jit(plain)(PARAMS), jit(without)(PARAMS))


# --- what tokens do -------------------------------------------------------------------------------------------------


def test_a_token_of_weight_1_is_a_word_of_the_caption():
    """Tokens that come in before the projection, against the same vectors as further words under a longer mask."""
    vector = ConditionEncoders({"object": VECTOR}, CONFIG.caption_channels, CONFIG.inner_dim)
    tokens = apply_tokens(vector, with_weight(randomised(init_tokens(vector, jax.random.key(0)), 5), 1.0), CONDITIONS)
    assert tokens.before.shape == (BATCH, 2, 10)
    assert tokens.after.shape == (BATCH, 0, 24)
    found = output(tokens)
    caption = np.concatenate([arguments()["encoder_hidden_states"], tokens.before], axis=1)
    longer = np.concatenate([MASK, np.ones((BATCH, 2), np.int32)], axis=1)
    expected = output(None, encoder_hidden_states=caption, encoder_attention_mask=longer)
    assert relative(found, expected) <= ROUNDING
    hidden = np.concatenate([MASK, np.zeros((BATCH, 2), np.int32)], axis=1)
    absent = {"object": jnp.zeros(BATCH, bool)}
    tokens = apply_tokens(vector, with_weight(init_tokens(vector, jax.random.key(0)), 1.0), CONDITIONS, None, absent)
    expected = output(None, encoder_hidden_states=caption, encoder_attention_mask=hidden)
    assert relative(output(tokens), expected) <= ROUNDING


def test_the_weight_multiplies():
    """A token of weight 2 counts as two equal tokens of weight 1."""
    one = ConditionEncoders({"zoom": SCALAR}, CONFIG.caption_channels, CONFIG.inner_dim)
    params = randomised(init_tokens(one, jax.random.key(0)), 6)
    single = apply_tokens(one, with_weight(params, 2.0), CONDITIONS)
    each = apply_tokens(one, with_weight(params, 1.0), CONDITIONS)
    twice = each._replace(after=jnp.repeat(each.after, 2, axis=1), log_weight=jnp.repeat(each.log_weight, 2, axis=1))
    assert relative(output(single), output(twice)) <= ROUNDING


def test_dropped_and_present_samples():
    params = with_weight(randomised(FRESH, 4), 1.0)
    dropped = {"object": jnp.array([True, False, False])}
    tokens = apply_tokens(ENCODERS, params, CONDITIONS, dropped, {"zoom": jnp.array([True, False, True])})
    plain, null = apply_tokens(ENCODERS, params, CONDITIONS), null_tokens(ENCODERS, params, BATCH)
    np.testing.assert_array_equal(tokens.before[0], null.before[0])
    np.testing.assert_array_equal(tokens.before[0], params["object"]["null"])
    np.testing.assert_array_equal(tokens.before[1:], plain.before[1:])
    np.testing.assert_array_equal(null.after, 0)
    np.testing.assert_array_equal(tokens.log_weight[1], [plain.log_weight[1, 0], plain.log_weight[1, 1], -10000])
    assert "null" not in params["zoom"]
    assert not np.array_equal(plain.after[0], plain.after[1])


def test_dropout_follows_the_caption_where_it_should():
    alone = dataclasses.replace(SCALAR, dropout=0.25, dropped_with_caption=False)
    encoders = ConditionEncoders({"object": dataclasses.replace(VECTOR, dropout=0.0), "zoom": alone}, 10, 24)
    caption = np.arange(4000) % 10 == 0
    keys = {"object": jax.random.key(1), "zoom": jax.random.key(2)}
    found = draw_dropped(encoders, keys, jnp.asarray(caption))
    np.testing.assert_array_equal(found["object"], caption)
    assert abs(np.mean(found["zoom"]) - 0.25) < 0.03
    assert abs(np.mean(np.asarray(found["zoom"])[caption]) - 0.25) < 0.08


def test_scalar_features():
    found = scalar_features(jnp.array([-2.0, 0.5, 3.0]), (-2.0, 3.0), 2)
    place = np.array([0.0, 0.5, 1.0])[:, None]
    expected = [2 * place - 1, np.sin(np.pi * place), np.sin(2 * np.pi * place), np.cos(np.pi * place),
                np.cos(2 * np.pi * place)]  # fmt: skip
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=1e-6)


# --- gradients ------------------------------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(9).standard_normal((BATCH, 4, 6, 3)).astype(np.float32)


def plain_loss(params):
    return (plain_output(apply_tokens(ENCODERS, params, CONDITIONS)) * WEIGHTS).sum()


loss, gradient = jit(plain_loss), jit(jax.grad(plain_loss))


@pytest.mark.parametrize("start", [0.0, 0.4])
def test_the_weights_gradient_is_the_difference_quotient(start):
    params = with_weight(randomised(FRESH, 4), start)
    found = gradient(params)
    for name in ("object", "zoom"):
        step = 5e-4

        def at(value, name=name):
            return float(loss({**params, name: {**params[name], "attention_weight": jnp.float32(value)}}))

        middle = float(params[name]["attention_weight"])
        lower = middle - step if start else middle
        expected = (at(middle + step) - at(lower)) / (middle + step - lower)
        assert abs(expected) > 1  # both are far from nothing, also where the weight is 0
        np.testing.assert_allclose(found[name]["attention_weight"], expected, rtol=0.05 if start == 0 else 0.01)


def test_below_0_the_weights_gradient_goes_on():
    params = randomised(FRESH, 4)
    at_zero, below = gradient(with_weight(params, 0.0)), gradient(with_weight(params, -0.3))
    for name in ("object", "zoom"):
        np.testing.assert_allclose(below[name]["attention_weight"], at_zero[name]["attention_weight"], rtol=1e-5)


def test_the_contents_gradient_is_that_of_weight_1():
    """The loss's own gradient divided by the weight, where that is below 1; and at 0 its limit."""
    params = randomised(FRESH, 4)

    def slope_and_quotient(weight, step=2e-2):
        """Along the gradient itself, the weight held: what the gradient says, and the loss's difference quotient."""
        own = {**gradient(with_weight(params, weight))["object"], "attention_weight": jnp.float32(0.0)}
        length = float(optax.tree_utils.tree_norm(own))

        def at(distance):
            moved = jax.tree.map(lambda a, b: a + distance / length * b, params["object"], own)
            return float(loss(with_weight({**params, "object": moved}, weight)))

        return length, (at(step) - at(-step)) / (2 * step)

    for weight in (2.0, 0.5, 0.02):
        slope, quotient = slope_and_quotient(weight)
        np.testing.assert_allclose(slope, quotient / min(weight, 1.0), rtol=0.02)
    slope, quotient = slope_and_quotient(0.0)
    assert quotient == pytest.approx(0, abs=1e-2)
    np.testing.assert_allclose(slope, slope_and_quotient(0.02)[0], rtol=0.1)
    assert SMALLEST_WEIGHT < 1e-10


def test_the_first_steps_move_all_of_it():
    """A base model that cannot know the number learns to follow it, from a start that is the base model."""
    encoders = ConditionEncoders({"zoom": dataclasses.replace(SCALAR, inject="before")}, 10, 24)
    target = np.asarray(output(None)) + 0.5 * (CONDITIONS["zoom"] - 0.5)[:, None, None, None]

    def error(params):
        return jnp.square(plain_output(apply_tokens(encoders, params, CONDITIONS)) - target).mean()

    params = init_tokens(encoders, jax.random.key(0))
    optimizer = optax.adam(3e-3)

    @jit
    def step(params, state):
        value, gradients = jax.value_and_grad(error)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value, gradients

    state, errors = optimizer.init(params), []
    for index in range(100):
        params, state, value, gradients = step(params, state)
        errors.append(float(value))
        if index == 0:
            sizes = {"/".join(path): float(jnp.abs(g).max()) for path, g in flatten(gradients).items()}
            assert min(sizes.values()) > 1e-6, sizes
    base = float(np.square(np.asarray(output(None)) - target).mean())
    print(f"base {base:.3e}, first {errors[0]:.3e}, last {errors[-1]:.3e}")
    assert abs(errors[0] - base) <= 2e-5 * base
    assert errors[-1] < 0.5 * base
    assert float(params["zoom"]["attention_weight"]) > 0


# --- the network's forms --------------------------------------------------------------------------------------------


def test_scanned_unrolled_rematerialised_and_with_a_lora():
    params = with_weight(randomised(FRESH, 4), 0.7)
    targets = (r"transformer_blocks/attn2/to_[kv]", r"caption_projection/linear_1")
    shapes = abstract_params(SanaTransformer(CONFIG))
    lora = randomised(init_lora(shapes, targets, 2, jax.random.key(0)), 2)

    def value_and_gradient(transformer):
        def value(params):
            tokens = apply_tokens(ENCODERS, params, CONDITIONS)
            return (plain_output(tokens, lora=lora, transformer=transformer) * WEIGHTS).sum()

        return jit(jax.value_and_grad(value))(params)

    expected, expected_gradient = value_and_gradient(SanaTransformer(CONFIG))
    assert abs(float(expected) - float(loss(params))) > 1e-2  # the LoRA acts
    for transformer in (SanaTransformer(CONFIG, scan_blocks=False), SanaTransformer(CONFIG, remat="full")):
        found, found_gradient = value_and_gradient(transformer)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        for leaf, wanted in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(expected_gradient)):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=1e-4 * float(jnp.abs(wanted).max()) + 1e-6)


def test_bfloat16():
    tokens = apply_tokens(ENCODERS, with_weight(randomised(FRESH, 4), 0.7), CONDITIONS)
    half = SanaTransformer(CONFIG, dtype=jnp.bfloat16)
    found = output(tokens, transformer=half)
    assert found.dtype == jnp.bfloat16
    assert relative(np.asarray(found, np.float32), output(tokens)) < 3 * max(
        relative(np.asarray(output(None, transformer=half), np.float32), output(None)), 0.02
    )


# --- shapes, sharding, mistakes -------------------------------------------------------------------------------------


def test_the_names_decide_the_draw_and_not_their_company():
    alone = ConditionEncoders({"zoom": SCALAR}, CONFIG.caption_channels, CONFIG.inner_dim)
    expected, found = init_tokens(alone, jax.random.key(3))["zoom"], FRESH["zoom"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_every_parameter_has_one_sharding_rule():
    from configs.schema import MeshConfig

    encoders = ConditionEncoders(
        {"object": dataclasses.replace(VECTOR, layers=3), "zoom": SCALAR}, CONFIG.caption_channels, CONFIG.inner_dim
    )
    params = {"tokens": jax.eval_shape(lambda: init_tokens(encoders, jax.random.key(0)))}
    shardings, _ = parameter_shardings(params, CONDITION_TOKENS, make_mesh(MeshConfig()))
    assert jax.tree.structure(shardings) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"kind": "vector"}, "width=None"),
        ({"kind": "scalar", "width": 3}, "does not read it"),
        ({"kind": "vector", "width": 3, "frequencies": 2}, "does not read it"),
        ({"kind": "vector", "width": 3, "value_range": (0, 1)}, "does not read it"),
        ({"kind": "scalar", "normalize": True}, "does not read it"),
        ({"kind": "scalar", "value_range": (1, 0)}, "a lower and a higher number"),
        ({"kind": "scalar", "value_range": (0, float("nan"))}, "a lower and a higher number"),
        ({"kind": "scalar", "dropout": 1.0}, "0 up to, not including, 1"),
        ({"kind": "text"}, "vector or scalar"),
        ({"kind": "scalar", "layers": 0}, "layers=0"),
        ({"kind": "scalar", "inject": "inside"}, "before or after"),
        ({"kind": "scalar", "num_tokens": 10**9}, "num_tokens"),
    ],
)
def test_bad_configurations(values, part):
    with pytest.raises(UserError, match=part):
        TokenEncoderConfig(**values)


def test_bad_conditions():
    with pytest.raises(UserError, match="condition zoom is missing"):
        apply_tokens(ENCODERS, FRESH, {"object": CONDITIONS["object"]})
    with pytest.raises(UserError, match=r"shape \(3, 6\).*\(B, 7\)"):
        apply_tokens(ENCODERS, FRESH, {**CONDITIONS, "object": CONDITIONS["object"][:, :6]})
    with pytest.raises(UserError, match=r"\(3, 1\)"):
        apply_tokens(ENCODERS, FRESH, {**CONDITIONS, "zoom": CONDITIONS["zoom"][:, None]})
    other = apply_tokens(
        ConditionEncoders({"zoom": SCALAR}, 11, 24), init_tokens(ENCODERS, jax.random.key(0)), CONDITIONS
    )
    with pytest.raises(UserError, match="another transformer"):
        output(other)
