"""Training data."""

from __future__ import annotations

from train.data.cached import CachedData
from train.data.digits import DigitsData
from train.data.loader import Dataset, Loader
from train.data.video.moving_digits import MovingDigitsData

__all__ = ["CachedData", "Dataset", "DigitsData", "Loader", "MovingDigitsData"]
