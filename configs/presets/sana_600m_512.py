"""SANA 0.6B at 512 px, trained from scratch.

    python -m train.main sana_600m_512 --encoders MODEL --data.path pictures/

NVlabs/Sana, configs/sana_config/512ms/Sana_600M_img512: CAME at 1e-4 after a warm-up of 2000, clipping at 0.1, shift
3, logit-normal noise levels, a tenth of the captions dropped, and of a picture's captions one drawn by CLIP score
(``clipscore``; pictures without scores have the caption of kind ``prompt``, or the first). Different here: bfloat16
instead of float16, a moving average of the weights, and batches of 1024 in all, which is the file's 128 per GPU on
eight of them. The file's rule that scales the rate with the square root of batch / 256 is left to
``--optimizer.learning-rate``.

For 8 x 80 GB: every GPU holds a copy of the model (about 10 GB with CAME, average and gradients).
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
    preset="sana_600m_512",
    run_dir="runs/sana_600m_512",
    steps=200_000,
    transformer=SanaConfig.sana_600m(sample_size=16),
    data=ImageDataConfig(caption_choice="clipscore"),
    batch_size=1024,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=3.0),
    optimizer=OptimizerConfig(name="came", learning_rate=1e-4, warmup_steps=2000, clip_norm=0.1),
    mesh=MeshConfig(data=-1),
    checkpoint=CheckpointConfig(every=5000),
    preview=PreviewConfig(every=5000),
)
