"""Softmax attention: ``softmax_attention`` is what networks call, whichever implementation runs it."""

from kernels.softmax_attention.api import softmax_attention

__all__ = ["softmax_attention"]
