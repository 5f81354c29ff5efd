from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.optimizer import READS, OptimizerConfig, check_optimizer, setting
from sana_jax import UserError
from train.optimizers import (
    learning_rate_schedule,
    make_optimizer,
    path_mask,
    peak_learning_rates,
    stop_frozen,
    updates_taken,
    warmup_steps,
)


def rates(steps: int, **settings) -> list[float]:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0 / 16, **settings), steps)
    return [16 * float(schedule(step)) for step in range(steps + 1)]


def test_constant_schedule():
    assert rates(4) == [1, 1, 1, 1, 1]


def test_warm_up_starts_above_zero_and_reaches_the_peak_without_a_jump():
    assert rates(6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1], abs=1e-7)
    assert rates(3, warmup_steps=1) == pytest.approx([1, 1, 1, 1], abs=1e-7)


def test_linear_schedule_ends_at_the_final_rate():
    assert rates(4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-7)
    values = rates(6, schedule="linear", warmup_steps=2, final_learning_rate=0.5 / 16)
    assert values == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5], abs=1e-6)


def test_cosine_schedule_against_its_formula():
    values = rates(14, schedule="cosine", warmup_steps=4, final_learning_rate=0.25 / 16)
    fall = [0.25 + 0.75 * (1 + np.cos(np.pi * step / 10)) / 2 for step in range(11)]
    assert values == pytest.approx([0.25, 0.5, 0.75, 1, *fall], abs=1e-6)


def test_a_warm_up_longer_than_the_run_is_a_tenth_of_it():
    config = OptimizerConfig(warmup_steps=50)
    assert [warmup_steps(config, steps) for steps in (51, 50, 30, 1)] == [50, 5, 3, 0]
    rates_of_short_run = [float(learning_rate_schedule(config, 20)(step)) for step in range(3)]
    assert rates_of_short_run == pytest.approx([0.5e-4, 1e-4, 1e-4])


# -- masks ---------------------------------------------------------------------------------------------------------


def params() -> dict:
    random = np.random.default_rng(0)
    return {
        "attention": {"kernel": random.standard_normal((4, 3), np.float32), "bias": np.ones(3, np.float32)},
        "head": {"kernel": random.standard_normal((3, 2), np.float32), "bias": np.ones(2, np.float32)},
        "scale_shift_table": random.standard_normal((2, 3), np.float32),
    }


def gradients(step: int) -> dict:
    random = np.random.default_rng(100 + step)
    return jax.tree.map(lambda leaf: 3 * random.standard_normal(leaf.shape, np.float32), params())


def updated(config: OptimizerConfig, steps: int = 3):
    tree = jax.tree.map(jnp.asarray, params())
    optimizer = make_optimizer(config, 100, tree)
    state = optimizer.init(tree)
    for step in range(steps):
        updates, state = optimizer.update(gradients(step), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


def test_patterns_match_whole_paths():
    mask = path_mask(params(), (r".*/bias", "head/.*"), "optimizer.frozen")
    assert mask == {
        "attention": {"kernel": False, "bias": True},
        "head": {"kernel": True, "bias": True},
        "scale_shift_table": False,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"frozen": ("attention",)}, "--optimizer.frozen 'attention' matches no parameter"),
        ({"frozen": ("(",)}, "--optimizer.frozen '\\(' is not a regular expression"),
        ({"frozen": (".*",)}, "leaves nothing to train"),
        ({"no_decay": ("nothing",)}, "--optimizer.no-decay 'nothing' matches no parameter"),
    ],
)
def test_patterns_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**config), 100, params())


def test_default_patterns_may_be_absent():
    make_optimizer(OptimizerConfig(), 100, {"kernel": np.ones(3, np.float32)})


def test_weight_decay_spares_what_no_decay_names():
    rate, decay = 1e-2, 0.1
    with_decay, _ = updated(OptimizerConfig(learning_rate=rate, weight_decay=decay), steps=1)
    without, _ = updated(OptimizerConfig(learning_rate=rate), steps=1)
    difference = jax.tree.map(lambda a, b: np.asarray(a - b), with_decay, without)
    for name in ("attention", "head"):
        np.testing.assert_allclose(difference[name]["kernel"], -rate * decay * params()[name]["kernel"], atol=3e-7)
        assert not difference[name]["bias"].any()
    assert not difference["scale_shift_table"].any()


def test_frozen_parameters_stay_and_have_no_state():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, frozen=("attention/.*",))
    tree, state = updated(config)
    for name, value in params()["attention"].items():
        assert np.array_equal(tree["attention"][name], value)
    assert not np.array_equal(tree["head"]["kernel"], params()["head"]["kernel"])
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert shapes == {(), (3, 2), (2,), (2, 3)}

    # what is trained moves as if the frozen parameters were not there: clipping and decay see the others alone
    rest = {name: value for name, value in params().items() if name != "attention"}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.1), 100, rest)
    alone, alone_state = jax.tree.map(jnp.asarray, rest), optimizer.init(rest)
    for step in range(3):
        grads = {name: value for name, value in gradients(step).items() if name != "attention"}
        updates, alone_state = optimizer.update(grads, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
    del tree["attention"]
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, alone))
    assert int(updates_taken(state)) == int(updates_taken(alone_state)) == 3


def test_stop_frozen_gives_no_gradient():
    def loss(tree):
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(stop_frozen(tree, ("attention/.*",))))

    grads = jax.grad(loss)(params())
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["attention"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["head"]))


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_adamw_against_pytorch(clip_norm):
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(
        learning_rate=3e-3, weight_decay=0.05, beta1=0.8, beta2=0.95, epsilon=1e-8, clip_norm=clip_norm, warmup_steps=3
    )
    steps = 8
    tree, state = updated(config, steps)

    tensors = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in flat(params()).items()}
    kernels = [tensor for name, tensor in tensors.items() if "kernel" in name]
    others = [tensor for name, tensor in tensors.items() if "kernel" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.8, 0.95),
        eps=1e-8,
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    for step in range(steps):
        for name, grad in flat(gradients(step)).items():
            tensors[name].grad = torch.tensor(grad)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        optimizer.step()
        warm_up.step()

    adam = optax.tree_utils.tree_get(state, "mu"), optax.tree_utils.tree_get(state, "nu")
    for name, tensor in tensors.items():
        # clip_grad_norm_ divides by norm + 1e-6 where optax divides by the norm: gradients of norm ~10 differ by 1e-7
        memory = optimizer.state[tensor]
        for port, reference in (
            (flat(tree)[name], tensor.detach()),
            (flat(adam[0])[name], memory["exp_avg"]),
            (flat(adam[1])[name], memory["exp_avg_sq"]),
        ):
            np.testing.assert_allclose(port, reference.numpy(), rtol=2e-6, atol=2e-7, err_msg=name)


def flat(tree) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


# -- own learning rates, and what alone is trained -----------------------------------------------------------------


def test_a_learning_rate_of_its_own_has_the_same_shape_of_schedule():
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2, "clip_norm": 1.0}
    plain, _ = updated(OptimizerConfig(**settings))
    grouped, state = updated(OptimizerConfig(**settings, learning_rates=("attention/.*=1e-3", "head/bias=0.05")))
    assert np.array_equal(plain["head"]["kernel"], grouped["head"]["kernel"])
    assert np.array_equal(plain["scale_shift_table"], grouped["scale_shift_table"])
    for settings_of_all, place in (({**settings, "learning_rate": 1e-3}, ("attention", "kernel")),):
        alone, _ = updated(OptimizerConfig(**settings_of_all))
        np.testing.assert_allclose(alone[place[0]][place[1]], grouped[place[0]][place[1]], rtol=1e-6, atol=1e-7)
    moved = grouped["head"]["bias"] - 1, plain["head"]["bias"] - 1
    np.testing.assert_allclose(moved[0], 5 * moved[1], rtol=1e-4)
    assert int(updates_taken(state)) == 3


def test_a_learning_rate_of_its_own_beside_frozen_parameters():
    config = OptimizerConfig(learning_rate=1e-2, frozen=("attention/.*",), learning_rates=("head/kernel=1e-3",))
    tree, _ = updated(config, steps=1)
    assert np.array_equal(tree["attention"]["kernel"], params()["attention"]["kernel"])
    np.testing.assert_allclose(np.abs(tree["head"]["kernel"] - params()["head"]["kernel"]), 1e-3, rtol=1e-3)
    np.testing.assert_allclose(np.abs(tree["head"]["bias"] - 1), 1e-2, rtol=1e-3)
    assert peak_learning_rates(config, params()) == {
        "head/kernel": 1e-3,
        "head/bias": 1e-2,
        "scale_shift_table": 1e-2,
    }


def test_only_what_is_named_is_trained():
    config = OptimizerConfig(learning_rate=1e-2, trained=("head/.*",))
    tree, state = updated(config)
    others, other_state = updated(OptimizerConfig(learning_rate=1e-2, frozen=("attention/.*", "scale_shift_table")))
    assert jax.tree.all(jax.tree.map(np.array_equal, (tree, state), (others, other_state)))
    stopped = jax.grad(lambda tree: jnp.square(stop_frozen(tree, (), ("head/.*",))["attention"]["kernel"]).sum())
    assert not stopped(params())["attention"]["kernel"].any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning_rates": ("attention=1e-3",)}, "--optimizer.learning-rates 'attention' matches no trained param"),
        ({"learning_rates": ("(=1e-3",)}, r"--optimizer.learning-rates '\(' is not a regular expression"),
        (
            {"learning_rates": ("head/.*=1e-3", ".*/kernel=1e-2")},
            "'head/.*' and '.*/kernel' both match head/kernel; a parameter has one learning rate",
        ),
        ({"learning_rates": ("head/.*=1e-3",), "frozen": ("head/.*",)}, "'head/.*' matches no trained parameter"),
        ({"trained": ("tail/.*",)}, "--optimizer.trained 'tail/.*' matches no parameter"),
        ({"trained": ("head/.*",), "frozen": ("head/bias",)}, "say the opposite"),
    ],
)
def test_groups_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**config), 100, params())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning_rates": ("head/.*",)}, "--optimizer.learning-rates 'head/.*' is not PATTERN=VALUE"),
        ({"learning_rates": ("head/.*=fast",)}, "'head/.*=fast' is not PATTERN=VALUE"),
        ({"learning_rates": ("head/.*=0",)}, "above 0 and below 1"),
        ({"learning_rates": ("head/.*=nan",)}, "above 0 and below 1"),
        ({"learning_rates": ("=1e-3",)}, "'=1e-3' is not PATTERN=VALUE"),
        ({"learning_rates": ("a=1e-3", "a=1e-4")}, "names the pattern 'a' twice; keep one"),
        ({"trained": ("a",), "frozen": ("b",)}, "--optimizer.trained a is not allowed; allowed is none together with"),
        ({"beta3": 0.9}, r"--optimizer.beta3 0.9 .* does not read it \(came, came_8bit, prodigy do\)"),
        ({"came_clip_threshold": 2.0}, "--optimizer.came-clip-threshold 2.0 .* its default, 1.0, with .*name adamw"),
        ({"name": "lion", "epsilon": 1e-8}, "--optimizer.epsilon 1e-08 .* with --optimizer.name lion"),
        ({"name": "came", "block_size": 64}, r"--optimizer.block-size 64 .*\(adamw_8bit, came_8bit do\)"),
        ({"muon_steps": 6}, r"--optimizer.muon-steps 6 .*\(muon does\)"),
        ({"name": "came", "beta3": 1.0}, "--optimizer.beta3 1.0"),
        ({"name": "came", "came_epsilon_gradient": 0.0}, "--optimizer.came-epsilon-gradient 0.0"),
        ({"name": "adamw_8bit", "block_size": 8}, "--optimizer.block-size 8"),
        ({"name": "came_8bit", "min_8bit_size": 0}, "--optimizer.min-8bit-size 0"),
        ({"name": "muon", "muon_momentum": 1.0}, "--optimizer.muon-momentum 1.0"),
        ({"name": "muon", "muon_steps": 0}, "--optimizer.muon-steps 0"),
        ({"name": "prodigy"}, "--optimizer.learning-rate 0.0001 .* 0.01 to 10 with --optimizer.name prodigy"),
        ({"name": "prodigy", "learning_rate": 1.0, "learning_rates": ("a=0.1",)}, "one rate for all"),
        ({"name": "schedule_free_adamw", "schedule": "cosine"}, "--optimizer.schedule cosine .* constant with"),
        ({"name": "schedule_free_adamw", "beta1": 0.0}, "--optimizer.beta1 0.0"),
    ],
)
def test_settings_that_are_not_allowed(config, message):
    with pytest.raises(UserError, match=message):
        check_optimizer(OptimizerConfig(**config))


def test_defaults_of_each_optimizer():
    def defaults(name, *fields):
        return tuple(setting(OptimizerConfig(name=name), field) for field in fields)

    assert defaults("adamw", "beta1", "beta2", "epsilon") == (0.9, 0.999, 1e-10)
    assert defaults("came", "beta1", "beta2", "beta3") == (0.9, 0.999, 0.9999)
    assert defaults("came_8bit", "block_size", "min_8bit_size") == (2048, 16384)
    assert defaults("adamw_8bit", "block_size", "min_8bit_size", "epsilon") == (256, 4096, 1e-10)
    assert defaults("lion", "beta1", "beta2") == (0.9, 0.99)
    assert defaults("prodigy", "beta3", "epsilon") == (None, 1e-8)
    assert setting(OptimizerConfig(name="came", beta3=0.5), "beta3") == 0.5
    for name in READS:
        check_optimizer(OptimizerConfig(name=name, learning_rate=0.1))
