"""Teaches a SANA image model a subject from a few pictures: DreamBooth by LoRA, with prior preservation.

    python -m train.main dreambooth --model MODEL --data.path dog/ --data.caption "a photo of sks dog" \\
        --prior.caption "a photo of a dog"

Rank, targets, learning rate, decay, uniform noise levels and number of pictures of the class are those of diffusers'
script (examples/dreambooth/train_dreambooth_lora_sana.py, its README's run of 500 steps). What differs: the flow shift
is the base model's, where the script trains unshifted. Prompts have the base model's instruction before them, as in
sampling, where the script encodes them bare. The loss is the mean over subject and class, which is half of the script's
sum, and counts under AdamW for clipping alone. AdamW keeps its state in full (``--optimizer.name adamw_8bit`` as the
README's run), and clipping is at 1 in both.
"""

from __future__ import annotations

from configs.data import ImageDataConfig
from configs.lora import LoraConfig
from configs.prior import PriorConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    FlowConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
)

CONFIG = RunConfig(
    preset="dreambooth",
    run_dir="runs/dreambooth",
    steps=500,
    transformer=None,
    data=ImageDataConfig(),
    lora=LoraConfig(rank=4, targets=("qkv",)),
    prior=PriorConfig(),
    batch_size=4,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None, density="uniform", caption_dropout=0.0),
    optimizer=OptimizerConfig(learning_rate=1e-4, epsilon=1e-8, weight_decay=1e-4),
    ema=EmaConfig(enabled=False),
    checkpoint=CheckpointConfig(every=250),
    preview=PreviewConfig(every=100, guidance_scale=None, captions=4),
)
