"""SANA 1.6B at 1024 px, trained from scratch or continued from the 512 px model.

    python -m train.main sana_1600m_1024 --encoders MODEL --data.path pictures/

NVlabs/Sana, configs/sana_config/1024ms/Sana_1600M_img1024_CAME8bit: 8-bit CAME (blocks of 2048, from 16384 values on)
at 1e-4, clipping at 0.1, 64 pictures per GPU, which on eight of them is the batch here. Different: bfloat16 instead
of float16, and a moving average. Captions are drawn by CLIP score as in ``sana_600m_512``, and the rate is as it stands
in the file. For 8 x 80 GB (``fsdp=8``), and several such hosts (``data=-1``). With ``finetune --model MODEL
--data.resolution 1024`` training goes on from a 512 px model instead.
"""

from __future__ import annotations

from configs.data import ImageDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    FlowConfig,
    MeshConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
)
from sana_jax.models.sana import SanaConfig

CONFIG = RunConfig(
    preset="sana_1600m_1024",
    run_dir="runs/sana_1600m_1024",
    steps=200_000,
    transformer=SanaConfig.sana_1600m(),
    data=ImageDataConfig(caption_choice="clipscore"),
    batch_size=512,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=3.0),
    optimizer=OptimizerConfig(name="came_8bit", learning_rate=1e-4, warmup_steps=2000, clip_norm=0.1),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=5000),
    preview=PreviewConfig(every=5000),
)
