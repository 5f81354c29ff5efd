"""The gated delta rule of one update per frame, over time in both directions, with a carried state of constant size."""

from kernels.gated_delta_rule.api import gated_delta_rule
from kernels.gated_delta_rule.state import DeltaState, init_state
from kernels.gated_delta_rule.updates import FrameUpdate, compose, frame_update, identity_update

__all__ = ["DeltaState", "FrameUpdate", "compose", "frame_update", "gated_delta_rule", "identity_update", "init_state"]
