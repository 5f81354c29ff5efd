"""Densities from which training draws its noise levels.

Every density is two steps: a raw random draw, uniform or normal, and a pure transform of that draw to u in [0, 1]
(an angle for the TrigFlow density). Recorded draws can therefore be fed to the transform. ``timestep_index`` turns u
into an index of the *unshifted* table of levels; the flow shift acts afterwards (``flow.noise_level``), so a
logit-normal density is logit-normal before the shift.

Densities of Esser et al., arXiv 2403.03206, section 3.1; TrigFlow of Lu and Song, arXiv 2410.11081.
"""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, PRNGKeyArray
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from sana_jax.errors import UserError

# Which settings each density reads. One that is given and not read is an error.
_SETTINGS_OF = {
    "uniform": (),
    "logit_normal": ("mean", "std"),
    "stretched_logit_normal": ("mean", "std", "p_low", "p_high"),
    "mode": ("mode_scale",),
    "logit_normal_trigflow": ("mean", "std", "sigma_data"),
}
DENSITIES = tuple(_SETTINGS_OF)
_NORMAL_DRAW = ("logit_normal", "logit_normal_trigflow")
# Outside this range the mode density's transform is not monotone (arXiv 2403.03206, section 3.1).
_MODE_SCALE_RANGE = (-1.0, 2.0 / (math.pi - 2.0))


@dataclasses.dataclass(frozen=True)
class TimestepDensity:
    """Which noise levels training visits, and how often.

    Attributes:
      name: ``uniform``; ``logit_normal``, the SANA default; ``stretched_logit_normal``, a logit-normal cut to the
        quantiles [p_low, p_high] and stretched back over [0, 1]; ``mode``, heavy-tailed around the middle;
        ``logit_normal_trigflow``, angles for the consistency models (SANA-Sprint).
      mean: mean of the normal in logit space, or of log tan for TrigFlow.
      std: its standard deviation.
      p_low: lower quantile of the stretched density, in [0, 1).
      p_high: upper quantile of the stretched density, in (p_low, 1].
      mode_scale: s of the mode density, in [-1, 2/(π − 2)]; 1.29 in the paper.
      sigma_data: standard deviation of the data, for TrigFlow.

    Raises:
      UserError: for an unknown name, a value out of range, or a setting that this density does not read.
    """

    name: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    p_low: float | None = None
    p_high: float | None = None
    mode_scale: float | None = None
    sigma_data: float = 0.5

    def __post_init__(self):
        if self.name not in DENSITIES:
            raise UserError(f"timestep density {self.name!r} is not known; choose one of {', '.join(DENSITIES)}")
        read = _SETTINGS_OF[self.name]
        for field in dataclasses.fields(self):
            if field.name != "name" and field.name not in read and getattr(self, field.name) != field.default:
                raise UserError(
                    f"{field.name}={getattr(self, field.name)!r} is not read by the timestep density {self.name!r}, "
                    f"which reads {', '.join(read) or 'no settings'}; remove it or choose another density"
                )
        if not self.std > 0:
            raise UserError(f"std={self.std!r} of the timestep density must be positive; 1.0 is the usual value")
        if not self.sigma_data > 0:
            raise UserError(f"sigma_data={self.sigma_data!r} must be positive; SANA-Sprint uses 0.5")
        if self.name == "stretched_logit_normal":
            low, high = self.p_low, self.p_high
            if low is None or high is None or not 0.0 <= low < high <= 1.0:
                raise UserError(
                    f"stretched_logit_normal needs quantiles 0 <= p_low < p_high <= 1, not p_low={low!r}, "
                    f"p_high={high!r}; set both, e.g. p_low=0.02, p_high=0.98"
                )
        if self.name == "mode":
            scale, (least, most) = self.mode_scale, _MODE_SCALE_RANGE
            if scale is None or not least <= scale <= most:
                raise UserError(
                    f"the mode density needs mode_scale in [{least}, {most:.4f}], not {scale!r}; set it, e.g. to 1.29"
                )


def uniform_density(uniform: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """u = the uniform draw itself."""
    return uniform


def logit_normal_density(normal: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """u = sigmoid(normal), for a draw from N(mean, std²)."""
    return jax.nn.sigmoid(normal)


def stretched_logit_normal_density(
    uniform: Float[Array, "*S"], mean: float, std: float, p_low: float, p_high: float
) -> Float[Array, "*S"]:
    """The logit-normal between two of its quantiles, stretched linearly over [0, 1].

    z = mean + std·Φ⁻¹(p_low + uniform·(p_high − p_low)) is normal, cut to the quantiles;
    u = (sigmoid(z) − sigmoid(z_low)) / (sigmoid(z_high) − sigmoid(z_low)).
    """
    low, high = (_sigmoid_of_quantile(p, mean, std) for p in (p_low, p_high))
    z = mean + std * math.sqrt(2.0) * jax.lax.erf_inv(2.0 * (p_low + uniform * (p_high - p_low)) - 1.0)
    # The reference adds the float32 epsilon to the denominator; it keeps u just below 1.
    return (jax.nn.sigmoid(z) - low) / (high - low + float(np.finfo(np.float32).eps))


def mode_density(uniform: Float[Array, "*S"], mode_scale: float) -> Float[Array, "*S"]:
    """u = 1 − r − s·(cos²(π·r/2) − 1 + r), for a uniform draw r (arXiv 2403.03206, eq. 20)."""
    return 1.0 - uniform - mode_scale * (jnp.square(jnp.cos(math.pi * uniform / 2.0)) - 1.0 + uniform)


def trigflow_density(normal: Float[Array, "*S"], sigma_data: float) -> Float[Array, "*S"]:
    """The TrigFlow angle atan(exp(normal)/sigma_data) in (0, π/2), for a draw from N(mean, std²)."""
    return jnp.arctan(jnp.exp(normal) / sigma_data)


def draw_for_density(key: PRNGKeyArray, shape: tuple[int, ...], density: TimestepDensity) -> Float[Array, "*S"]:
    """The raw float32 draw behind a density: N(mean, std²) for the logit-normal ones that say so, else U[0, 1)."""
    if density.name in _NORMAL_DRAW:
        return density.mean + density.std * jax.random.normal(key, shape, jnp.float32)
    return jax.random.uniform(key, shape, jnp.float32)


def density_from_draw(draw: Float[Array, "*S"], density: TimestepDensity) -> Float[Array, "*S"]:
    """Turns a raw draw of ``draw_for_density`` into u in [0, 1], or into an angle in radians for TrigFlow."""
    match density.name:
        case "uniform":
            return uniform_density(draw)
        case "logit_normal":
            return logit_normal_density(draw)
        case "stretched_logit_normal":
            return stretched_logit_normal_density(draw, density.mean, density.std, density.p_low, density.p_high)
        case "mode":
            return mode_density(draw, density.mode_scale)
        case _:
            return trigflow_density(draw, density.sigma_data)


def sample_density(key: PRNGKeyArray, shape: tuple[int, ...], density: TimestepDensity) -> Float[Array, "*S"]:
    """Draws float32 values of a density: u in [0, 1], or angles in radians for TrigFlow."""
    return density_from_draw(draw_for_density(key, shape, density), density)


def timestep_index(u: Float[Array, "*S"], num_levels: int = NUM_TRAIN_TIMESTEPS) -> Int[Array, "*S"]:
    """The table index floor(num_levels·u), int32, kept within [0, num_levels − 1] (float32 u may round to 1)."""
    return jnp.clip(jnp.floor(u * num_levels).astype(jnp.int32), 0, num_levels - 1)


def sample_timestep_index(
    key: PRNGKeyArray, shape: tuple[int, ...], density: TimestepDensity, num_levels: int = NUM_TRAIN_TIMESTEPS
) -> Int[Array, "*S"]:
    """Draws indices into the unshifted table of levels, int32 in [0, num_levels); feed them to ``flow.noise_level``.

    Raises:
      UserError: for the TrigFlow density, whose draws are angles and not levels of the table.
    """
    require_index_density(density)
    return timestep_index(sample_density(key, shape, density), num_levels)


def require_index_density(density: TimestepDensity) -> None:
    """Raises ``UserError`` for a density whose draws do not index the table of levels."""
    if density.name == "logit_normal_trigflow":
        allowed = ", ".join(name for name in DENSITIES if name != density.name)
        raise UserError(
            f"the density {density.name!r} draws angles, not indices of the table of noise levels; choose one of "
            f"{allowed}, or use sample_density for the angles"
        )


def _sigmoid_of_quantile(probability: float, mean: float, std: float) -> float:
    """sigmoid(mean + std·Φ⁻¹(probability)), with its limits 0 and 1 at the ends."""
    if probability in (0.0, 1.0):
        return probability
    return 1.0 / (1.0 + math.exp(-(mean + std * NormalDist().inv_cdf(probability))))
