# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The files of a run: a folder that one run alone writes to, and files that are there whole or not at all."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ultralytics.cfg import get_save_dir
from ultralytics.utils import RANK

__all__ = ("UNREADABLE", "absolute", "check_writable", "claim_folder", "locked", "sweep", "whole_files")

UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)  # what reading a damaged checkpoint raises
LOCK, SCRATCH = ".lock", ".partial"  # beside the files of a run, while they are written
ROOM = 1 << 20  # bytes that a run's folder must have room for at least


@contextmanager
def whole_files(folder: Path, last: str = "", scratch: str = SCRATCH) -> Iterator[Path]:
    """Yield a folder to write in; what was written there then appears in `folder`, each entry whole.

    Args:
        folder (Path): Where the files are to be.
        last (str): Name of the file that appears after all others.
        scratch (str): Name of the folder to write in; what a process that was killed left there is removed. Processes
            that write to one folder at once give names of their own.

    Yields:
        (Path): The folder to write in.

    Raises:
        OSError: If they cannot be written; what was in `folder` stays.
    """
    written = folder / scratch
    try:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir(parents=True)
        yield written
        entries = sorted(written.iterdir(), key=lambda entry: (entry.name == last, entry.name))
        for entry in entries:
            for path in (*entry.rglob("*"), entry) if entry.is_dir() else (entry,):
                _flush(path)
        for entry in entries:
            os.replace(entry, folder / entry.name)
        _flush(folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def absolute(value: Any) -> Any:
    """Return the absolute path of what is there, so that a resumed run finds it from any folder; else the value."""
    return os.path.abspath(value) if isinstance(value, (str, Path)) and os.path.exists(value) else value


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder where the system lets one, onto the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim_folder(args: Namespace, resumed: bool = False) -> None:
    """Make a run's folder before upstream finds it, so that two runs that start at once get one each.

    Args:
        args (Namespace): Training arguments; `save_dir` is set.
        resumed (bool): Whether the run goes on in a folder that is there.

    Raises:
        OSError: If the folder cannot be written to, or its disk is full.
        RuntimeError: If another run trains in it.
    """
    again = bool(args.exist_ok or getattr(args, "save_dir", None))
    try:
        while True:
            folder = get_save_dir(args)
            try:
                folder.mkdir(parents=True, exist_ok=again)
                break
            except FileExistsError:
                if again:  # a file of that name
                    raise
        args.save_dir = str(folder)
        if resumed:
            _own(folder / "args.yaml")
        with locked(folder), tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise _unwritable(e, "'save_dir'" if resumed else "'project'") from e


def check_writable(folder: Path) -> None:
    """Refuse a run's folder, which need not be there, that could not be written to, and leave nothing.

    Raises:
        OSError: If it could not.
    """
    place = next(x for x in (folder, *folder.absolute().parents) if x.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as e:
        raise _unwritable(e, "'project'") from e


def _unwritable(e: OSError, how: str) -> OSError:
    """Return an error in words that say how to give another folder."""
    said = f"The run's folder cannot be written to: {e.strerror}. Give one that can with {how}"
    return OSError(e.errno, said, e.filename)


def _own(file: Path) -> None:
    """Make a file that a copied run shares with another, by a link, its own: upstream writes into it."""
    if file.is_file() and (file.is_symlink() or file.stat().st_nlink > 1):
        with whole_files(file.parent) as scratch:
            shutil.copyfile(file, scratch / file.name)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder, in the first of its processes; one that is killed lets go of it.

    Raises:
        RuntimeError: If another run holds it.
    """
    if RANK not in {-1, 0}:
        yield
        return
    file = Path(folder) / "weights" / LOCK
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise RuntimeError(f"Another run is training in '{folder}'. Wait until it ends, or give another 'name'.") from e
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def sweep(weights: Path) -> None:
    """Take away what a run left that was killed in its last instant, when its checkpoints were in place already."""
    with suppress(Timeout, OSError), FileLock(weights / LOCK, timeout=0):
        shutil.rmtree(weights / SCRATCH, ignore_errors=True)
        (weights / LOCK).unlink()
