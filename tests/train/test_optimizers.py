from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.schema import OptimizerConfig
from sana_jax import UserError
from train.optimizers import (
    learning_rate_schedule,
    make_optimizer,
    path_mask,
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
