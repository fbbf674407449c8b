# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Datasets around a dataset, one of which names a bad image; and a look at some of a dataset's images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import Dataset
from ultralytics.data import ClassificationDataset
from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import imread

UNREADABLE = (OSError, ValueError, EOFError, cv2.error)  # what libraries raise for an image

__all__ = ("ReadableDataset", "WrappedDataset", "alike", "naming_unreadable", "spaced", "spaced_batches")


class WrappedDataset(Dataset):
    """A dataset around another.

    Attributes:
        dataset (Dataset): The other; what is not found here is asked of it.
    """

    def __init__(self, dataset: Dataset):
        """Wrap a dataset."""
        self.dataset = dataset

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return what the dataset gives."""
        return self.dataset[i]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        """Return what the dataset has."""
        if name == "dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


class ReadableDataset(WrappedDataset):
    """A ClassificationDataset that says which image cannot be read, and repairs what `cache=disk` keeps beside it.

    Upstream looks at an image's header before training, not at its pixels; and a kill can cut its copy on the disk
    short.
    """

    dataset: ClassificationDataset

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return what the dataset gives.

        Raises:
            OSError: If the image cannot be read.
        """
        file, _, copy, _ = self.dataset.samples[i]
        kept = self.dataset.cache_disk and copy.exists()
        try:
            return self.dataset[i]
        except UNREADABLE as e:
            error = e
        if self.dataset.cache_disk:
            copy.unlink(missing_ok=True)
        if kept:
            try:
                found = self.dataset[i]
                LOGGER.warning(f"'{copy}' was damaged and is written anew.")
                return found
            except UNREADABLE as e:
                error = e
                copy.unlink(missing_ok=True)
        raise _unreadable(file) from error


@contextmanager
def naming_unreadable(folder: str | Path) -> Iterator[None]:
    """Say which image it is where upstream, keeping images in memory, fails as one of a folder cannot be decoded."""
    try:
        yield
    except AttributeError as e:
        for file in sorted(Path(folder).rglob("*")):
            if file.suffix[1:].lower() in IMG_FORMATS and imread(str(file)) is None:
                raise _unreadable(file) from e
        raise


def _unreadable(file: str | Path) -> OSError:
    """Return the refusal of an image."""
    return OSError(
        f"'{file}' cannot be read as an image. Save it anew, or remove it, and start again, or go on with 'resume' "
        f"where an epoch has ended."
    )


def spaced(dataset: Dataset, limit: int | None = None) -> list[int]:
    """Return the places of evenly spaced images in a dataset, at most `limit` of them, or of all."""
    count = min(len(dataset), limit or len(dataset))
    return torch.linspace(0, len(dataset) - 1, count).round().long().tolist()


def alike(dataset: Dataset, indices: Iterable[int], most: int) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Yield some images of a dataset, as many at a time as follow each other in one size.

    Args:
        dataset (Dataset): Gives dicts of `img`, a (channels, H, W) image, and more.
        indices (Iterable[int]): Places of images in the dataset.
        most (int): Images at a time, at most.

    Yields:
        indices (list[int]): Places of at least one image in the dataset.
        samples (list[dict[str, Any]]): What the dataset gives for them.
    """
    for _, group in groupby(((i, dataset[i]) for i in indices), lambda pair: pair[1]["img"].shape):
        for pairs in iter(lambda group=group: list(islice(group, most)), []):
            yield [i for i, _ in pairs], [sample for _, sample in pairs]


def spaced_batches(
    dataset: Dataset, classes: Collection[int], limit: int | None = None, batch: int = 64
) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """Yield evenly spaced images of a dataset, as far as they are of some classes, without a loader's random stream.

    Args:
        dataset (Dataset): Gives dicts of `img`, a (channels, H, W) image, and `cls`, its class index.
        classes (Collection[int]): The classes.
        limit (int, optional): Most images to look at; None for all.
        batch (int): Images to look at for each batch.

    Yields:
        index (list[int]): Places of at least one image in the dataset, B of them.
        images (Tensor): Images of shape (B, channels, H, W), float32.
        labels (list[int]): Their classes.
    """
    chosen = spaced(dataset, limit)
    for start in range(0, len(chosen), batch):
        samples = [(i, dataset[i]) for i in chosen[start : start + batch]]
        samples = [(i, sample) for i, sample in samples if int(sample["cls"]) in classes]
        if samples:
            images = torch.stack([sample["img"] for _, sample in samples]).float()
            yield [i for i, _ in samples], images, [int(sample["cls"]) for _, sample in samples]
