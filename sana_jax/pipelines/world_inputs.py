"""What a call of SANA-WM is told of its picture and its camera: brought to one size and one number of frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kernels.typing import Float
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.camera import (
    ActionScheme,
    CameraInputs,
    action_to_c2w,
    camera_inputs,
    check_poses,
    find_scheme,
    intrinsics_of_field,
    plan_resize_and_crop,
    read_intrinsics,
    snap_frames,
)
from sana_jax.errors import UserError
from sana_jax.models.sana_wm import MAX_POSITIONS
from sana_jax.pipelines.checks import as_numbers
from sana_jax.pipelines.image_inputs import to_network_range

if TYPE_CHECKING:
    from PIL import Image

    from sana_jax.pipelines.model_directory import SamplingDefaults

DEFAULT_FIELD = 60.0  # degrees across, where nothing is said of the camera's lens
DEFAULT_SCHEME = "v1"


class WorldView(NamedTuple):
    """The picture and the camera at the size of the video.

    Attributes:
        pixels: the picture in [-1, 1].
        intrinsics: fx, fy, cx, cy of every frame, in pixels of the video.
        camera: what the network is told of it.
    """

    pixels: Float[np.ndarray, "1 H W 3"]
    intrinsics: Float[np.ndarray, "F 4"]
    camera: CameraInputs


def camera_path(
    action: str | None,
    c2w: Any,
    num_frames: int | None,
    scheme: str | ActionScheme | None,
    temporal_factor: int,
    say: Callable[[str], None] = print,
    defaults: SamplingDefaults | None = None,
) -> Float[np.ndarray, "F 4 4"]:
    """The poses of a video, 1 + temporal_factor·k of them; poses that are left out are said.

    Args:
        action: an action string, which must make ``num_frames`` frames where that is given.
        c2w: camera-to-world matrices in place of it, ``num_frames`` or more.
        num_frames: of the video; None for as many as there are poses, less those that no latent frame has.
        scheme: what the keys of ``action`` mean; None for ``v1``, at the speeds of the model where it has its own.
        temporal_factor: pixel frames per latent frame.
        say: prints a line.
        defaults: of the model.

    Raises:
        UserError: both or neither of action and c2w, a malformed action, poses that are not rigid, a number of frames
            that does not go with them, or a video that is too short or too long.
    """
    if (action is None) == (c2w is None):
        given = "neither is" if action is None else "both are"
        raise UserError(f"action and c2w: {given} given, and exactly one is allowed: give one of them")
    whole = isinstance(num_frames, int | np.integer) and not isinstance(num_frames, bool) and num_frames >= 1
    if num_frames is not None and not whole:
        raise UserError(f"num_frames {num_frames!r} is not allowed; choose a whole number, 1 + {temporal_factor}·k")
    if action is not None:
        found = scheme_of(scheme, defaults)
        poses = action_to_c2w(action, found, num_frames=num_frames)
        if scheme is None and found != find_scheme(DEFAULT_SCHEME):
            say(
                f"keys of scheme {found.name} at the speed that the model was trained for: {found.translation_speed:g} "
                f"units and {found.rotation_speed:g} degrees per frame"
            )
    elif scheme is not None:
        raise UserError(
            "action_scheme would not be used with c2w; it says what the keys of an action mean: leave it out"
        )
    else:
        poses = check_poses(c2w)
    there = len(poses)
    asked = there if num_frames is None else int(num_frames)
    if num_frames is not None:
        _check_fits(asked, temporal_factor, action)
    if asked > there:
        raise UserError(
            f"num_frames {asked} with a c2w of {there} poses; allowed is one pose for every frame: give more poses, or "
            f"ask for {snap_frames(there, available=there, temporal_factor=temporal_factor)} frames"
        )
    frames = snap_frames(asked, available=there, temporal_factor=temporal_factor)
    _check_length(frames, asked, temporal_factor)
    if frames != asked:
        longer = f"; end the action with ,none-{frames + temporal_factor - asked} for {frames + temporal_factor}"
        rule = f"videos of this model have 1 + {temporal_factor}k frames"
        say(f"{asked} frames become {frames}: {rule}{'' if action is None else longer}")
    elif frames != there:
        say(f"c2w: the first {frames} of {there} poses are taken")
    return poses[:frames]


def scheme_of(scheme: str | ActionScheme | None, defaults: SamplingDefaults | None) -> ActionScheme:
    """The scheme that is asked for, or the default one at the speeds of the model."""
    if scheme is not None or defaults is None:
        return find_scheme(DEFAULT_SCHEME if scheme is None else scheme)
    speeds = {name: getattr(defaults, name) for name in ("translation_speed", "rotation_speed")}
    return find_scheme(DEFAULT_SCHEME, **speeds)


def _check_fits(asked: int, temporal_factor: int, action: str | None) -> None:
    """Refuses a number of frames that was asked for and that the model does not make."""
    over = (asked - 1) % temporal_factor
    if over:
        above = asked - over + temporal_factor
        near = above if asked - over == 1 else f"{asked - over} or {above}"
        longer = f", with ,none-{above - asked} at the action's end for {above}"
        raise UserError(
            f"num_frames {asked} is not allowed; videos of this model have 1 + {temporal_factor}k frames: ask for "
            f"{near}{'' if action is None else longer}"
        )


def _check_length(frames: int, asked: int, temporal_factor: int) -> None:
    latent = 1 + (frames - 1) // temporal_factor
    if latent < 2:
        raise UserError(
            f"{asked} frames are less than the model makes, which is {1 + temporal_factor} or more beginning with the "
            "image: lengthen the camera's path"
        )
    if latent > MAX_POSITIONS:
        most = pixel_frames(MAX_POSITIONS, temporal_factor)
        raise UserError(
            f"{frames} frames are {latent} latent frames, and the model has positions for {MAX_POSITIONS}; allowed are "
            f"{most} frames and fewer: cut the camera's path"
        )


def view_at(
    picture: Image.Image,
    c2w: Float[np.ndarray, "F 4 4"],
    intrinsics: Any,
    size: tuple[int, int],
    temporal_factor: int,
    spatial_factor: int,
    say: Callable[[str], None] = print,
    field: float | None = None,
) -> WorldView:
    """The picture scaled to cover ``size`` (height, width) and cropped to its middle; the intrinsics move with it.

    Args:
        picture: what the video begins with.
        c2w: a pose for every frame.
        intrinsics: fx, fy, cx, cy in pixels of the picture as it is given, in any of the forms of ``read_intrinsics``;
            None for a camera of square pixels that spans 60 degrees across the picture, or ``field`` across the video.
        size: of the video, in pixels.
        temporal_factor: pixel frames per latent frame.
        spatial_factor: pixels per side of a latent pixel.
        say: prints a line.
        field: degrees across that the model was trained for, where it has its own.

    Raises:
        UserError: intrinsics that are none of this picture.
    """
    source = (picture.height, picture.width)
    given = intrinsics is not None
    if not given:
        intrinsics, whose, across = intrinsics_of_field(DEFAULT_FIELD, *source), "a camera is taken that", "across"
        if field is not None:
            whose = "one as in training is taken, which"
            across = "across what is left of the picture when it is cropped"
            scale = max(length / there for length, there in zip(size, source))
            intrinsics[:2] = intrinsics_of_field(field, *size)[0] / scale
            intrinsics[2:] -= 0.5 / scale  # the middle lies between the video's pixels, as in training
        say(
            f"intrinsics: none are given; {whose} spans {field or DEFAULT_FIELD:g} degrees {across}, "
            f"fx and fy {intrinsics[0]:.1f} in pixels of the {source[0]}x{source[1]} image"
        )
    # nobody is warned of the field of a lens that nobody gave
    values = read_intrinsics(intrinsics, len(c2w), *source, say if given else lambda line: None)
    plan = plan_resize_and_crop(source, size)
    if plan.resized != plan.target:
        axis = 0 if plan.resized[0] > size[0] else 1
        share = 1 - size[axis] / plan.resized[axis]
        say(
            f"image of {source[0]}x{source[1]} pixels for a video of {size[0]}x{size[1]}: {share:.1%} of its "
            f"{('height', 'width')[axis]} is cropped, half on each side"
        )
    moved = plan.intrinsics(values)
    height, width = size
    camera = camera_inputs(
        c2w, moved, height=height, width=width, temporal_factor=temporal_factor, spatial_factor=spatial_factor
    )
    return WorldView(to_network_range(plan.image(picture), height, width), moved, camera)


def one_text(name: str, text: Any, refine: Any, refiner_options: Mapping[str, Any] | None) -> str | None:
    """The text of a prompt, or of a list of one; raises ``UserError`` for more, or where a refiner would have none."""
    if isinstance(text, list | tuple) and len(text) == 1:
        text = text[0]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{name} {text!r} is not allowed; a world has one text: call once for each")
    if text is None and refine is not None and not {"prompt", "prompt_embeds"} & set(refiner_options or {}):
        raise UserError(
            "the refiner needs a prompt, and embeddings of the first stage are given in place of it; give "
            "refiner_options its prompt or prompt_embeds"
        )
    return text


def instruction_lines(chi_prompt: Any, prompt_embeds: Any) -> Any:
    """Lines that are put before the prompt; raises ``UserError`` for a single string, or if they would not be used."""
    if isinstance(chi_prompt, str):
        raise UserError("chi_prompt is a list of lines, not one string: put it in a list")
    if chi_prompt is not None and prompt_embeds is not None:
        raise UserError("chi_prompt would not be used, since prompt_embeds are given; leave it out")
    return chi_prompt


def three_axes(name: str, embeds: Any) -> Any:
    """Embeddings (1, L, C), also of diffusers' shape (1, 1, L, C).

    Raises:
        UserError: embeddings of several prompts, or what is no array of real numbers.
    """
    if embeds is None:
        return None
    embeds = as_numbers(name, embeds)
    if embeds.ndim == 4 and embeds.shape[1] == 1:
        embeds = embeds[:, 0]
    if embeds.ndim == 3 and embeds.shape[0] != 1:
        raise UserError(
            f"{name} of shape {embeds.shape}; allowed is (1, L, C): a world has one text, call once for each"
        )
    return embeds


def refuse_memory(memory: str | None) -> None:
    """Raises ``UserError`` for a memory budget of a streamed world."""
    if memory is not None:
        raise UserError(
            f"memory {memory} is not for streamed worlds: it plans one network at a time, and all stages work on each "
            "chunk before the next; leave --memory out, and use --quantization, --refiner-quantization or "
            "--refiner-stream-blocks"
        )
