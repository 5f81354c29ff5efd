"""Distillation of a world model in miniature, on a CPU, stage 2: the four-step student learns on clips of its own.

    python -m train.main moving_camera_self_forcing --model runs/moving_camera \\
        --self-forcing.generator runs/moving_camera_ode
"""

from __future__ import annotations

from configs.longsana import SelfForcingConfig
from configs.moving_camera import MovingCameraDataConfig
from configs.presets.moving_camera_ode import BLOCK_FRAMES, BLOCKS, PREVIEW, TIMESTEPS
from configs.schema import CheckpointConfig, EmaConfig, OptimizerConfig, RunConfig, VideoFlowConfig

CONFIG = RunConfig(
    preset="moving_camera_self_forcing",
    run_dir="runs/moving_camera_self_forcing",
    steps=360,
    transformer=None,
    data=MovingCameraDataConfig(),
    self_forcing=SelfForcingConfig(
        timesteps=TIMESTEPS,
        flow_shift=None,
        score_flow_shift=None,
        block_frames=BLOCK_FRAMES,
        blocks=BLOCKS,
        num_cached_blocks=2,
        sink=True,
        guidance=0.0,
        timestep_shift=6.0,
        least_normalizer=1e-6,
        critic_learning_rate=4e-4,
    ),
    batch_size=16,
    flow=VideoFlowConfig(),
    optimizer=OptimizerConfig(learning_rate=2e-4, beta1=0.0, beta2=0.999, clip_norm=10.0),
    ema=EmaConfig(decay=0.9, warmup=False, start=120),
    checkpoint=CheckpointConfig(every=120),
    preview=PREVIEW,
)
