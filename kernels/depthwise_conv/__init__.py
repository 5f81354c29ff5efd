"""Depthwise 2-D convolution: ``depthwise_conv2d`` is what networks call."""

from kernels.depthwise_conv.api import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
