"""Adaptive layer norm: ``modulated_norm`` and ``gated_residual`` are what networks call around their layers."""

from kernels.adaln.api import gated_residual, modulated_norm

__all__ = ["gated_residual", "modulated_norm"]
