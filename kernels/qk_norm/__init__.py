"""RMS norm of queries or keys over all heads together, with what may follow it: ``qk_norm`` is what networks call."""

from kernels.qk_norm.api import qk_norm

__all__ = ["qk_norm"]
