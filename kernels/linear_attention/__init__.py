"""ReLU linear attention: ``relu_linear_attention`` is what networks call."""

from kernels.linear_attention.api import relu_linear_attention

__all__ = ["relu_linear_attention"]
