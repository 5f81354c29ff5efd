"""LongSANA's stage 1 in miniature, on a CPU: the moving digits in four steps, two frames after two.

    python -m train.make_trajectories --model runs/moving_digits --per-caption 16 \\
        --out runs/moving_digits_trajectories --num-steps 20 --flow-shift 6 --timesteps 1000 947 857 667
    python -m train.main moving_digits_ode --model runs/moving_digits
"""

from __future__ import annotations

from configs.longsana import OdeInitializationConfig
from configs.longsana_data import TrajectoriesDataConfig
from configs.schema import CheckpointConfig, EmaConfig, OptimizerConfig, PreviewConfig, RunConfig, VideoFlowConfig

# Steps k/4 at the teacher's flow shift of 6.
TIMESTEPS, FLOW_SHIFT, BLOCK_FRAMES = (1000, 947, 857, 667), 6.0, 2
PREVIEW = PreviewConfig(every=200, sampler="longsana", num_inference_steps=4, guidance_scale=1.0, per_caption=1)

CONFIG = RunConfig(
    preset="moving_digits_ode",
    run_dir="runs/moving_digits_ode",
    steps=400,
    transformer=None,
    data=TrajectoriesDataConfig(path="runs/moving_digits_trajectories"),
    ode=OdeInitializationConfig(timesteps=TIMESTEPS, flow_shift=FLOW_SHIFT, block_frames=BLOCK_FRAMES),
    batch_size=16,
    flow=VideoFlowConfig(),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=20),
    ema=EmaConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=200),
    preview=PREVIEW,
)
