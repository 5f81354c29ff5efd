"""The continuous-time consistency loss (sCM) in TrigFlow coordinates, part by part.

Lu and Song, arXiv 2410.11081, section 4; SANA-Sprint, arXiv 2503.09641, section 3.2. With F the student's velocity in
units of sigma_data, F⁻ the same without gradient, and dx/dt the teacher's guided derivative at x_t:

    g = −cos²t·(σ·F⁻ − dx/dt) − r·(cos t·sin t·x_t + σ·cos t·sin t·dF⁻/dt),     r rising from 0 to 1
    loss = mean( e^{−w}/(σ·tan t)·(F − F⁻ − g/(‖g‖ + 0.1))² + w ),              w the learned log-variance

dF⁻/dt is the student's derivative along the teacher's trajectory, a Jacobian-vector product.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.selection import forward_mode
from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.diffusion.flow import align_leading
from sana_jax.diffusion.trigflow import flow_input, sigma_from_angle, trigflow_velocity
from sana_jax.models.sana import SanaTransformer
from sana_jax.nn.embeddings import TimeEmbedding
from sana_jax.nn.initializers import xavier_uniform
from sana_jax.pipelines.sampling_function import transformer_variables

NORM_EPSILON = 0.1


def angle_from_normal(normal: Float[Array, "*S"], mean: float, std: float, sigma_data: float) -> Float[Array, "*S"]:
    """The angle t = atan(exp(mean + std·normal)/sigma_data) of a standard normal draw, in radians, float32."""
    return jnp.arctan(jnp.exp(mean + std * jnp.asarray(normal, jnp.float32)) / sigma_data)


def noised(
    clean: Float[Array, "B *X"], noise: Float[Array, "B *X"], angle: Float[Array, " B"], sigma_data: float
) -> Float[Array, "B *X"]:
    """x_t = cos(t)·x0 + sin(t)·sigma_data·noise; ``clean`` is in units of the result, ``noise`` is standard normal."""
    angle = align_leading(angle, clean, "angle")
    return jnp.cos(angle) * clean + jnp.sin(angle) * sigma_data * noise


def clean_prediction(
    noisy: Float[Array, "B *X"], velocity: Float[Array, "B *X"], angle: Float[Array, " B"], sigma_data: float
) -> Float[Array, "B *X"]:
    """x0 = cos(t)·x_t − sin(t)·sigma_data·F."""
    angle = align_leading(angle, noisy, "angle")
    return jnp.cos(angle) * noisy - jnp.sin(angle) * sigma_data * velocity


def network_velocity(
    transformer: SanaTransformer,
    params: PyTree,
    scaled: Float[Array, "B H W C"],
    angle: Float[Array, " B"],
    captions: tuple[Array, Array],
    guidance: Float[Array, " B"] | None,
    timestep_factor: float,
    lora: PyTree | None = None,
) -> Float[Array, "B H W C"]:
    """A flow network's TrigFlow velocity F, in units of sigma_data and in float32.

    Args:
        transformer: the network.
        params: its parameters.
        scaled: x_t / sigma_data.
        angle: t in radians.
        captions: prompt embeddings and their mask.
        guidance: what the network is told of the guidance scale; None for a network that is not.
        timestep_factor: what the flow level in [0, 1] is multiplied with for the network: 1 for SANA-Sprint.
        lora: beside the parameters; None for none.
    """
    network_input = flow_input(scaled, angle, 1.0)
    embeds, mask = captions
    timestep = sigma_from_angle(angle) * timestep_factor
    velocity = transformer.apply(
        transformer_variables(params, lora), network_input, embeds, timestep, guidance, encoder_attention_mask=mask
    )
    return trigflow_velocity(network_input, velocity, angle, 1.0)


def value_and_tangent(
    function: Callable[..., Array], params: PyTree, primals: PyTree, tangents: PyTree, constants: PyTree
) -> tuple[Array, Array]:
    """``function(params, primals, constants)`` and its derivative along ``tangents``, in one pass.

    Only the value can be differentiated, and only by ``params``; to the derivative no gradient passes. Reverse mode
    through ``jax.jvp`` would be right as well, but inside the scan over a network's blocks it cannot see that the
    derivative's own gradient is never asked for, and computes it.

    Fused kernels have no forward-mode derivative: the network's operations run in forms that have one here, whatever
    is measured to be faster.

    Args:
        function: the network.
        params: what the value may be differentiated by.
        primals: where.
        tangents: along what, of the structure of ``primals``.
        constants: further arguments.
    """

    @jax.custom_vjp
    def run(params, primals, tangents, constants):
        with forward_mode():
            return jax.jvp(lambda at: function(params, at, constants), (primals,), (tangents,))

    def forward(params, primals, tangents, constants):
        def value_and_pullback(at):
            return jax.vjp(lambda p: function(p, at, constants), params)

        # the pullback's residuals have tangents too, which nothing reads and the compiler leaves out
        with forward_mode():
            (value, pullback), (tangent, _) = jax.jvp(value_and_pullback, (primals,), (tangents,))
        return (value, tangent), pullback

    def backward(pullback, cotangents):
        return *pullback(cotangents[0]), None, None, None

    run.defvjp(forward, backward)
    value, tangent = run(params, primals, tangents, constants)
    return value, jax.lax.stop_gradient(tangent)


def consistency_tangent(
    velocity: Float[Array, "B *X"],
    velocity_tangent: Float[Array, "B *X"],
    noisy: Float[Array, "B *X"],
    derivative: Float[Array, "B *X"],
    angle: Float[Array, " B"],
    ratio: float | Float[Array, ""],
    sigma_data: float,
) -> tuple[Float[Array, "B *X"], Float[Array, " B"]]:
    """The normalised g above, and ‖g‖ before; no gradient passes.

    Args:
        velocity: F.
        velocity_tangent: cos t·sin t·dF/dt.
        noisy: x_t.
        derivative: the teacher's dx/dt.
        angle: t.
        ratio: r.
        sigma_data: σ.
    """
    t = align_leading(angle, noisy, "angle")
    towards_teacher = -jnp.square(jnp.cos(t)) * (sigma_data * velocity - derivative)
    own = jnp.cos(t) * jnp.sin(t) * noisy + sigma_data * velocity_tangent
    g = jax.lax.stop_gradient(towards_teacher - ratio * own)
    norm = jnp.sqrt(jnp.square(g).sum(tuple(range(1, g.ndim)), keepdims=True))
    return g / (norm + NORM_EPSILON), norm.reshape(-1)


def consistency_loss(
    velocity: Float[Array, "B *X"],
    tangent: Float[Array, "B *X"],
    angle: Float[Array, " B"],
    log_variance: Float[Array, " B"],
    sigma_data: float,
) -> Float[Array, " B"]:
    """Each sample's loss; ``tangent`` is the normalised g."""
    target = jax.lax.stop_gradient(velocity) + tangent
    error = jnp.square(velocity - target).mean(tuple(range(1, velocity.ndim)))
    weight = 1.0 / (jnp.tan(angle) * sigma_data)
    return weight * jnp.exp(-log_variance) * error + log_variance


def init_log_variance(key: PRNGKeyArray, features: int) -> PyTree:
    """Parameters of the log-variance: a linear function of the time embedding."""
    return {"kernel": xavier_uniform()(key, (features, 1)), "bias": jnp.zeros(1)}


def log_variance(
    head: PyTree,
    transformer: SanaTransformer,
    params: PyTree,
    angle: Float[Array, " B"],
    guidance: Float[Array, " B"],
) -> Float[Array, " B"]:
    """The learned log-variance of the consistency error at each sample's angle and guidance scale, in float32.

    It reads the student's own time embedding, to which gradients pass. The head is no part of the network: it is
    trained beside it and left out of what is exported.
    """
    embedder = TimeEmbedding(transformer.config.inner_dim, guidance_embeds=True)
    embedding, _ = embedder.apply({"params": params["time_embed"]}, sigma_from_angle(angle), guidance)
    return (embedding @ head["kernel"] + head["bias"])[:, 0]


def warmup_ratio(step, warmup_steps: int) -> Float[Array, ""]:
    """r = min(1, step/warmup_steps), 1 without warm-up."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(1.0, step / np.float32(warmup_steps)) if warmup_steps else jnp.float32(1.0)
