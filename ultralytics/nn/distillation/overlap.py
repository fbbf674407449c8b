# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Where a teacher answers: at once, or beside the student's forward pass.

Each is called with what asks the teacher and the images that it is asked about, and returns a function that gives the
answer, as often as it is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

__all__ = ("Answer", "Overlap", "SideStream", "SideThread", "at_once", "choose_overlap", "usable_cores")

Answer = tuple[Any, list[Tensor]]  # what the head says, e.g. logits of shape (B, C), and feature maps
Overlap = Callable[[Callable[[], Answer], Tensor], Callable[[], Answer]]


def at_once(ask: Callable[[], Answer], images: Tensor) -> Callable[[], Answer]:
    """Ask, and return when the answer is there."""
    answer = ask()
    return lambda: answer


class SideThread:
    """A thread, to answer on a CPU core that the student leaves idle.

    It computes with as many threads as the student and in its precision, so its answers are the same bit for bit.
    """

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, "teacher")

    def __call__(self, ask: Callable[[], Answer], images: Tensor) -> Callable[[], Answer]:
        """Begin to ask; what returned gives the answer when it is there, or raises what went wrong."""
        precision = torch.autocast("cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))
        return self._executor.submit(precision(ask)).result  # as autocast is a thread's own


class SideStream:
    """A CUDA stream, to answer while the student's work does not fill the GPU.

    A call begins after all that the current stream was given before it, and whoever takes the answer goes on after all
    calls so far. So the memory of an answer, which belongs to this stream, is only written again once nobody reads it.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def __call__(self, ask: Callable[[], Answer], images: Tensor) -> Callable[[], Answer]:
        """Begin to ask; in the stream of whoever takes the answer it can be read, without the host waiting."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        images.record_stream(self._stream)  # or they could be overwritten where nobody waits, as after an error
        with torch.cuda.stream(self._stream):
            return partial(self._take, ask())

    def _take(self, answer: Answer) -> Answer:
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return answer


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_overlap(
    wanted: bool | None, device: torch.device, compiled: bool, cached: bool, on_host: bool = False
) -> Overlap:
    """Return where a teacher answers.

    Args:
        wanted (bool | None): Beside the student, or not; None for what is faster.
        device (torch.device): Where both networks are.
        compiled (bool): Whether one of them is compiled.
        cached (bool): Whether answers are kept.
        on_host (bool): Whether the teacher takes images from the host and gives answers there, wherever it computes.

    Returns:
        (Overlap): Called with what asks the teacher, and images; gives a function that gives the answer.
    """
    waits = "with 'teacher_cache' on CUDA" if cached else "with an ONNX teacher on CUDA" if on_host else None
    obstacle = {
        "cpu": "where a network is compiled on a CPU" if compiled else None,  # tracing reaches into other threads
        "cuda": waits,  # the host, so nothing is left to compute beside it
    }.get(device.type, f"on '{device.type}'")
    if obstacle:
        if wanted:
            LOGGER.warning(f"'teacher_overlap=True' has no effect {obstacle}.")
        return at_once
    if wanted is None:
        wanted = device.type == "cpu" and usable_cores() > 1
    if not wanted:
        return at_once
    return SideThread() if device.type == "cpu" else SideStream(device)
