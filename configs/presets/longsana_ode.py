"""LongSANA, stage 1: a SANA-Video learns to end its teacher's trajectories in four steps, in causal blocks.

    python -m train.make_trajectories --model TEACHER --prompts prompts.txt --motion-score 10 --out trajectories/ \\
        [--negative-prompt "..."]
    python -m train.main longsana_ode --model TEACHER --data.path trajectories/

NVlabs/Sana, configs/sana_video_config/longsana/480ms/ode: AdamW at 2e-5 with betas 0.9 and 0.999, clipping at 10,
10,000 steps, clips of 81 frames (21 latent frames) in blocks of 10, states at the timesteps 1000, 960, 889 and 727 of
48 steps. The model may also be one that ``longsana_chunk_causal`` has trained. Upstream's student is told the prompts
with motion score 10: ``--motion-score 10`` above tells it to teacher and student.

Different here: the batch, one clip for each of 64 GPUs, and a moving average of the weights are this preset's own. The
teacher's unconditional branch is told no text unless ``--negative-prompt`` says otherwise; upstream's file names a
negative prompt, ``negative_prompt``.
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

CONFIG = RunConfig(
    preset="longsana_ode",
    run_dir="runs/longsana_ode",
    steps=10_000,
    transformer=None,
    data=TrajectoriesDataConfig(),
    ode=OdeInitializationConfig(),
    batch_size=64,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(),
    optimizer=OptimizerConfig(learning_rate=2e-5, beta1=0.9, beta2=0.999, clip_norm=10.0),
    ema=EmaConfig(decay=0.99),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(
        every=1000, sampler="longsana", num_inference_steps=4, guidance_scale=1.0, captions=2, per_caption=1
    ),
)
