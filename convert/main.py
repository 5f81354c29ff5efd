"""Converts checkpoints from the command line.

::

    python -m convert.main import SRC DST     a published or original checkpoint -> a directory of ours
    python -m convert.main export SRC DST     ours, or a published one -> a directory that diffusers loads, or
                                              (--layout original) one .pth or .safetensors file as NVlabs save it
    python -m convert.main merge SRC LORA DST a model with a LoRA in its weights -> a directory that diffusers loads
    python -m convert.main inspect SRC        what it is, and every tensor that does not fit
    python -m convert.main verify SRC         compares it with PyTorch on the same weights, module by module
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line

PROG = "python -m convert.main"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What all commands ask of what they read."""

    source: str
    """Model directory, one component's directory, a training run, or an original file."""
    variant: str | None = None
    """Variant of the published weight files, such as bf16 or fp16; None: the plain files."""
    weights: Literal["auto", "params", "ema"] = "auto"
    """Weights of a training run or an original file: averaged (ema), raw (params), or the averaged if any (auto)."""
    image_size: int | None = None
    """Of an original file: pixels per side that it was trained for, where the file does not say."""
    revision: Literal["legacy", "current"] | None = None
    """Of an original file of SANA-WM: how its camera branch is computed, as by diffusers 0.42.1 (legacy; None takes it
    and says so) or by the original code now (current)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSourceConfig(SourceConfig):
    """What the commands ask that read training runs as well."""

    checkpoint_step: int | None = None
    """Checkpoint of a training run by its step; None: the newest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteConfig(RunSourceConfig):
    """What the commands ask that write a model for others."""

    layout: Literal["diffusers", "original"] = "diffusers"
    """A directory that diffusers loads, or one file with the transformer or ControlNet as NVlabs save it (original)."""
    max_shard_size: str | None = None
    """Weights above this size become several files and an index; None: 5GB."""
    flow_shift: float | None = None
    """Of an original file: shift of the noise schedule; None: as published for the size."""
    pipeline: Literal["SanaVideoPipeline", "LongSanaVideoPipeline"] | None = None
    """Of an original file of SANA-Video or LongSANA, whose weights look alike: which of them it is; None: as the file
    says, else SANA-Video, with a note. With --layout original also of a lone transformer or a training run."""
    dry_run: bool = False
    """Say which bytes would be read and written, and stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(SourceConfig):
    """Converts a published or original checkpoint to a directory of ours: import SRC DST."""

    source: str
    """Model directory as published, one component's directory, or an original .pth or .safetensors file."""
    destination: str
    """New directory; it appears when everything is in it."""
    weights: Literal["auto", "params", "ema"] = "auto"
    """Weights of an original file: raw (params), averaged (ema), or whichever there is (auto)."""
    flow_shift: float | None = None
    """Of an original file: shift of the noise schedule; None: as published for the size."""
    pipeline: Literal["SanaVideoPipeline", "LongSanaVideoPipeline"] | None = None
    """Of an original file of SANA-Video or LongSANA, whose weights look alike: which of them it is; None: as the file
    says, else SANA-Video, with a note."""
    components_from: str | None = None
    """Of an original file: published model whose text encoder, tokenizer and autoencoder complete it."""
    dry_run: bool = False
    """Say which bytes would be read and written, and stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(WriteConfig):
    """Writes a directory that diffusers loads, or a file in NVlabs' own layout: export SRC DST."""

    source: str
    """Converted or published model, one component of it, a training run (its transformer or ControlNet), or an original
    file."""
    destination: str
    """New directory; it appears when everything is in it. With --layout original a new .safetensors or .pth file."""
    lora: Literal["only", "merged"] | None = None
    """Of a training run of a LoRA: its file alone, or the base model with it in its weights."""
    components_from: str | None = None
    """Of an original file or a training run: model whose other components make it a whole model directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig(WriteConfig):
    """Writes what export does, with a LoRA in the transformer's weights: merge SRC LORA DST."""

    source: str
    """Converted or published model, its transformer, a training run, or an original file."""
    lora: str
    """LoRA file, or a directory with one; FILE:WEIGHT for another strength than 1."""
    destination: str
    """New directory; it appears when everything is in it. With --layout original a new .safetensors or .pth file."""
    layout: Literal["diffusers", "original"] = "diffusers"
    """A directory that diffusers loads, or one file with the transformer as NVlabs save it (original)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(RunSourceConfig):
    """Says what a checkpoint is, from headers alone: inspect SRC. Exit status 1 if something does not fit."""

    all: bool = False
    """Name every tensor and file, not the first few."""
    weights: Literal["auto", "params", "ema"] = "auto"
    """Weights of a training run or an original file: averaged (ema), raw (params), or whichever there is (auto)."""
    pipeline: Literal["SanaVideoPipeline", "LongSanaVideoPipeline"] | None = None
    """Of an original file of SANA-Video or LongSANA, whose weights look alike: which of them it is; None: as the file
    says, else SANA-Video, with a note."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig(RunSourceConfig):
    """Compares it with PyTorch, module by module and as a pipeline: verify SRC. Exit status 1 past a threshold."""

    source: str
    """Model directory (published or converted), one component's directory, a training run, or an original file."""
    component: tuple[Literal["text_encoder", "connectors", "transformer", "controlnet", "vae", "pipeline"], ...] = ()
    """What to compare: one or several of these; none for all that there is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of both sides. In bfloat16 ours must be about as near to PyTorch's float32 as PyTorch's own bfloat16 is."""
    height: int | None = None
    """Pixels; None: three latent pixels."""
    width: int | None = None
    """Pixels; None: five latent pixels."""
    steps: int | None = None
    """Steps of the pipeline; None: 3, of SANA-Sprint 2."""
    prompt: tuple[str, ...] = ()
    """One text or several; none for two of ours."""
    seed: int = 0
    """Of all inputs and noise."""
    emulate_fp16_saturation: bool = False
    """Clip linear attention to float16's range on both sides, for weights that were trained so."""
    module_threshold: float | None = None
    """Relative error allowed of a module on the same input, in float32; None: 1e-5."""
    whole_threshold: float | None = None
    """Relative error allowed of a whole network and of the pipeline's latents, in float32; None: 1e-4."""
    pixel_threshold: float | None = None
    """Difference allowed of a pixel in [0, 1], in float32; None: 2e-4."""
    ratio: float | None = None
    """In bfloat16: how many times PyTorch's own error ours may be, of whole networks and pipelines; None: 1.5."""
    all: bool = False
    """List the layers within the modules too, not only those past their thresholds."""
    json: str | None = None
    """File that everything compared is written to."""


def _import(config: ImportConfig) -> int:
    from convert.engine import import_model

    import_model(
        config.source,
        config.destination,
        _choices(config),
        components_from=config.components_from,
        dry_run=config.dry_run,
    )
    return 0


def _export(config: ExportConfig) -> int:
    if config.lora is not None:
        from convert.lora import export_run

        if any(value is not None for value in (config.image_size, config.flow_shift, config.revision, config.pipeline)):
            raise UserError(
                "--image-size, --flow-shift, --revision and --pipeline have no meaning with --lora; leave them out"
            )
        if config.components_from is not None:
            raise UserError(
                f"--components-from {config.components_from}: --lora merged takes the others from the run's base "
                "model, and --lora only needs none; leave it out"
            )
        export_run(
            config.source,
            config.destination,
            config.lora,
            _choices(config),
            layout=config.layout,
            max_shard_size=config.max_shard_size,
            dry_run=config.dry_run,
        )
        return 0
    from convert.engine import export_model

    export_model(
        config.source,
        config.destination,
        _choices(config),
        components_from=config.components_from,
        layout=config.layout,
        max_shard_size=config.max_shard_size,
        dry_run=config.dry_run,
    )
    return 0


def _merge(config: MergeConfig) -> int:
    from convert.lora import merge_model
    from sana_jax.lora import parse_lora_option

    lora, weight = parse_lora_option(config.lora)
    merge_model(
        config.source,
        lora,
        config.destination,
        _choices(config),
        weight=weight,
        layout=config.layout,
        max_shard_size=config.max_shard_size,
        dry_run=config.dry_run,
    )
    return 0


def _inspect(config: InspectConfig) -> int:
    from convert.inspection import inspect_model

    return 0 if inspect_model(config.source, _choices(config), every=config.all) else 1


def _verify(config: VerifyConfig) -> int:
    from convert.verify import PROMPTS, verify_model
    from convert.verify.report import choose_limits

    limits = choose_limits(
        config.dtype,
        module=config.module_threshold,
        whole=config.whole_threshold,
        pixel=config.pixel_threshold,
        ratio=config.ratio,
    )
    fine = verify_model(
        config.source,
        _choices(config),
        components=config.component,
        dtype=config.dtype,
        height=config.height,
        width=config.width,
        steps=config.steps,
        prompts=config.prompt or PROMPTS,
        seed=config.seed,
        limits=limits,
        emulate_fp16_saturation=config.emulate_fp16_saturation,
        every=config.all,
        json_file=config.json,
    )
    return 0 if fine else 1


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: its options, what runs it, and which options the first plain words are."""

    config: type
    run: Callable[[Any], int]
    words: tuple[str, ...]
    on_host: bool = True  # whether it needs no accelerator


COMMANDS = {
    "import": Command(ImportConfig, _import, ("source", "destination")),
    "export": Command(ExportConfig, _export, ("source", "destination")),
    "merge": Command(MergeConfig, _merge, ("source", "lora", "destination")),
    "inspect": Command(InspectConfig, _inspect, ("source",)),
    "verify": Command(VerifyConfig, _verify, ("source",)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (by default the program's own) and returns its exit status.

    Raises:
        UserError, FileNotFoundError: a mistake in the options or the checkpoint.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise UserError(f"no command; allowed are {', '.join(COMMANDS)}: {PROG} COMMAND SRC ..., or {PROG} --help")
    name = words.pop(0)
    if name in ("-h", "--help"):
        print(f"usage: {PROG} COMMAND ...\n")
        for command_name, command in COMMANDS.items():
            print(f"  {command_name:<8} {command.config.__doc__}")
        print(f"\n{PROG} COMMAND --help lists a command's options.")
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name!r} is no command; allowed are {', '.join(COMMANDS)}: {PROG} COMMAND SRC ...")
    command = COMMANDS[name]
    config = parse(command.config, _name_words(words, command.words, name), prog=f"{PROG} {name}")
    if command.on_host:
        _stay_on_the_host()
    return command.run(config)


def _name_words(words: list[str], names: tuple[str, ...], command: str) -> list[str]:
    """The first words are options by their place."""
    named: list[str] = []
    for name in names:
        if words and not words[0].startswith("-"):
            named += [f"--{name}={words.pop(0)}"]
    if words and not words[0].startswith("-"):
        usage = " ".join(name.upper() for name in names)
        raise UserError(f"unexpected {words[0]!r}; {PROG} {command} takes {usage} and then options")
    return named + words


def _choices(config: Any) -> Any:
    from convert.sources import Choices

    fields = {field.name for field in dataclasses.fields(Choices)}
    return Choices(**{name: value for name, value in vars(config).items() if name in fields})


def _stay_on_the_host() -> None:
    """Conversion needs no accelerator; JAX would otherwise reserve its memory."""
    import jax

    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    run_command_line(main)
