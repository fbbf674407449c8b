# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A teacher that can be given a linear head for other classes, fitted on its frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from ultralytics.nn.distillation.class_names import some
from ultralytics.nn.distillation.probe import find_head, put_head
from ultralytics.nn.distillation.sources import Source, hash_file
from ultralytics.nn.distillation.sources.probed import read_probed, save_probed
from ultralytics.nn.distillation.teacher import Teacher

__all__ = ("ProbeableTeacher",)


class ProbeableTeacher(Teacher):
    """A teacher whose head can be changed: it grows a blank one, gets its weights, and becomes the file of both.

    Attributes:
        waits_for_head (bool): Whether it has grown a head that has no weights yet.
    """

    _layer, _width = "", 0  # where a head has grown, see `probe.find_head`

    def grow_head(self, names: Sequence[str], imgsz: int, channels: int) -> None:
        """Put a head for other classes in the place of its own, with weights of 0 until `wear_head`.

        Args:
            names (Sequence[str]): The classes by index.
            imgsz (int): Side of the student's images in pixels.
            channels (int): Their channels.

        Raises:
            ValueError: If it has no features, or cannot process such images.
        """
        if not self.has_features:
            raise ValueError(
                f"'teacher_probe=True' needs the features inside the teacher, but 'teacher={self.source}' is an "
                f"exported file, which gives answers only. Give the checkpoint that it was exported from."
            )
        try:
            self._layer, self._width = find_head(self.model, lambda: self.first_answer(imgsz, channels))
        except TypeError as e:
            raise ValueError(f"'teacher={self.source}' has no features for 'teacher_probe=True': {e}.") from e
        self.model = put_head(self.model, self._layer, self._width, len(names))
        self.names, self.waits_for_head = list(names), True

    def features(self, images: Tensor) -> Tensor:
        """Return what the head that has grown sees of B images: (B, d) in float32 on the CPU."""
        seen: list[Tensor] = []
        handle = self._linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].float().cpu()))
        try:
            self(images)
        finally:
            handle.remove()
        return torch.cat(seen)

    def wear_head(self, weight: Tensor, bias: Tensor) -> None:
        """Give the head that has grown its weights, of shapes (C, d) and (C,)."""
        with torch.no_grad():
            self._linear.weight.copy_(weight)
            self._linear.bias.copy_(bias)

    def save(self, file: Path) -> None:
        """Write the network with the head that has grown, whole, as a teacher by itself, see `save_probed`."""
        source = Source(self.source, self.model, self.names, self.channels, self.imgsz, *self.normalization)
        save_probed(file, source, self._layer, self._width)
        images = torch.rand(2, self.channels or 3, self._side, self._side, generator=torch.Generator().manual_seed(0))
        try:
            same = torch.allclose(type(self)(str(file))(images)[0], self(images)[0], rtol=1e-2, atol=1e-3)
        except TypeError:
            same = False
        if not same:  # its library would build another one by its name
            save_probed(file, source, self._layer, self._width, in_python=True)

    def take_head(self, file: str | Path) -> None:
        """Have the weights that `save` has written to a file, with the head that has grown among them.

        Raises:
            FileNotFoundError: If there is no such file.
            TypeError: If it is damaged, or was not written by `save`.
            ValueError: If it is of another network, or of other classes.
        """
        names, state = read_probed(str(file))
        if names != self.names:
            raise ValueError(
                f"'teacher_probe={file}' knows the classes {some(names)}, and the dataset has {some(self.names)}. Set "
                f"'teacher_probe=True' to fit a head for these."
            )
        try:
            self.model.load_state_dict(state)
        except RuntimeError as e:
            raise ValueError(
                f"'teacher_probe={file}' was fitted on another network than 'teacher={self.source}'. Give that one, or "
                f"set 'teacher_probe=True' to fit a head for this one."
            ) from e

    def become(self, file: str | Path) -> None:
        """Be the teacher that `save` has written to a file from now on."""
        self.backbone, self.source, self.content_hash = self.source, str(file), hash_file(str(file))
        self.waits_for_head = False
        self.model = self.fuse(self.model)

    @property
    def _linear(self) -> nn.Linear:
        """The head that has grown."""
        return self.model.get_submodule(self._layer or "head")
