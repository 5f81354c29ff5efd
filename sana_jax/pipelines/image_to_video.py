"""Image and text to video with SANA-Video: ``SanaImageToVideoPipeline``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.diffusion.guidance import ProjectedGuidance
from sana_jax.errors import UserError
from sana_jax.pipelines.base import OutputType, Size, StepEndCallback, Stopwatch
from sana_jax.pipelines.checks import check_finite
from sana_jax.pipelines.denoising import GuidanceBatching
from sana_jax.pipelines.image_inputs import LUMA, SHORTEST_SIDE, place, read_pictures, to_network_range
from sana_jax.pipelines.residency import AUTOENCODER, TEXT, TRANSFORMER
from sana_jax.pipelines.resolution import Binning, kept_window, nearest_bin, video_bins
from sana_jax.pipelines.sampling_function import is_guided
from sana_jax.pipelines.video_base import SanaVideoPipelineOutput, VideoPipeline, VideoRequest

if TYPE_CHECKING:
    from PIL import Image


class SanaImageToVideoPipeline(VideoPipeline):
    """Makes videos that begin with a given image, from texts; arguments as in ``SamplingPipeline``.

    The network and its weights are those of ``SanaVideoPipeline``. The image is the first latent frame: it is clean,
    its timestep is 0, and no step changes it.
    """

    class_name = "SanaImageToVideoPipeline"

    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        num_videos_per_prompt: int = 1,
        seed: int = 0,
        latents: Float[Array, "B C T H W"] | None = None,
        prompt_embeds: Float[Array, "B L C"] | None = None,
        prompt_attention_mask: Int[Array, "B L"] | None = None,
        negative_prompt_embeds: Float[Array, "B L C"] | None = None,
        negative_prompt_attention_mask: Int[Array, "B L"] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        projected_guidance: ProjectedGuidance | None = None,
        motion_score: int | None = None,
        binning: Binning | None = None,
        max_sequence_length: int | None = None,
        complex_human_instruction: Sequence[str] | None = None,
        guidance_batching: GuidanceBatching = "auto",
        step_cache: float | None = None,
        step_cache_error: bool = False,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEndCallback | None = None,
        progress_bar: bool = False,
    ) -> SanaVideoPipelineOutput:
        """Makes ``num_videos_per_prompt`` videos of every prompt. What is None comes from ``self.defaults``.

        Args:
            image: what the videos begin with: file, PIL image, or array (H, W, 3); one for all, or a list of one for
                each prompt or each video. One of another shape than the result is cropped, which a line says.
            prompt: one or several texts.
            negative_prompt: what the videos should not be, one text or one per prompt.
            num_inference_steps: sampling steps.
            guidance_scale: classifier-free guidance; 1 or below runs without, at half the cost.
            height: pixels of the result. If neither height nor width is given: the trained size nearest in shape to the
                image, where the model has a table.
            width: pixels of the result.
            frames: frames of the result, 1 + k times the autoencoder's temporal factor: 81 = 1 + 20·4.
            num_videos_per_prompt: videos of each prompt, side by side in the result.
            seed: video i starts from noise that depends on (seed, i) alone; 0 to 2³² - 1.
            latents: the noise to start from instead, unit normal, (B, C, T, h, w).
            prompt_embeds: encoded prompts (B, L, C) in place of ``prompt``, with ``prompt_attention_mask`` (B, L).
            prompt_attention_mask: 1 where a token counts.
            negative_prompt_embeds: likewise in place of ``negative_prompt``, (B or 1, L, C).
            negative_prompt_attention_mask: likewise.
            guidance_interval: (lowest, highest) noise level in [0, 1] at which guidance acts.
            projected_guidance: adaptive projected guidance in place of the plain one.
            motion_score: writes `` motion score: N.`` behind every prompt, as SANA-Video's training did; 30 is usual,
                more asks for more motion.
            binning: ``"nearest"`` samples the trained size of the nearest shape and crops, ``"off"`` the size itself,
                ``"error"`` refuses other sizes than trained ones, and images of another shape. None: nearest where the
                model has a table.
            max_sequence_length: prompt tokens that count, where the text encoder has that setting.
            complex_human_instruction: lines put before the prompt, where the text encoder has that setting; empty for
                none.
            guidance_batching: ``"batched"`` runs prompt and negative prompt as one batch, ``"split"`` one after another
                in less memory; ``"auto"`` splits where the one batch does not fit into the device's free memory.
            step_cache: skips steps at which the network's input changes little: a threshold from 0, which skips none;
                see ``sana_jax.diffusion.step_caching``. Tokens are kept from step to step, 6 bytes for each of their
                channels in bfloat16. None is off.
            step_cache_error: measures the error of that, by taking every step as well; it is printed, and in the
                result's ``step_cache``.
            output_type: ``"pil"``; ``"np"``, (B, F, H, W, 1 or 3) in [0, 1]; or ``"latent"``, (B, C, T, h, w).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": (B, C, T, h, w)}) after every step;
                if it returns False, sampling ends there.
            progress_bar: shows the steps. Without it and a callback all steps are one call on the device.

        Raises:
            UserError: a value that is not allowed, arguments that exclude one another or would not be used, or values
                that stop being finite; the message names the stage.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "image")}
        return self._make(image, VideoRequest(**arguments))

    def _make(self, image: Any, request: VideoRequest) -> SanaVideoPipelineOutput:
        steps, scale = self._steps_and_scale(request)
        schedule = self.sampler.schedule(steps)
        frames = self._frames(request)
        if frames < 2:
            raise UserError(
                f"frames {request.frames or 1} would be the image alone; choose "
                f"{1 + self.autoencoder.temporal_factor} or more"
            )
        pictures = read_pictures(image, "image", min(SHORTEST_SIDE, self.defaults.height, self.defaults.width))
        if pictures is None:
            raise UserError("image is missing; name a picture, or use SanaVideoPipeline")
        size = self._size_for(request, pictures)
        # what the cropping of the result will keep, so that the first frame is the picture as it was given
        window = kept_window(size.sampled, size.requested)
        pictures = [fit_picture(picture, window, request.binning, size.requested) for picture in pictures]

        watch = Stopwatch()
        conditions = self._conditions(request, is_guided(scale))
        self._leave(TEXT)
        watch.end("text")

        count = conditions[0].embeds.shape[0]
        given = self._encode_images(pictures, size, count, request.num_videos_per_prompt)
        watch.end("encode")

        start = self._noise(request.latents, count, frames, size, request.seed)[:, 1:]

        def whole(latents: Array) -> Array:
            return jnp.concatenate([given, latents], axis=1)

        latents = self._denoise(watch, schedule, start, conditions, scale, request, given, whole)
        self._leave(TRANSFORMER)
        watch.end("denoise")
        videos = self._videos(whole(latents), size, request.output_type)
        watch.end("decode")
        return self._result(watch, videos, size)

    def _size_for(self, request: VideoRequest, pictures: Sequence[Image.Image]) -> Size:
        """The size of the call: what is asked for, or what suits the image."""
        height, width = request.height, request.width
        bins = video_bins(self.transformer.config.sample_size, self.token_side)
        if height is None and width is None and request.latents is None and request.binning != "off" and bins:
            shapes = {picture.size[::-1] for picture in pictures}
            if len(shapes) > 1:
                shown = ", ".join(f"{rows}x{columns}" for rows, columns in sorted(shapes))
                raise UserError(f"images of {shown} pixels; several are allowed if of one size: give height and width")
            (shape,) = shapes
            found = nearest_bin(*shape, bins)
            height, width = found.height, found.width
            print(f"size {height}x{width}, the trained size nearest in shape to the image of {shape[0]}x{shape[1]}")
        return self._video_size(height, width, request.binning, request.latents)

    def _encode_images(
        self, pictures: Sequence[Image.Image], size: Size, count: int, repeats: int
    ) -> Float[Array, "B 1 H W C"]:
        """Latents of one image for all videos, or of one for each prompt or each video.

        What is sampled around an image, and cropped from the result, repeats its border.
        """
        if len(pictures) not in (1, count // repeats, count):
            raise UserError(
                f"{len(pictures)} images for {count // repeats} prompts with {repeats} videos each; allowed is one for "
                "all, one for each prompt, or one for each video"
            )
        shown = [to_network_range(picture, picture.height, picture.width)[0] for picture in pictures]
        ready = np.stack([place(picture, size.sampled)[None] for picture in shown])
        if self.autoencoder.image_channels == 1:
            ready = (ready @ LUMA)[..., None]
        latents = jnp.asarray(self.autoencoder.encode(jnp.asarray(ready)), jnp.float32)
        check_finite("encoding of the image", latents, self.made)
        self._leave(AUTOENCODER)
        if len(pictures) == 1:
            return jnp.broadcast_to(latents, (count, *latents.shape[1:]))
        return jnp.repeat(latents, count // len(pictures), axis=0)


def fit_picture(
    picture: Image.Image, size: tuple[int, int], binning: Binning | None, video: tuple[int, int] | None = None
) -> Image.Image:
    """A picture at a size (height, width): scaled to cover it (Lanczos), and its middle cropped, which a line says.

    ``video`` is the size that the line names, where it is another.

    Raises:
        UserError: it must be cropped, and ``binning`` is ``"error"``.
    """
    from PIL import Image

    height, width = size
    scale = max(height / picture.height, width / picture.width)
    kept_height, kept_width = min(picture.height, height / scale), min(picture.width, width / scale)
    lost_height, lost_width = picture.height - kept_height, picture.width - kept_width
    if max(lost_height, lost_width) * scale < 1:  # less than a pixel: rounding
        return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)
    named = "x".join(map(str, size if video is None else video))
    shape = f"image of {picture.height}x{picture.width} pixels for a video of {named}"
    if binning == "error":
        raise UserError(
            f"{shape}: another shape; crop it to {kept_height:.0f}x{kept_width:.0f}, or binning nearest or off"
        )
    axis, share = (
        ("height", lost_height / picture.height) if lost_height > lost_width else ("width", lost_width / picture.width)
    )
    print(f"{shape}: {share:.1%} of its {axis} is cropped, half on each side")
    left, top = lost_width / 2, lost_height / 2
    box = (left, top, left + kept_width, top + kept_height)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
