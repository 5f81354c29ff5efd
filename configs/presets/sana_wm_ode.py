"""SANA-WM's streaming student, stage 1: it learns to end its teacher's trajectories in four steps, in causal blocks.

    python -m train.make_trajectories --model SANA_WM --data clips-cache/ --frames 337 --out trajectories/ \\
        --num-steps 60 --flow-shift 9.8 --snap --timesteps 1000 967 908 764
    python -m train.main sana_wm_ode --model SANA_WM_CHUNK_CAUSAL --data.path trajectories/

NVlabs/Sana, configs/sana_wm/distill/ode_t43: AdamW at 2e-5 with betas 0.9 and 0.999 and a weight decay of 0.01,
clipping at 1, 3,000 steps, clips of 43 latent frames (337 frames) in blocks of three, of which the first has one more
and begins with the given frame; states at the timesteps 1000, 967, 908 and 764, of level timestep/1000; no average of
the weights, one clip for each of eight GPUs. There the weights and the optimizer's memory are bfloat16, here float32.
"""

from __future__ import annotations

from configs.longsana import OdeInitializationConfig
from configs.longsana_data import TrajectoriesDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    MeshConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    VideoFlowConfig,
)
from sana_jax.diffusion.samplers.world_model import DISTILLED_STEPS

PREVIEW = PreviewConfig(
    every=600, sampler="world_stream", num_inference_steps=4, guidance_scale=1.0, captions=1, per_caption=1
)

CONFIG = RunConfig(
    preset="sana_wm_ode",
    run_dir="runs/sana_wm_ode",
    steps=3000,
    transformer=None,
    data=TrajectoriesDataConfig(),
    ode=OdeInitializationConfig(
        timesteps=DISTILLED_STEPS, flow_shift=None, block_frames=3, blocks="first_plus_one", clean_first_frame=True
    ),
    batch_size=8,
    seed=42,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(),
    optimizer=OptimizerConfig(learning_rate=2e-5, beta1=0.9, beta2=0.999, weight_decay=0.01, clip_norm=1.0),
    ema=EmaConfig(enabled=False),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=600),
    preview=PREVIEW,
)
