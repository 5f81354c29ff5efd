"""What a block's backward pass keeps and what it computes again, by name."""

from __future__ import annotations

import flax.linen as nn
import jax

from sana_jax.errors import UserError

# The name under which a block passes its input through ``jax.ad_checkpoint.checkpoint_name``.
BLOCK_INPUT = "block_input"

# From fastest and largest to slowest and smallest.
REMAT_POLICIES = {
    "none": None,  # keep every intermediate
    "dots": jax.checkpoint_policies.dots_saveable,  # keep the results of matrix products
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # only those against weights
    "full": jax.checkpoint_policies.nothing_saveable,  # keep a block's input alone
    # keep it in host memory, which a GPU's copies overlap; on a CPU that is the same memory
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat_block(
    block_class: type[nn.Module], policy: str, static_arguments: tuple[int, ...] = (), *, scanned: bool = True
) -> type[nn.Module]:
    """Wraps a module class so that its call is rematerialised under the named policy.

    Args:
        block_class: the module class.
        policy: a key of ``REMAT_POLICIES``.
        static_arguments: positions of arguments that are not arrays, counting ``self`` as 0.
        scanned: whether the blocks run inside a scan, where nothing can be commoned up across iterations; elsewhere a
            barrier keeps the compiler from undoing the rematerialisation.

    Raises:
        UserError: for a name that is not in the table.
    """
    if policy not in REMAT_POLICIES:
        raise UserError(f"remat={policy!r}: choose one of {', '.join(REMAT_POLICIES)}")
    if policy == "none":
        return block_class
    return nn.remat(
        block_class, policy=REMAT_POLICIES[policy], static_argnums=static_arguments, prevent_cse=not scanned
    )
