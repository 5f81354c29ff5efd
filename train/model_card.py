"""The model card that lies beside a LoRA file: ``README.md``, as the Hub and other users read it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from configs.lora import LoraConfig
from sana_jax.errors import UserError
from sana_jax.files import atomic_file
from sana_jax.lora.reading import FILE_NAME

NAME = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_VIDEO = "SanaVideoPipeline"
_WORLD = "SanaWMPipeline"
_PIPELINES = ("SanaPipeline", "SanaSprintPipeline", "SanaControlNetPipeline", _VIDEO, _WORLD)
_TASKS = {_VIDEO: "text-to-video", _WORLD: "image-to-video"}


@dataclasses.dataclass(frozen=True)
class LoraCard:
    """What a model card says.

    Attributes:
        base_model: the base model's name on the Hub, or its directory, of which only the last part is shown.
        lora: the LoRA's settings.
        steps: optimizer steps that it was trained for.
        data: one line on the data: "12 pictures with captions, 1024 px".
        prompt: the trigger or class prompt that it was trained on; None where each sample had a caption of its own.
        example: a caption to try it with, where there is no such prompt.
        license: of the base model, as its contract has it, which the LoRA is under as well; None if not known.
        pipeline: the pipeline that it is for, of the same name in diffusers and here.
        for_diffusers: whether diffusers can open the base model, which it can't if that is a training run.
        preview: a picture beside the card, by its path from there; None for none.
        facts: further rows of the table: learning rate, batch size, resolution, ...
    """

    base_model: str
    lora: LoraConfig
    steps: int
    data: str
    prompt: str | None = None
    example: str | None = None
    license: str | None = None
    pipeline: str = "SanaPipeline"
    for_diffusers: bool = True
    preview: str | None = None
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)


def write_model_card(directory: str | Path, card: LoraCard) -> Path:
    """Writes the card; it replaces an older one, whole or not at all. Touches no network.

    Args:
        directory: where ``pytorch_lora_weights.safetensors`` is.
        card: what it says.

    Returns:
        The file.

    Raises:
        UserError: a pipeline that there is not.
        FileNotFoundError: the preview is not there.
    """
    directory = Path(directory)
    if card.pipeline not in _PIPELINES:
        raise UserError(f"model card: pipeline {card.pipeline!r} is not known; allowed are {', '.join(_PIPELINES)}")
    if card.preview is not None and not (directory / card.preview).is_file():
        raise FileNotFoundError(
            f"the model card's picture {directory / card.preview} is missing; name another, or none"
        )
    with atomic_file(directory / NAME) as file:
        file.write(model_card(card, directory.absolute().name).encode())
    return directory / NAME


def model_card(card: LoraCard, title: str) -> str:
    """The card's text, Markdown after a header that the Hub reads."""
    prompt = _line(card.prompt) if card.prompt else None
    lines = ["---", *_front_matter(card, prompt), "---", "", f"# {_line(title)}", ""]
    lines += [f"A LoRA for **{base_name(card.base_model)}**, trained with sana_jax.", ""]
    if card.preview is not None:
        lines += [f"![Samples](<{card.preview}>)", ""]
    if prompt is not None:
        lines += [f"Prompt that it was trained on: `{prompt.replace('`', chr(39))}`", ""]
    rows = {
        "Base model": base_name(card.base_model),
        "Rank": card.lora.rank,
        "Alpha": f"{card.lora.rank if card.lora.alpha is None else card.lora.alpha:g} (scale {card.lora.scale:g})",
        "Dropout": f"{card.lora.dropout:g}",
        "Targets": ", ".join(f"`{target}`" for target in card.lora.targets),
        "Steps": f"{card.steps:,}",
        "Data": card.data,
        **card.facts,
    }
    lines += ["| | |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    lines += ["", "## Use it", "", *_usage(card, _to_try(card)), "", "## Licence", "", _licence(card), ""]
    return "\n".join(lines)


def _front_matter(card: LoraCard, prompt: str | None) -> list[str]:
    """YAML; a JSON string is one of its strings."""
    lines = []
    if _is_hub_name(card.base_model):
        lines += [f"base_model: {json.dumps(card.base_model)}", "base_model_relation: adapter"]
    if card.license:
        short = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", card.license)
        lines += [f"license: {card.license}"] if short else ["license: other", f"license_name: {_yaml(card.license)}"]
    task = _TASKS.get(card.pipeline, "text-to-image")
    library = "diffusers" if _has_diffusers(card) else "sana_jax"
    lines += [f"library_name: {library}", f"pipeline_tag: {task}"]
    lines += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(("sana", "sana_jax", "lora", library, task)))]
    if prompt is not None:
        lines += [f"instance_prompt: {_yaml(prompt)}"]
    if card.preview is not None:
        lines += ["widget:", f"- text: {_yaml(_to_try(card) or '')}", f"  output: {{url: {_yaml(card.preview)}}}"]
    return lines


def _to_try(card: LoraCard) -> str | None:
    """A prompt to try the LoRA with."""
    return _line(card.prompt or card.example or "") or None


def _usage(card: LoraCard, prompt: str | None) -> list[str]:
    base = card.base_model if _is_hub_name(card.base_model) else "DIRECTORY_OF_THE_BASE_MODEL"
    text = json.dumps(prompt or "your prompt", ensure_ascii=False)
    call = f"image = pipe({text}).images[0]"
    options = ""
    if card.pipeline == _VIDEO:
        call = f"frames = pipe({text}).frames[0]"
    if card.pipeline == _WORLD:
        call = f'frames = pipe("PICTURE", {text}, action="w-80,jw-40,w-40").frames[0]'
        options = " --image PICTURE --action w-80,jw-40,w-40"
    diffusers = [
        "With diffusers:",
        "",
        "```python",
        "import torch",
        f"from diffusers import {card.pipeline}",
        "",
        f'pipe = {card.pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")',
        f'pipe.load_lora_weights("DIRECTORY_OF_THIS_FILE", weight_name="{FILE_NAME}")',
        call,
        "```",
        "",
    ]
    return [
        *(diffusers if _has_diffusers(card) else []),
        "With sana_jax:",
        "",
        "```python",
        f"from sana_jax import {card.pipeline}",
        "",
        f'pipe = {card.pipeline}.from_pretrained("{base}")',
        'pipe.load_lora_weights("DIRECTORY_OF_THIS_FILE")',
        call,
        "```",
        "",
        "or",
        "",
        "```",
        f"python -m sana_jax.generate --model {base} --lora DIRECTORY_OF_THIS_FILE --prompt {_shell(prompt)}" + options,
        "```",
        "",
        "Rank and alpha are in the file's header, from which they are read.",
    ]


def _has_diffusers(card: LoraCard) -> bool:
    """Whether diffusers can use it; its pipeline of worlds loads no LoRA."""
    return card.for_diffusers and card.pipeline != _WORLD


def _licence(card: LoraCard) -> str:
    if not card.license:
        return "The base model's licence was not stated beside its weights; it holds for this LoRA as well."
    return f"{_line(card.license)}, as the base model."


def base_name(model: str) -> str:
    """A model's name on the Hub, or that of its directory alone: what others may read of where it lies here."""
    return model if _is_hub_name(model) else Path(model).name or Path(model).absolute().name


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not Path(name).exists()


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _cell(value: object) -> str:
    return _line(str(value)).replace("|", "\\|")


def _yaml(text: str) -> str:
    return json.dumps(_line(text), ensure_ascii=False)


def _shell(prompt: str | None) -> str:
    return "'" + (prompt or "your prompt").replace("'", "'\\''") + "'"
