"""The gated delta rule as Pallas kernels for GPUs, through Triton; values and reverse-mode gradients.

Three parts, each with a gradient of its own: ``pallas_update`` builds every frame's update in one pass over its tokens,
``pallas_scan`` takes the memories through all frames in both directions at once, and ``pallas_read`` has every query
read and divided. Between them there are matrices per frame and head, float32. Products have the precision of float32
whatever the inputs' dtype (``tiles.THREE_PRODUCTS``); inputs of half precision are widened as they are read.

Forward-mode derivatives (``jax.jvp``) are not defined for kernels; ``implementation="xla"`` has them.
"""

from __future__ import annotations

import functools

from kernels.gated_delta_rule import gpu_form
from kernels.gated_delta_rule.pallas_read import read
from kernels.gated_delta_rule.pallas_scan import scan
from kernels.gated_delta_rule.pallas_update import update

gated_delta_rule = functools.partial(gpu_form.run, "pallas", gpu_form.Parts(update, scan, read))
