"""SANA-Video 2B learns the look of one cartoon from clips with one caption for all: a LoRA on all linear layers.

    python -m train.main tom_and_jerry_lora --model MODEL --data.path clips/

Clips of 81 frames at 224x224 pixels, 4,116 tokens each in batches of 8; a LoRA of rank 16 and scale 2 with dropout,
12.0 million parameters. A step takes 15.7 GB, or 5.9 GB with ``--accumulation 8`` (``--plan=h100``).
Previews show the class prompt with the same noise before the first step and at six more. ``--optimizer.name
adamw_8bit`` keeps the optimizer's state in a quarter of its memory; where the loss explodes early on,
``--optimizer.warmup-steps 500`` helps. Five prompts show at every checkpoint what is left of the model's other words:

    python -m train.compare runs/tom_and_jerry_lora --checkpoint-steps all --seeds 32420 --guidance-scales 4 \\
        --binning off --prompts-file configs/presets/tom_and_jerry_prompts.txt
"""

from __future__ import annotations

from configs.data import VideoDataConfig
from configs.lora import LoraConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    VideoFlowConfig,
)

CONFIG = RunConfig(
    preset="tom_and_jerry_lora",
    run_dir="runs/tom_and_jerry_lora",
    steps=10_000,
    transformer=None,
    data=VideoDataConfig(caption="a tom and jerry cartoon", clip_frames=81, clip_size=(224, 224)),
    lora=LoraConfig(rank=16, alpha=32.0, dropout=0.1, targets=("all_linear",)),
    batch_size=8,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(flow_shift=3.0),
    optimizer=OptimizerConfig(learning_rate=2e-4),
    ema=EmaConfig(enabled=False),
    checkpoint=CheckpointConfig(every=500, keep_every=2500),
    preview=PreviewConfig(
        every=10_000,
        at=(100, 1000, 2000, 5000, 7500),
        per_caption=1,
        num_inference_steps=50,
        guidance_scale=4.0,
        seed=69420,
    ),
)
