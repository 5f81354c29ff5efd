"""Block-causal ReLU linear attention with rotary positions and a recurrent state of constant size."""

from kernels.block_linear_attention.api import block_linear_attention
from kernels.block_linear_attention.state import BlockSums, init_block_sums

__all__ = ["BlockSums", "block_linear_attention", "init_block_sums"]
