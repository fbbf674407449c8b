# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Reading a file of weights from anywhere without running, or allocating, what is hidden in it."""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils.patches import torch_load

__all__ = ("is_torchscript", "load_checkpoint_file", "load_safetensors", "regular_file")


def regular_file(path: str | Path, teacher: Any) -> str:
    """Return the absolute path of an existing regular file that is not empty.

    Args:
        path (str | Path): The file.
        teacher (Any): The teacher as the user gave it, for the messages.

    Raises:
        FileNotFoundError: If there is no such file, a link leads nowhere, or it is a folder or a device.
        TypeError: If the file is empty.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        if path.is_dir():
            reason = "is a folder; give the file in it, i.e. 'weights/best.pt'"
        elif path.is_symlink():
            reason = "is a link that leads nowhere or to itself; give the file itself"
        else:
            reason = "is no regular file" if path.exists() else "does not exist; give the path of a trained checkpoint"
        raise FileNotFoundError(f"'teacher={teacher}' {reason}.")
    if not path.stat().st_size:
        raise TypeError(f"'teacher={teacher}' is empty (0 bytes). Copy or train it again.")
    return str(path.resolve())


def is_torchscript(file: str) -> bool:
    """Tell whether a file is a TorchScript archive: a zip that holds code beside the weights."""
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def load_checkpoint_file(file: str, teacher: Any, trusted: bool = False, ultralytics: bool = False) -> Any:
    """Read a checkpoint with the restricted unpickler, after its sizes were found to be true.

    Args:
        file (str): A regular file.
        teacher (Any): The teacher as the user gave it, for the messages.
        trusted (bool): Read it as pickle does, which runs whatever code the file names.
        ultralytics (bool): Allow Ultralytics' own classes; the file is a `.pt`. Else tensors and plain values only.

    Returns:
        (Any): What was saved, on the CPU.

    Raises:
        TypeError: If the file is damaged, declares more than it holds, or needs more than the restricted unpickler.
    """
    if trusted:
        return _unpickle(file, teacher, trusted, ultralytics)
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise TypeError(
            f"'teacher={teacher}' cannot be read safely by torch {torch.__version__}. Update to torch 2.6 or newer, or "
            f"set 'teacher_trusted=True' if you trust the file."
        )
    if is_torchscript(file):
        raise TypeError(
            f"'teacher={teacher}' is a TorchScript program, not a checkpoint. Give it by itself, as 'teacher={file}'."
        )
    try:
        _check_sizes(file)
    except zipfile.BadZipFile as e:
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: the file is damaged, cut short or no checkpoint of torch 1.6 or "
            f"newer ({e}). Copy or train it again; a sound file of an older torch loads with 'teacher_trusted=True'."
        ) from e
    except _ForgedError as e:
        raise TypeError(f"'teacher={teacher}' is refused as damaged or forged: {e}. Copy or train it again.") from e
    except Exception as e:  # a torn pickle fails in as many ways as there are opcodes
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: its index is damaged ({type(e).__name__}). Copy or train it again."
        ) from e
    return _unpickle(file, teacher, trusted, ultralytics)


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
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: no sound safetensors file ({e!s:.100}). Copy it again."
        ) from e


def _unpickle(file: str, teacher: Any, trusted: bool, ultralytics: bool) -> Any:
    """Unpickle a file, by upstream's list of known classes if it is Ultralytics', unless it is trusted."""
    try:
        if ultralytics:
            return torch_safe_load(file, safe_only=not trusted)[0]
        if trusted:
            return torch_load(file, map_location="cpu", weights_only=False)
        with torch.serialization.safe_globals([Namespace]):  # plain values, in what timm and TorchVision's scripts save
            return torch_load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        foreign = [] if trusted else _foreign_names(file)
        if foreign:
            raise TypeError(
                f"'teacher={teacher}' is refused, as loading it would call code that is no part of a plain checkpoint: "
                f"{foreign}. If you know where the file comes from and trust it, set 'teacher_trusted=True'."
            ) from e
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: the file is damaged or no checkpoint ({type(e).__name__}). Give "
            f"the 'best.pt' of a finished classification training."
        ) from e


def _foreign_names(file: str) -> list[str]:
    """Return the names in a file that the restricted unpickler, with all that upstream allowed it, does not know."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # no zip archive of torch's, or a pickle too strange to be scanned
        return []


class _ForgedError(Exception):
    """A file declares more than it holds."""


def _check_sizes(file: str) -> None:
    """Compare every size that a zip checkpoint declares with the bytes that are there, before torch allocates any.

    Raises:
        zipfile.BadZipFile: If the file is no checkpoint archive.
        _ForgedError: If a size is not true.
    """
    total = os.path.getsize(file)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if len({r.filename for r in records}) < len(records):
            raise _ForgedError("two of its records have one name")
        for record in records:  # torch stores them as they are; a compressed one may unfold to any size
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > total:
                raise _ForgedError(f"record '{record.filename}' would unfold to {record.file_size:,} bytes")
        index = [r.filename for r in records if r.filename.count("/") == 1 and r.filename.endswith("/data.pkl")]
        if len(index) != 1:
            raise zipfile.BadZipFile("it has no data.pkl")
        folder = index[0].removesuffix("data.pkl")
        sizes = {r.filename.removeprefix(f"{folder}data/"): r.file_size for r in records}
        _SizeReader(archive.read(index[0]), sizes, total).load()


class _Storage:
    """Stands for the storage of a tensor: how many elements it has."""

    def __init__(self, numel: int):
        self.numel = numel


class _SizeReader(pickle._Unpickler):
    """Follows a pickle with stand-ins: nothing that it names is imported, called or allocated.

    The unpickler in Python without BYTEARRAY8, as that opcode and the unpickler in C allocate what an operand asks for.
    """

    dispatch: ClassVar = {k: v for k, v in pickle._Unpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}

    def __init__(self, data: bytes, sizes: dict[str, int], total: int):
        super().__init__(io.BytesIO(data))
        self.sizes = sizes
        self.total = total

    def find_class(self, module: str, name: str) -> type:
        """Return a class of that name which does nothing but look at what it is called with."""
        return type(name, (_StandIn,), {"reader": self})

    def persistent_load(self, saved: tuple) -> _Storage:
        """Check a storage, saved as ("storage", type, record, device, number of elements)."""
        _, kind, key, _, numel = saved
        itemsize = _itemsize(getattr(kind, "__name__", str(kind)))
        if not isinstance(numel, int) or not 0 <= numel * itemsize <= self.sizes.get(key, -1):
            raise _ForgedError(f"tensor data '{key}' declares {numel:,} elements in {self.sizes.get(key, 0):,} bytes")
        return _Storage(numel)

    def check_call(self, args: tuple) -> None:
        """Check a call: a tensor must lie within its storage, and nothing else may be built larger than the file."""
        if args and isinstance(args[0], _Storage):
            storage, offset, size, stride = args[:4]
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            elements = math.prod(size)
            if min((offset, *size, *stride)) < 0 or (elements and max(elements, last + 1) > storage.numel):
                raise _ForgedError(f"a tensor of shape {tuple(size)} lies over {storage.numel:,} elements of data")
        elif math.prod(_integers(args)) > self.total:
            raise _ForgedError("it builds something larger than itself")


class _StandIn:
    """Stands for whatever a pickle names: takes every argument and state, and keeps none."""

    reader: _SizeReader

    def __new__(cls, *args: Any, **kwargs: Any):
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        self.reader.check_call((*args, *kwargs.values()))

    def ignore(self, *args: Any) -> None:
        """Take what an unpickler adds to an object."""

    __setstate__ = __setitem__ = append = extend = add = update = ignore


def _integers(values: Iterable[Any]) -> list[int]:
    """Return the positive integers among nested lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += _integers(value)
        elif isinstance(value, int) and value > 1:
            found.append(value)
    return found


def _itemsize(storage: str) -> int:
    """Return the bytes of one element of a storage class, 1 if torch does not know it."""
    name = storage.removesuffix("Storage").lower()
    dtype = getattr(torch, {"": "uint8", "untyped": "uint8", "char": "int8", "byte": "uint8"}.get(name, name), None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 1
