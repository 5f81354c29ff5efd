"""How parameters are updated: which optimizer, its settings, learning rates, and what is trained at all."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Literal

from configs.checks import require
from sana_jax.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with decoupled weight decay, a learning-rate schedule and clipping by the global norm."""

    name: Literal["adamw", "adamw_8bit", "came", "came_8bit", "lion", "muon", "prodigy", "schedule_free_adamw"] = (
        "adamw"
    )
    """Which optimizer. A setting below that it does not read must be left alone."""
    learning_rate: float = 1e-4
    """Peak learning rate; with prodigy a factor on the rate that it estimates, usually 1."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to final_learning_rate at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0; a tenth of a run that would end before that, which is said."""
    final_learning_rate: float = 0.0
    """Where cosine and linear schedules end."""
    learning_rates: tuple[str, ...] = ()
    """PATTERN=VALUE: parameters whose whole path matches PATTERN have the peak learning rate VALUE (the rate itself,
    not a factor) instead of learning_rate, with the same shape of schedule."""
    beta1: float | None = None
    """Decay of the first moment; None for the optimizer's own, 0.9."""
    beta2: float | None = None
    """Decay of the second moment; None for the optimizer's own: 0.999, lion 0.99."""
    beta3: float | None = None
    """came, came_8bit: decay of the instability, None for 0.9999. prodigy: decay of its sums, None for sqrt(beta2)."""
    epsilon: float | None = None
    """Added to the root of the second moment; None for the optimizer's own: adamw and adamw_8bit 1e-10, muon (for
    what is no matrix), prodigy and schedule_free_adamw 1e-8."""
    came_epsilon_gradient: float = 1e-30
    """came, came_8bit: added to the squared gradient."""
    came_epsilon_residual: float = 1e-16
    """came, came_8bit: added to the squared distance of an update from the average update."""
    came_clip_threshold: float = 1.0
    """came, came_8bit: root mean square to which the update of each parameter is scaled down before averaging."""
    block_size: int | None = None
    """adamw_8bit: most values of the last axis that share a scale, None for 256. came_8bit: output channels of a
    matrix that share one, None for 2048."""
    min_8bit_size: int | None = None
    """adamw_8bit, came_8bit: parameters of at most so many values in a layer keep float32 moments; None for 4096
    and 16384."""
    muon_momentum: float = 0.95
    """muon: decay of the matrices' momentum."""
    muon_steps: int = 5
    """muon: Newton-Schulz iterations."""
    muon_update_rms: float | None = None
    """muon: scale the updates of matrices to this root mean square (0.2 is AdamW's, arXiv 2502.16982, and takes AdamW's
    learning rates); None scales by sqrt(max(1, outputs / inputs)), whose learning rates are near 0.02."""
    prodigy_initial_estimate: float = 1e-6
    """prodigy: first estimate of the learning rate."""
    prodigy_coefficient: float = 1.0
    """prodigy: factor on the estimate."""
    prodigy_safeguard_warmup: bool = False
    """prodigy: leave the schedule out of the estimate's denominator; for runs with a warm-up."""
    schedule_free_weight_power: float = 2.0
    """schedule_free_adamw: power of the learning rate by which a step counts in the average."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    no_decay: tuple[str, ...] = (
        *(r".*/bias", r".*/scale", r".*scale_shift_table"),
        *(r"tokens/.*/null", r"tokens/.*/attention_weight"),
    )
    """Path patterns (regular expressions that match a parameter's whole path) without weight decay."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this norm over all trained parameters; None for no clipping."""
    frozen: tuple[str, ...] = ()
    """Path patterns of parameters that are not trained."""
    trained: tuple[str, ...] = ()
    """Path patterns of the only parameters that are trained; without any, all but the frozen ones are."""


_ADAM = ("beta1", "beta2", "epsilon")
_CAME = ("beta1", "beta2", "beta3", "came_epsilon_gradient", "came_epsilon_residual", "came_clip_threshold")
_EIGHT_BIT = ("block_size", "min_8bit_size")
# The settings of its own that each optimizer reads; all others are common to all.
READS: dict[str, tuple[str, ...]] = {
    "adamw": _ADAM,
    "adamw_8bit": (*_ADAM, *_EIGHT_BIT),
    "came": _CAME,
    "came_8bit": (*_CAME, *_EIGHT_BIT),
    "lion": ("beta1", "beta2"),
    "muon": (*_ADAM, "muon_momentum", "muon_steps", "muon_update_rms"),
    "prodigy": (
        *(*_ADAM, "beta3", "prodigy_initial_estimate"),
        *("prodigy_coefficient", "prodigy_safeguard_warmup"),
    ),
    "schedule_free_adamw": (*_ADAM, "schedule_free_weight_power"),
}
_COMMON_DEFAULTS = {"beta1": 0.9, "beta2": 0.999, "beta3": None, "epsilon": 1e-8}
_DEFAULTS: dict[str, dict] = {
    "adamw": {"epsilon": 1e-10},
    "adamw_8bit": {"epsilon": 1e-10, "block_size": 256, "min_8bit_size": 4096},
    "came": {"beta3": 0.9999},
    "came_8bit": {"beta3": 0.9999, "block_size": 2048, "min_8bit_size": 16384},
    "lion": {"beta2": 0.99},
}


def setting(config: OptimizerConfig, name: str):
    """A setting's value: as configured, or for None the optimizer's own default."""
    value = getattr(config, name)
    return value if value is not None else {**_COMMON_DEFAULTS, **_DEFAULTS.get(config.name, {})}.get(name)


def own_learning_rates(config: OptimizerConfig) -> dict[str, float]:
    """``learning_rates`` as peak rate by pattern.

    Raises:
        UserError: an entry that is not PATTERN=VALUE with a value above 0 and below 1, or a pattern that comes twice.
    """
    rates: dict[str, float] = {}
    for entry in config.learning_rates:
        pattern, equals, text = entry.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (equals and pattern and 0 < value < 1):
            raise UserError(
                f"--optimizer.learning-rates {entry!r} is not PATTERN=VALUE with a learning rate above 0 and below 1; "
                "write for example '.*/attn1/.*=1e-5', and use --optimizer.frozen for what is not to be trained"
            )
        if pattern in rates:
            raise UserError(f"--optimizer.learning-rates names the pattern {pattern!r} twice; keep one of them")
        rates[pattern] = value
    return rates


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises ``UserError`` for values out of range, and for settings that the chosen optimizer does not read."""
    c = config
    is_prodigy = c.name == "prodigy"
    if is_prodigy:
        allowed = "0.01 to 10 with --optimizer.name prodigy, where it is a factor on the estimated rate, usually 1"
        require("optimizer.learning-rate", c.learning_rate, 0.01 <= c.learning_rate <= 10, allowed)
    else:
        require("optimizer.learning-rate", c.learning_rate, 0 < c.learning_rate < 1, "above 0 and below 1")
    final, falls = c.final_learning_rate, c.schedule != "constant"
    require("optimizer.final-learning-rate", final, 0 <= final < 1, "0 up to, not including, 1")
    require("optimizer.final-learning-rate", final, falls or final == 0, "0 where --optimizer.schedule is constant")
    require("optimizer.final-learning-rate", final, final <= c.learning_rate, f"0 to the peak, {c.learning_rate}")
    require("optimizer.warmup-steps", c.warmup_steps, c.warmup_steps >= 0, "0 or more")
    require("optimizer.weight-decay", c.weight_decay, c.weight_decay >= 0, "0 or more")
    require("optimizer.clip-norm", c.clip_norm, c.clip_norm is None or c.clip_norm > 0, "above 0, or None")
    _check_read(c)
    for beta in ("beta1", "beta2", "beta3", "muon_momentum"):
        value = getattr(c, beta)
        require(f"optimizer.{_option(beta)}", value, value is None or 0 <= value < 1, "0 up to, not including, 1")
    positive = ("epsilon", "came_epsilon_gradient", "came_epsilon_residual", "came_clip_threshold", "muon_update_rms")
    for name in (*positive, "prodigy_initial_estimate", "prodigy_coefficient"):
        value = getattr(c, name)
        require(f"optimizer.{_option(name)}", value, value is None or 0 < value < math.inf, "above 0")
    block, smallest, power = c.block_size, c.min_8bit_size, c.schedule_free_weight_power
    require("optimizer.block-size", block, block is None or block >= 16, "16 or more")
    require("optimizer.min-8bit-size", smallest, smallest is None or smallest >= 1, "1 or more")
    require("optimizer.muon-steps", c.muon_steps, 1 <= c.muon_steps <= 20, "1 to 20")
    require("optimizer.schedule-free-weight-power", power, 0 <= power < math.inf, "0 or more")
    own = own_learning_rates(c)
    if c.name == "schedule_free_adamw":
        require("optimizer.schedule", c.schedule, not falls, f"constant with --optimizer.name {c.name}, which averages")
        require("optimizer.beta1", c.beta1, c.beta1 != 0, f"above 0 with --optimizer.name {c.name}")
    allowed = "none with --optimizer.name prodigy, which estimates one rate for all"
    require("optimizer.learning-rates", " ".join(c.learning_rates), not (is_prodigy and own), allowed)
    allowed = "none together with --optimizer.frozen, which says the opposite"
    require("optimizer.trained", " ".join(c.trained), not (c.trained and c.frozen), allowed)


def _check_read(config: OptimizerConfig) -> None:
    defaults = {field.name: field.default for field in fields(config)}
    own_settings = {name for names in READS.values() for name in names}
    for name in (name for name in defaults if name in own_settings - set(READS[config.name])):
        value, readers = getattr(config, name), [reader for reader, names in READS.items() if name in names]
        allowed = (
            f"its default, {defaults[name]}, with --optimizer.name {config.name}, which does not read it "
            f"({', '.join(readers)} {'do' if len(readers) > 1 else 'does'})"
        )
        require(f"optimizer.{_option(name)}", value, value == defaults[name], allowed)


def _option(name: str) -> str:
    return re.sub("_", "-", name)
