# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Files of teachers: whether they are there, and what they hold, told without reading it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

__all__ = (
    "Content",
    "content_of",
    "is_safetensors",
    "is_torchscript",
    "load_safetensors",
    "refuse_other",
    "regular_file",
)

ONNX_FIELDS = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42}  # that may follow the version, the first, in protobuf
BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before 1.6


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        words (str): What it is, e.g. "an ONNX model".
        mend (str): What it cannot teach for, and what lets it, the end of a sentence after "but".
    """

    words: str
    mend: str


def regular_file(path: str | Path, teacher: Any) -> str:
    """Return the absolute path of an existing regular file that is not empty, links as they are named.

    Args:
        path (str | Path): The file.
        teacher (Any): The teacher as the user gave it, for the messages.

    Raises:
        FileNotFoundError: If there is no such file, a link leads nowhere, or it is a folder or a device.
        TypeError: If the file is empty.
    """
    try:
        path = Path(path).expanduser()
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as e:  # too long, or the home of nobody
        raise FileNotFoundError(f"'teacher={teacher!s:.200}' is no path ({type(e).__name__}).") from e
    if not found:
        if path.is_dir():
            reason = "is a folder; give the file in it, e.g. 'weights/best.pt'"
        elif path.is_symlink():
            reason = "is a link that leads nowhere or to itself; give the file itself"
        else:
            reason = "is no regular file" if path.exists() else "does not exist; give the path of a trained checkpoint"
        raise FileNotFoundError(f"'teacher={teacher}' {reason}.")
    if not path.stat().st_size:
        raise TypeError(f"'teacher={teacher}' is empty (0 bytes). Copy or train it again.")
    return os.path.abspath(path)  # caches of files name them by links


def is_torchscript(file: str) -> bool:
    """Tell whether a file is a TorchScript archive: a zip that holds code beside the weights."""
    return _holds(file, "/constants.pkl")


def _holds(file: str, ending: str) -> bool:
    """Tell whether a file is a zip archive with a record whose name ends so."""
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith(ending) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def is_safetensors(file: str) -> bool:
    """Tell whether a file is of safetensors: the size of a header, and the header in JSON."""
    with open(file, "rb") as f:
        size, brace = int.from_bytes(f.read(8), "little"), f.read(1)
    return brace == b"{" and size < os.path.getsize(file)


def content_of(file: str) -> Content | None:
    """Return what a file holds, whatever its name is; None if that is not known."""
    named, renamed = f"e.g. 'teacher=timm:resnet18@{file}'", "give it a name, or a link of a name, that does"
    if is_safetensors(file):
        return Content("safetensors weights", f"no network: name the one that they belong to, {named}")
    if is_torchscript(file):
        return Content("a TorchScript program", f"no weights for another network: give it as 'teacher={file}'")
    with open(file, "rb") as f:
        start = f.read(256)
    if start.startswith(BEFORE_ZIP):
        trust = "set 'teacher_trusted=True' if you trust it, or save it again with a newer torch"
        return Content("a checkpoint from before torch 1.6", f"none that can be read safely: {trust}")
    if len(start) > 1 and start[0] == 0x80 and start[1] < 6:
        saved = "read it with 'pickle', if you trust it, and save the network's weights by 'torch.save'"
        return Content("what Python's pickle wrote", f"no checkpoint of torch: {saved}")
    if len(start) > 2 and start[0] == 8 and 0 < start[1] < 32 and start[2] in ONNX_FIELDS:
        if file.lower().endswith(".onnx"):
            return Content("an ONNX model", f"no weights for another network: give it as 'teacher={file}'")
        return Content("an ONNX model", f"its name does not end in '.onnx': {renamed}")
    if start.startswith(b"version https://git-lfs"):
        return Content("a pointer of Git LFS", "not the file: fetch that with 'git lfs pull'")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return Content("a web page", "no network: download the file itself")
    if _holds(file, "/data.pkl"):
        network = f"or name the network that its weights belong to, {named}"
        return Content("a checkpoint", f"its name does not end in '.pt': {renamed}, {network}")
    return None


def refuse_other(file: str, teacher: Any, *but: str) -> None:
    """Refuse a file that holds something else than it was read as, in words that say what.

    Args:
        file (str): A regular file that could not be read.
        teacher (Any): The teacher as the user gave it.
        *but (str): The words of what it was read as, see `Content`: such a file is damaged, for the caller to say.

    Raises:
        TypeError: If it is known what it holds.
    """
    found = content_of(file)
    if found and found.words not in but:
        raise TypeError(f"'teacher={teacher}' holds {found.words}, but {found.mend}.")


def load_safetensors(file: str, teacher: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file; the library checks its header against its size.

    Args:
        file (str): A regular file.
        teacher (Any): The teacher as the user gave it, for the messages.

    Returns:
        tensors (dict[str, Tensor]): The state dict, on the CPU.
        metadata (dict[str, str]): The file's own notes.

    Raises:
        ImportError: If the library is not installed.
        TypeError: If the file is damaged.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ImportError(f"'teacher={teacher}' needs safetensors. Install it with 'pip install safetensors'.") from e
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError) as e:
        refuse_other(file, teacher, "safetensors weights")
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: no sound safetensors file ({e!s:.100}). Copy it again."
        ) from e
