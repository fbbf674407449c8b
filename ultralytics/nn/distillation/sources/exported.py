# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Teachers that were exported: ONNX and TorchScript files, which give answers but no feature maps."""

from __future__ import annotations

import json
import re
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.distillation.files import refuse_other
from ultralytics.nn.distillation.sources.base import Source, names_in

__all__ = ("open_onnx", "open_torchscript")

CHANNELS = {1, 3, 4}  # what an image has, unlike a side
TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,  # from 0 to 255
}
LOCATION = re.compile(rb"\x0a\x08location\x12([\x80-\xff]?[\x01-\x7f])", re.DOTALL)  # in protobuf; a name's length
EXAMPLE = 64  # pixels of an image to try
MAX_SIDE = 2048  # pixels, and images at a time, that an ONNX file may ask for


class _OnnxNetwork(nn.Module):
    """An ONNX graph, run by ONNX Runtime.

    Attributes:
        file (str): Its file.
        session (onnxruntime.InferenceSession): What runs it.
        channels_last (bool): Whether it takes images (B, H, W, channels), as those of TensorFlow do.
        answers_on_host (bool): That images and answers pass through the host's memory.
        takes_bytes (bool): Whether it takes images from 0 to 255, as they are stored.
    """

    answers_on_host = True

    def __init__(self, file: str):
        super().__init__()
        self.file = file
        self.device = torch.device("cpu")
        self.session = self._open()
        self.input = self.session.get_inputs()[0]
        sides = self.input.shape[1:]
        self.takes_bytes = TYPES.get(self.input.type) == torch.uint8
        self.channels_last = len(sides) == 3 and sides[2] in CHANNELS and sides[0] not in CHANNELS
        if len(sides) == 3 and not any(isinstance(d, int) for d in sides):
            self.channels_last = not self._takes(3, EXAMPLE, EXAMPLE) and self._takes(EXAMPLE, EXAMPLE, 3)

    def _open(self) -> Any:
        """Return a session on the device, the CPU if ONNX Runtime has no other."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": self.device.index or 0}))
        return onnxruntime.InferenceSession(self.file, options, providers)

    def _takes(self, *sides: int) -> bool:
        """Tell whether the graph answers an image of a shape, which its file leaves open."""
        batch = self.input.shape[0] if isinstance(self.input.shape[0], int) else 1
        image = torch.zeros(batch, *sides, dtype=TYPES.get(self.input.type)).numpy()
        try:
            return bool(self.session.run(None, {self.input.name: image}))
        except Exception:  # onnxruntime's exceptions share no class of their own
            return False

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the graph's output on the device of the images, several by name.

        A fixed batch size is fed piece by piece.
        """
        if images.device != self.device:
            self.device = images.device
            self.session = self._open()
        images, dtype = images.detach().cpu(), TYPES[self.input.type]
        images = (images.clamp(0, 1) * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)
        if self.channels_last:
            images = images.permute(0, 2, 3, 1).contiguous()
        size = self.input.shape[0] if isinstance(self.input.shape[0], int) else len(images)
        names = [output.name for output in self.session.get_outputs()]
        answers: dict[str, list[Tensor]] = {name: [] for name in names}
        for piece in images.split(size):
            filled = torch.cat([piece, piece[-1:].expand(size - len(piece), *piece.shape[1:])])
            for name, found in zip(names, self.session.run(None, {self.input.name: filled.numpy()}), strict=True):
                answers[name].append(torch.from_numpy(found)[: len(piece)])
        whole = {name: torch.cat(parts).to(self.device) for name, parts in answers.items()}
        return whole[names[0]] if len(names) == 1 else whole


def open_onnx(file: str, teacher: Any) -> Source:
    """Open an ONNX file: its operators compute, and can do nothing else."""
    beside = _weights_beside(file)
    try:
        network = _OnnxNetwork(file)
    except ImportError as e:
        raise ImportError(f"'teacher={teacher}' needs ONNX Runtime. Install it with 'pip install onnxruntime'.") from e
    except Exception as e:  # onnxruntime's exceptions share no class of their own
        if missing := [name for name in beside if not Path(name).is_file()]:
            raise FileNotFoundError(
                f"'teacher={teacher}' has weights in '{missing[0]}', which is not there. Copy that file, too."
            ) from e
        refuse_other(file, teacher, "an ONNX model")
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: the file is damaged or no ONNX model ({type(e).__name__})."
        ) from e
    session, shape = network.session, network.input.shape
    if len(session.get_inputs()) != 1 or len(shape) != 4:
        raise TypeError(f"'teacher={teacher}' must take one batch of images, (B, channels, height, width).")
    if network.input.type not in TYPES:
        raise TypeError(
            f"'teacher={teacher}' takes images of type {network.input.type}, whose scale is not known. Export it with "
            f"an input of float32, or of uint8 from 0 to 255."
        )
    batch, *sides = (d if isinstance(d, int) else None for d in shape)
    channels, height, width = (sides[2], *sides[:2]) if network.channels_last else sides
    if any(d is not None and not 0 < d <= MAX_SIDE for d in (batch, channels, height, width)):
        raise TypeError(f"'teacher={teacher}' declares an input of shape {shape!s:.80}.")
    if height != width:
        raise TypeError(f"'teacher={teacher}' takes images of {height}x{width}, but training images are square.")
    notes = session.get_modelmeta().custom_metadata_map
    source = Source(file, network, names_in(notes), channels, height, has_features=False, file=file)
    noted = notes.get("location")  # which is written as tensors name their files
    source.beside = [name for name in beside if noted is None or name != str(Path(file).parent / noted)]
    return source


def _weights_beside(file: str) -> list[str]:
    """Return the files that hold weights of an ONNX file, as its tensors name them by their key `location`."""
    with open(file, "rb") as f, mmap(f.fileno(), 0, access=ACCESS_READ) as content:
        found = set()
        for match in LOCATION.finditer(content):
            length = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(match[1]))  # a varint
            found.add(content[match.end() : match.end() + length])
    folder = Path(file).parent
    return sorted(str(folder / name.decode(errors="replace")) for name in found)


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
        refuse_other(file, teacher, "a TorchScript program")
        raise TypeError(f"'teacher={teacher}' cannot be loaded: the TorchScript file is damaged.") from e
