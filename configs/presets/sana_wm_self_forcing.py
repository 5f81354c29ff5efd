"""SANA-WM's streaming student, stage 2: it learns on clips of its own, of 43 latent frames (self-forcing).

    python -m train.main sana_wm_self_forcing --model SANA_WM --self-forcing.generator runs/sana_wm_ode \\
        --data.path videos/

NVlabs/Sana, configs/sana_wm/distill/self_forcing_t43: AdamW with betas 0 and 0.999 at 1e-5 (generator) and 2e-6 (fake
score), no weight decay, clipping at 10, five steps of the fake score for one of the generator, which sees all earlier
blocks. The first latent frame is the data's, and so is the camera's path: it is clean, its time is 0, and no loss falls
on it. One exit step for all blocks; the pass that writes the state adds no noise; scores are compared at times bent by
10, between 20 and 980. Real and fake score begin as the bidirectional model, which ``--model`` names. No average of the
weights. Upstream makes a generator's step and one of the fake score together, on two batches, and counts them as one:
its 700 are 840 of these. Its batch is two clips on eight GPUs, whose frames the scores split over four of them
(``--mesh.context 4``); here it is eight.
"""

from __future__ import annotations

from configs.longsana import SelfForcingConfig
from configs.presets.sana_wm_ode import PREVIEW
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    VideoFlowConfig,
)
from configs.world_data import WorldDataConfig
from sana_jax.diffusion.samplers.world_model import DISTILLED_STEPS

CONFIG = RunConfig(
    preset="sana_wm_self_forcing",
    run_dir="runs/sana_wm_self_forcing",
    steps=840,
    transformer=None,
    data=WorldDataConfig(clip_frames=337),
    self_forcing=SelfForcingConfig(
        timesteps=DISTILLED_STEPS,
        flow_shift=None,
        score_flow_shift=None,
        block_frames=3,
        blocks="first_plus_one",
        critic_learning_rate=2e-6,
        timestep_shift=10.0,
        least_normalizer=1e-6,
    ),
    batch_size=8,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(),
    optimizer=OptimizerConfig(learning_rate=1e-5, beta1=0.0, beta2=0.999, clip_norm=10.0),
    ema=EmaConfig(enabled=False),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=420),
    preview=PREVIEW,
)
