"""ReLU linear attention, plain and with rotary positions: what networks call."""

from kernels.linear_attention.api import relu_linear_attention, rope_linear_attention

__all__ = ["relu_linear_attention", "rope_linear_attention"]
