"""LongSANA's stage 2 in miniature, on a CPU: the four-step generator learns on clips of its own.

    python -m train.main moving_digits_self_forcing --model runs/moving_digits \\
        --self-forcing.generator runs/moving_digits_ode
    python -m train.evaluate_moving_digits --model runs/moving_digits_self_forcing --frames 40
"""

from __future__ import annotations

from configs.data import MovingDigitsDataConfig
from configs.longsana import SelfForcingConfig
from configs.presets.moving_digits_ode import BLOCK_FRAMES, FLOW_SHIFT, PREVIEW, TIMESTEPS
from configs.schema import CheckpointConfig, EmaConfig, OptimizerConfig, RunConfig, VideoFlowConfig

CONFIG = RunConfig(
    preset="moving_digits_self_forcing",
    run_dir="runs/moving_digits_self_forcing",
    steps=360,
    transformer=None,
    data=MovingDigitsDataConfig(),
    self_forcing=SelfForcingConfig(
        timesteps=TIMESTEPS,
        flow_shift=FLOW_SHIFT,
        score_flow_shift=FLOW_SHIFT,
        block_frames=BLOCK_FRAMES,
        num_cached_blocks=2,
        guidance=1.0,
        timestep_shift=FLOW_SHIFT,
        critic_learning_rate=4e-4,
    ),
    batch_size=16,
    flow=VideoFlowConfig(),
    optimizer=OptimizerConfig(learning_rate=2e-4, beta1=0.0, beta2=0.999, clip_norm=10.0),
    ema=EmaConfig(decay=0.9, warmup=False, start=120),
    checkpoint=CheckpointConfig(every=120),
    preview=PREVIEW,
)
