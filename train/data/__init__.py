"""Data sources by the type of their configuration."""

from __future__ import annotations

from configs.schema import DigitsDataConfig
from train.data.digits import DigitsData
from train.data.loader import Loader

__all__ = ["Loader", "make_dataset"]


def make_dataset(config: DigitsDataConfig) -> DigitsData:
    """The data set that a configuration describes."""
    return {DigitsDataConfig: DigitsData}[type(config)](config)
