# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Teachers with a fitted head: files that hold the whole network, its head, and what its answers mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import __version__
from ultralytics.nn.distillation.class_names import read_names
from ultralytics.nn.distillation.probe import ProbedNetwork, put_head
from ultralytics.nn.distillation.safe_load import load_checkpoint_file, regular_file
from ultralytics.nn.distillation.sources.base import Source, fixed_imgsz, without_folders
from ultralytics.nn.distillation.sources.libraries import LIBRARIES, build_network
from ultralytics.nn.tasks import BaseModel, guess_model_task

__all__ = ("PROBE", "describe_probed", "open_probed", "read_probed", "save_probed")

PROBE = "probe"  # the key of a file that says how its head was fitted
OPTIONS = (
    "transform_input",
    "aux_logits",
)  # of TorchVision's Inception networks, by which their weights come to differ


def save_probed(file: Path, source: Source, layer: str, features: int, in_python: bool = False) -> None:
    """Write a network with a fitted head, whole.

    An Ultralytics network is written as Ultralytics writes one, so `YOLO(file)` opens it. Others are written as
    weights with the name of their library's network.

    Args:
        file (Path): The file.
        source (Source): The network with its head, and what it was fitted with; its name is the backbone's.
        layer (str): Name of the layer in whose place the head is, "" if it stands behind the network.
        features (int): Width of its input.
        in_python (bool): Say that it can only be opened with the network given again, whatever its library.
    """
    network, names = copy.deepcopy(source.network).cpu(), dict(enumerate(source.names))
    known: dict[str, Any] = {"backbone": source.name, "imgsz": source.imgsz, "channels": source.channels}
    known |= {"mean": list(source.mean), "std": list(source.std)}
    if isinstance(network, BaseModel):
        network.names, network.yaml["nc"] = names, len(names)
        content = {"model": network, "train_args": {"task": guess_model_task(network)}, "version": __version__}
    else:
        known |= {"layer": layer, "features": features}
        inner = network.network if isinstance(network, ProbedNetwork) else network
        known["side"] = fixed_imgsz(inner)
        known["options"] = {key: getattr(inner, key) for key in OPTIONS if hasattr(inner, key)}
        architecture = (getattr(inner, "pretrained_cfg", None) or {}).get("architecture")
        known["network"] = f"timm:{architecture}" if architecture else source.name.partition("@")[0]
        if in_python:
            known["network"] = f"module:{type(inner).__name__}"
        content = {"state_dict": network.state_dict(), "names": names}
    torch.save({**content, PROBE: known}, file)


def describe_probed(source: Source, known: Any) -> Source:
    """Return a source with what its file says of a fitted head.

    Raises:
        TypeError: If the file says it in another way than `save_probed`.
    """
    try:
        source.backbone, source.imgsz, source.channels = (known[key] for key in ("backbone", "imgsz", "channels"))
        source.mean, source.std = (tuple(map(float, known[key])) for key in ("mean", "std"))
        kinds = ((source.backbone, str), (source.imgsz, (int, type(None))), (source.channels, (int, type(None))))
        if not all(isinstance(value, kind) for value, kind in kinds) or min(source.std) <= 0:
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
        raise TypeError(
            f"'teacher={file}' holds a network that was given in Python, {known.get('network')}, with a head. "
            f"Give the network again, as 'teacher=network' with 'teacher_probe={file}'."
        )
    try:
        network = build_network(library, name, known["side"], known["options"])
        network = put_head(network, known["layer"], known["features"], len(content["names"]))
        network.load_state_dict(content["state_dict"])
        source.network, source.names = network, read_names(content["names"])
    except ImportError:
        raise
    except Exception as e:  # of another release of the library, or damaged
        raise TypeError(
            f"'teacher={without_folders(file)}' does not fit '{library}:{name}' as it is installed here "
            f"({type(e).__name__}: {' '.join(str(e).split())[:160]}). Fit it again, with "
            f"'teacher={source.backbone}' and 'teacher_probe=True'."
        ) from e
    return source


def read_probed(file: str) -> tuple[list[str], Mapping[str, Tensor]]:
    """Return the classes and the weights in a file that `save_probed` has written.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is damaged, or was not written by `save_probed`.
    """
    content = load_checkpoint_file(regular_file(file, file), file, ultralytics=True)
    if not isinstance(content, Mapping) or PROBE not in content:
        raise TypeError(
            f"'teacher_probe={file}' holds no fitted head. Give the 'probe-....pt' of an earlier run, or True."
        )
    network = content.get("model")
    if isinstance(network, BaseModel):
        return read_names(network.names), network.state_dict()
    return read_names(content["names"]), content["state_dict"]
