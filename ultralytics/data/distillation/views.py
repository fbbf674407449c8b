# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A dataset whose augmentations repeat, so that what a teacher said of an image can be read again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from ultralytics.data.distillation.wrapped import WrappedDataset

__all__ = ("RepeatableViews", "random_stream")

_GENERATOR = np.random.MT19937(0)  # stands in for numpy's own while a view is drawn


class RepeatableViews(WrappedDataset):
    """A dataset that augments each image in a fixed number of ways: in epoch e each image is its view e % views.

    A view is drawn by the dataset's own transforms, from the distribution that they always draw from, but from a random
    stream that image and view alone determine. So it is the same in every epoch, every run and every loader worker, and
    the training's own random streams are left as they are.

    Attributes:
        dataset (Dataset): Gives dicts.
        views (int): Views per image.
        epoch (Tensor): The epoch, an int64 scalar in shared memory, as loader workers read it too.
    """

    def __init__(self, dataset: Dataset, views: int):
        """Wrap a dataset.

        Args:
            dataset (Dataset): Gives one dict per image, augmented by torch's, numpy's and python's global generators.
            views (int): Views per image, >= 1.
        """
        super().__init__(dataset)
        self.views = views
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return an image's view of this epoch, with `index` and `view` that name it."""
        view = int(self.epoch) % self.views
        with random_stream(i, view):
            return {**self.dataset[i], "index": i, "view": view}


@contextmanager
def random_stream(*key: int) -> Iterator[None]:
    """Draw from a stream that the key determines; afterwards the global streams go on where they were."""
    before = torch.get_rng_state(), np.random.get_bit_generator(), random.getstate()
    seed = np.random.SeedSequence(key).generate_state(3).tolist()
    torch.default_generator.manual_seed(seed[0])
    np.random.set_bit_generator(_GENERATOR)  # to copy the state of the other, and back, takes 20 times as long
    np.random.seed(seed[1])
    random.seed(seed[2])
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_bit_generator(before[1])
        random.setstate(before[2])
