"""Options of Sprint training: a flow model distilled to one to four steps (SANA-Sprint, arXiv 2503.09641)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from configs.checks import require


@dataclass(frozen=True)
class SprintConfig:
    """Continuous-time consistency (sCM) plus latent adversarial (LADD) distillation of the base model.

    Steps alternate: the student's on even numbers, the discriminator's on odd ones. Without an adversarial term there
    is no discriminator and every step is the student's.
    """

    scm_weight: float = 1.0
    """Weight of the consistency loss; 0 leaves it out."""
    adversarial_weight: float = 0.5
    """Weight of the adversarial loss; 0 leaves it and the discriminator out."""
    tangent_warmup_steps: int = 4000
    """Steps (of both kinds) over which the student's own derivative comes into the consistency loss; 0 for at once."""
    sigma_data: float = 0.5
    """Standard deviation that latents are scaled to; the sampler's too."""
    generator_mean: float = 0.2
    """Mean of the normal density of log(sigma_data·tan t) from which the student's angles t are drawn."""
    generator_std: float = 1.6
    """Its standard deviation."""
    discriminator_mean: float = -0.6
    """The same for the angles at which the discriminator sees samples."""
    discriminator_std: float = 1.0
    """Its standard deviation."""
    separate_real_angles: bool = False
    """Draw angles of their own for real samples; otherwise they get those of the student's samples."""
    largest_angle: float = 1.57080
    """The angle of pure noise, where sampling begins."""
    largest_angle_probability: float = 0.5
    """Share of samples of the adversarial term that begin there, so that one step is trained directly."""
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    """Guidance scales to draw from, with equal chances: the teacher uses one, the student is told which."""
    head_blocks: tuple[int, ...] = (2, 8, 14, 19)
    """Blocks of the teacher, from 0, whose outputs a discriminator head reads."""
    virtual_batch: int = 8
    """Samples over which the heads normalise."""
    misaligned_pairs: bool = True
    """Also show the discriminator real samples with the captions of others, as false ones."""
    r1_weight: float = 0.0
    """Weight of the penalty on the heads' gradient at real samples; 1e-5 in one published recipe, 0 leaves it out."""
    adversarial_loss: Literal["hinge", "cross_entropy"] = "hinge"
    """How the discriminator's answers are scored."""
    discriminator_learning_rate: float | None = None
    """Learning rate of the heads; None for that of the student."""

    def __post_init__(self):
        require("sprint.scm-weight", self.scm_weight, self.scm_weight >= 0, "0 or more")
        require("sprint.adversarial-weight", self.adversarial_weight, self.adversarial_weight >= 0, "0 or more")
        weights = self.scm_weight + self.adversarial_weight
        require("sprint.scm-weight", self.scm_weight, weights > 0, "above 0 where --sprint.adversarial-weight is 0")
        require("sprint.tangent-warmup-steps", self.tangent_warmup_steps, self.tangent_warmup_steps >= 0, "0 or more")
        for name in ("sigma_data", "generator_std", "discriminator_std"):
            require(f"sprint.{name}", getattr(self, name), 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("generator_mean", "discriminator_mean"):
            require(f"sprint.{name}", getattr(self, name), math.isfinite(getattr(self, name)), "a finite number")
        # the published constant is a little above π/2
        require(
            "sprint.largest-angle", self.largest_angle, 0 < self.largest_angle <= 1.571, "above 0, at most 1.5708 (π/2)"
        )
        probability = self.largest_angle_probability
        require("sprint.largest-angle-probability", probability, 0 <= probability <= 1, "0 to 1")
        scales = self.guidance_scales
        require(
            "sprint.guidance-scales", scales, len(scales) > 0 and all(s >= 0 for s in scales), "one or more, 0 or more"
        )
        blocks = self.head_blocks
        distinct = len(blocks) > 0 and len(set(blocks)) == len(blocks) and min(blocks) >= 0
        require("sprint.head-blocks", blocks, distinct, "one or more different numbers of blocks, from 0")
        require("sprint.virtual-batch", self.virtual_batch, self.virtual_batch >= 1, "1 or more")
        require("sprint.r1-weight", self.r1_weight, self.r1_weight >= 0, "0 or more")
        rate = self.discriminator_learning_rate
        require(
            "sprint.discriminator-learning-rate", rate, rate is None or 0 < rate < 1, "above 0 and below 1, or None"
        )
        if not self.adversarial:
            used = {"discriminator_learning_rate": None, "r1_weight": 0.0}
            for name, unused in used.items():
                value = getattr(self, name)
                require(f"sprint.{name}", value, value == unused, f"{unused} where --sprint.adversarial-weight is 0")

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversarial_weight > 0
