# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Upstream's validation of several networks on the same images, whose figures can be asked for parts of the images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from ultralytics.data.distillation.wrapped import alike
from ultralytics.engine.distillation.plan import Plan
from ultralytics.models.yolo.detect import DetectionValidator

__all__ = ("Found", "Validation", "sure", "validate")

ARGUMENTS = ("imgsz", "conf", "iou", "max_det", "single_cls", "agnostic_nms", "overlap_mask", "split")
SURE = 0.25  # confidence from which on a network is taken at its word, as upstream's predictions are

Found = dict[str, Tensor]  # in an image: bboxes, cls, conf, and masks or keypoints


class Validation:
    """What upstream's validator makes of a network's answers. It writes no file.

    Attributes:
        validator (DetectionValidator): Upstream's, of the task.
        answer (Callable): Gives for images (B, C, H, W) what the validator takes.
    """

    def __init__(
        self,
        validator_class: type[DetectionValidator],
        metrics: str,
        plan: Plan,
        device: torch.device,
        answer: Callable[[Tensor], Any],
        end2end: bool = False,
    ):
        """Begin without an image.

        Args:
            validator_class (type[DetectionValidator]): Upstream's.
            metrics (str): Those of its metrics that are asked for: `box`, `seg` or `pose`.
            plan (Plan): The run's.
            device (torch.device): Where answers are.
            answer (Callable): Gives for images (B, C, H, W) what the validator takes.
            end2end (bool): Whether the answers are those of an end-to-end head, which need no suppression.
        """
        with tempfile.TemporaryDirectory() as scratch:
            given = {k: getattr(plan.training, k) for k in ARGUMENTS}
            task = plan.training.task
            self.validator = validator_class(save_dir=Path(scratch), args={**given, "task": task, "plots": False})
        self.validator.device, self.validator.data = device, plan.data
        self.validator.init_metrics(SimpleNamespace(names=plan.data["names"], end2end=end2end))
        self.answer, self._metrics = answer, metrics

    def add(self, batch: dict[str, Any]) -> list[Found]:
        """Count the images of a preprocessed batch in, and return what the network finds in each."""
        with torch.no_grad():
            found = self.validator.postprocess(self.answer(batch["img"]))
        self.validator.update_metrics(found, batch)
        return found

    def precision(self, classes: Sequence[int], images: Sequence[int] | None = None) -> dict[int, tuple[float, float]]:
        """Return average precision by class, mean over overlaps from 0.5 to 0.95 and that at 0.5.

        Args:
            classes (Sequence[int]): Those that are asked for; one without an object is left out.
            images (Sequence[int], optional): The images that count, by their place among those that were added.
        """
        metrics = self.validator.metrics
        every = metrics.stats
        if images is not None:
            metrics.stats = {k: [x[i] for i in images] for k, x in every.items()}
        try:
            metrics.process()
        finally:
            metrics.stats = every
        measured = getattr(metrics, self._metrics)
        # Without a label they are lists
        rows = zip(
            *(np.asarray(x).tolist() for x in (measured.ap_class_index, measured.ap, measured.ap50)), strict=True
        )
        return {int(c): (mean, at_50) for c, mean, at_50 in rows if c in classes}

    def count(self, classes: int) -> list[int]:
        """Return the number of labelled objects of each of as many classes."""
        return np.bincount(
            np.concatenate(self.validator.metrics.stats["target_cls"]).astype(int), minlength=classes
        ).tolist()

    def shared(self, found: Found, other: Found) -> int:
        """Return how many objects two networks both find in an image: of one class, boxes overlapping by half."""
        oriented = found["bboxes"].shape[1] == 5
        match = (type(self.validator) if oriented else DetectionValidator)._process_batch
        return int(match(self.validator, found, other)["tp"][:, 0].sum())

    def labels(self, batch: dict[str, Any]) -> Found:
        """Return the labels of a batch of one preprocessed image, as if they were found."""
        return self.validator._prepare_batch(0, batch)


def sure(found: Found, classes: Sequence[int] | None = None) -> Found:
    """Return what a network is sure of, of some classes or of all."""
    chosen = found["conf"] >= SURE
    if classes is not None:
        chosen &= torch.isin(found["cls"].long(), torch.tensor(list(classes), device=chosen.device))
    return {k: v[chosen] for k, v in found.items()}


def validate(
    networks: Mapping[str, Validation], dataset: Dataset, indices: Sequence[int], batch: int
) -> Iterator[tuple[Sequence[int], Sequence[dict[str, Any]], dict[str, list[Found]]]]:
    """Count images of a dataset in, some at a time that are of one size.

    Args:
        networks (Mapping[str, Validation]): By name.
        dataset (Dataset): Upstream's, for validation.
        indices (Sequence[int]): Those of the images.
        batch (int): The most at a time.

    Yields:
        indices (Sequence[int]): Of some images.
        samples (Sequence[dict[str, Any]]): Their samples.
        found (dict[str, list[Found]]): By network, what it finds in each.
    """
    preprocess = next(iter(networks.values())).validator.preprocess
    for chosen, samples in alike(dataset, indices, batch):
        loaded = preprocess(dataset.collate_fn(samples))
        yield chosen, samples, {who: network.add(dict(loaded)) for who, network in networks.items()}
