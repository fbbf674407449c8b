# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Where a teacher comes from: one adapter per source, each returning a network and what is known about it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine.exporter import export_formats
from ultralytics.nn.distillation.files import is_torchscript, regular_file
from ultralytics.nn.distillation.sources.base import CLASSIFIER, Expected, Source, download
from ultralytics.nn.distillation.sources.exported import open_onnx, open_torchscript
from ultralytics.nn.distillation.sources.libraries import LIBRARIES
from ultralytics.nn.distillation.sources.networks import open_module, open_ultralytics
from ultralytics.utils import SETTINGS
from ultralytics.utils.checks import REMOTE_FILE_PREFIXES, check_file, check_model_file_from_stem
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

__all__ = ("CLASSIFIER", "Expected", "Source", "hash_file", "open_source")

EXPORTED = {".onnx", ".torchscript"}  # suffixes of files that give answers only


def open_source(
    teacher: Any,
    imgsz: int | None = None,
    trusted: bool = False,
    expected: Expected = CLASSIFIER,
    grows_head: bool = False,
) -> Source:
    """Open a teacher, on the CPU, and hash its content.

    Args:
        teacher (Any): An Ultralytics `.pt` or its official name, `torchvision:NAME[@FILE]`, `timm:NAME[@FILE]`, a
            TorchScript or ONNX file, or an `nn.Module`.
        imgsz (int, optional): Image side in pixels to build a network of fixed size for.
        trusted (bool): Let a file run code of its own.
        expected (Expected): What kind of network an Ultralytics checkpoint has to hold; other sources give classifiers.
        grows_head (bool): Let a file of weights lack those of the head, which the network is then without.

    Returns:
        (Source): The network and what is known about it.

    Raises:
        FileNotFoundError: If the file does not exist or cannot be downloaded.
        ImportError: If the source needs a library that is not installed.
        TypeError: If it is no trained network of the task, or the file is damaged or not safe to load.
        ValueError: If no teacher is given, or the library knows no such network.
    """
    if teacher is None:
        raise ValueError(
            f"No teacher given. Set 'teacher' to a trained {expected.noun} checkpoint, e.g. "
            f"'teacher=runs/{expected.task}/train/weights/best.pt'."
        )
    source = _open(teacher, expected, imgsz, trusted, grows_head)
    source.content_hash = hash_file(source.file, *source.beside) if source.file else _hash_weights(source.network)
    return source


def _open(teacher: Any, expected: Expected, imgsz: int | None, trusted: bool, grows_head: bool) -> Source:
    """Let the adapter of a teacher's source open it."""
    if isinstance(teacher, nn.Module):
        return open_module(teacher, expected)
    library, _, rest = str(teacher).partition(":")
    other = library in LIBRARIES or Path(str(teacher)).suffix.lower() in EXPORTED
    if other and expected.task != CLASSIFIER.task:
        raise TypeError(
            f"'teacher={teacher}' cannot teach a {expected.noun} model: other libraries' networks and exported files "
            f"teach classifiers alone. Give a YOLO checkpoint, e.g. '{expected.example}'."
        )
    if library == "module":
        raise ValueError(f"'teacher={teacher}' was a network given in Python: give it again, as 'teacher=network'.")
    if library in LIBRARIES:
        name, at, file = rest.partition("@")
        if at and not file:
            raise ValueError(f"'teacher={teacher}' names no file after '@'. Give one, or leave the '@' out.")
        return LIBRARIES[library](name, file, imgsz, trusted, grows_head)
    _check_format(teacher, expected)
    file = _find(teacher, expected)
    if Path(file).suffix.lower() == ".onnx":
        return open_onnx(file, teacher)
    if is_torchscript(file):
        return open_torchscript(file, teacher, trusted)
    return open_ultralytics(file, teacher, trusted, expected)


def _check_format(teacher: str | Path, expected: Expected) -> None:
    """Refuse files and folders of other programs by their names.

    Raises:
        TypeError: If it is one.
    """
    formats = export_formats()
    names = dict(zip(formats["Suffix"], formats["Format"], strict=True))
    names |= {".xml": "OpenVINO", ".mlmodel": "CoreML", ".trt": "TensorRT", ".h5": "Keras", ".keras": "Keras"}
    name = Path(str(teacher)).name.lower()
    for suffix, program in names.items():
        if suffix and suffix not in {".pt", ".torchscript", ".onnx"} and name.endswith(suffix):
            onnx = ", or an ONNX file of the same network, e.g. by 'yolo export model=best.pt format=onnx'"
            raise TypeError(
                f"'teacher={teacher}' is for {program}, which cannot be asked here. Give the '.pt' that it was made "
                f"of{onnx if expected.task == CLASSIFIER.task else ''}."
            )


def _find(path: str | Path, expected: Expected) -> str:
    """Return the path of a teacher's file, downloaded if it is an official one that is not there yet."""
    file = str(Path(check_model_file_from_stem(path)).expanduser()) if "://" not in str(path) else str(path)
    if Path(file).suffix.lower() in {".yaml", ".yml"}:
        raise TypeError(
            f"'teacher={path}' is a network description without trained weights. Train it first, e.g. "
            f"'yolo {expected.task} train model={path}', and give its 'best.pt'."
        )
    for local in (Path(file), Path(SETTINGS["weights_dir"]) / file):
        if local.is_file():
            return regular_file(local, path)
    if file.lower().startswith(REMOTE_FILE_PREFIXES):
        return regular_file(download(lambda: check_file(file, download_dir=SETTINGS["weights_dir"]), path), path)
    if Path(file).name in GITHUB_ASSETS_NAMES:
        return regular_file(download(lambda: attempt_download_asset(file), path), path)
    return regular_file(file, path)


def hash_file(*files: str) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it, or of several one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _hash_weights(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights with their names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() if plain else f"{name} {value}".encode())
        if plain:
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
