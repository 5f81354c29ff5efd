"""Trains a ControlNet beside a SANA image model that stays as it is.

    python -m train.main controlnet --model MODEL --data.path photos/ --data.conditions control=canny
    python -m train.main controlnet --model MODEL --data.path pairs.jsonl --data.conditions control=picture

The first takes the pictures' own edges, found on the way into the cache: ``canny`` (thin), ``soft_edges`` (as HED's) or
``scribble`` (coarse strokes). The second takes any pictures, named in the column ``control`` of a manifest. The
published recipe (NVlabs/Sana, configs/sana_controlnet_config: seven copied blocks, CAME at 1e-4, warm-up 30, batches of
16) with AdamW, which is steadier on small data; ``--optimizer.name came`` is the published optimizer. The preset
``digits_controlnet`` is one for a CPU.
"""

from __future__ import annotations

from configs.controlnet import ControlNetConfig
from configs.data import ImageDataConfig
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
    preset="controlnet",
    run_dir="runs/controlnet",
    steps=10_000,
    transformer=None,
    data=ImageDataConfig(conditions=("control=canny",)),
    controlnet=ControlNetConfig(),
    batch_size=16,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=30, clip_norm=0.1),
    ema=EmaConfig(),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(every=1000, guidance_scale=None, captions=4),
)
