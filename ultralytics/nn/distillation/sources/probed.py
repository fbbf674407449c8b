# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Teachers with a fitted head: files that hold the whole network, its head, and what its answers mean."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics import __version__
from ultralytics.nn.distillation.files import regular_file
from ultralytics.nn.distillation.probe import put_head
from ultralytics.nn.distillation.safe_load import load_checkpoint_file
from ultralytics.nn.distillation.sources.base import Source, names_in, without_folders
from ultralytics.nn.distillation.sources.libraries import LIBRARIES, OPTIONS, build_network, without_layers
from ultralytics.nn.tasks import BaseModel, guess_model_task

__all__ = ("PROBE", "Head", "describe_probed", "open_probed", "read_head", "save_probed")

PROBE = "probe"  # the key of a file that says how its head was fitted
MOST_PIXELS, MOST_CLASSES = 4096, 100_000  # of a side, and of a head, that a file may ask for


class Head(NamedTuple):
    """A linear head of C classes on d features.

    Attributes:
        layer (str): Name of the layer in whose place it is, "" if it stands behind the network.
        weight (Tensor): Weights of shape (C, d), float32.
        bias (Tensor): Biases of shape (C,), float32.
    """

    layer: str
    weight: Tensor
    bias: Tensor


def save_probed(file: Path, source: Source, head: Head) -> None:
    """Write a network with a fitted head, whole.

    An Ultralytics network is written as Ultralytics writes one, so `YOLO(file)` opens it. Others are written as
    weights with the name of their library's network, if they have a recipe.

    Args:
        file (Path): The file.
        source (Source): The network with its head, and what it was fitted with.
        head (Head): The head.
    """
    network, names = copy.deepcopy(source.network).cpu(), dict(enumerate(source.names))
    known = {"backbone": source.backbone, "imgsz": source.imgsz, "channels": source.channels, "names": names}
    known |= {"mean": list(source.mean), "std": list(source.std)}
    known |= {key: value.cpu() if isinstance(value, Tensor) else value for key, value in head._asdict().items()}
    if isinstance(network, BaseModel):
        network.names, network.yaml["nc"] = names, len(names)
        content = {"model": network, "train_args": {"task": guess_model_task(network)}, "version": __version__}
    else:
        content = {"state_dict": network.state_dict()}
        known |= source.recipe or {"network": f"module:{type(network).__name__}"}
    torch.save({**content, PROBE: known}, file)


def describe_probed(source: Source, known: Mapping[str, Any]) -> Source:
    """Return a source with what its file says of a fitted head.

    Raises:
        TypeError: If the file says it in another way than `save_probed`.
    """
    try:
        source.backbone, source.imgsz, source.channels = (known[key] for key in ("backbone", "imgsz", "channels"))
        source.mean, source.std = (tuple(map(float, known[key])) for key in ("mean", "std"))
        source.names = names_in(known)
        sizes = [x for x in (source.imgsz, source.channels, known.get("side")) if x is not None]
        classes = known.get("classes")
        if not (
            isinstance(source.backbone, str)
            and source.names
            and all(type(x) is int and 0 < x <= MOST_PIXELS for x in sizes)
            and (classes is None or (type(classes) is int and 0 <= classes <= MOST_CLASSES))
            and all(map(math.isfinite, source.mean + source.std))
            and min(source.std) > 0
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise TypeError(f"'teacher={source.name}' is damaged: what it says of its head is not complete.") from e
    return source


def open_probed(file: str, content: Mapping[str, Any]) -> Source:
    """Open a network of a library with a fitted head.

    Args:
        file (str): The file.
        content (Mapping[str, Any]): What it holds.

    Raises:
        TypeError: If the network was given in Python, or the file is damaged.
        ImportError: If the library is not installed.
    """
    known = content[PROBE]
    source = describe_probed(Source(file, nn.Identity(), file=file), known)
    library, _, name = str(known.get("network")).partition(":")
    if library not in LIBRARIES:
        given = "network" if source.backbone.startswith("module:") else source.backbone
        raise TypeError(
            f"'teacher={file}' holds a head, and weights of a network that no library builds by its name alone, "
            f"{known.get('network')}. Give the network itself, as 'teacher={given}' with 'teacher_probe=True': a run "
            f"beside this one takes the head."
        )
    try:
        options = {key: bool(value) for key, value in known["options"].items() if key in OPTIONS}
        recipe = {"network": f"{library}:{name}", "side": known["side"], "options": options}
        source.recipe = {**recipe, **{key: known[key] for key in ("classes", "without") if key in known}}
        network = build_network(library, name, known["side"], options, known.get("classes"))
        head = _head(known)
        network = put_head(without_layers(network, known.get("without", ())), head.layer, *head.weight.shape[::-1])
        network.load_state_dict(content["state_dict"])
        source.network = network
    except ImportError:
        raise
    except Exception as e:  # of another release of the library, or damaged
        raise TypeError(
            f"'teacher={without_folders(file)}' does not fit '{library}:{name}' as it is installed here "
            f"({type(e).__name__}: {' '.join(str(e).split())[:160]}). Fit it again, with "
            f"'teacher={source.backbone}' and 'teacher_probe=True'."
        ) from e
    return source


def read_head(file: str, trusted: bool = False) -> Head:
    """Return the head in a file that `save_probed` has written; nothing else in it is looked at.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is damaged, or was not written by `save_probed`.
    """
    content = load_checkpoint_file(regular_file(file, file), file, trusted, ultralytics=True)
    try:
        return _head(content[PROBE])
    except (KeyError, TypeError, ValueError) as e:
        raise TypeError(f"'{file}' holds no fitted head.") from e


def _head(known: Mapping[str, Any]) -> Head:
    """Return the head that a file describes.

    Raises:
        KeyError: If it has none.
        ValueError: If it is none.
    """
    head = Head(known["layer"], known["weight"], known["bias"])
    shapes = [(x.ndim, x.dtype, len(x)) for x in head[1:]]
    classes = len(known["names"])
    if not isinstance(head.layer, str) or shapes != [(2, torch.float32, classes), (1, torch.float32, classes)]:
        raise ValueError("no linear head")
    return head
