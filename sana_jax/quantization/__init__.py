"""Networks whose dense layers are stored, and where the device can, multiplied, in 8 or 4 bits.

``formats`` says how a kernel is stored, ``products`` how it is multiplied, ``trees`` which leaves of a network's
parameters are stored so, ``choice`` what a user asks for, ``weights`` how weights are read into it. The dense layer
itself is ``sana_jax.nn.linear.Linear``, which looks at what its parameters are.
"""

from __future__ import annotations

from sana_jax.quantization.formats import FORMATS, dequantize_kernel, quantize_kernel
from sana_jax.quantization.products import quantized_product

__all__ = ["FORMATS", "dequantize_kernel", "quantize_kernel", "quantized_product"]
