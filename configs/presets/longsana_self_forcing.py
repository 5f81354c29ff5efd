"""LongSANA, stage 2: the four-step generator learns on whole videos of its own (self-forcing).

    python -m train.main longsana_self_forcing --model TEACHER --self-forcing.generator runs/longsana_ode \\
        --data.path prompts.txt

NVlabs/Sana, configs/sana_video_config/longsana/480ms/self_forcing: on 64 GPUs with one video each, AdamW with betas 0
and 0.999 at 1e-5 (generator) and 2e-6 (fake score), clipping at 10, five steps of the fake score for one of the
generator, an average of 0.99 from upstream's step 200, videos of 81 frames (21 latent frames), and behind the prompts
motion score 10, which generator and both scores are told.

Different here: upstream makes a generator's step and one of the fake score together and counts them as one; each is a
step here, so that its 200 are 240 of these. The unconditional branch of the real score is told no text unless
``--data.negative-prompt "..."`` names one; upstream's is ``negative_prompt`` in the file above. The 12,000 steps are
this preset's own.
"""

from __future__ import annotations

from configs.longsana import SelfForcingConfig
from configs.longsana_data import PromptsDataConfig
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
    preset="longsana_self_forcing",
    run_dir="runs/longsana_self_forcing",
    steps=12_000,
    transformer=None,
    data=PromptsDataConfig(motion_score=10),
    self_forcing=SelfForcingConfig(critic_learning_rate=2e-6),
    batch_size=64,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(),
    optimizer=OptimizerConfig(learning_rate=1e-5, beta1=0.0, beta2=0.999, clip_norm=10.0),
    ema=EmaConfig(decay=0.99, warmup=False, start=240),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=1200),
    preview=PreviewConfig(
        every=1200, sampler="longsana", num_inference_steps=4, guidance_scale=1.0, captions=2, per_caption=1
    ),
)
