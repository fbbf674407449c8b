# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Datasets around a dataset, which they are for anyone who asks for something else; and one that names a bad image."""

from __future__ import annotations

from typing import Any

import cv2
from torch.utils.data import Dataset
from ultralytics.data import ClassificationDataset
from ultralytics.utils import LOGGER

__all__ = ("ReadableDataset", "WrappedDataset")


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
        try:
            return self.dataset[i]
        except (OSError, ValueError, EOFError, cv2.error) as e:
            file, _, copy, _ = self.dataset.samples[i]
            if self.dataset.cache_disk and copy.exists():
                LOGGER.warning(f"'{copy}' is damaged and is written anew.")
                copy.unlink()
                return self[i]
            raise OSError(
                f"'{file}' cannot be read as an image. Save it anew, or remove it, and go on with 'resume'."
            ) from e
