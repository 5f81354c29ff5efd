"""Sprint training against recorded vectors: the consistency loss, the adversarial loss, the heads, all gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.sprint import SprintConfig
from convert.renames import RenamedSource
from convert.tables import sana_original
from sana_jax.models.sana import QK_NORM, SanaConfig, SanaTransformer, init_params
from sana_jax.nn.norms import RMSNorm, rms_norm
from sana_jax.weights.rules import flatten, places, read_params
from sana_jax.weights.safetensors_files import TensorInfo
from sana_jax.weights.tables.sana import transformer_rules
from tests.golden.golden_files import GoldenFile, assert_golden, load_golden
from tests.train.tiny_run import QUICKLY
from train.batch import Batch
from train.objectives import scm
from train.objectives.discriminator import CONVOLUTIONS, head_logits, power_iteration
from train.objectives.sprint import (
    DiscriminatorDraws,
    GeneratorDraws,
    Sprint,
    discriminator_score,
    discriminator_total,
    generator_score,
    mix_largest,
    vectors_after,
)

ANGLE_TOLERANCE = 5e-6
MODULE_TOLERANCE = 1e-5
VALUE_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 3e-4
GRADIENT_FLOOR = 1e-6  # some are exactly zero in exact arithmetic
LOSS_TOLERANCE = 2e-5
# The published diffusers weights run with 1e-5 here, the reference of these vectors with 1e-6.
CROSS_NORM_EPSILON = 1e-6

ORIGINAL_CONVOLUTIONS = {"input": "main.0.0", "ring": "main.1.fn.0", "logit": "cls"}
ORIGINAL_NORMS = {"input_norm": "main.0.1", "ring_norm": "main.1.fn.1"}


@pytest.fixture(autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def _compiled(function, *arguments):
    """The function's result, from one program."""
    with _cross_norm_epsilon():
        return jax.jit(function, compiler_options=QUICKLY)(*arguments)


def _gradient(golden: GoldenFile, name: str) -> np.ndarray:
    """In float64 where it was recorded so; large ones were not."""
    wide = f"out64/{name}"
    return golden[wide if wide in golden else f"out/{name}"]


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1)


# -- the heads -------------------------------------------------------------------------------------------------------


def _heads(golden: GoldenFile, names: list[str]) -> tuple[dict, dict]:
    """Parameters and singular vectors of the heads whose tensors begin with ``names``, stacked."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([golden[f"{head}{name}"] for head in names])

    heads: dict[str, Any] = {}
    vectors: dict[str, Any] = {}
    for ours, theirs in ORIGINAL_CONVOLUTIONS.items():
        kernel = stacked(f"{theirs}.weight_orig").transpose(0, 3, 2, 1)
        heads[ours] = {"kernel": kernel, "bias": stacked(f"{theirs}.bias")}
        right = stacked(f"{theirs}.weight_v").reshape(len(names), kernel.shape[2], kernel.shape[1])
        vectors[ours] = {"left": stacked(f"{theirs}.weight_u"), "right": right.swapaxes(1, 2)}
    for ours, theirs in ORIGINAL_NORMS.items():
        heads[ours] = {"scale": stacked(f"{theirs}.weight"), "bias": stacked(f"{theirs}.bias")}
    return jax.tree.map(jnp.asarray, (heads, vectors))


def _assert_vectors(golden: GoldenFile, vectors: dict, head: int, prefix: str) -> None:
    for name, theirs in ORIGINAL_CONVOLUTIONS.items():
        left, right = (np.asarray(vectors[name][side][head]) for side in ("left", "right"))
        assert_golden(left, golden[f"{prefix}{theirs}.weight_u"], MODULE_TOLERANCE, f"{prefix}{theirs}.weight_u")
        assert_golden(
            right.T.reshape(-1), golden[f"{prefix}{theirs}.weight_v"], MODULE_TOLERANCE, f"{prefix}{theirs}.weight_v"
        )


def test_one_head():
    golden = load_golden("sprint_disc_head")
    heads, vectors = _heads(golden, ["w/"])
    features, samples = golden["in/x"].swapaxes(1, 2)[None], golden.hparams["virtual_bs"]
    iterations = golden.hparams["power_iterations_per_training_forward"]
    now = vectors
    for stage in ("eval", "train_first", "train_second"):
        now = now if stage == "eval" else power_iteration(heads, now, iterations)
        logits = head_logits(heads, now, jnp.asarray(features), samples)
        assert_golden(logits, golden[f"out64/{stage}"][:, 0], MODULE_TOLERANCE, stage)
    _assert_vectors(golden, now, 0, "out64/after_two_train_forwards/")


def test_losses_of_given_logits():
    golden = load_golden("sprint_disc_head")
    false, real = (jnp.asarray(golden[f"in/logits_{kind}"]) for kind in ("fake", "real"))
    for kind in ("hinge", "cross_entropy"):
        of_false = discriminator_score(false, kind, real=False).mean()
        of_real = discriminator_score(real, kind, real=True).mean()
        results = {
            "G": generator_score(false, kind).mean(),
            "D": discriminator_total(of_false, of_real, kind),
            "D_fake": of_false,
            "D_real": of_real,
        }
        for name, value in results.items():
            if f"out64/{kind}/{name}" in golden:
                assert_golden(value, golden[f"out64/{kind}/{name}"], LOSS_TOLERANCE, f"{kind}/{name}")


# -- the networks ----------------------------------------------------------------------------------------------------


class _Tensors:
    """Recorded tensors as a source of a checkpoint."""

    location = "the recorded vectors"

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._arrays = tensors
        self.tensors = {name: TensorInfo(array.dtype, array.shape) for name, array in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


@contextlib.contextmanager
def _cross_norm_epsilon():
    """Runs networks with the recorded epsilon of cross-attention's query and key norms."""

    def interceptor(call, args, kwargs, context):
        module = context.module
        if isinstance(module, RMSNorm) and context.method_name == "__call__" and "attn2" in module.path:
            return rms_norm(args[0], module.get_variable("params", "scale"), CROSS_NORM_EPSILON)
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield


def _network(hparams: dict, *, guidance: bool) -> SanaTransformer:
    net = hparams["net"]
    width, heads = net["hidden_size"], net["num_heads"]
    config = SanaConfig(
        in_channels=net["in_channels"],
        out_channels=net["in_channels"],
        num_attention_heads=width // net["linear_head_dim"],
        attention_head_dim=net["linear_head_dim"],
        num_layers=net["depth"],
        num_cross_attention_heads=heads,
        cross_attention_head_dim=width // heads,
        cross_attention_dim=width,
        caption_channels=net["caption_channels"],
        mlp_ratio=net["mlp_ratio"],
        patch_size=net["patch_size"],
        qk_norm=QK_NORM,
        guidance_embeds=guidance,
        timestep_scale=0.001,
    )
    return SanaTransformer(config)


def _abstract(network: SanaTransformer) -> Any:
    return jax.eval_shape(lambda: init_params(network, jax.random.key(0)))


def _renamed(network: SanaTransformer, tensors: dict[str, np.ndarray]) -> RenamedSource:
    table = sana_original.transformer_table(guidance=network.config.guidance_embeds)
    return RenamedSource(_Tensors(tensors), table, sana_original.DROPPED)


def _parameters(golden: GoldenFile, prefix: str, network: SanaTransformer) -> Any:
    source = _renamed(network, {name.removeprefix(prefix): golden[name] for name in golden.names(prefix)})
    tree = read_params(source, transformer_rules(network.config), _abstract(network))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.read() if hasattr(leaf, "read") else leaf), tree)


def _original(network: SanaTransformer, tree: Any, name: str, recorded: np.ndarray) -> np.ndarray:
    """The leaves of our tree that are the original tensor ``name``, in its layout."""
    where = places(transformer_rules(network.config), _abstract(network))
    leaves, parts = flatten(tree), []
    for published in _renamed(network, {name: recorded}).tensors:
        place = where[published]
        leaf = np.asarray(leaves[place.path])
        parts.append(place.layout.to_theirs(leaf if place.layer is None else leaf[place.layer]))
    return np.concatenate(parts)


# -- a step of each kind ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    golden: GoldenFile
    sprint: Sprint
    trained: Any
    frozen: Any
    batch: Batch


@pytest.fixture(scope="module")
def case() -> Case:
    golden = load_golden("sprint_scm_ladd")
    hparams = golden.hparams
    config = SprintConfig(
        scm_weight=hparams["scm_lambda"],
        adversarial_weight=hparams["adv_lambda"],
        tangent_warmup_steps=hparams["warmup"],
        sigma_data=hparams["sigma_data"],
        generator_mean=hparams["lm"],
        generator_std=hparams["ls"],
        discriminator_mean=hparams["lmD"],
        discriminator_std=hparams["lsD"],
        separate_real_angles=hparams["diff_timesteps_D"],
        largest_angle=hparams["largest"],
        largest_angle_probability=hparams["pl"],
        guidance_scales=tuple(hparams["cfg_scales"]),
        head_blocks=tuple(hparams["head_ids"]),
        misaligned_pairs=hparams["misaligned_pairs_D"] and hparams["B"] > 1,
        adversarial_loss=hparams["discriminator_loss"].replace(" ", "_"),
    )
    student, teacher = _network(hparams, guidance=True), _network(hparams, guidance=False)
    # without text the reference keeps the mask of the caption
    sprint = Sprint(student, teacher, config, jnp.asarray(golden["in/uncond_y"][:, 0]), null_mask=None)
    heads, vectors = _heads(golden, [f"w/disc_heads/{head}." for head in range(len(config.head_blocks))])
    logvar = {
        "kernel": jnp.asarray(golden["w/student/logvar_linear.weight"].T),
        "bias": jnp.asarray(golden["w/student/logvar_linear.bias"]),
    }
    transformer = _parameters(golden, "w/student/", student)
    trained = {"transformer": transformer, "logvar": logvar, "heads": heads, "vectors": vectors}
    mask = golden["in/y_mask"].reshape(hparams["B"], -1).astype(np.int32)
    batch = Batch(*map(jnp.asarray, (_channels_last(golden["in/clean_latent"]), golden["in/y"][:, 0], mask)))
    return Case(golden, sprint, trained, _parameters(golden, "w/teacher/", teacher), batch)


class _Draws:
    """Recorded draws in their order."""

    def __init__(self, case: Case, phase: str):
        self._golden, self._config = case.golden, case.sprint.config
        self._names = case.golden.names(f"rng/{phase}/")

    def next(self, kind: str) -> np.ndarray:
        name = self._names.pop(0)
        assert name.rsplit("/", 1)[-1].split("_", 1)[1] == kind, f"next draw is {name}, expected {kind}"
        return self._golden[name]

    def noise(self) -> np.ndarray:
        return _channels_last(self.next("randn_like"))

    def angle(self, *, discriminator: bool) -> Any:
        c = self._config
        density = (c.discriminator_mean, c.discriminator_std) if discriminator else (c.generator_mean, c.generator_std)
        return scm.angle_from_normal(self.next("randn"), *density, c.sigma_data)

    def guidance(self) -> Any:
        return jnp.asarray(self.next("np_choice"), jnp.float32)

    def or_largest(self, angle: Any) -> Any:
        return mix_largest(angle, jnp.asarray(self.next("rand_like").reshape(-1)), self._config)

    def assert_finished(self) -> None:
        assert not self._names, f"draws left over: {self._names}"


@pytest.fixture(scope="module")
def generator_draws(case) -> GeneratorDraws:
    draws = _Draws(case, "G")
    result = GeneratorDraws(
        angle=draws.angle(discriminator=False),
        noise=draws.noise(),
        guidance_scale=draws.guidance(),
        adversarial_angle=draws.or_largest(draws.angle(discriminator=False)),
        adversarial_noise=draws.noise(),
        discriminator_angle=draws.angle(discriminator=True),
        discriminator_noise=draws.noise(),
    )
    draws.assert_finished()
    return result


@pytest.fixture(scope="module")
def discriminator_draws(case) -> DiscriminatorDraws:
    draws, config = _Draws(case, "D"), case.sprint.config
    angle = draws.angle(discriminator=False)
    draws.noise()  # the reference draws these two and does not use them
    draws.guidance()
    guidance = draws.guidance()
    angle, noise = draws.or_largest(angle), draws.noise()
    fake_angle = draws.angle(discriminator=True)
    real_angle = draws.angle(discriminator=True) if config.separate_real_angles else fake_angle
    fake_noise, real_noise = draws.noise(), draws.noise()
    pairs = config.misaligned_pairs
    result = DiscriminatorDraws(
        angle=angle,
        noise=noise,
        guidance_scale=guidance,
        fake_angle=fake_angle,
        fake_noise=fake_noise,
        real_angle=real_angle,
        real_noise=real_noise,
        misaligned_latents=jnp.roll(case.batch.latents, 1, axis=0) if pairs else None,
        misaligned_angle=draws.angle(discriminator=True) if pairs else None,
        misaligned_noise=draws.noise() if pairs else None,
    )
    draws.assert_finished()
    return result


def test_consistency_values(case, generator_draws):
    golden, sprint, draws = case.golden, case.sprint, generator_draws
    sigma_data, t = sprint.config.sigma_data, draws.angle
    captions = case.batch.prompt_embeds, case.batch.prompt_attention_mask

    def check(name, value, tolerance=VALUE_TOLERANCE):
        recorded = golden[f"out64/G/{name}"]
        assert_golden(value, _channels_last(recorded) if recorded.ndim == 4 else recorded, tolerance, name)

    check("t", t, ANGLE_TOLERANCE)
    noisy = scm.noised(case.batch.latents * sigma_data, draws.noise, t, sigma_data)
    check("x_t", noisy, MODULE_TOLERANCE)
    ones = jnp.ones_like(t)

    def student(params, at, constants):
        return scm.network_velocity(sprint.student, params, *at, *constants, 1.0)

    def values(trained, frozen, noisy, t):
        derivative = sprint.guided_derivative(frozen, noisy, t, captions, draws.guidance_scale)
        alone = [sprint.guided_derivative(frozen, noisy, t, captions, scale) for scale in (0 * ones, ones)]
        guidance = draws.guidance_scale * sprint.student.config.guidance_embeds_scale
        along = jnp.cos(t) * jnp.sin(t)
        velocity, velocity_tangent = scm.value_and_tangent(
            student,
            trained["transformer"],
            (noisy / sigma_data, t),
            (along[:, None, None, None] * derivative / sigma_data, along),
            (captions, guidance),
        )
        spread = scm.log_variance(trained["logvar"], sprint.student, trained["transformer"], t, guidance)
        return derivative, alone, velocity, velocity_tangent, spread

    derivative, alone, velocity, velocity_tangent, log_variance = _compiled(values, case.trained, case.frozen, noisy, t)
    check("teacher_uncond", alone[0])
    check("teacher_cond", alone[1])
    check("dxt_dt", derivative)
    check("F_theta", velocity)
    check("jvp_F", velocity)
    check("jvp_dF", velocity_tangent)
    check("logvar", log_variance)
    ratio = scm.warmup_ratio(golden.hparams["step"], golden.hparams["warmup"])
    tangent, norm = scm.consistency_tangent(velocity, velocity_tangent, noisy, derivative, t, ratio, sigma_data)
    check("tangent", tangent)
    check("tangent_norm", norm)
    check("tangent_raw", tangent * (norm + scm.NORM_EPSILON)[:, None, None, None])
    check("weight", 1 / (jnp.tan(t) * sigma_data), ANGLE_TOLERANCE)
    check("scm_loss", scm.consistency_loss(velocity, tangent, t, log_variance, sigma_data).mean(), LOSS_TOLERANCE)
    check("loss_no_logvar", scm.consistency_loss(velocity, tangent, t, 0 * t, sigma_data).mean(), LOSS_TOLERANCE)
    check("loss_no_weight", jnp.square(tangent).mean(), LOSS_TOLERANCE)


def test_adversarial_values_of_the_generator(case, generator_draws):
    golden, sprint, draws = case.golden, case.sprint, generator_draws
    captions = case.batch.prompt_embeds, case.batch.prompt_attention_mask
    assert_golden(draws.adversarial_angle, golden["out64/G/t_new"], ANGLE_TOLERANCE, "t_new")
    assert_golden(draws.discriminator_angle, golden["out64/G/t_D"], ANGLE_TOLERANCE, "t_D")

    def values(trained, frozen):
        clean = sprint.one_step(trained, case.batch, draws.adversarial_angle, draws.adversarial_noise, draws)
        noisy = scm.noised(clean, draws.discriminator_noise, draws.discriminator_angle, sprint.config.sigma_data)
        return clean, sprint.logits(trained, frozen, trained["vectors"], noisy, draws.discriminator_angle, captions)

    clean, logits = _compiled(values, case.trained, case.frozen)
    assert_golden(clean, _channels_last(golden["out64/G/pred_x0"]), VALUE_TOLERANCE, "pred_x0")
    assert_golden(logits, golden["out64/G/disc_logits"], VALUE_TOLERANCE, "disc_logits")
    adversarial = generator_score(logits, sprint.config.adversarial_loss).mean()
    assert_golden(adversarial, golden["out64/G/adv_loss"], LOSS_TOLERANCE, "adv_loss")


@pytest.mark.parametrize("part", ["scm", "total"])
def test_generator_gradients(case, generator_draws, part):
    golden = case.golden
    without = {"scm_weight": 1.0, "adversarial_weight": 0.0}
    config = dataclasses.replace(case.sprint.config, **(without if part == "scm" else {}))
    sprint = dataclasses.replace(case.sprint, config=config)

    def mean_loss(student):
        trained = {**case.trained, **student}
        return sprint.generator_losses(
            trained, case.frozen, case.batch, generator_draws, golden.hparams["step"]
        ).loss.mean()

    student = {name: case.trained[name] for name in ("transformer", "logvar")}
    loss, grads = _compiled(jax.value_and_grad(mean_loss), student)
    assert_golden(loss, golden[f"out64/G/{part}_loss"], LOSS_TOLERANCE, f"{part}_loss")

    prefix = f"out/G/grad_{part}/"
    names = [name.removeprefix(prefix) for name in golden.names(prefix)]
    assert names
    logvar = {
        "logvar_linear.weight": np.asarray(grads["logvar"]["kernel"]).T,
        "logvar_linear.bias": np.asarray(grads["logvar"]["bias"]),
    }
    for name in names:
        recorded = _gradient(golden, f"G/grad_{part}/{name}")
        ours = logvar[name] if name in logvar else _original(sprint.student, grads["transformer"], name, recorded)
        assert_golden(ours, recorded, GRADIENT_TOLERANCE, name, GRADIENT_FLOOR)


def _assert_head_gradients(golden: GoldenFile, grads: Any, prefix: str) -> None:
    names = {name.removeprefix("out/") for name in golden.names(f"out/{prefix}")}
    assert names
    checked = set()
    for module, parts in grads.items():
        theirs = {**ORIGINAL_CONVOLUTIONS, **ORIGINAL_NORMS}[module]
        weight = "weight_orig" if module in CONVOLUTIONS else "weight"
        for part, stacked in parts.items():
            for head, ours in enumerate(np.asarray(stacked)):
                name = f"{prefix}{head}.{theirs}.{'bias' if part == 'bias' else weight}"
                ours = ours.transpose(2, 1, 0) if part == "kernel" else ours
                if name in names:
                    assert_golden(ours, _gradient(golden, name), GRADIENT_TOLERANCE, name, GRADIENT_FLOOR)
                    checked.add(name)
                else:  # what R1 does not depend on
                    assert np.abs(ours).max() <= GRADIENT_FLOOR, name
    assert checked == names


def test_discriminator_step(case, discriminator_draws):
    golden, sprint, draws = case.golden, case.sprint, discriminator_draws
    false_angle = draws.fake_angle
    if draws.misaligned_angle is not None:
        false_angle = jnp.concatenate([false_angle, draws.misaligned_angle])
    for name, angle in {"t_G": draws.angle, "t_real": draws.real_angle, "t_fake": false_angle}.items():
        assert_golden(angle, golden[f"out64/D/{name}"], ANGLE_TOLERANCE, name)

    def mean_loss(heads):
        trained = {**case.trained, "heads": heads}
        losses = sprint.discriminator_losses(trained, case.frozen, case.batch, draws)
        clean = sprint.one_step(trained, case.batch, draws.angle, draws.noise, draws)
        return losses.loss.mean(), (losses.figures, clean)

    (loss, (figures, clean)), grads = _compiled(jax.value_and_grad(mean_loss, has_aux=True), case.trained["heads"])
    assert_golden(clean, _channels_last(golden["out64/D/pred_x0"]), VALUE_TOLERANCE, "pred_x0")
    assert_golden(loss, golden["out64/D/loss"], LOSS_TOLERANCE, "loss")
    assert_golden(figures["false"].mean(), golden["out64/D/loss_fake"], LOSS_TOLERANCE, "loss_fake")
    assert_golden(figures["real"].mean(), golden["out64/D/loss_real"], LOSS_TOLERANCE, "loss_real")
    _assert_head_gradients(golden, grads, "D/grad/")

    after = vectors_after(case.trained)
    for head in range(len(sprint.config.head_blocks)):
        _assert_vectors(golden, after, head, f"out64/D/after/{head}.")


def test_discriminator_logits(case, discriminator_draws):
    golden, sprint, draws, sigma_data = case.golden, case.sprint, discriminator_draws, case.sprint.config.sigma_data
    captions = case.batch.prompt_embeds, case.batch.prompt_attention_mask

    def values(trained, frozen):
        first = power_iteration(trained["heads"], trained["vectors"])
        second = power_iteration(trained["heads"], first)
        real = scm.noised(case.batch.latents * sigma_data, draws.real_noise, draws.real_angle, sigma_data)
        real_logits = sprint.logits(trained, frozen, second, real, draws.real_angle, captions)
        return real_logits, sprint.logits(trained, frozen, first, *sprint.false_samples(trained, case.batch, draws))

    real_logits, false_logits = _compiled(values, case.trained, case.frozen)
    assert_golden(real_logits, golden["out64/D/logits_real"], VALUE_TOLERANCE, "logits_real")
    assert_golden(false_logits, golden["out64/D/logits_fake"], VALUE_TOLERANCE, "logits_fake")


def test_r1_penalty(case, discriminator_draws):
    golden, sprint, draws, sigma_data = case.golden, case.sprint, discriminator_draws, case.sprint.config.sigma_data
    captions = case.batch.prompt_embeds, case.batch.prompt_attention_mask

    def penalty(heads):
        real = scm.noised(case.batch.latents * sigma_data, draws.real_noise, draws.real_angle, sigma_data)
        features = sprint.features(case.frozen, real, draws.real_angle, captions)
        return sprint.r1_penalty({"heads": heads}, vectors_after(case.trained), features).mean()

    value, grads = _compiled(jax.value_and_grad(penalty), case.trained["heads"])
    assert_golden(value, golden["out64/D/r1_penalty_eval_mode"], LOSS_TOLERANCE, "r1")
    _assert_head_gradients(golden, grads, "D/grad_r1/")
