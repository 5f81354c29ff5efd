"""Sprint training: the consistency loss and the adversarial loss of one student, as pure functions.

SANA-Sprint, arXiv 2503.09641, section 3. ``trained`` is the tree

    {"transformer": the student, "logvar": its log-variance,
     "heads": the discriminator's, "vectors": their singular vectors}

whose last two are there with an adversarial term alone; ``frozen`` is the teacher's parameters. Draws hold everything
random, for the whole batch and with the sample as first axis, so that neither accumulation nor the mesh changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.sprint import SprintConfig
from kernels.typing import Array, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from sana_jax.diffusion.trigflow import flow_input, sigma_from_angle
from sana_jax.errors import UserError
from sana_jax.models.sana import SanaTransformer, init_params
from train.batch import Batch
from train.objectives.base import PhaseLosses
from train.objectives.discriminator import head_logits, init_heads, init_vectors, power_iteration
from train.objectives.scm import (
    angle_from_normal,
    clean_prediction,
    consistency_loss,
    consistency_tangent,
    init_log_variance,
    log_variance,
    network_velocity,
    noised,
    value_and_tangent,
    warmup_ratio,
)
from train.randomness import stream

Captions = tuple[Float[Array, "B L Ctext"], Int[Array, "B L"]]


class GeneratorDraws(NamedTuple):
    """What is random about a step of the student."""

    angle: Float[Array, " B"]
    noise: Float[Array, "B H W C"]
    guidance_scale: Float[Array, " B"]
    adversarial_angle: Float[Array, " B"]
    """Where the sample that the discriminator sees comes from."""
    adversarial_noise: Float[Array, "B H W C"]
    discriminator_angle: Float[Array, " B"]
    """To where that sample is noised again."""
    discriminator_noise: Float[Array, "B H W C"]


class DiscriminatorDraws(NamedTuple):
    """What is random about a step of the discriminator, and the misaligned pairs' latents."""

    angle: Float[Array, " B"]
    noise: Float[Array, "B H W C"]
    guidance_scale: Float[Array, " B"]
    fake_angle: Float[Array, " B"]
    fake_noise: Float[Array, "B H W C"]
    real_angle: Float[Array, " B"]
    real_noise: Float[Array, "B H W C"]
    misaligned_latents: Float[Array, "B H W C"] | None
    """Another sample's for each caption; None without misaligned pairs."""
    misaligned_angle: Float[Array, " B"] | None
    misaligned_noise: Float[Array, "B H W C"] | None


@dataclass(frozen=True)
class Sprint:
    """Losses of both phases and their draws.

    Attributes:
        student: the network that learns, with ``guidance_embeds``.
        teacher: the network it learns from; it is told times in [0, 1].
        config: weights, densities and the discriminator.
        null_embeds: the text encoder's encoding of no text (1, L, Ctext), for the teacher's guidance.
        null_mask: its mask (1, L); None for that of each sample's caption.

    Raises:
        UserError: networks or blocks that do not fit.
    """

    student: SanaTransformer
    teacher: SanaTransformer
    config: SprintConfig
    null_embeds: Float[Array, "1 L Ctext"]
    null_mask: Int[Array, "1 L"] | None

    def __post_init__(self):
        check_networks(self.student, self.teacher, self.config)

    # -- randomness --------------------------------------------------------------------------------------------------

    def draw_generator(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> GeneratorDraws:
        """What is random at a step of the student, for a whole batch."""
        shape = batch.latents.shape

        def noise(name):
            return jax.random.normal(stream(seed, step, f"sprint_{name}"), shape, jnp.float32)

        return GeneratorDraws(
            angle=self._angles(seed, step, "angle", shape[0], discriminator=False),
            noise=noise("noise"),
            guidance_scale=self._guidance_scales(seed, step, shape[0]),
            adversarial_angle=self._angles_or_largest(seed, step, shape[0]),
            adversarial_noise=noise("adversarial_noise"),
            discriminator_angle=self._angles(seed, step, "discriminator_angle", shape[0], discriminator=True),
            discriminator_noise=noise("discriminator_noise"),
        )

    def draw_discriminator(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> DiscriminatorDraws:
        """What is random at a step of the discriminator, for a whole batch."""
        latents, rows = batch.latents, batch.latents.shape[0]

        def noise(name):
            return jax.random.normal(stream(seed, step, f"sprint_{name}"), latents.shape, jnp.float32)

        def angles(name):
            return self._angles(seed, step, name, rows, discriminator=True)

        fake_angle, pairs = angles("discriminator_angle"), self.config.misaligned_pairs
        return DiscriminatorDraws(
            angle=self._angles_or_largest(seed, step, rows),
            noise=noise("adversarial_noise"),
            guidance_scale=self._guidance_scales(seed, step, rows),
            fake_angle=fake_angle,
            fake_noise=noise("discriminator_noise"),
            real_angle=angles("real_angle") if self.config.separate_real_angles else fake_angle,
            real_noise=noise("real_noise"),
            misaligned_latents=jnp.roll(latents, 1, axis=0) if pairs else None,
            misaligned_angle=angles("misaligned_angle") if pairs else None,
            misaligned_noise=noise("misaligned_noise") if pairs else None,
        )

    def _angles(self, seed, step, name: str, rows: int, *, discriminator: bool) -> Float[Array, " B"]:
        c = self.config
        mean, std = (
            (c.discriminator_mean, c.discriminator_std) if discriminator else (c.generator_mean, c.generator_std)
        )
        normal = jax.random.normal(stream(seed, step, f"sprint_{name}"), (rows,), jnp.float32)
        return angle_from_normal(normal, mean, std, c.sigma_data)

    def _angles_or_largest(self, seed, step, rows: int) -> Float[Array, " B"]:
        uniform = jax.random.uniform(stream(seed, step, "sprint_largest_angle"), (rows,))
        angle = self._angles(seed, step, "adversarial_angle", rows, discriminator=False)
        return mix_largest(angle, uniform, self.config)

    def _guidance_scales(self, seed, step, rows: int) -> Float[Array, " B"]:
        scales = jnp.asarray(self.config.guidance_scales, jnp.float32)
        return jax.random.choice(stream(seed, step, "sprint_guidance_scale"), scales, (rows,))

    # -- losses ------------------------------------------------------------------------------------------------------

    def generator_losses(
        self, trained: PyTree, frozen: PyTree, batch: Batch, draws: GeneratorDraws, step: int | Int[Array, ""]
    ) -> PhaseLosses:
        """The student's loss, ``scm_weight``·sCM + ``adversarial_weight``·adversarial; gradients are for it alone.

        Args:
            trained: the tree above. The heads are used as they are.
            frozen: the teacher's parameters.
            batch: samples, or a part of them.
            draws: of ``draw_generator``, the same part.
            step: for the warm-up of the tangent.
        """
        c, captions = self.config, _captions(batch)
        loss, figures = jnp.zeros(batch.latents.shape[0]), {}
        if c.scm_weight > 0:
            scm, figures = self.consistency_losses(trained, frozen, batch, draws, step)
            loss = loss + c.scm_weight * scm
        if c.adversarial:
            clean = self.one_step(trained, batch, draws.adversarial_angle, draws.adversarial_noise, draws)
            noisy = noised(clean, draws.discriminator_noise, draws.discriminator_angle, c.sigma_data)
            logits = self.logits(trained, frozen, trained["vectors"], noisy, draws.discriminator_angle, captions)
            adversarial = generator_score(logits, c.adversarial_loss)
            loss = loss + c.adversarial_weight * adversarial
            figures = {**figures, "adversarial": adversarial}
        return PhaseLosses(loss, sigma_from_angle(draws.angle), figures)

    def consistency_losses(
        self, trained: PyTree, frozen: PyTree, batch: Batch, draws: GeneratorDraws, step: int | Int[Array, ""]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        """Each sample's consistency loss, and what it consists of."""
        sigma_data, t, captions = self.config.sigma_data, draws.angle, _captions(batch)
        noisy = noised(batch.latents * sigma_data, draws.noise, t, sigma_data)
        derivative = self.guided_derivative(frozen, noisy, t, captions, draws.guidance_scale)
        guidance = self._guidance(draws)

        def student(params, at, constants):
            captions, guidance = constants
            return network_velocity(self.student, params, *at, captions, guidance, 1.0)

        along = jnp.cos(t) * jnp.sin(t)
        velocity, velocity_tangent = value_and_tangent(
            student,
            trained["transformer"],
            (noisy / sigma_data, t),
            (along[:, None, None, None] * derivative / sigma_data, along),
            (captions, guidance),
        )
        ratio = warmup_ratio(step, self.config.tangent_warmup_steps)
        tangent, norm = consistency_tangent(velocity, velocity_tangent, noisy, derivative, t, ratio, sigma_data)
        spread = log_variance(trained["logvar"], self.student, trained["transformer"], t, guidance)
        losses = consistency_loss(velocity, tangent, t, spread, sigma_data)
        return losses, {"scm": losses, "tangent_norm": norm, "log_variance": spread}

    def guided_derivative(
        self,
        frozen: PyTree,
        noisy: Float[Array, "B H W C"],
        angle: Float[Array, " B"],
        captions: Captions,
        guidance_scale: Float[Array, " B"],
    ) -> Float[Array, "B H W C"]:
        """The teacher's dx/dt at x_t with classifier-free guidance; no gradient passes."""
        embeds, mask = captions
        null_embeds = jnp.broadcast_to(self.null_embeds, embeds.shape).astype(embeds.dtype)
        null_mask = mask if self.null_mask is None else jnp.broadcast_to(self.null_mask, mask.shape).astype(mask.dtype)
        both = jnp.concatenate([null_embeds, embeds]), jnp.concatenate([null_mask, mask])
        scaled, twice = jnp.concatenate([noisy, noisy]) / self.config.sigma_data, jnp.concatenate([angle, angle])
        velocity = network_velocity(self.teacher, frozen, scaled, twice, both, None, self._teacher_time)
        without, with_caption = jnp.split(self.config.sigma_data * jax.lax.stop_gradient(velocity), 2)
        return without + guidance_scale[:, None, None, None] * (with_caption - without)

    def one_step(
        self,
        trained: PyTree,
        batch: Batch,
        angle: Float[Array, " B"],
        noise: Float[Array, "B H W C"],
        draws: GeneratorDraws | DiscriminatorDraws,
    ) -> Float[Array, "B H W C"]:
        """The student's clean prediction from the batch noised to ``angle``, in units of ``sigma_data``."""
        sigma_data = self.config.sigma_data
        noisy = noised(batch.latents * sigma_data, noise, angle, sigma_data)
        velocity = network_velocity(
            self.student,
            trained["transformer"],
            noisy / sigma_data,
            angle,
            _captions(batch),
            self._guidance(draws),
            1.0,
        )
        return clean_prediction(noisy, velocity, angle, sigma_data)

    def discriminator_losses(
        self, trained: PyTree, frozen: PyTree, batch: Batch, draws: DiscriminatorDraws
    ) -> PhaseLosses:
        """The discriminator's loss; gradients are for the heads alone.

        The singular vectors are iterated once for the false samples and once more for the real ones, which depends on
        the kernels alone; ``vectors_after`` gives those that the step leaves behind.
        """
        c, captions = self.config, _captions(batch)
        first = power_iteration(trained["heads"], trained["vectors"])
        second = power_iteration(trained["heads"], first)
        noisy, angle, repeated = self.false_samples(trained, batch, draws)
        false_logits = self.logits(trained, frozen, first, noisy, angle, repeated)
        real = noised(batch.latents * c.sigma_data, draws.real_noise, draws.real_angle, c.sigma_data)
        features = self.features(frozen, real, draws.real_angle, captions)
        real_logits = self.logits_of_features(trained, second, features)
        # the student's samples and the misaligned pairs count as much as each other
        kinds = 1 if draws.misaligned_latents is None else 2
        of_false = discriminator_score(false_logits, c.adversarial_loss, real=False).reshape(kinds, -1).mean(0)
        of_real = discriminator_score(real_logits, c.adversarial_loss, real=True)
        loss = discriminator_total(of_false, of_real, c.adversarial_loss)
        right_about_false = (false_logits < 0).mean(1).reshape(kinds, -1).mean(0)
        figures = {"real": of_real, "false": of_false, "right": 0.5 * ((real_logits > 0).mean(1) + right_about_false)}
        if c.r1_weight > 0:
            penalty = self.r1_penalty(trained, second, features)
            loss, figures = loss + c.r1_weight * penalty, {**figures, "r1": penalty}
        return PhaseLosses(loss, sigma_from_angle(draws.real_angle), figures)

    def false_samples(
        self, trained: PyTree, batch: Batch, draws: DiscriminatorDraws
    ) -> tuple[Float[Array, "M H W C"], Float[Array, " M"], Captions]:
        """What the discriminator should call false, its angles and captions: M = B, or 2·B with misaligned pairs.

        No gradient passes to the student.
        """
        sigma_data, fixed = self.config.sigma_data, jax.lax.stop_gradient(trained["transformer"])
        clean = self.one_step({"transformer": fixed}, batch, draws.angle, draws.noise, draws)
        noisy, angle = noised(clean, draws.fake_noise, draws.fake_angle, sigma_data), draws.fake_angle
        captions = _captions(batch)
        if draws.misaligned_latents is None:
            return noisy, angle, captions
        misaligned = noised(
            draws.misaligned_latents * sigma_data, draws.misaligned_noise, draws.misaligned_angle, sigma_data
        )
        twice = jax.tree.map(lambda array: jnp.concatenate([array, array]), captions)
        return jnp.concatenate([noisy, misaligned]), jnp.concatenate([angle, draws.misaligned_angle]), twice

    def r1_penalty(self, trained: PyTree, vectors: PyTree, features: Float[Array, "K B N D"]) -> Float[Array, " B"]:
        """Each sample's squared gradient of the logits' sum by what the heads read, the mean over heads."""
        gradient = jax.grad(lambda read: self.logits_of_features(trained, vectors, read).sum())(features)
        return jnp.square(gradient.astype(jnp.float32)).sum((2, 3)).mean(0)

    # -- the discriminator -------------------------------------------------------------------------------------------

    def logits(
        self,
        trained: PyTree,
        frozen: PyTree,
        vectors: PyTree,
        noisy: Float[Array, "B H W C"],
        angle: Float[Array, " B"],
        captions: Captions,
    ) -> Float[Array, "B K_N"]:
        """The discriminator's answers about x_t."""
        return self.logits_of_features(trained, vectors, self.features(frozen, noisy, angle, captions))

    def logits_of_features(self, trained: PyTree, vectors: PyTree, features: Float[Array, "K B N D"]) -> Array:
        """The heads' answers, side by side (B, K·N)."""
        return head_logits(trained["heads"], vectors, features, self.config.virtual_batch)

    def features(
        self, frozen: PyTree, noisy: Float[Array, "B H W C"], angle: Float[Array, " B"], captions: Captions
    ) -> Float[Array, "K B N D"]:
        """What the teacher's blocks ``head_blocks`` give for x_t."""
        embeds, mask = captions
        _, sown = self.teacher.apply(
            {"params": frozen},
            flow_input(noisy / self.config.sigma_data, angle, 1.0),
            embeds,
            sigma_from_angle(angle) * self._teacher_time,
            encoder_attention_mask=mask,
            mutable=["intermediates"],
        )
        (outputs,) = sown["intermediates"]["block_outputs"]
        return outputs[jnp.asarray(self.config.head_blocks)]

    @property
    def _teacher_time(self) -> float:
        return NUM_TRAIN_TIMESTEPS * self.teacher.config.timestep_scale

    def _guidance(self, draws: GeneratorDraws | DiscriminatorDraws) -> Float[Array, " B"]:
        return draws.guidance_scale * self.student.config.guidance_embeds_scale


def init_trained(sprint: Sprint, key: PRNGKeyArray, teacher_params: PyTree) -> PyTree:
    """Step 0 in float32: the student is the teacher with a guidance embedder whose output is 0; the rest is fresh."""
    fresh = init_params(sprint.student, jax.random.fold_in(key, 0))
    student = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), teacher_params)
    student["time_embed"] = {
        **student["time_embed"],
        "guidance_embedder": fresh["time_embed"]["guidance_embedder"],
    }
    width = sprint.student.config.inner_dim
    trained = {"transformer": student, "logvar": init_log_variance(jax.random.fold_in(key, 1), width)}
    if sprint.config.adversarial:
        heads = init_heads(jax.random.fold_in(key, 2), len(sprint.config.head_blocks), width)
        trained |= {"heads": heads, "vectors": init_vectors(jax.random.fold_in(key, 3), heads)}
    return trained


def vectors_after(trained: PyTree) -> PyTree:
    """The singular vectors that a step of the discriminator leaves behind."""
    return power_iteration(trained["heads"], trained["vectors"], 2)


def mix_largest(angle: Float[Array, " B"], uniform: Float[Array, " B"], config: SprintConfig) -> Float[Array, " B"]:
    """The largest angle where the uniform draw is below its probability, the others elsewhere."""
    return jnp.where(uniform < config.largest_angle_probability, jnp.float32(config.largest_angle), angle)


def generator_score(logits: Float[Array, "B K"], kind: str) -> Float[Array, " B"]:
    """Each sample's adversarial loss for the student: −logit (hinge), or the cross-entropy with 'real'."""
    return (-logits if kind == "hinge" else jax.nn.softplus(-logits)).mean(1)


def discriminator_score(logits: Float[Array, "B K"], kind: str, *, real: bool) -> Float[Array, " B"]:
    """Each sample's part of the discriminator's loss: hinge at margin 1, or cross-entropy with what it is."""
    signed = -logits if real else logits
    return (jnp.maximum(1.0 + signed, 0.0) if kind == "hinge" else jax.nn.softplus(signed)).mean(1)


def discriminator_total(false: Float[Array, " B"], real: Float[Array, " B"], kind: str) -> Float[Array, " B"]:
    """Both parts together: their mean for hinge, their sum for cross-entropy, as published."""
    return 0.5 * (false + real) if kind == "hinge" else false + real


def check_networks(student: SanaTransformer, teacher: SanaTransformer, config: SprintConfig) -> None:
    """Raises ``UserError`` unless the student can begin as the teacher and the heads find their blocks."""
    if not student.config.guidance_embeds or teacher.config.guidance_embeds:
        raise UserError(
            f"Sprint training from a model with guidance_embeds={teacher.config.guidance_embeds}; allowed is a flow "
            "model (SANA, SANA-1.5), from which a student with guidance_embeds is made: give --model that one"
        )
    told = NUM_TRAIN_TIMESTEPS * teacher.config.timestep_scale
    if abs(told - 1) > 1e-6:
        raise UserError(
            f"the model's timestep_scale {teacher.config.timestep_scale:g} tells it times from 0 to {told:g}; allowed "
            "is 0.001, times from 0 to 1, whose derivative a consistency loss can use: train the model on with "
            "--transformer.timestep-scale 0.001 first (a few thousand steps of flow matching)"
        )
    layers = teacher.config.num_layers
    if max(config.head_blocks) >= layers and config.adversarial:
        raise UserError(
            f"--sprint.head-blocks {' '.join(map(str, config.head_blocks))}: the model has blocks 0 to {layers - 1}; "
            "name some of these"
        )


def _captions(batch: Batch) -> Captions:
    return batch.prompt_embeds, batch.prompt_attention_mask
