"""The middle of a Mix-FFN: ``mix_ffn`` is what networks call between its two pointwise products."""

from kernels.mix_ffn.api import mix_ffn

__all__ = ["mix_ffn"]
