# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The teacher: a trained classifier as a frozen function from images to logits and features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from ultralytics.nn.autobackend import check_class_names
from ultralytics.nn.taps import FeatureTaps
from ultralytics.nn.tasks import ClassificationModel, load_checkpoint
from ultralytics.utils import SETTINGS
from ultralytics.utils.checks import REMOTE_FILE_PREFIXES, check_file, check_model_file_from_stem
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

__all__ = ("Teacher",)


class Teacher:
    """A trained classifier, frozen: eval mode, no gradients, Conv and BatchNorm fused.

    It is no `nn.Module`, so that it can never become part of a student, an optimizer or a checkpoint.

    Attributes:
        path (str): The checkpoint file.
        model (ClassificationModel): The network.
        names (dict[int, str]): Class names by index.
        channels (int): Input channels.
    """

    def __init__(self, path: str | Path | None):
        """Load and vet a checkpoint, on the CPU.

        Args:
            path (str | Path | None): Ultralytics classification checkpoint, or an official name to download.

        Raises:
            FileNotFoundError: If the file does not exist.
            TypeError: If the file is not a trained classification checkpoint.
            ValueError: If no teacher is given.
        """
        self.path = str(Path(_find(path)).resolve())
        try:
            model, _ = load_checkpoint(self.path)
        except Exception as e:
            raise TypeError(
                f"'teacher={path}' cannot be loaded: the file is empty, damaged or no Ultralytics checkpoint "
                f"({type(e).__name__}). Give the 'best.pt' of a finished classification training."
            ) from e
        if not isinstance(model, ClassificationModel):
            raise TypeError(
                f"'teacher={path}' is a {getattr(model, 'task', type(model).__name__)} model, but the teacher must be "
                f"a classification model, i.e. 'teacher=yolo11l-cls.pt'."
            )
        if not _is_trained(model):
            raise TypeError(
                f"'teacher={path}' has never been trained: its BatchNorm statistics are those of a new network. "
                f"Train it first, i.e. 'yolo classify train model={path}', and give its 'best.pt'."
            )
        self.names = check_class_names(model.names)
        self.channels = model.yaml.get("channels", 3)
        self.model = model.requires_grad_(False).fuse(verbose=False).eval()
        self._taps = FeatureTaps(self.model, ())

    def check(self, names: dict[int, str], channels: int) -> None:
        """Check that this teacher can judge a dataset.

        Args:
            names (dict[int, str]): The dataset's class names by index.
            channels (int): Channels of the dataset's images.

        Raises:
            ValueError: If classes or channels differ.
        """
        ours, theirs = list(self.names.values()), list(check_class_names(names).values())
        if len(ours) != len(theirs):
            raise ValueError(
                f"'teacher={self.path}' knows {len(ours)} classes, but the dataset has {len(theirs)}. "
                f"Train the teacher on this dataset, or give one that was."
            )
        if ours != theirs:
            i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            raise ValueError(
                f"'teacher={self.path}' and the dataset name their {len(ours)} classes differently: class {i} is "
                f"'{ours[i]}' for the teacher and '{theirs[i]}' in the dataset. Give a teacher trained on this dataset."
            )
        if self.channels != channels:
            raise ValueError(
                f"'teacher={self.path}' takes images of {self.channels} channels, but the dataset's have {channels}. "
                f"Give a teacher trained on {channels}-channel images."
            )

    def tap(self, names: Sequence[str]) -> None:
        """Choose the modules whose outputs are returned as features.

        Args:
            names (Sequence[str]): Dotted module names, one per level.
        """
        self._taps.remove()
        self._taps = FeatureTaps(self.model, names)

    def to(self, device: torch.device) -> Teacher:
        """Move the network to a device."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Answer a batch of images.

        Args:
            images (Tensor): Images of shape (B, channels, H, W) as upstream's training loop holds them: 0 to 1, RGB.

        Returns:
            logits (Tensor): Class logits of shape (B, C).
            features (list[Tensor]): One (B, c, h, w) map per tapped module.
        """
        _, logits = self.model(images)  # an Ultralytics classifier in eval mode returns (probabilities, logits)
        return logits, self._taps.take()


def _find(path: str | Path | None) -> str:
    """Return the path of the checkpoint file, downloaded if it is an official one that is not there yet."""
    if path is None:
        raise ValueError(
            "No teacher given. Set 'teacher' to a trained classification checkpoint, i.e. "
            "'teacher=runs/classify/train/weights/best.pt'."
        )
    file = str(Path(check_model_file_from_stem(path)).expanduser()) if "://" not in str(path) else str(path)
    if Path(file).suffix.lower() in {".yaml", ".yml"}:
        raise TypeError(
            f"'teacher={path}' is a network description without trained weights. Train it first, i.e. "
            f"'yolo classify train model={path}', and give its 'best.pt'."
        )
    if Path(file).suffix.lower() != ".pt":
        raise TypeError(f"'teacher={path}' is not a '.pt' file. Give the 'best.pt' of a classification training.")
    for local in (Path(file), Path(SETTINGS["weights_dir"]) / file):
        if local.is_file():
            return str(local)
    if file.lower().startswith(REMOTE_FILE_PREFIXES):
        return check_file(file, download_dir=SETTINGS["weights_dir"])
    if Path(file).name in GITHUB_ASSETS_NAMES:
        try:
            return attempt_download_asset(file)
        except Exception as e:
            raise FileNotFoundError(
                f"'teacher={path}' is an official model, but could not be downloaded ({type(e).__name__}). Download it "
                f"where there is a network, and give its path."
            ) from e
    raise FileNotFoundError(f"'teacher={path}' does not exist. Give the path of a trained checkpoint.")


def _is_trained(model: nn.Module) -> bool:
    """Tell a trained network by its BatchNorm statistics, which only training moves; without any, believe it."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    return not norms or any(m.running_mean.any() for m in norms)
