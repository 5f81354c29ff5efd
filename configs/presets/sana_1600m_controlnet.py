"""A ControlNet beside SANA 1.6B at 1024 px, by the published recipe.

    python -m train.main sana_1600m_controlnet --model MODEL --data.path photos/

NVlabs/Sana, configs/sana_controlnet_config/Sana_1600M_1024px_controlnet_bf16: seven copied blocks, CAME at 1e-4 after
a warm-up of 30, 16 pictures, controlled by scribbles. These are found here in the pictures themselves, by a detector
that is not the file's (``--data.conditions control=picture`` takes them from a manifest); the published weights are for
HED edges, which ``control=soft_edges`` is like. The file's batch may be for each GPU, and a moving average is added.
The preset ``controlnet`` is the same for any model, with AdamW. For one GPU of 80 GB.
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
from sana_jax.models.sana import SanaConfig

CONFIG = RunConfig(
    preset="sana_1600m_controlnet",
    run_dir="runs/sana_1600m_controlnet",
    steps=50_000,
    transformer=SanaConfig.sana_1600m(),
    data=ImageDataConfig(conditions=("control=scribble",)),
    controlnet=ControlNetConfig(num_layers=7),
    batch_size=16,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(name="came", learning_rate=1e-4, warmup_steps=30, clip_norm=0.1),
    ema=EmaConfig(),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(every=1000, guidance_scale=None, captions=4),
)
