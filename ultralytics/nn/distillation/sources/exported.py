# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Teachers that were exported: ONNX and TorchScript files, which give answers but no feature maps."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.distillation.sources.base import Source, names_in

__all__ = ("open_onnx", "open_torchscript")

MAX_SIDE = 2048  # pixels, and images at a time, that an ONNX file may ask for


class _OnnxNetwork(nn.Module):
    """An ONNX graph, run by ONNX Runtime."""

    def __init__(self, session):
        super().__init__()
        self.session = session
        self.input = session.get_inputs()[0]

    def forward(self, images: Tensor) -> Tensor:
        """Return the graph's first output on the device of the images; a fixed batch size is fed piece by piece."""
        array = images.detach().float().cpu().numpy()
        array = array.astype("float16") if "float16" in self.input.type else array
        size = self.input.shape[0] if isinstance(self.input.shape[0], int) else len(array)
        answers = []
        for start in range(0, len(array), size):
            piece = torch.from_numpy(array[start : start + size])
            filled = torch.cat([piece, piece[-1:].expand(size - len(piece), *piece.shape[1:])])
            answer = torch.from_numpy(self.session.run(None, {self.input.name: filled.numpy()})[0])
            answers.append(answer[: len(piece)])
        return torch.cat(answers).to(images.device)


def open_onnx(file: str, teacher: Any) -> Source:
    """Open an ONNX file: its operators compute, and can do nothing else."""
    try:
        import onnxruntime
    except ImportError as e:
        raise ImportError(f"'teacher={teacher}' needs ONNX Runtime. Install it with 'pip install onnxruntime'.") from e
    available = onnxruntime.get_available_providers()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(
            file, options, [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
        )
    except Exception as e:  # onnxruntime's exceptions share no class of their own
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: the file is damaged or no ONNX model ({type(e).__name__})."
        ) from e
    if len(session.get_inputs()) != 1 or len(session.get_inputs()[0].shape) != 4:
        raise TypeError(f"'teacher={teacher}' must take one batch of images, (B, channels, height, width).")
    batch, channels, height, width = (d if isinstance(d, int) else None for d in session.get_inputs()[0].shape)
    if any(d is not None and not 0 < d <= MAX_SIDE for d in (batch, channels, height, width)):
        raise TypeError(f"'teacher={teacher}' declares an input of shape {session.get_inputs()[0].shape!s:.80}.")
    if height != width:
        raise TypeError(f"'teacher={teacher}' takes images of {height}x{width}, but training images are square.")
    notes = session.get_modelmeta().custom_metadata_map
    return Source(file, _OnnxNetwork(session), names_in(notes), channels, height, has_features=False, file=file)


def open_torchscript(file: str, teacher: Any, trusted: bool) -> Source:
    """Open a TorchScript file, if it is trusted: its language can write files, when loaded and when called."""
    if not trusted:
        raise TypeError(
            f"'teacher={teacher}' is a TorchScript program, which can write files on this machine. If you know where "
            f"it comes from and trust it, set 'teacher_trusted=True'."
        )
    notes = {"config.txt": ""}  # Ultralytics' export writes it
    try:
        network = torch.jit.load(file, map_location="cpu", _extra_files=notes).float()
        known = json.loads(notes["config.txt"] or "{}")
        sides = known.get("imgsz") or [None]  # of the example that Ultralytics' export traced
        return Source(file, network, names_in(known), known.get("channels"), sides[0], has_features=False, file=file)
    except (RuntimeError, ValueError, AttributeError, TypeError, LookupError) as e:
        raise TypeError(f"'teacher={teacher}' cannot be loaded: the TorchScript file is damaged.") from e
