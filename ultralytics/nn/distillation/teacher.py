# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The teacher: a trained network as a frozen function from images to what its head says and its feature maps."""

from __future__ import annotations

import copy
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from ultralytics.nn.distillation.class_names import read_names
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.distillation.sources import Expected, Source, open_source
from ultralytics.nn.distillation.sources.base import trained, without_folders
from ultralytics.nn.distillation.taps import FeatureLevel, FeatureTaps, find_levels
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import WINDOWS
from ultralytics.utils.torch_utils import attempt_compile

__all__ = ("OutputError", "Teacher", "random_images")

CUDA_GRAPH_MODES = {"reduce-overhead", "max-autotune"}  # of torch.compile
CAST = {nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear}  # whose weights autocast casts
CHANNELS_LAST = 96  # side of the images in pixels from which that memory format is faster on a CPU
PIXELS_AT_ONCE = 1 << 20  # on a CPU; their maps are tens of MB, and larger ones the system has to find anew each time


def random_images(*shape: int) -> Tensor:
    """Return images of noise, 0 to 1, that are always the same for a shape (B, channels, H, W)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


class OutputError(ValueError):
    """A network has no such output as `teacher_output` names."""


class Teacher:
    """A trained network, frozen: eval mode, no gradients. A task's own teacher says what the head's output means.

    It is no `nn.Module`, so that it can never become part of a student, an optimizer or a checkpoint. Images come as
    upstream's training holds them, 0 to 1 in RGB with mean 0 and standard deviation 1, and are brought to the teacher's
    own size, mean and standard deviation here.

    Attributes:
        expected (Expected): What kind of network an Ultralytics checkpoint has to hold.
        source (str): The teacher as args.yaml records it, files by absolute path.
        model (nn.Module): The network; opened again when it is asked for after `release`.
        names (list[str] | None): Class names by index, if known.
        channels (int | None): Input channels, if known.
        imgsz (int | None): Side of the images it sees in pixels; None for the student's.
        trained_imgsz (int | None): Side that it was trained at, if its source says so.
        output (str | None): What its answer is, or which part of it is meant, if that was given.
        has_features (bool): Whether feature maps can be read inside it.
        content_hash (str): SHA-256 of its file, or of its weights where it has none, in hexadecimal digits.
        backbone (str | None): The network whose features its head was fitted on, if one was, see `probe`.
        recipe (Mapping[str, Any] | None): How a library builds the network, see `Source`.
        trusted (bool): Whether its file may run code of its own.
        levels (Sequence[FeatureLevel]): The feature maps to return, none at first.
        pixels_at_once (float): Above so many pixels a batch is answered in pieces of two images or more; infinite at
            first, and where that gains nothing.
    """

    expected: ClassVar[Expected]
    waits_for_head = False  # whether one is still to be fitted

    def __init__(
        self,
        source: Any,
        names: Any = None,
        imgsz: int | None = None,
        output: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        trusted: bool = False,
        grows_head: bool = False,
    ):
        """Open a teacher and freeze it, on the CPU.

        Args:
            source (Any): What `sources.open_source` takes; or a Source, whose network stays as it is.
            names (list | dict | str | Path, optional): Class names by index; None for the source's own.
            imgsz (int, optional): Side of the images it sees in pixels; None for the source's own, or the student's.
            output (str, optional): What its answer is, or which part of it is meant, see the task's own teacher.
            mean (Sequence[float], optional): Mean that its images have subtracted; None for the source's own.
            std (Sequence[float], optional): Standard deviation that they are divided by; None for the source's own.
            trusted (bool): Let a file run code of its own.
            grows_head (bool): Whether it will be given a head: so its file may lack one, and `fuse` has to wait.

        Raises:
            FileNotFoundError: If a file does not exist or cannot be downloaded.
            ImportError: If the source needs a library that is not installed.
            TypeError: If it is no trained network of the task, or the file is damaged or not safe to load.
            ValueError: If no teacher is given, or the names are no list of names.
        """
        is_open = isinstance(source, Source)
        opened = source
        if not is_open:
            opened = trained(open_source(source, imgsz, trusted, self.expected, grows_head), self.expected)
        self.source = opened.name
        try:
            self.names = opened.names if names is None else read_names(names)
        except (FileNotFoundError, TypeError, ValueError) as e:
            raise type(e)(f"'teacher_names={reprlib.repr(names)}' is an invalid value. {e}") from e
        self.channels = opened.channels
        self.imgsz, self.trained_imgsz = imgsz or opened.imgsz, opened.trained_imgsz
        self.output = output
        self.has_features = opened.has_features
        self.content_hash = opened.content_hash
        self.backbone, self.recipe, self.trusted = opened.backbone, opened.recipe, trusted
        self.model = opened.network.eval() if is_open or grows_head else self.fuse(opened.network.eval())
        for parameter in self.model.parameters():  # a TorchScript module refuses requires_grad_ as a whole
            parameter.requires_grad_(False)
        self.levels: Sequence[FeatureLevel] = ()
        self.pixels_at_once = math.inf
        self._reopens = isinstance(source, (str, Path))
        self._given_imgsz, self._device = imgsz, torch.device("cpu")
        self._mean, self._std = (
            torch.tensor(own if given is None else given, dtype=torch.float32).reshape(1, -1, 1, 1)
            for given, own in ((mean, opened.mean), (std, opened.std))
        )
        self._normalizes = bool(self._mean.any() or (self._std != 1).any())  # asking a CUDA tensor would synchronise
        self._side = 0  # of the images it sees, once that is known
        self._fixed = not is_open  # one that was open may be the student's average
        self._cast: tuple[torch.dtype, nn.Module] | None = None  # what answers under autocast
        self._compiled: nn.Module | None = None
        self._compiled_shape: tuple[int, ...] = ()
        self._in_graphs = False  # whether the compiled network answers in memory that its next call overwrites

    @property
    def model(self) -> nn.Module:
        """The network."""
        if self._model is None:
            opened = open_source(self.source, self._given_imgsz, self.trusted, self.expected)
            if opened.content_hash != self.content_hash:
                raise ValueError(
                    f"'teacher={self.source}' has changed while it taught: its SHA-256 is {opened.content_hash}, and "
                    f"was {self.content_hash}. Put the former file back, and go on with 'resume'."
                )
            self._model = self.fuse(opened.network.eval()).requires_grad_(False)
            self.to(self._device)
        return self._model

    @model.setter
    def model(self, network: nn.Module) -> None:
        self._model: nn.Module | None = network

    def release(self) -> None:
        """Let the network go, if it came from a file, until it is asked for again."""
        if self._reopens and self.has_features and self._compiled is None:
            self._model = self._cast = None

    @property
    def title(self) -> str:
        """What it is called where it is shown: files without their folders, a fitted head by what it sits on."""
        return f"{without_folders(self.backbone)} + fitted head" if self.backbone else without_folders(self.source)

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """The mean that its images have subtracted, and the standard deviation that they are divided by."""
        return self._mean.flatten().tolist(), self._std.flatten().tolist()

    def fuse(self, network: nn.Module) -> nn.Module:
        """Return a network that was opened here in a form that answers faster, and the same but for rounding."""
        return network

    def read(self, output: Any) -> Any:
        """Return of the network's raw output in eval mode what tells all: tensors over B images, or dicts of such."""
        raise NotImplementedError

    def interpret(self, kept: Any) -> Any:
        """Return what that which `read` gives means, by default itself."""
        return kept

    def check_answer(self, answer: Any, count: int) -> None:
        """Refuse an answer to some images that is none of the task's.

        Args:
            answer (Any): What it says of them, see `interpret`.
            count (int): How many they are.

        Raises:
            ValueError: If the answer has another shape, is not finite, or is not of as many classes as there are names.
        """
        raise NotImplementedError

    def vet(self, imgsz: int, channels: int, images: Tensor | None = None) -> None:
        """Check by one forward pass that this teacher answers as one of its task.

        Args:
            imgsz (int): Side of the student's images in pixels.
            channels (int): Their channels.
            images (Tensor, optional): Some of the dataset's, (B, channels, imgsz, imgsz); None for two random ones.

        Raises:
            ValueError: If it takes other images, or gives another answer.
        """
        if images is None:
            images = random_images(2, channels, imgsz, imgsz)
        self.check_answer(self.first_answer(images), len(images))

    def first_answer(self, images: Tensor) -> Any:
        """Return what it says of images, whatever that is; see `vet`."""
        count, channels, imgsz, _ = images.shape
        if self.channels not in {None, channels}:
            raise ValueError(
                f"'teacher={self.source}' takes images of {self.channels} channels, but the dataset's have {channels}. "
                f"Give a teacher trained on {channels}-channel images."
            )
        if max(self._mean.shape[1], self._std.shape[1]) not in {1, channels}:
            raise ValueError(f"'teacher_mean' and 'teacher_std' need 1 or {channels} values, one per image channel.")
        if self._normalizes and getattr(self.model, "takes_bytes", False):
            raise ValueError(
                f"'teacher={self.source}' takes images as they are stored, from 0 to 255, and normalises them itself. "
                f"Leave out 'teacher_mean' and 'teacher_std'."
            )
        side = self._side = self.imgsz or imgsz
        try:
            return self(images)[0]
        except OutputError:
            raise
        except Exception as e:  # a foreign network may fail in any way
            raise ValueError(
                f"'teacher={self.source}' cannot process a batch of {count} images of {channels}x{side}x{side} "
                f"({type(e).__name__}: {' '.join(str(e).split())[:160]}). Set 'teacher_imgsz' to the size it was "
                f"trained at."
            ) from e

    def find_levels(self, imgsz: int, channels: int) -> dict[str, FeatureLevel]:
        """List the feature maps that can be read, see `taps.find_levels`; none in an exported file."""
        if not self.has_features:
            return {}
        return find_levels(self.model, self.imgsz or imgsz, channels)

    def head(self, level: FeatureLevel) -> nn.Module | None:
        """Return the head as a function of a level's map, or None if that is not what it is given."""
        return None

    def to(self, device: torch.device) -> Teacher:
        """Move the network to a device, in the memory format that is fastest there."""
        self.model.to(device)
        self._cast, self._device = None, device
        if self.prefers_channels_last(device):
            self.model.to(memory_format=torch.channels_last)
        self.pixels_at_once = PIXELS_AT_ONCE if device.type == "cpu" and self.has_features else math.inf
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def prefers_channels_last(self, device: torch.device) -> bool:
        """Tell whether its convolutions are faster with channels last on a device, on a CPU those of Ultralytics'."""
        if WINDOWS or device.type not in {"cpu", "cuda"}:
            return False
        if device.type == "cuda":
            return any(isinstance(module, nn.Conv2d) for module in self.model.modules())
        return self._side >= CHANNELS_LAST and isinstance(self.model, BaseModel)

    @torch.no_grad()
    def cast(self, images: Tensor) -> None:
        """Keep weights in the type that autocast is in force with, as it casts those without gradients in every call.

        What the network says stays the same bit for bit; one of which that is not so stays as it is.

        Args:
            images (Tensor): Some, (B, channels, H, W), to compare by.
        """
        kind = images.device.type
        if not (self._fixed and self.has_features and torch.is_autocast_enabled(kind)):
            return
        dtype = torch.get_autocast_dtype(kind)
        said = tree_leaves(self.ask(images))
        self._cast = dtype, cast_weights(self.model, dtype)
        if not all(torch.equal(a, b) for a, b in zip(said, tree_leaves(self.ask(images)), strict=True)):
            self._cast = None

    def _network(self, kind: str) -> nn.Module:
        """Return what answers on a kind of device in the precision in force."""
        if self._cast and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == self._cast[0]:
            return self._cast[1]
        return self.model

    def compile(self, mode: bool | str, shape: Sequence[int]) -> None:
        """Compile the network for batches of one shape; those of another are answered by the network as it is.

        It is compiled for the precision in force, in which it then has to be asked.

        Args:
            mode (bool | str): Mode of `torch.compile`, True for its default one; False to be as it is again.
            shape (Sequence[int]): Shape of the images, (B, channels, H, W), before they are resized.
        """
        if self._compiled_shape == tuple(shape):
            return
        if not mode:
            self._compiled, self._compiled_shape = None, ()
            return
        device = next(self.model.parameters()).device
        self._compiled = attempt_compile(_WithFeatures(self._network(device.type), self.levels), device, mode=mode)
        self._compiled_shape = tuple(shape)
        self._in_graphs = mode in CUDA_GRAPH_MODES

    @torch.no_grad()
    def __call__(self, images: Tensor, head: bool = True) -> Answer:
        """Answer a batch of images.

        Args:
            images (Tensor): Images of shape (B, channels, H, W) as upstream's training loop holds them: 0 to 1, RGB.
            head (bool): Compute what the head says; if not, the forward pass ends at the last level.

        Returns:
            output (Any): What `interpret` gives, an empty tensor of shape (B, 0) without.
            features (list[Tensor]): One (B, c, h, w) map per level.
        """
        kept, features = self.ask(images, head)
        return self.interpret(kept) if head else kept, features

    @torch.no_grad()
    def ask(self, images: Tensor, head: bool = True) -> Answer:
        """Answer a batch of images as it can be kept, by what `read` gives; see `__call__`."""
        compiled = self._compiled if images.shape == self._compiled_shape else None
        pixels = len(images) * math.prod((self.imgsz, self.imgsz) if self.imgsz else images.shape[-2:])
        pieces = min(math.ceil(pixels / self.pixels_at_once), len(images) // 2)
        if compiled is None and pieces > 1:
            return tree_map(
                lambda *parts: torch.cat(parts),
                *(tuple(self.ask(piece, head)) for piece in images.tensor_split(pieces)),
            )
        if self.imgsz and images.shape[-2:] != (self.imgsz, self.imgsz):
            images = F.interpolate(images, (self.imgsz, self.imgsz), mode="bilinear", antialias=True)
        if self._normalizes:
            images = (images - self._mean) / self._std
        if compiled is not None:
            output, features = compiled(images, head)
            if self._in_graphs:  # of any network: a graph's memory is free for the next that is called
                output, features = tree_map_only(Tensor, Tensor.clone, (output, features))
        else:
            # Hooks only for this call: the network may be the student's EMA, which is copied and saved
            network = self._network(images.device.type)
            taps = FeatureTaps(network, self.levels, stop=not head)
            try:
                output = network(images)
                features = taps.take()
            except FeatureTaps.Complete:
                features = taps.take()
            finally:
                taps.remove()
        return self.read(output) if head else images.new_zeros(len(images), 0), features


def share_weights(network: nn.Module) -> nn.Module:
    """Return a copy of a network that has its weights and buffers in common with it."""
    return copy.deepcopy(network, {id(x): x for x in (*network.parameters(), *network.buffers())})


def cast_weights(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a network with weights of its convolutions and linear layers in another type, that shares all others."""
    cast = share_weights(network)
    for module in cast.modules():
        if type(module) in CAST:  # no subclass, which may compute with its weights first
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    return cast


class _WithFeatures(nn.Module):
    """A network together with what is read inside it, to be compiled as one."""

    def __init__(self, network: nn.Module, levels: Sequence[FeatureLevel]):
        super().__init__()
        self.network = share_weights(network)  # as hooks stay on what is compiled
        self.taps = FeatureTaps(self.network, levels)

    def forward(self, images: Tensor, head: bool) -> tuple[Any, list[Tensor]]:
        """Return the network's output, if it is wanted, and its maps; compiled, what nobody wants is left out."""
        output = self.network(images)
        return output if head else None, self.taps.take()
