"""Options that another one leaves without a reader: a run says so instead of ignoring them."""

from __future__ import annotations

from collections.abc import Iterator

from configs.changes import flatten
from configs.schema import RunConfig
from configs.serialization import to_dict
from sana_jax.errors import UserError

_SAMPLES_OF_PREVIEWS = ("preview.seed", "preview.per_caption", "preview.captions")
# What is read while data is looked through, and not of a finished cache.
_SOURCE = (
    "format",
    "caption",
    "missing_captions",
    "minimum_size",
    "max_bad_share",
    "rare_buckets",
    "group_column",
    "filters",
)
_VALIDATION = ("validation.sigmas", "validation.samples", "validation.seed")


def check_unread(config: RunConfig, start: RunConfig) -> None:
    """Refuses options that nothing of this run would read.

    Presets have values for what they do not use, so an option counts as given where it differs from what it would be
    without the command line's words.

    Args:
        config: the run.
        start: what the command line started from: the preset, or the run that is continued.

    Raises:
        UserError: an option with its value, the option that leaves it unread, and what to do.
    """
    values, others = flatten(to_dict(config)), flatten(to_dict(start))
    for name, why in _unread(config):
        value = values[name]
        if value != others[name]:
            option = name.replace("_", "-")
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{option} {shown} would not be used {why}")


def _unread(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Dotted names of fields that have no reader, with the reason and the next step."""
    if not config.ema.enabled:
        yield from ((name, "with --ema.no-enabled; leave it out") for name in _settings_of_the_average(config))
    elif config.optimizer.name == "schedule_free_adamw":
        why = "with --optimizer.name schedule_free_adamw, which keeps an average of its own; leave it out"
        yield from ((name, why) for name in _settings_of_the_average(config))
    if config.preview.every == 0:
        why = "with --preview.every 0, which draws none; leave it out, or give --preview.every steps"
        yield from ((name, why) for name in _SAMPLES_OF_PREVIEWS)
    elif config.preview.prompts:
        yield "preview.captions", "with --preview.prompts, which are drawn instead; leave one of them out"
    if config.validation.every == 0:
        why = "with --validation.every 0, which measures none; leave it out, or give --validation.every steps"
        yield from ((name, why) for name in _VALIDATION)
    if getattr(config.data, "finished_cache", False):
        why = "with --data.cache alone, whose samples are trained on as they are; name the data too, with --data.path"
        yield from ((f"data.{name}", why) for name in _SOURCE if hasattr(config.data, name))
    if not config.logging.wandb:
        yield "logging.wandb_project", "without --logging.wandb; leave it out, or add that"
    if config.nonfinite == "error":
        yield "max_nonfinite", "with --nonfinite error, which allows none; leave it out, or choose --nonfinite skip"


def _settings_of_the_average(config: RunConfig) -> list[str]:
    return [name for name in flatten({"ema": to_dict(config.ema)}) if name != "ema.enabled"]
