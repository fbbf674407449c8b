# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The teacher: one or more trained classifiers as a frozen function from images to logits and features."""

from __future__ import annotations

import copy
import hashlib
import math
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset
from ultralytics.data.wrapped import spaced_batches
from ultralytics.nn.class_names import match_classes, read_names
from ultralytics.nn.taps import FeatureLevel, FeatureTaps, find_levels
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.nn.teacher_sources import Source, open_source
from ultralytics.utils import WINDOWS
from ultralytics.utils.distillation import average_logits
from ultralytics.utils.torch_utils import attempt_compile

__all__ = ("Teacher", "TeacherEnsemble")

CUDA_GRAPH_MODES = {"reduce-overhead", "max-autotune"}  # of torch.compile
CHANNELS_LAST = 96  # side of the images in pixels from which that memory format is faster on a CPU
PIXELS_AT_ONCE = 1 << 20  # on a CPU; their maps are tens of MB, and larger ones the system has to find anew each time


class Teacher:
    """A trained classifier, frozen: eval mode, no gradients, Ultralytics' Conv and BatchNorm fused.

    It is no `nn.Module`, so that it can never become part of a student, an optimizer or a checkpoint. Images come as
    upstream's classification training holds them, 0 to 1 in RGB with mean 0 and standard deviation 1, and are brought
    to the teacher's own size, mean and standard deviation here.

    Attributes:
        source (str): The teacher as args.yaml records it, files by absolute path.
        model (nn.Module): The network.
        names (list[str] | None): Class names by index, if known.
        channels (int | None): Input channels, if known.
        imgsz (int | None): Side of the images it sees in pixels; None for the student's.
        has_features (bool): Whether feature maps can be read inside it.
        content_hash (str): SHA-256 of its file, or of its weights where it has none, in hexadecimal digits.
        levels (Sequence[FeatureLevel]): The feature maps to return, none at first.
        pixels_at_once (float): Above so many pixels a batch is answered in pieces of two images or more; infinite at
            first, and where that gains nothing.
    """

    def __init__(
        self,
        source: Any,
        names: Any = None,
        imgsz: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        trusted: bool = False,
    ):
        """Open a teacher and freeze it, on the CPU.

        Args:
            source (Any): What `teacher_sources.open_source` takes, or a Source.
            names (list | dict | str | Path, optional): Class names by index; None for the source's own.
            imgsz (int, optional): Side of the images it sees in pixels; None for the source's own, or the student's.
            mean (Sequence[float], optional): Mean that its images have subtracted; None for the source's own.
            std (Sequence[float], optional): Standard deviation that they are divided by; None for the source's own.
            trusted (bool): Let a file run code of its own.

        Raises:
            FileNotFoundError: If a file does not exist or cannot be downloaded.
            ImportError: If the source needs a library that is not installed.
            TypeError: If it is not a trained classifier, or the file is damaged or not safe to load.
            ValueError: If no teacher is given, or the names are no list of names.
        """
        opened = source if isinstance(source, Source) else open_source(source, imgsz, trusted)
        self.source = opened.name
        try:
            self.names = opened.names if names is None else read_names(names)
        except (FileNotFoundError, TypeError, ValueError) as e:
            raise type(e)(f"'teacher_names={reprlib.repr(names)}' is an invalid value. {e}") from e
        self.channels = opened.channels
        self.imgsz = imgsz or opened.imgsz
        self.has_features = opened.has_features
        self.content_hash = _hash_file(opened.file) if opened.file else _hash_weights(opened.network)
        self.model = opened.network.eval()
        for parameter in self.model.parameters():  # a TorchScript module refuses requires_grad_ as a whole
            parameter.requires_grad_(False)
        if isinstance(self.model, ClassificationModel):
            self.model = self.model.fuse(verbose=False)
        self.levels: Sequence[FeatureLevel] = ()
        self.pixels_at_once = math.inf
        self._mean, self._std = (
            torch.tensor(own if given is None else given, dtype=torch.float32).reshape(1, -1, 1, 1)
            for given, own in ((mean, opened.mean), (std, opened.std))
        )
        self._normalizes = bool(self._mean.any() or (self._std != 1).any())  # here, as on a GPU the question waits
        self._gives_probabilities = False
        self._side = 0  # of the images it sees, once that is known
        self._compiled: nn.Module | None = None
        self._compiled_shape: tuple[int, ...] = ()
        self._in_graphs = False  # whether the compiled network answers in memory that its next call overwrites

    def vet(self, imgsz: int, channels: int) -> None:
        """Check by one forward pass of two random images that this teacher answers as a classifier.

        Args:
            imgsz (int): Side of the student's images in pixels.
            channels (int): Their channels.

        Raises:
            ValueError: If it takes other images, or its answer is no finite row of logits per image, one per name.
        """
        if self.channels not in {None, channels}:
            raise ValueError(
                f"'teacher={self.source}' takes images of {self.channels} channels, but the dataset's have {channels}. "
                f"Give a teacher trained on {channels}-channel images."
            )
        if max(self._mean.shape[1], self._std.shape[1]) not in {1, channels}:
            raise ValueError(f"'teacher_mean' and 'teacher_std' need 1 or {channels} values, one per image channel.")
        side = self._side = self.imgsz or imgsz
        images = torch.rand(2, channels, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
        try:
            logits, _ = self(images)
        except Exception as e:  # a foreign network may fail in any way
            raise ValueError(
                f"'teacher={self.source}' cannot process a batch of 2 images of {channels}x{side}x{side} "
                f"({type(e).__name__}: {' '.join(str(e).split())[:160]}). Set 'teacher_imgsz' to the size it was "
                f"trained at."
            ) from e
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2 or not logits.shape[1]:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"'teacher={self.source}' answers 2 images with {found}, not with logits of shape (2, C).")
        if not logits.isfinite().all():
            raise ValueError(
                f"'teacher={self.source}' gives NaN or infinite logits: its weights are damaged, or its training "
                f"failed. Give an earlier checkpoint."
            )
        if self.names is not None and logits.shape[1] != len(self.names):
            raise ValueError(
                f"'teacher={self.source}' gives {logits.shape[1]} logits per image, but has {len(self.names)} class "
                f"names. Name each of its classes with 'teacher_names'."
            )
        # Exported classifiers often end in a softmax; the logarithm gives logits back, up to a constant that no
        # softmax sees
        sums = logits.sum(1)
        self._gives_probabilities = bool(
            logits.shape[1] > 1 and (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
        )

    def find_levels(self, imgsz: int, channels: int) -> dict[str, FeatureLevel]:
        """List the feature maps that can be read, see `taps.find_levels`; none in an exported file."""
        if not self.has_features:
            return {}
        return find_levels(self.model, self.imgsz or imgsz, channels)

    def to(self, device: torch.device) -> Teacher:
        """Move the network to a device, an Ultralytics one in the memory format that is fastest there."""
        self.model.to(device)
        least = {"cpu": CHANNELS_LAST, "cuda": 1}.get(device.type, math.inf)
        if self._side >= least and not WINDOWS and isinstance(self.model, ClassificationModel):
            self.model.to(memory_format=torch.channels_last)
        self.pixels_at_once = PIXELS_AT_ONCE if device.type == "cpu" and self.has_features else math.inf
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def compile(self, mode: bool | str, shape: Sequence[int]) -> None:
        """Compile the network for batches of one shape; those of another are answered by the network as it is.

        Args:
            mode (bool | str): Mode of `torch.compile`, True for its default one.
            shape (Sequence[int]): Shape of the images, (B, channels, H, W), before they are resized.
        """
        if self._compiled_shape == tuple(shape):
            return
        module = _WithFeatures(self.model, self.levels)
        self._compiled = attempt_compile(module, next(self.model.parameters()).device, mode=mode)
        self._compiled_shape = tuple(shape)
        self._in_graphs = mode in CUDA_GRAPH_MODES

    @torch.no_grad()
    def __call__(self, images: Tensor, logits: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Answer a batch of images.

        Args:
            images (Tensor): Images of shape (B, channels, H, W) as upstream's training loop holds them: 0 to 1, RGB.
            logits (bool): Compute logits; if not, the forward pass ends at the last level.

        Returns:
            logits (Tensor): Class logits of shape (B, C), (B, 0) without.
            features (list[Tensor]): One (B, c, h, w) map per level.
        """
        compiled = self._compiled if images.shape == self._compiled_shape else None
        pixels = len(images) * math.prod((self.imgsz, self.imgsz) if self.imgsz else images.shape[-2:])
        pieces = min(math.ceil(pixels / self.pixels_at_once), len(images) // 2)
        if compiled is None and pieces > 1:
            answers, maps = zip(*(self(piece, logits) for piece in images.tensor_split(pieces)), strict=True)
            return torch.cat(answers), [torch.cat(level) for level in zip(*maps, strict=True)]
        if self.imgsz and images.shape[-2:] != (self.imgsz, self.imgsz):
            images = F.interpolate(images, (self.imgsz, self.imgsz), mode="bilinear", antialias=True)
        if self._normalizes:
            images = (images - self._mean) / self._std
        if compiled is not None:
            output, features = compiled(images, logits)
            if self._in_graphs:  # of any network: a graph's memory is free for the next that is called
                output, features = tree_map_only(Tensor, Tensor.clone, (output, features))
        else:
            # Hooks only for this call: the network may be the student's EMA, which is copied and saved
            taps = FeatureTaps(self.model, self.levels, stop=not logits)
            try:
                output = self.model(images)
                features = taps.take()
            except FeatureTaps.Complete:
                features = taps.take()
            finally:
                taps.remove()
        if not logits:
            return images.new_zeros(len(images), 0), features
        if isinstance(output, (tuple, list)):  # an Ultralytics classifier in eval mode gives (probabilities, logits)
            output = output[isinstance(self.model, ClassificationModel)]
        answer = getattr(output, "logits", output)
        if self._gives_probabilities:
            answer = answer.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return answer, features


class _WithFeatures(nn.Module):
    """A network together with what is read inside it, to be compiled as one."""

    def __init__(self, network: nn.Module, levels: Sequence[FeatureLevel]):
        super().__init__()
        # A copy that shares the weights, as hooks stay on what is compiled
        shared = {id(x): x for x in (*network.parameters(), *network.buffers())}
        self.network = copy.deepcopy(network, shared)
        self.taps = FeatureTaps(self.network, levels)

    def forward(self, images: Tensor, logits: bool) -> tuple[Any, list[Tensor]]:
        """Return the network's answer, if logits are wanted, and its maps; compiled, what nobody wants is left out."""
        answer = self.network(images)
        return answer if logits else None, self.taps.take()


class TeacherEnsemble:
    """One or more teachers that answer as one: probabilities averaged over members, features from the first.

    Attributes:
        members (list[Teacher]): The teachers.
        weights (list[float]): Their shares of the average, which sum to 1.
        temperature (float): Softening temperature at which probabilities are averaged.
        classes (list[int] | None): The dataset's classes that the logits stand for, those that every member knows;
            None before `align`.
        device (torch.device): Where the networks are.
    """

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float] | None = None, temperature: float = 1.0):
        """Join teachers.

        Args:
            members (Sequence[Teacher]): The teachers, at least one.
            weights (Sequence[float], optional): One per teacher, > 0; None for equal ones.
            temperature (float): Softening temperature of the response loss.
        """
        self.members = list(members)
        weights = weights or [1.0] * len(members)
        self.weights = [w / sum(weights) for w in weights]
        self.temperature = temperature
        self.classes: list[int] | None = None
        self.device = torch.device("cpu")
        self._columns: list[Tensor | None] = [None] * len(members)

    @property
    def first(self) -> Teacher:
        """The teacher that gives the features."""
        return self.members[0]

    @property
    def source(self) -> str | list[str]:
        """The `teacher` argument as args.yaml records it."""
        sources = [member.source for member in self.members]
        return sources if len(sources) > 1 else sources[0]

    @property
    def content_hash(self) -> str | list[str]:
        """The `teacher_hash` argument as args.yaml records it."""
        hashes = [member.content_hash for member in self.members]
        return hashes if len(hashes) > 1 else hashes[0]

    def align(self, names: Sequence[str]) -> list[str]:
        """Align the logits with a dataset's classes by name.

        Args:
            names (Sequence[str]): The dataset's class names by index.

        Returns:
            (list[str]): What is notable, in sentences for the log.

        Raises:
            ValueError: If a member's classes are not known, match ambiguously, or fewer than 2 are shared.
        """
        matches = []
        for member in self.members:
            if member.names is None:
                raise ValueError(
                    f"'teacher={member.source}' does not say which classes it knows. Name them by index with "
                    f"'teacher_names', a list, a dict or a YAML file, i.e. 'teacher_names=ImageNet.yaml', or set "
                    f"'response_distill=False' to learn from its feature maps alone."
                )
            matches.append(match_classes(member.names, names))
        classes = [i for i in range(len(names)) if all(i in match for match in matches)]
        if len(classes) < min(2, len(names)):
            raise ValueError(
                f"'teacher={self.source}' knows {len(classes)} of the dataset's {len(names)} classes {_some(names)}, "
                f"and the response loss compares at least 2. It knows {_some(self.first.names)}. Give a teacher of "
                f"these classes, rename its own with 'teacher_names', or set 'response_distill=False' to learn from "
                f"its feature maps alone."
            )
        self.classes = classes
        notes = []
        for k, (member, match) in enumerate(zip(self.members, matches, strict=True)):
            columns = [match[i] for i in classes]
            if columns != list(range(len(member.names))):
                self._columns[k] = torch.tensor(columns)
                notes.append(
                    f"{member.source}: {len(columns)} of its {len(member.names)} classes are matched by name to the "
                    f"dataset's."
                )
        if len(classes) < len(names):
            unknown = [name for i, name in enumerate(names) if i not in classes]
            notes.append(
                f"The response loss compares the {len(classes)} of {len(names)} classes that the teacher knows, on "
                f"their images only; unknown to it: {_some(unknown)}."
            )
        return notes

    def vet(self, imgsz: int, channels: int) -> None:
        """Check every member, see `Teacher.vet`."""
        for member in self.members:
            member.vet(imgsz, channels)

    def judge(self, dataset: Dataset, limit: int | None = None, batch: int = 64) -> tuple[list[Tensor], Tensor]:
        """Answer images of a dataset, evenly spaced, as far as their classes are known.

        Args:
            dataset (Dataset): Gives dicts of `img`, a (channels, H, W) image in 0 to 1, and `cls`, its class index.
            limit (int, optional): Most images to look at; None for all.
            batch (int): Images at a time.

        Returns:
            logits (list[Tensor]): Each member's, (N, len(classes)) in float32 on the CPU.
            labels (Tensor): The images' classes as columns of the logits, (N,).
        """
        logits, labels = [[] for _ in self.members], []
        for _, images, classes in spaced_batches(dataset, self.classes, limit, batch):
            for kept, answer in zip(logits, self.answers(images.to(self.device))[0], strict=True):
                kept.append(answer.float().cpu())
            labels += [self.classes.index(c) for c in classes]
        empty = torch.zeros(0, len(self.classes))
        return [torch.cat([empty, *kept]) for kept in logits], torch.tensor(labels, dtype=torch.long)

    def to(self, device: torch.device) -> TeacherEnsemble:
        """Move the networks to a device."""
        self.device = device
        for member in self.members:
            member.to(device)
        self._columns = [None if c is None else c.to(device) for c in self._columns]
        return self

    def compile(self, mode: bool | str, shape: Sequence[int]) -> None:
        """Compile every member but exported files, see `Teacher.compile`."""
        for member in self.members:
            if member.has_features:
                member.compile(mode, shape)

    def answers(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return each member's logits of shape (B, len(classes)), and the features of the first.

        Before `align` only the first is asked, as logits of unknown classes cannot be averaged.
        """
        answers = [member(images) for member in (self.members if self.classes else self.members[:1])]
        logits = [
            x if columns is None else x.index_select(1, columns)
            for (x, _), columns in zip(answers, self._columns, strict=False)
        ]
        return logits, answers[0][1]

    def __call__(self, images: Tensor, logits: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Answer a batch of images.

        Args:
            images (Tensor): Images of shape (B, channels, H, W), 0 to 1, RGB.
            logits (bool): Compute logits; if not, only the first member is asked, see `Teacher`.

        Returns:
            logits (Tensor): Logits of shape (B, len(classes)), the teacher's own (B, C) before `align`, or (B, 0).
            features (list[Tensor]): One (B, c, h, w) map per level of the first member.
        """
        if not logits:
            return self.first(images, logits=False)
        answers, features = self.answers(images)
        return average_logits(answers, self.weights[: len(answers)], self.temperature), features


def _hash_file(file: str) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
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


def _some(names: Sequence[str]) -> str:
    """Return the first few names, for a sentence."""
    return "(" + ", ".join(f"'{name}'" for name in names[:5]) + ", ..." * (len(names) > 5) + ")"
