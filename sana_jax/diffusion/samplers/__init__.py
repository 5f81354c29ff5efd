from sana_jax.diffusion.samplers.base import LatentState, Sampler, Schedule
from sana_jax.diffusion.samplers.dpm_solver import DPMSolver, DPMState, DPMTables
from sana_jax.diffusion.samplers.flow_euler import FlowEuler
from sana_jax.diffusion.samplers.longsana import LongSanaSampler
from sana_jax.diffusion.samplers.scheduler_config import (
    SAMPLERS,
    from_scheduler_config,
    make_sampler,
    to_scheduler_config,
)
from sana_jax.diffusion.samplers.scm import SCM, SCMState, SCMTables
from sana_jax.diffusion.samplers.world_model import WorldStreamSampler

__all__ = [
    "SAMPLERS",
    "SCM",
    "DPMSolver",
    "DPMState",
    "DPMTables",
    "FlowEuler",
    "LatentState",
    "LongSanaSampler",
    "SCMState",
    "SCMTables",
    "Sampler",
    "Schedule",
    "WorldStreamSampler",
    "from_scheduler_config",
    "make_sampler",
    "to_scheduler_config",
]
