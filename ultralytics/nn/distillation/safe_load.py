# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Reading a file of weights from anywhere without running, or allocating, what is hidden in it."""

from __future__ import annotations

import io
import math
import os
import pathlib
import pickle
import sys
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from ultralytics.nn.distillation.files import is_torchscript, refuse_other
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils.patches import torch_load

sys.modules.setdefault("pathlib._local", pathlib)  # where Python 3.13's checkpoints say that paths are, students' too
# Paths, which are made of this system's kind
PATHS = {
    f"{module}.{name}": PurePath if name.startswith("Pure") else Path
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
# What plain checkpoints call: tensors, and values that are no larger than their text
TENSORS = {f"torch._utils.{name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")}
CONTAINERS = {"builtins.set", "__builtin__.set", "collections.OrderedDict"}
CALLS = TENSORS | {
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *(
        "torch.Size",
        "torch.device",
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "__builtin__.set",
    ),
    *("argparse.Namespace", "types.SimpleNamespace", "ultralytics.utils.IterableSimpleNamespace", "_codecs.encode"),
    *PATHS,
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *("numpy.dtype", "torchvision.transforms.functional.InterpolationMode"),
}
FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, type)
PLAIN_VALUES = [  # beside the weights in what timm's and TorchVision's scripts save
    *(Namespace, np.dtype, np.float64(0).__reduce__()[0]),
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
]


__all__ = ("check_modules", "load_checkpoint_file")


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
    try:
        if is_torchscript(file):
            raise zipfile.BadZipFile("it is no checkpoint")
        _check_sizes(file)
    except zipfile.BadZipFile as e:
        refuse_other(file, teacher)
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: the file is damaged, cut short or no checkpoint of torch ({e}). "
            f"Copy or train it again."
        ) from e
    except _ForgedError as e:
        raise TypeError(f"'teacher={teacher}' is refused as damaged or forged: {e}. Copy or train it again.") from e
    except _ForeignCallError as e:
        raise _foreign(teacher, [str(e)]) from e
    except Exception as e:  # a torn pickle fails in as many ways as there are opcodes
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: its index is damaged ({type(e).__name__}). Copy or train it again."
        ) from e
    return _unpickle(file, teacher, trusted, ultralytics)


def _unpickle(file: str, teacher: Any, trusted: bool, ultralytics: bool) -> Any:
    """Unpickle a file, by upstream's list of known classes if it is Ultralytics', unless it is trusted."""
    known = torch.serialization.get_safe_globals()
    try:
        if trusted:
            try:
                return torch_load(file, map_location="cpu", weights_only=False)
            except ModuleNotFoundError as e:
                if not (ultralytics and str(e.name).startswith("ultralytics.")):
                    raise
                return torch_safe_load(file, safe_only=False)[0]  # knows where modules of old releases went
        torch.serialization.add_safe_globals([(kind, name) for name, kind in PATHS.items()])
        if ultralytics:
            return torch_safe_load(file, safe_only=True)[0]
        with torch.serialization.safe_globals(PLAIN_VALUES):
            return torch_load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        if not trusted and (names := _foreign_names(file)):
            raise _foreign(teacher, names) from e
        if isinstance(e, (ImportError, AttributeError)):
            raise TypeError(
                f"'teacher={teacher}' cannot be loaded, as it was saved together with code that is not here "
                f"({' '.join(str(e).split()):.160}). Load it where that can be imported, save its 'state_dict()', and "
                f"give that with the network that it belongs to, e.g. 'timm:resnet18@weights.pth'."
            ) from e
        refuse_other(file, teacher, "a checkpoint", "a checkpoint from before torch 1.6")
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: the file is damaged or no checkpoint ({type(e).__name__}). Give "
            f"the 'best.pt' of a finished classification training."
        ) from e
    finally:  # upstream adds what it knows for the whole process; what reads files after us shall not inherit it
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(known)


def _foreign(teacher: Any, names: list[str]) -> TypeError:
    """Return the refusal of a file that asks for code."""
    shown = [f"{name:.80}" for name in names[:10]]
    return TypeError(
        f"'teacher={teacher}' is refused, as loading it would call code that is no part of a plain checkpoint: "
        f"{shown}. If you know where the file comes from and trust it, set 'teacher_trusted=True'."
    )


def _foreign_names(file: str) -> list[str]:
    """Return the names in a file that the restricted unpickler, with all that upstream allowed it, does not know."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # no zip archive of torch's, or a pickle too strange to be scanned
        return []


def check_modules(model: nn.Module) -> None:
    """Check that a network from a file calls no more than the methods of its classes.

    Args:
        model (nn.Module): As it was unpickled; none of its methods is called here.

    Raises:
        TypeError: If a part of it is no module, has a hook, or a function for an attribute.
    """
    waiting, checked = [("", model)], set()
    while waiting:
        name, module = waiting.pop()
        if not isinstance(module, nn.Module):
            raise TypeError(f"its part '{name:.80}' is no network")
        if id(module) in checked:
            continue
        checked.add(id(module))
        for key, value in vars(module).items():
            fused = key == "forward" and getattr(value, "__func__", None) is getattr(type(module), "forward_fuse", 0)
            method = isinstance(value, FUNCTIONS) or (callable(value) and callable(getattr(type(module), key, None)))
            if ("hooks" in key and value) or (method and not fused):
                raise TypeError(f"its part '{name:.80}' brings a '{key:.80}' of its own")
        waiting += [(f"{name}.{k}".strip("."), m) for k, m in vars(module).get("_modules", {}).items() if m is not None]


class _ForgedError(Exception):
    """A file declares more than it holds."""


class _ForeignCallError(Exception):
    """A file asks for a call that no plain checkpoint makes; says which."""


def _check_sizes(file: str) -> None:
    """Compare every size that a zip checkpoint declares with the bytes that are there, before torch allocates any.

    Raises:
        zipfile.BadZipFile: If the file is no checkpoint archive.
        _ForgedError: If a size is not true.
    """
    total = os.path.getsize(file)
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        if len({r.filename.casefold() for r in records}) < len(records):
            raise _ForgedError("two of its records have one name")
        # torch looks for the directory where the end of the file says, zipfile where it must be
        if zipfile._EndRecData(archive.fp)[zipfile._ECD_OFFSET] != archive.start_dir:
            raise _ForgedError("its directory lies elsewhere than it says")
        end = 0
        for record in records:  # torch stores them as they are; a compressed one may unfold to any size
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > total:
                raise _ForgedError(f"record {record.filename!r:.80} would unfold to {record.file_size:,} bytes")
            if record.header_offset < end:
                raise _ForgedError("its records overlap")
            end = record.header_offset + zipfile.sizeFileHeader + len(record.orig_filename.encode()) + record.file_size
        if end > archive.start_dir:
            raise _ForgedError("its records overlap")
        index = [r.filename for r in records if r.filename.count("/") == 1 and r.filename.endswith("/data.pkl")]
        if len(index) != 1:
            raise zipfile.BadZipFile("it has no data.pkl")
        folder = index[0].removesuffix("data.pkl")
        sizes = {r.filename.removeprefix(f"{folder}data/"): r.file_size for r in records}
        _SizeReader(archive.read(index[0]), sizes, total).load()


class _Storage:
    """Stands for the storage of a tensor: how many elements it has, and of how many bytes each."""

    def __init__(self, numel: int, itemsize: int):
        self.numel = numel
        self.itemsize = itemsize


class _SizeReader(pickle._Unpickler):
    """Follows a pickle with stand-ins: nothing that it names is imported, called or allocated.

    The unpickler in Python without BYTEARRAY8, as that opcode and the unpickler in C allocate what an operand asks for.
    """

    dispatch: ClassVar = {
        opcode: load
        for opcode, load in pickle._Unpickler.dispatch.items()
        if bytes([opcode]) not in {pickle.BYTEARRAY8, pickle.ADDITEMS, pickle.FROZENSET}
    }

    def load_setitem(self) -> None:
        """Check the key, as the hash of a deeply shared tuple takes forever."""
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Check the keys."""
        self.check_keys(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Check that what will be hashed is plain."""
        if any(isinstance(key, (tuple, _StandIn)) for key in keys):
            raise _ForgedError("a key or a member of a set is no plain value")

    def __init__(self, data: bytes, sizes: dict[str, int], total: int):
        super().__init__(io.BytesIO(data))
        self.sizes = sizes
        self.total = total

    def find_class(self, module: str, name: str) -> type:
        """Return a class of that name which does nothing but look at what it is called with."""
        full = f"{module}.{name}"
        if module == "ultralytics.nn.distill_model":  # loads another file when it is built
            raise _ForeignCallError(full)
        return _StandInType(name, (_StandIn,), {"reader": self, "full": full})

    def persistent_load(self, saved: tuple) -> _Storage:
        """Check a storage, saved as ("storage", type, record, device, number of elements)."""
        _, kind, key, _, numel = saved
        itemsize = _itemsize(getattr(kind, "__name__", str(kind)))
        if not isinstance(numel, int) or not 0 <= numel * itemsize <= self.sizes.get(key, -1):
            raise _ForgedError(
                f"tensor data {key!r:.20} declares {numel!r:.30} elements in {self.sizes.get(key, 0):,} bytes"
            )
        return _Storage(numel, itemsize)

    def check_call(self, full: str, args: tuple) -> None:
        """Check a call: only those that plain checkpoints make, and a tensor must lie within its storage."""
        if full in TENSORS and args and isinstance(args[0], _Storage):
            storage, offset, size, stride = args[:4]
            if len(size) > 64:
                raise _ForgedError(f"a tensor has {len(size):,} dimensions")
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            elements = math.prod(size)
            if min((offset, *size, *stride)) < 0 or (
                elements and (last >= storage.numel or elements * storage.itemsize > self.total)
            ):
                raise _ForgedError(
                    f"a tensor of shape {tuple(size)!s:.80} lies over {storage.numel:,} elements of data"
                )
        elif full in {"builtins.getattr", "__builtin__.getattr"}:
            if args[1:] not in {("forward",), ("forward_fuse",)}:  # of a fused layer
                raise _ForeignCallError(full)
        elif full.endswith(".multiarray._reconstruct"):
            if args[1:2] != ((0,),):
                raise _ForgedError("an array is allocated before it is filled")
        elif full in CONTAINERS:
            self.check_keys(args[0] if args and isinstance(args[0], list) else args)
            if args and "set" not in full:
                raise _ForgedError("a dictionary is not made empty")
        elif full not in CALLS:
            raise _ForeignCallError(full)


class _StandInType(type):
    """Looks at calls; an unpickler that only makes an object does not call its class."""

    def __call__(cls, *args: Any) -> _StandIn:
        """Take the arguments of a call, and keep none."""
        cls.reader.check_call(cls.full, args)
        return cls.__new__(cls)


class _StandIn:
    """Stands for whatever a pickle names: takes every state, and keeps none."""

    reader: _SizeReader
    full: str

    def __new__(cls, *args: Any, **kwargs: Any):
        tensor = cls.full.startswith("torch.") and not cls.full.startswith("torch.nn.modules.")
        if args or kwargs or (tensor and cls.full not in CALLS):  # objects are made bare, and tensors by a call
            raise _ForeignCallError(cls.full)
        return super().__new__(cls)

    def ignore(self, *args: Any) -> None:
        """Take what an unpickler adds to an object."""

    __setstate__ = __setitem__ = append = extend = add = update = ignore


def _itemsize(storage: str) -> int:
    """Return the bytes of one element of a storage class."""
    name = storage.removesuffix("Storage").lower()
    names = {"": "uint8", "untyped": "uint8", "char": "int8", "byte": "uint8"}
    names |= {"complexfloat": "complex64", "complexdouble": "complex128"}
    dtype = getattr(torch, names.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise _ForgedError(f"there is no storage {storage!r:.40}")
    return dtype.itemsize
