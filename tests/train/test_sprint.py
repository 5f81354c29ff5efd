"""Sprint training on a tiny random teacher: both kinds of step, their draws and start, the one-pass derivative."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import EmaConfig, OptimizerConfig
from configs.sprint import SprintConfig
from kernels import selection
from sana_jax.errors import UserError
from sana_jax.models.sana import QK_NORM, SanaConfig, SanaTransformer, init_params
from tests.kernels.cuda_lowering import lower_for_cuda, triton_kernels
from tests.train.tiny_run import QUICKLY, tiny_config
from train.batch import Batch
from train.objectives import scm
from train.objectives.discriminator import CONVOLUTIONS, head_logits, init_heads, init_vectors, power_iteration
from train.objectives.sprint import Sprint, init_trained
from train.phases import part
from train.sprint_step import averaged, check_batch_of_heads, make_sprint_optimizers, make_sprint_steps
from train.state import TrainState

TEACHER = SanaConfig(
    in_channels=3,
    out_channels=3,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=12,
    mlp_ratio=2.0,
    qk_norm=QK_NORM,
    timestep_scale=0.001,
)
SPRINT = SprintConfig(head_blocks=(0, 2), virtual_batch=2, tangent_warmup_steps=4, guidance_scales=(1.5, 2.0))
ROWS = 8


def jitted(function):
    return jax.jit(function, compiler_options=QUICKLY)


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other))


def sprint_of(config: SprintConfig = SPRINT, remat: str = "none") -> Sprint:
    student = SanaTransformer(dataclasses.replace(TEACHER, guidance_embeds=True), remat=remat)
    null = jnp.linspace(-1, 1, 5 * 12).reshape(1, 5, 12)
    return Sprint(student, SanaTransformer(TEACHER), config, null, jnp.asarray([[1, 1, 0, 0, 0]], jnp.int32))


def random_like(tree, seed: int):
    """Every parameter random: nothing that starts at zero stays there."""
    leaves, structure = jax.tree.flatten(tree)
    generator = np.random.default_rng(seed)
    return structure.unflatten(
        [jnp.asarray(leaf + 0.1 * generator.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    )


def fresh_student(sprint: Sprint, teacher):
    return jitted(lambda teacher: init_trained(sprint, jax.random.key(3), teacher))(teacher)


@pytest.fixture(scope="module")
def sprint() -> Sprint:
    return sprint_of()


@pytest.fixture(scope="module")
def teacher():
    return random_like(jitted(lambda: init_params(SanaTransformer(TEACHER), jax.random.key(0)))(), 1)


@pytest.fixture(scope="module")
def trained(sprint, teacher):
    fresh = fresh_student(sprint, teacher)
    return {**random_like({k: v for k, v in fresh.items() if k != "vectors"}, 2), "vectors": fresh["vectors"]}


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = np.random.default_rng(5)
    mask = (np.arange(5) < generator.integers(1, 6, (ROWS, 1))).astype(np.int32)
    latents, captions = generator.standard_normal((ROWS, 3, 5, 3)), generator.standard_normal((ROWS, 5, 12))
    return Batch(jnp.asarray(latents, jnp.float32), jnp.asarray(captions, jnp.float32), jnp.asarray(mask))


def run_config(**changes):
    optimizer = OptimizerConfig(learning_rate=1e-3, weight_decay=0.01)
    small = {"steps": 20, "batch_size": ROWS, "optimizer": optimizer, "ema": EmaConfig(decay=0.9)}
    return tiny_config(**{**small, **changes})


@pytest.fixture(scope="module")
def config():
    return run_config()


def start(sprint, trained, config) -> TrainState:
    optimizers = make_sprint_optimizers(config, sprint.config, trained)
    ema = jax.tree.map(jnp.copy, averaged(trained))
    return TrainState(jnp.zeros((), jnp.int32), trained, ema, optimizers.init(trained))


@pytest.fixture(scope="module")
def steps(sprint, trained, config):
    optimizers = make_sprint_optimizers(config, sprint.config, trained)
    return [jitted(step) for step in make_sprint_steps(sprint, optimizers, config)]


@pytest.fixture(scope="module")
def state(sprint, trained, config) -> TrainState:
    return start(sprint, trained, config)


# -- the derivative --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_derivative_is_a_jvp_and_only_the_value_is_differentiated(trained, batch, remat):
    sprint = sprint_of(remat=remat)
    params, rows = trained["transformer"], 2
    latents = batch.latents[:rows]
    primals = latents, jnp.asarray([0.4, 1.2])
    tangents = jnp.flip(latents, 0), jnp.asarray([0.3, -0.2])
    constants = (batch.prompt_embeds[:rows], batch.prompt_attention_mask[:rows]), jnp.asarray([0.4, 0.5])

    def student(params, at, constants):
        return scm.network_velocity(sprint.student, params, *at, *constants, 1.0)

    def at_once(params):
        value, tangent = scm.value_and_tangent(student, params, primals, tangents, constants)
        return jnp.sum(value * latents) + 7.0 * jnp.sum(tangent), (value, tangent)

    def apart(params):
        value, tangent = jax.jvp(lambda at: student(params, at, constants), (primals,), (tangents,))
        return jnp.sum(value * latents), (value, tangent)

    with jax.default_matmul_precision("highest"):
        (gradient, ours), (expected, theirs) = jitted(
            lambda params: [jax.grad(function, has_aux=True)(params) for function in (at_once, apart)]
        )(params)
    for one, other in zip(ours, theirs):
        assert float(jnp.abs(one - other).max()) <= 1e-5 * float(jnp.abs(other).max())
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected)):
        assert float(jnp.abs(one - other).max()) <= 1e-5 * float(jnp.abs(other).max()) + 1e-7, path


def test_the_derivative_takes_no_kernel_where_the_table_picks_them(monkeypatch, trained, teacher, batch):
    """As on a GPU with a row for every fused form: the student lowers without any, other steps take them."""
    table = tuple(
        selection.Measurement(op, "pallas", "cuda", "H100", {}, "2026-01-01", "", 0.5, "by hand")
        for op, implementations in selection.operations().items()
        if "pallas" in implementations
    )
    monkeypatch.setattr(selection, "measurements", lambda: table)
    sprint, rows = sprint_of(remat="full"), 2
    latents, angle, guidance = batch.latents[:rows], jnp.asarray([0.4, 1.2]), jnp.asarray([0.4, 0.5])
    captions = batch.prompt_embeds[:rows], batch.prompt_attention_mask[:rows]

    def student(params, at, constants):
        return scm.network_velocity(sprint.student, params, *at, *constants, 1.0)

    def consistency(params):
        tangents = jnp.flip(latents, 0), angle
        value, tangent = scm.value_and_tangent(student, params, (latents, angle), tangents, (captions, guidance))
        return jnp.sum(value * latents) + jnp.sum(tangent)

    def plain(params):
        return jnp.sum(student(params, (latents, angle), (captions, guidance)))

    def naive(params):
        return jax.jvp(lambda at: student(params, at, (captions, guidance)), ((latents, angle),), ((latents, angle),))

    params = trained["transformer"]
    assert triton_kernels(lower_for_cuda(jax.grad(plain), params)) >= 10
    assert triton_kernels(lower_for_cuda(jax.grad(consistency), params)) == 0
    with pytest.raises(ValueError, match="has no forward-mode derivative"):
        lower_for_cuda(naive, params)


def test_warmup_ratio():
    assert [float(scm.warmup_ratio(step, 4)) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert float(scm.warmup_ratio(0, 0)) == 1.0


# -- the heads -------------------------------------------------------------------------------------------------------


def test_singular_vectors_find_the_largest_singular_value():
    heads = init_heads(jax.random.key(0), 2, 6)
    vectors = jitted(lambda heads: power_iteration(heads, init_vectors(jax.random.key(1), heads), 500))(heads)
    for name in CONVOLUTIONS:
        for head, kernel in enumerate(np.asarray(heads[name]["kernel"], np.float64)):
            matrix = kernel.reshape(-1, kernel.shape[-1])
            left, right = (np.asarray(vectors[name][side][head]).reshape(-1) for side in ("left", "right"))
            largest = np.linalg.svd(matrix, compute_uv=False)[0]
            assert right @ matrix @ left == pytest.approx(largest, rel=1e-4)


def test_samples_of_a_virtual_batch_alone_see_each_other():
    heads = random_like(init_heads(jax.random.key(0), 2, 6), 1)
    vectors = init_vectors(jax.random.key(1), heads)
    features = jax.random.normal(jax.random.key(2), (2, 6, 7, 6))
    logits_of = jitted(lambda features: head_logits(heads, vectors, features, 2))
    logits = logits_of(features)
    assert logits.shape == (6, 14)
    moved = logits_of(features.at[:, 3].add(1.0))
    changed = np.abs(np.asarray(moved - logits)).max(1) > 1e-6
    assert changed.tolist() == [False, False, True, True, False, False]
    # the row of tokens is a ring
    rolled = logits_of(jnp.roll(features, 3, axis=2)).reshape(6, 2, 7)
    np.testing.assert_allclose(rolled, np.roll(logits.reshape(6, 2, 7), 3, axis=2), atol=1e-5)


# -- the start -------------------------------------------------------------------------------------------------------


def test_the_student_begins_as_the_teacher(sprint, teacher, batch):
    fresh = fresh_student(sprint, teacher)
    assert set(fresh) == {"transformer", "logvar", "heads", "vectors"}
    captions = batch.prompt_embeds, batch.prompt_attention_mask
    angle, guidance = jnp.linspace(0.2, 1.5, ROWS), jnp.full(ROWS, 0.45)

    def velocities(student, teacher):
        own = scm.network_velocity(sprint.student, student, batch.latents, angle, captions, guidance, 1.0)
        return own, scm.network_velocity(sprint.teacher, teacher, batch.latents, angle, captions, None, 1.0)

    own, theirs = jitted(velocities)(fresh["transformer"], teacher)
    np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-6)
    alone = sprint_of(dataclasses.replace(SPRINT, adversarial_weight=0.0))
    abstract = jax.eval_shape(lambda: init_trained(alone, jax.random.key(3), teacher))
    assert set(abstract) == {"transformer", "logvar"}


# -- randomness ------------------------------------------------------------------------------------------------------


def test_draws(sprint, batch):
    many = Batch(jnp.zeros((4000, 1, 1, 1)), jnp.zeros((4000, 1, 1)), jnp.ones((4000, 1), jnp.int32))
    draws = jitted(lambda: sprint.draw_generator(0, 6, many))()
    again = jitted(lambda step: sprint.draw_generator(0, step, many))(6)
    assert all(np.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(draws, again))
    log_tan = np.log(SPRINT.sigma_data * np.tan(np.asarray(draws.angle)))
    assert log_tan.mean() == pytest.approx(0.2, abs=0.1)
    assert log_tan.std() == pytest.approx(1.6, abs=0.1)
    for_heads = np.log(SPRINT.sigma_data * np.tan(np.asarray(draws.discriminator_angle)))
    assert for_heads.mean() == pytest.approx(-0.6, abs=0.07)
    assert (draws.adversarial_angle == np.float32(SPRINT.largest_angle)).mean() == pytest.approx(0.5, abs=0.03)
    scales, counts = np.unique(draws.guidance_scale, return_counts=True)
    assert scales.tolist() == [1.5, 2.0]
    assert counts.min() > 1800
    assert float(draws.noise.std()) == pytest.approx(1, abs=0.05)
    assert not same(draws.noise, draws.adversarial_noise)

    ours = sprint.draw_discriminator(0, 7, batch)
    assert np.array_equal(ours.real_angle, ours.fake_angle)
    assert np.array_equal(ours.misaligned_latents[1:], batch.latents[:-1])
    other = dataclasses.replace(SPRINT, separate_real_angles=True, misaligned_pairs=False)
    theirs = sprint_of(other).draw_discriminator(0, 7, batch)
    assert not np.array_equal(theirs.real_angle, theirs.fake_angle)
    assert theirs.misaligned_latents is None


# -- steps -----------------------------------------------------------------------------------------------------------


def test_each_step_moves_its_own_parameters(steps, state, teacher, batch):
    generator, discriminator = steps
    after_first, metrics = generator(state, teacher, batch)
    assert metrics.finite
    parts = ("scm", "tangent_norm", "log_variance", "adversarial")
    assert set(metrics.figures) == {f"generator/{name}" for name in parts}
    total = metrics.figures["generator/scm"] + SPRINT.adversarial_weight * metrics.figures["generator/adversarial"]
    assert float(metrics.loss) == pytest.approx(float(total), rel=1e-5)
    for name in ("heads", "vectors"):
        assert same(after_first.params[name], state.params[name])
    assert same(after_first.opt_state["discriminator"], state.opt_state["discriminator"])
    for tree in (after_first.params["transformer"], after_first.params["logvar"]):
        before = state.params["transformer" if "patch_embed" in tree else "logvar"]
        assert not any(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), tree, before)))
    assert set(after_first.ema) == {"transformer"}
    assert not same(after_first.ema, state.ema)

    after_second, metrics = discriminator(after_first, teacher, batch)
    assert metrics.finite
    assert int(after_second.step) == 2
    assert {"discriminator/real", "discriminator/false", "discriminator/right"} == set(metrics.figures)
    for name in ("transformer", "logvar"):
        assert same(after_second.params[name], after_first.params[name])
    assert same(after_second.ema, after_first.ema)
    heads = after_second.params["heads"], after_first.params["heads"]
    moved = jax.tree.map(lambda new, old: not np.array_equal(new, old), *heads)
    assert all(jax.tree.leaves(moved))
    assert not same(after_second.params["vectors"], after_first.params["vectors"])


def test_a_step_is_a_function_of_the_state(steps, state, teacher, batch):
    for step in steps:
        one, other = step(state, teacher, batch), step(state, teacher, batch)
        assert same(one, other)
        later = step(state._replace(step=state.step + 2), teacher, batch)
        assert float(later[1].loss) != float(one[1].loss)


@pytest.mark.parametrize("phase", [0, 1])
def test_a_step_that_is_not_finite_is_left_out(steps, state, teacher, batch, phase):
    poisoned = batch._replace(latents=batch.latents.at[3, 2, 1].set(jnp.nan))
    after, metrics = steps[phase](state, teacher, poisoned)
    assert not metrics.finite
    assert int(after.step) == 1
    assert same(after._replace(step=state.step), state)


@pytest.mark.parametrize("phase", [0, 1])
def test_accumulation_changes_nothing_but_rounding(sprint, trained, teacher, batch, phase, steps, state):
    config = run_config(accumulation=2)
    optimizers = make_sprint_optimizers(config, sprint.config, trained)
    after, metrics = jitted(make_sprint_steps(sprint, optimizers, config)[phase])(state, teacher, batch)
    _, expected = steps[phase](state, teacher, batch)
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-4)
    for name, value in expected.figures.items():
        assert float(metrics.figures[name]) == pytest.approx(float(value), rel=1e-4), name
    np.testing.assert_allclose(metrics.bin_loss, expected.bin_loss, rtol=1e-4, atol=1e-5)
    whole = steps[phase](state, teacher, batch)[0]
    assert same(after.params["vectors"], whole.params["vectors"])


def test_without_a_discriminator_every_step_is_the_students(teacher, batch, config):
    alone = sprint_of(dataclasses.replace(SPRINT, adversarial_weight=0.0))
    trained = fresh_student(alone, teacher)
    (step,) = make_sprint_steps(alone, make_sprint_optimizers(config, alone.config, trained), config)
    after, metrics = jax.eval_shape(step, start(alone, trained, config), teacher, batch)
    assert set(after.opt_state) == {"generator"}
    assert "generator/adversarial" not in metrics.figures


def test_heads_have_their_own_learning_rate(trained):
    config = run_config(optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", clip_norm=None))
    own = dataclasses.replace(SPRINT, discriminator_learning_rate=5e-3)
    optimizers = make_sprint_optimizers(config, own, trained)
    states = optimizers.init(trained)
    for names, phase, rate in ((("transformer", "logvar"), "generator", 1e-3), (("heads",), "discriminator", 5e-3)):
        tree, optimizer = part(trained, names), optimizers.transformations[phase]
        updates, _ = jitted(optimizer.update)(jax.tree.map(jnp.ones_like, tree), states[phase], tree)
        for update in jax.tree.leaves(updates):
            np.testing.assert_allclose(update, -rate, rtol=1e-3)  # Adam's first update is the sign of the gradient


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scm_weight": 0.0, "adversarial_weight": 0.0}, "--sprint.scm-weight 0.0 is not allowed"),
        ({"adversarial_weight": 0.0, "r1_weight": 1.0}, "--sprint.r1-weight 1.0 is not allowed"),
        ({"guidance_scales": ()}, r"--sprint.guidance-scales \(none\)"),
        ({"head_blocks": (1, 1)}, "--sprint.head-blocks 1 1"),
        ({"largest_angle": 1.7}, "--sprint.largest-angle 1.7"),
        ({"largest_angle_probability": 1.5}, "--sprint.largest-angle-probability 1.5"),
        ({"sigma_data": 0.0}, "--sprint.sigma-data 0.0"),
        ({"virtual_batch": 0}, "--sprint.virtual-batch 0"),
    ],
)
def test_options_that_are_not_allowed(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SPRINT, **changes)


def test_networks_that_do_not_fit(sprint):
    null = sprint.null_embeds, sprint.null_mask
    integers = SanaTransformer(dataclasses.replace(TEACHER, timestep_scale=1.0))
    with pytest.raises(UserError, match=r"times from 0 to 1000; allowed is 0\.001"):
        Sprint(sprint.student, integers, SPRINT, *null)
    with pytest.raises(UserError, match="guidance_embeds=True; allowed is a flow model"):
        Sprint(sprint.student, sprint.student, SPRINT, *null)
    with pytest.raises(UserError, match="the model has blocks 0 to 2"):
        Sprint(sprint.student, sprint.teacher, dataclasses.replace(SPRINT, head_blocks=(0, 3)), *null)


def test_batches_that_do_not_fit():
    check_batch_of_heads(SPRINT, 8, 2)
    with pytest.raises(UserError, match="no misaligned pairs"):
        check_batch_of_heads(SPRINT, 1, 1)
    with pytest.raises(UserError, match="does not divide the 4 samples of a part"):
        check_batch_of_heads(dataclasses.replace(SPRINT, virtual_batch=8), 8, 2)
    with pytest.raises(UserError, match="unequal virtual batches"):
        check_batch_of_heads(dataclasses.replace(SPRINT, virtual_batch=8), 9, 1)
