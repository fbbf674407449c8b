# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a source says about a network, and what all sources share."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from ultralytics.nn.distillation.class_names import read_names
from ultralytics.nn.tasks import ClassificationModel

__all__ = (
    *("CLASSIFIER", "Expected", "Source"),
    *("download", "fixed_imgsz", "names_in", "names_of", "trained", "without_folders"),
)

NAME_KEYS = ("names", "class_names", "classes")


class Expected(NamedTuple):
    """What kind of network a task's teacher is.

    Attributes:
        task (str): Upstream's name of the task, e.g. "classify".
        network_class (type[nn.Module]): Upstream's class of such networks, e.g. `ClassificationModel`.
        example (str): An official checkpoint, for the messages.
    """

    task: str
    network_class: type[nn.Module]
    example: str

    @property
    def noun(self) -> str:
        """What the task is called in a sentence, e.g. "classification"."""
        noun = self.network_class.__name__.removesuffix("Model").lower()
        return "rotated box" if noun == "obb" else noun

    @property
    def training(self) -> str:
        """A command that trains such a network."""
        return f"yolo {self.task} train model={Path(self.example).stem}.yaml"


CLASSIFIER = Expected("classify", ClassificationModel, "yolo11l-cls.pt")  # what libraries and exported files hold


@dataclass
class Source:
    """A network and what its source says about it; None where it says nothing.

    Attributes:
        name (str): The teacher as args.yaml records it, files by absolute path.
        network (nn.Module): Takes (B, channels, imgsz, imgsz) images.
        names (list[str] | None): Class names by index.
        channels (int | None): Input channels.
        imgsz (int | None): The one image side in pixels that it takes; None if it takes any.
        mean (Sequence[float]): Per-channel mean that its training subtracted from images in 0 to 1.
        std (Sequence[float]): Per-channel standard deviation that its training divided by.
        has_features (bool): Whether feature maps can be read inside it.
        file (str | None): The file that it was read from.
        beside (Sequence[str]): Further files that hold its weights.
        content_hash (str | None): SHA-256 of the file, followed by those beside it, or of the weights where there is
            none, in hexadecimal digits.
        backbone (str | None): The network whose features its head was fitted on, if one was.
        recipe (Mapping[str, Any] | None): How a library builds the network without weights: its `network`, e.g.
            "timm:resnet18", the `side` of its images if it is built for one, `options` of its constructor, and where
            they are known, the `classes` of its own head and the layers that it is `without`.
        trained_imgsz (int | None): The image side in pixels that it was trained at, though it takes others.
    """

    name: str
    network: nn.Module
    names: list[str] | None = None
    channels: int | None = None
    imgsz: int | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    has_features: bool = True
    file: str | None = None
    beside: Sequence[str] = ()
    content_hash: str | None = None
    backbone: str | None = None
    recipe: Mapping[str, Any] | None = None
    trained_imgsz: int | None = None


def download(get: Callable[[], Any], teacher: Any) -> Any:
    """Return what a library downloads, or say that it could not."""
    try:
        return get()
    except Exception as e:  # libraries and their networks fail in many ways
        raise FileNotFoundError(
            f"'teacher={teacher}' could not be downloaded ({type(e).__name__}: {' '.join(str(e).split())[:120]}). "
            f"Download it where there is a network, and give the file."
        ) from e


def trained(source: Source, expected: Expected) -> Source:
    """Refuse a network that was never trained: only training moves BatchNorm statistics; without any, believe it.

    Raises:
        TypeError: If it was not.
    """
    norms = [m for m in source.network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    if norms and not any(m.running_mean.any() for m in norms):
        raise TypeError(
            f"'teacher={source.name}' has never been trained: its BatchNorm statistics are those of a new network. "
            f"Train it first, e.g. '{expected.training}', and give its 'best.pt'."
        )
    return source


def fixed_imgsz(network: nn.Module) -> int | None:
    """Return the one image side that a network takes, as TorchVision's and timm's transformers say it, or None."""
    if (getattr(network, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        side = getattr(getattr(network, "patch_embed", None), "img_size", None)
        return (side[0] if isinstance(side, (tuple, list)) else side) or network.pretrained_cfg["input_size"][-1]
    side = getattr(network, "image_size", None)
    return side if isinstance(side, int) else None


def names_of(network: nn.Module) -> list[str] | None:
    """Return a network's own class names, as those of Ultralytics and of Hugging Face's transformers carry them."""
    names = getattr(network, "names", None) or getattr(getattr(network, "config", None), "id2label", None)
    return names_in({"names": names}) if names else None


def names_in(content: Any) -> list[str] | None:
    """Return the class names that a checkpoint, or a file's notes, say beside the weights."""
    if not isinstance(content, Mapping):
        return None
    try:
        by_name = content.get("class_to_idx")
        if isinstance(by_name, Mapping):  # torchvision's ImageFolder
            return read_names({i: name for name, i in by_name.items()})
        names = next((content[k] for k in NAME_KEYS if k in content), None)
        if isinstance(names, str):  # notes hold text; a list in JSON reads the same
            names = ast.literal_eval(names) if len(names) < 1_000_000 else None
        return read_names(names) if isinstance(names, (list, tuple, Mapping)) else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # then they have to be given
        return None


def without_folders(source: Any) -> str:
    """Return the name of a network as it is shown: files, alone or behind an @, without their folders."""
    return re.sub(r"(^|@)[^@]*[/\\]", r"\1", str(source))
