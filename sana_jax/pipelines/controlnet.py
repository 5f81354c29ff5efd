"""Text to image along a control picture (edges, depth, a sketch): ``SanaControlNetPipeline``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sana_jax.errors import UserError
from sana_jax.models.controlnet import SanaControlNet
from sana_jax.pipelines.base import SanaPipelineOutput
from sana_jax.pipelines.image_inputs import read_pictures
from sana_jax.pipelines.memory_plan import MemoryBudget
from sana_jax.pipelines.opening import open_model
from sana_jax.pipelines.residency import CONTROLNET, Residency
from sana_jax.pipelines.sampling_function import Network
from sana_jax.pipelines.text_to_image import SanaPipeline, TextToImageRequest
from sana_jax.weights.components import Resident


class SanaControlNetPipeline(SanaPipeline):
    """``SanaPipeline`` with a ControlNet; needs a control picture in every call.

    The ControlNet sees the same scaled timestep as the transformer; the reference leaves ``timestep_scale`` out.

    Args:
        controlnet: the second network.
        controlnet_params: its parameters, as ``params``.
        arguments: as in ``ImagePipeline``.
    """

    class_name = "SanaControlNetPipeline"

    def __init__(self, *arguments: Any, controlnet: SanaControlNet, controlnet_params: Any, **options: Any) -> None:
        self.controlnet = controlnet
        given = isinstance(controlnet_params, Resident)
        self.controlnet_weights = controlnet_params if given else Resident.of(CONTROLNET, controlnet_params)
        super().__init__(*arguments, **options)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        controlnet: str | os.PathLike[str] | None = None,
        residency: Residency = "text_encoder_freed",
        memory: str | MemoryBudget | None = None,
        **options: Any,
    ) -> SanaControlNetPipeline:
        """Reads a model with its ControlNet, or a plain model and a ControlNet's own directory.

        Args:
            path: a model directory, as in ``ImagePipeline.from_pretrained``.
            controlnet: the ControlNet's directory if ``path`` is a plain SANA model.
            residency: as in ``ImagePipeline.from_pretrained``.
            memory: likewise.
            options: ``dtype``, ``variant``, ``emulate_fp16_saturation``, ``quantization``, likewise.

        Raises:
            FileNotFoundError: a directory or one of its files is missing.
            UserError: a damaged file, or networks that do not fit one another.
            CheckpointError: weights that are missing, damaged, or do not fit.
        """
        model = open_model(path, cls.class_name, controlnet=controlnet, **options)
        networks = {"controlnet": model.controlnet, "controlnet_params": model.controlnet_weights}
        return cls._from_model(model, residency, memory, **networks)

    def check_components(self) -> None:
        """Raises ``UserError`` for a ControlNet that was made for another width or latent."""
        super().check_components()
        ours, theirs = self.transformer.config, self.controlnet.config
        for name in ("inner_dim", "in_channels", "patch_size", "caption_channels"):
            if getattr(ours, name) != getattr(theirs, name):
                raise UserError(
                    f"ControlNet with {name} {getattr(theirs, name)} for a transformer with {getattr(ours, name)}; "
                    "both must be alike: choose the ControlNet of this model"
                )

    @classmethod
    def argument_names(cls) -> frozenset[str]:
        """What a call of this pipeline can be given."""
        return (super().argument_names() | SanaPipeline.argument_names()) - {"options"}

    @property
    def networks(self) -> dict[str, Resident | None]:
        """Every network's weights; None where it has none."""
        return {**super().networks, CONTROLNET: self.controlnet_weights}

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float = 1.0,
        **options: Any,
    ) -> SanaPipelineOutput:
        """Draws pictures of every prompt along the control picture.

        Args:
            prompt: one or several texts.
            control_image: file, PIL image, or array (H, W, 3); one for all pictures or a list of one each. It is
                resized to the size of the result.
            controlnet_conditioning_scale: multiplies what the ControlNet adds; 0 is without it.
            options: all other arguments of ``SanaPipeline``.

        Raises:
            UserError: no control picture, a scale that is not finite, or as in ``SanaPipeline``.
        """
        if control_image is None:
            raise UserError("control_image is missing; SanaControlNetPipeline needs one: give a picture")
        if not np.isfinite(controlnet_conditioning_scale):
            raise UserError(
                f"controlnet_conditioning_scale {controlnet_conditioning_scale}; allowed is a finite number"
            )
        try:
            request = TextToImageRequest(prompt=prompt, **options)
        except TypeError as error:
            raise TypeError(f"SanaControlNetPipeline: {error}") from None
        pictures = read_pictures(control_image, "control_image", self._shortest_side)
        return self._draw(request, pictures, controlnet_conditioning_scale)

    def _network(self) -> Network:
        return Network(self.transformer, self.controlnet)

    def _network_params(self) -> Any:
        return {"transformer": self.params, "controlnet": self.controlnet_weights.params}
