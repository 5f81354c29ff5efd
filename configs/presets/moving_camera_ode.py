"""Distillation of a world model in miniature, on a CPU, stage 1: the moving camera in four steps, two frames after two.

    python -m train.make_trajectories --model runs/moving_camera --out runs/moving_camera_trajectories \\
        --num-clips 512 --num-steps 20 --flow-shift 9.95 --timesteps 1000 968 909 768
    python -m train.main moving_camera_ode --model runs/moving_camera
"""

from __future__ import annotations

from configs.longsana import OdeInitializationConfig
from configs.longsana_data import TrajectoriesDataConfig
from configs.schema import CheckpointConfig, EmaConfig, OptimizerConfig, PreviewConfig, RunConfig, VideoFlowConfig

TIMESTEPS, BLOCK_FRAMES, BLOCKS = (1000, 968, 909, 768), 2, "first_plus_one"
PREVIEW = PreviewConfig(
    every=200, sampler="world_stream", num_inference_steps=4, guidance_scale=1.0, captions=4, per_caption=1
)

CONFIG = RunConfig(
    preset="moving_camera_ode",
    run_dir="runs/moving_camera_ode",
    steps=400,
    transformer=None,
    data=TrajectoriesDataConfig(path="runs/moving_camera_trajectories"),
    ode=OdeInitializationConfig(
        timesteps=TIMESTEPS, flow_shift=None, block_frames=BLOCK_FRAMES, blocks=BLOCKS, clean_first_frame=True
    ),
    batch_size=16,
    flow=VideoFlowConfig(),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=20),
    ema=EmaConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=200),
    preview=PREVIEW,
)
