# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a teacher said, kept by image and view: records of one size in memory or in a memory-mapped file."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.utils.distillation import compress_logits, restore_logits

__all__ = ("CachedTeacher", "TeacherCache", "cache_key")

CHECKSUM = 4  # bytes of a CRC-32 behind each record
RESERVE = 0.1  # of the machine's free memory stays free
PIECE = 4096  # records that are looked at at a time
FORMAT = 2  # to be raised when records change
MOST_CLASSES, TOP = 100, 64  # with more classes than that, the logits of the top ones are kept


class TeacherCache:
    """Tensors by (image, view), each record with a checksum.

    A record that was never written, was cut short by a kill, or rotted on the disk fails its checksum and counts as
    missing. Several processes may use one file: records of different images do not touch, and whoever writes the same
    one writes the same.

    Attributes:
        size (int): Bytes that all records take.
        hits (int): Records that were found.
        misses (int): Records that were asked for and missing.
    """

    def __init__(
        self,
        images: int,
        views: int,
        kinds: Sequence[tuple[tuple[int, ...], torch.dtype]],
        file: Path | None = None,
        pinned: bool = False,
    ):
        """Open or make a cache.

        Args:
            images (int): Number of images.
            views (int): Views of each.
            kinds (Sequence[tuple[tuple[int, ...], torch.dtype]]): Shape and dtype of each tensor of a record.
            file (Path, optional): File to map; None for memory.
            pinned (bool): Read into memory that a GPU copies from while the host goes on.

        Raises:
            OSError: If the file cannot be written, or the disk has no room for it.
            MemoryError: If the memory has no room.
        """
        self.views, self.kinds, self.pinned = views, list(kinds), pinned
        self.hits = self.misses = 0
        self._bytes = [math.prod(shape) * dtype.itemsize for shape, dtype in self.kinds]
        self._payload = sum(self._bytes)
        records, length = images * views, self._payload + CHECKSUM
        self.size = records * length
        if file is None:
            free = int(psutil.virtual_memory().available * (1 - RESERVE))
            if self.size > free:
                raise MemoryError(f"{self.size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB of memory are free")
            self._records = np.zeros((records, length), np.uint8)
            return
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _allocate(descriptor, self.size)  # or a full disk would kill the process when it writes
        finally:
            os.close(descriptor)
        self._records = np.memmap(file, np.uint8, "r+", shape=(records, length))

    @property
    def complete(self) -> bool:
        """Whether there is a record of every view of every image, as far as checksums that are not zero tell."""
        sums = self._records[:, self._payload :]
        return all(sums[i : i + PIECE].any(1).all() for i in range(0, len(sums), PIECE))

    def read(self, images: Sequence[int], views: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return what is known of a batch.

        Args:
            images (Sequence[int]): Indices of B images.
            views (Sequence[int]): Their views.

        Returns:
            found (Tensor): Which of the records are there, bool of shape (B,), on the CPU.
            tensors (list[Tensor]): One (B, ...) tensor per kind, on the CPU; undefined where not found.
        """
        rows = self._rows(images, views)
        records = self._records[rows]
        sums = [_checksum(record[: self._payload], row) for record, row in zip(records, rows, strict=True)]
        found = torch.tensor([r[self._payload :].tobytes() == s for r, s in zip(records, sums, strict=True)])
        self.hits += int(found.sum())
        self.misses += len(found) - int(found.sum())
        pieces = torch.from_numpy(records[:, : self._payload]).split(self._bytes, 1)
        return found, [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=self.pinned)
            .copy_(x)
            .flatten()
            .view(dtype)
            .reshape(len(found), *shape)
            for x, (shape, dtype) in zip(pieces, self.kinds, strict=True)
        ]

    def write(self, images: Sequence[int], views: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Keep what a teacher said of a batch, but for records that are not finite.

        Args:
            images (Sequence[int]): Indices of B images.
            views (Sequence[int]): Their views.
            tensors (Sequence[Tensor]): One (B, ...) tensor per kind, of its dtype, on the CPU.
        """
        finite = torch.stack([x.flatten(1).isfinite().all(1) for x in tensors]).all(0).tolist()
        payloads = torch.cat([x.flatten(1).contiguous().view(torch.uint8) for x in tensors], 1).numpy()
        for row, payload, good in zip(self._rows(images, views), payloads, finite, strict=True):
            if good:
                self._records[row, : self._payload] = payload
                self._records[row, self._payload :] = np.frombuffer(_checksum(payload, row), np.uint8)

    def _rows(self, images: Sequence[int], views: Sequence[int]) -> list[int]:
        """Return where the records of a batch are."""
        return [int(image) * self.views + int(view) for image, view in zip(images, views, strict=True)]


class CachedTeacher:
    """A teacher that is asked once about each (image, view).

    Answers are in half precision, whether they were read or just given, so a run does not depend on what the cache held
    when it began. Compressed, of more than 100 classes the top 64 keep their logits, and the others share their mass
    equally.

    Attributes:
        cache (TeacherCache): The records.
        waiting (float): Time between batches, while the data loader works, as told by `lap`.
        training (float): Time within batches.
    """

    def __init__(
        self,
        teacher: Callable[[Tensor], Answer],
        example: Tensor,
        images: int,
        views: int,
        temperature: float,
        file: Path | None = None,
        compress: bool = True,
        interpret: Callable[[Any], Any] = lambda output: output,
    ):
        """Open the cache of a teacher.

        Args:
            teacher (Callable): Returns logits (B, C), or a dict of dicts of tensors over B images, and feature maps for
                images (B, channels, H, W).
            example (Tensor): A batch of images like those to come, of their size and on their device.
            images (int): Number of images.
            views (int): Views of each.
            temperature (float): Softening temperature at which the mass of compressed logits is kept.
            file (Path, optional): File to map; None for memory.
            compress (bool): Compress the logits of more than 100 classes.
            interpret (Callable): Gives what an output means that was kept.

        Raises:
            OSError: If the file cannot be written, or the disk has no room for it.
            MemoryError: If the memory has no room.
        """
        self.teacher, self.temperature, self.interpret = teacher, temperature, interpret
        self.waiting = self.training = 0.0
        self._since: float | None = None
        leaves, self._form = tree_flatten(teacher(example)[0])
        self._outputs, self.classes = len(leaves), leaves[0].shape[1] if leaves else 0
        self.top = TOP if compress and self.classes > MOST_CLASSES else None
        start = time.perf_counter()
        kinds = [(tuple(x.shape[1:]), x.dtype) for x in self._encode(*teacher(example))]
        self._each = (time.perf_counter() - start) / len(example)  # seconds; of a second pass, as the first is slow
        self.cache = TeacherCache(images, views, kinds, file, pinned=example.is_cuda)

    def __call__(self, images: Tensor, index: Tensor | Sequence[int], view: Tensor | Sequence[int]) -> Answer:
        """Answer a batch of images.

        Args:
            images (Tensor): Images of shape (B, channels, H, W).
            index (Tensor | Sequence[int]): Their indices, B of them.
            view (Tensor | Sequence[int]): Their views.

        Returns:
            output (Any): What `interpret` gives of float16 tensors; by default logits of shape (B, C), float32 if they
                were compressed.
            features (list[Tensor]): One (B, c, h, w) float16 map per level.
        """
        index, view = (torch.as_tensor(x, device="cpu") for x in (index, view))
        found, tensors = self.cache.read(index.tolist(), view.tolist())
        if not found.all():
            asked = ~found
            answer = self._encode(*self.teacher(images[asked.to(images.device)]))
            for known, new in zip(tensors, answer, strict=True):
                known[asked] = new
            self.cache.write(index[asked].tolist(), view[asked].tolist(), answer)
        tensors = self._decode([x.to(images.device, non_blocking=True) for x in tensors])
        return self.interpret(tree_unflatten(tensors[: self._outputs], self._form)), tensors[self._outputs :]

    def lap(self, event: str) -> None:
        """Take the time at "on_train_epoch_start", "on_train_batch_start" or "on_train_batch_end"."""
        now = time.perf_counter()
        if self._since is not None and event == "on_train_batch_start":
            self.waiting += now - self._since
        elif self._since is not None and event == "on_train_batch_end":
            self.training += now - self._since
        self._since = now

    @property
    def report(self) -> str:
        """What the cache was good for, in a sentence or two."""
        hits, misses = self.cache.hits, self.cache.misses
        said = (
            f"the teacher's cache held {hits:,} of {hits + misses:,} answers asked for, and takes "
            f"{self.cache.size / 1e6:.1f} MB; it spared the teacher about {hits * self._each:.0f} s."
        )
        if self.waiting > self.training:
            said += (
                f" The data loader took {self.waiting / (self.waiting + self.training):.0%} of the time, so epochs got "
                f"hardly shorter: give it more 'workers', or 'cache=ram'."
            )
        return said

    def _encode(self, output: Any, features: Sequence[Tensor]) -> list[Tensor]:
        """Return an answer as the tensors of its records, on the CPU."""
        kept = tree_leaves(output)
        if self.top:
            values, indices, rest = compress_logits(output, self.top, self.temperature)
            kept = [values, indices.int(), rest]
        limit = torch.finfo(torch.float16).max
        return [
            x.cpu() if x.dtype == torch.int32 else torch.where(x.isfinite(), x.clamp(-limit, limit), x).half().cpu()
            for x in (*kept, *features)
        ]

    def _decode(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return logits and features from the tensors of records."""
        if not self.top:
            return tensors
        values, indices, rest, *features = tensors
        return [restore_logits(values.float(), indices.long(), rest.float(), self.classes), *features]


def cache_key(**parts: Any) -> str:
    """Return a short name for all that answers depend on: another value of any part gives another name."""
    parts = {**parts, "format": FORMAT, "torch": torch.__version__}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _checksum(payload: np.ndarray, row: int) -> bytes:
    """Return a record's checksum in its row; that of zeros, as of a record never written, is not zero."""
    return (zlib.crc32(payload.tobytes(), row) or 1).to_bytes(CHECKSUM, "little")


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its size, with room on the disk for all of it, or leave it as it is; what it holds stays."""
    before = os.fstat(descriptor).st_size
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.ftruncate(descriptor, min(before, size))
            raise
    elif hasattr(os, "fstatvfs"):
        room = os.fstatvfs(descriptor)
        if room.f_bavail * room.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
