# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Detectors and what is built on them as teachers: heads that say something of each of many anchors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics.nn.distillation.class_names import match_classes, some
from ultralytics.nn.distillation.overlap import Answer
from ultralytics.nn.distillation.teacher import Teacher
from ultralytics.nn.distillation.teachers import Teachers
from ultralytics.nn.modules import OBB, Detect, Pose, Segment, WorldDetect, YOLOEDetect
from ultralytics.nn.modules.head import Pose26
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.tal import dist2bbox, dist2rbox

__all__ = ("DenseHead", "DenseTeacher", "DenseTeachers", "maps_of")

BRANCHES = ("one2many", "one2one")
RAW = ("scores", "boxes", "angle", "mask_coefficient", "kpts")  # of a branch's output, one tensor each


class DenseHead(NamedTuple):
    """What a head of anchors says, and how it is read.

    Attributes:
        strides (tuple[int, ...]): Pixels between its anchors, by level.
        bins (int): Steps in which it says how far an anchor's sides are; 1 if it says the distance itself.
        branches (tuple[str, ...]): Its branches: "one2many" and, of an end-to-end head, "one2one".
        masks (bool): Whether it gives masks.
        keypoints (tuple[int, int] | None): The number of its keypoints, and of what it says of each.
        oriented (bool): Whether its boxes are oriented.
        keypoint_scale (float): What it multiplies keypoints by; they are then relative to the anchor, in strides.
        keypoint_shift (float): What it adds to them.
    """

    strides: tuple[int, ...]
    bins: int
    branches: tuple[str, ...]
    masks: bool
    keypoints: tuple[int, int] | None
    oriented: bool
    keypoint_scale: float
    keypoint_shift: float

    @classmethod
    def of(cls, network: nn.Module) -> DenseHead:
        """Describe the head of a network.

        Raises:
            TypeError: If it has none of anchors, or one that needs words beside the image.
        """
        head = network.model[-1] if isinstance(getattr(network, "model", None), nn.Sequential) else network
        if not isinstance(head, Detect) or isinstance(head, (WorldDetect, YOLOEDetect)):
            raise TypeError(f"a head of type {type(head).__name__} says nothing of anchors that could be compared")
        present = [head.cv2 is not None, getattr(head, "one2one_cv2", None) is not None]
        newer = isinstance(head, Pose26)
        return cls(
            strides=tuple(head.stride.int().tolist()),
            bins=head.reg_max,
            branches=tuple(name for name, there in zip(BRANCHES, present, strict=True) if there),
            masks=isinstance(head, Segment),
            keypoints=tuple(head.kpt_shape) if isinstance(head, Pose) else None,
            oriented=isinstance(head, OBB),
            keypoint_scale=1.0 if newer else 2.0,
            keypoint_shift=0.0 if newer else -0.5,
        )

    def read(self, raw: Any, branches: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """Return what branches say, see `utils.distillation.dense`.

        Args:
            raw (Any): What the network gives: in training a dict, in eval mode its second part.
            branches (Sequence[str], optional): Which; None for all that there are.
        """
        return self.decode(self.pick(raw, branches))

    def pick(self, raw: Any, branches: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """Return of each branch's output what is needed to decode it; of its maps no channel, but their sizes."""
        raw = raw[1] if isinstance(raw, tuple) else raw
        picked = {}
        for name in self.branches if branches is None else branches:
            branch = self._branch(raw, name)
            own = picked[name] = {k: branch[k] for k in RAW if k in branch}
            if self.masks:
                prototypes = branch["proto"]  # in training with the semantic logits of newer ones
                own["proto"] = prototypes[0] if isinstance(prototypes, tuple) else prototypes
            own |= {f"map{i}": x[:, :0] for i, x in enumerate(branch["feats"])}
        return picked

    def decode(self, picked: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return what branches say, see `utils.distillation.dense`, from what `pick` gave."""
        return {name: self._decode(branch) for name, branch in picked.items()}

    def _branch(self, raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """Return what one branch gives; a head that has but one gives it as it is, unless it had two."""
        return raw if len(self.branches) == 1 and name not in raw else raw[name]

    def points(self, raw: Any) -> Tensor:
        """Return the anchors of training predictions, (A, 2), x and y in pixels."""
        points, strides = self._anchors(maps_of(raw))
        return points * strides

    def _anchors(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the anchors in strides, (A, 2), and their strides in pixels, (A, 1), made on the device."""
        points, strides = [], []
        for x, stride in zip(maps, self.strides, strict=True):
            like, (h, w) = {"device": x.device, "dtype": torch.float32}, x.shape[2:]
            rows, columns = torch.meshgrid(torch.arange(h, **like), torch.arange(w, **like), indexing="ij")
            points.append(torch.stack([columns, rows], -1).flatten(0, 1) + 0.5)
            strides.append(torch.full((h * w, 1), float(stride), **like))
        return torch.cat(points), torch.cat(strides)

    def _decode(self, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what one branch says, boxes and keypoints in pixels."""
        scores, maps = raw["scores"], [raw[f"map{i}"] for i in range(len(self.strides))]
        points, strides = self._anchors(maps)
        bins = raw["boxes"].float().unflatten(1, (4, self.bins))
        steps = torch.arange(self.bins, device=bins.device, dtype=bins.dtype)[:, None]
        distances = ((bins.softmax(2) * steps).sum(2) if self.bins > 1 else bins[:, :, 0]).transpose(1, 2)
        sides = [points.new_full((len(scores),), self.strides[0] * side) for side in maps[0].shape[2:]]
        said = {"scores": scores, "image": torch.stack(sides, 1)}
        if self.bins > 1:
            said["bins"] = bins
        if self.oriented:
            angle = raw["angle"].float().transpose(1, 2)
            said["boxes"] = torch.cat([dist2rbox(distances, angle, points) * strides, angle], 2)
        else:
            said["boxes"] = dist2bbox(distances, points, xywh=False) * strides
        if self.masks:
            said["coefficients"], said["prototypes"] = raw["mask_coefficient"], raw["proto"]
        if self.keypoints:
            keypoints = raw["kpts"].float().unflatten(1, self.keypoints).permute(0, 3, 1, 2)
            place = keypoints[..., :2] * self.keypoint_scale + points[:, None] + self.keypoint_shift
            said["keypoints"] = torch.cat([place * strides[:, None], keypoints[..., 2:]], -1)
        return said


def maps_of(raw: Mapping[str, Any]) -> list[Tensor]:
    """Return the maps that a head was given, from its training predictions."""
    return raw.get("one2many", raw)["feats"]


class DenseTeacher(Teacher):
    """A trained network with a head of anchors, frozen. Its answer is (what each branch says, features)."""

    def fuse(self, network: nn.Module) -> nn.Module:
        """Return a network with its convolutions and BatchNorm layers fused, that says what it says in training.

        Upstream fuses a head by taking the branch away that predicts nothing, which a student's is yet to be compared
        with; and in eval mode it decodes and sorts what nobody asks for here.
        """
        if not isinstance(network, DetectionModel) or not isinstance(head := network.model[-1], Detect):
            return network  # to be refused, see `vet`
        head.fuse = lambda: None
        try:
            network.fuse(verbose=False)
        finally:
            del head.fuse
        # The head alone, not what is inside; one that upstream has fused lacks what it would ask for
        head.training = not any(module is None and name.endswith("sigma") for name, module in head._modules.items())
        return network

    @cached_property
    def dense_head(self) -> DenseHead | None:
        """What the head says, and how it is read; None of one that says nothing of anchors, e.g. RT-DETR's."""
        try:
            return DenseHead.of(self.model)
        except TypeError:
            return None

    def read(self, output: Any) -> dict[str, dict[str, Tensor]]:
        """Return each branch's output, nothing of a head that says nothing of anchors."""
        return self.dense_head.pick(output) if self.dense_head else {}

    def interpret(self, kept: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return what each branch of the head says."""
        return self.dense_head.decode(kept) if self.dense_head else {}

    def vet(self, imgsz: int, channels: int, images: Tensor | None = None) -> None:
        """Check that it is a network of the task, and by one forward pass that it answers as one."""
        if not isinstance(self.model, DetectionModel):
            raise TypeError(
                f"'teacher={self.source}' cannot teach a {self.expected.noun} model: it is of type "
                f"{type(self.model).__name__}. Give a YOLO checkpoint, e.g. '{self.expected.example}'."
            )
        super().vet(imgsz, channels, images)

    def check_answer(self, answer: dict[str, dict[str, Tensor]], count: int) -> None:
        """Refuse what is not finite, or is not of as many classes as there are names.

        Raises:
            ValueError: If it is so.
        """
        for said in answer.values():
            if not all(x.isfinite().all() for x in said.values()):
                raise ValueError(
                    f"'teacher={self.source}' gives NaN or infinite predictions: its weights are damaged, or its "
                    f"training failed. Give an earlier checkpoint."
                )
            count = said["scores"].shape[1]
            if self.names is not None and count != len(self.names):
                raise ValueError(
                    f"'teacher={self.source}' gives scores of {count} classes, but has {len(self.names)} class names. "
                    f"Name each of its classes with 'teacher_names'."
                )


class DenseTeachers(Teachers):
    """One teacher with a head of anchors, its scores matched to a dataset's classes by name."""

    def __init__(self, members: Sequence[DenseTeacher]):
        """Begin with the teacher's own classes."""
        super().__init__(members)
        self._columns: Tensor | None = None

    def align(self, names: Sequence[str], chosen: Collection[int] | None = None) -> list[str]:
        """Match the teacher's classes to a dataset's by name; `classes` is empty where they share none.

        Args:
            names (Sequence[str]): The dataset's class names by index.
            chosen (Collection[int], optional): Indices of those that are trained on; None for all.

        Returns:
            (list[str]): What is notable, in sentences for the log.

        Raises:
            ValueError: If the teacher's classes are not known, or match ambiguously.
        """
        teacher = self.first
        if teacher.names is None:
            raise ValueError(
                f"'teacher={teacher.source}' does not say which classes it knows. Name them by index with "
                f"'teacher_names', a list, a dict or a YAML file."
            )
        matched = match_classes(teacher.names, names)
        chosen = range(len(names)) if chosen is None else chosen
        unknown = [names[i] for i in range(len(names)) if i in chosen and i not in matched]
        matched = {i: column for i, column in matched.items() if i in chosen}
        self.classes = list(matched)
        columns, notes = list(matched.values()), []
        if columns and columns != list(range(len(teacher.names))):
            self._columns = torch.tensor(columns)
            notes.append(
                f"{teacher.source}: {len(columns)} of its {len(teacher.names)} classes are matched by name to the "
                f"dataset's."
            )
        if columns and len(columns) < len(names):
            self.known_classes = torch.tensor(self.classes)
        if columns and unknown:
            notes.append(
                f"The teacher knows {len(columns)} of {len(columns) + len(unknown)} classes. It is not listened to "
                f"where objects of the others are: {some(unknown)}."
            )
        return notes

    def to(self, device: torch.device) -> DenseTeachers:
        """Move the network to a device."""
        super().to(device)
        self._columns = None if self._columns is None else self._columns.to(device)
        return self

    def __call__(self, images: Tensor, head: bool = True) -> Answer:
        """Answer a batch of images.

        Args:
            images (Tensor): Images of shape (B, channels, H, W), 0 to 1, RGB.
            head (bool): Compute what the head says; if not, the forward pass ends at the last level.

        Returns:
            said (dict[str, dict[str, Tensor]]): What each branch says, see `utils.distillation.dense`, of the classes
                in `classes`; or an empty tensor of shape (B, 0) without.
            features (list[Tensor]): One (B, c, h, w) map per level.
        """
        kept, features = self.ask(images, head)
        return self.interpret(kept) if head else kept, features

    def ask(self, images: Tensor, head: bool = True) -> Answer:
        """Answer a batch of images as it can be kept: in the units of the head."""
        return self.first.ask(images, head)

    def interpret(self, kept: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return what each branch says of the classes in `classes`."""
        said = self.first.interpret(kept)
        if self._columns is None:
            return said
        return {k: {**x, "scores": x["scores"].index_select(1, self._columns)} for k, x in said.items()}
