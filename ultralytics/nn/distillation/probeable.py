# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A teacher that can be given a linear head for other classes, fitted on its frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from ultralytics.nn.distillation.probe import ProbedNetwork, find_head, put_head
from ultralytics.nn.distillation.sources import Source
from ultralytics.nn.distillation.sources.libraries import head_layers, without_layers
from ultralytics.nn.distillation.sources.probed import Head, save_probed
from ultralytics.nn.distillation.teacher import Teacher, random_images
from ultralytics.utils import LOGGER

__all__ = ("ProbeableTeacher",)

FEW = 32  # features; networks for images have hundreds


class ProbeableTeacher(Teacher):
    """A teacher whose head can be changed: it grows a blank one, gets its weights, and becomes the file of both.

    Attributes:
        waits_for_head (bool): Whether it has grown a head that has no weights yet.
        layer (str): Name of the layer in whose place the head is, "" if it stands behind the network.
    """

    layer = ""

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
        images = random_images(2, channels, imgsz, imgsz)
        scores = len(self.names or ()), getattr(self.model, "num_classes", None)
        if isinstance(self.model, ProbedNetwork):  # fitted for other classes before
            self.model, scores = self.model.network, ()

        def find() -> tuple[str, int]:
            return find_head(self.model, lambda: self.first_answer(images))

        try:
            self.layer, features = find()
            if not self.layer and features in scores and self.recipe:  # of several heads, or of a convolution
                self.recipe = {**self.recipe, "without": head_layers(self.recipe)}
                without_layers(self.model, self.recipe["without"])
                self.layer, features = find()
        except TypeError as e:
            raise ValueError(f"'teacher={self.source}' has no features for 'teacher_probe=True': {e}.") from e
        if not self.layer and (features < FEW or (features in scores and not self.recipe)):
            LOGGER.warning(
                f"'teacher={self.source}' shows a head no more than its answer, {features} values of an image, as no "
                f"linear layer makes them: if they are scores of classes, it knows little else. Give the network "
                f"without its own head."
            )
        self.model = put_head(self.model, self.layer, features, len(names))
        self.names, self.waits_for_head = list(names), True

    @property
    def linear(self) -> nn.Linear:
        """The head that has grown."""
        return self.model.get_submodule(self.layer or "head")

    def features(self, images: Tensor) -> Tensor:
        """Return what the head that has grown sees of B images: (B, d) in float32 on the CPU."""
        seen: list[Tensor] = []
        handle = self.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].float().cpu()))
        try:
            self(images)
        finally:
            handle.remove()
        return torch.cat(seen)

    def wear_head(self, head: Head) -> None:
        """Give the head that has grown its weights.

        Raises:
            ValueError: If they are for another place, another width or other classes.
        """
        if head.layer != self.layer or head.weight.shape != self.linear.weight.shape:
            raise ValueError(f"a head of {tuple(head.weight.shape)} at '{head.layer}' does not fit '{self.source}'")
        with torch.no_grad():
            self.linear.weight.copy_(head.weight)
            self.linear.bias.copy_(head.bias)

    def save(self, file: Path) -> None:
        """Write the network with its head, whole, as a teacher by itself, see `save_probed`; it is on the CPU."""
        backbone = self.backbone or self.source
        source = Source(self.source, self.model, self.names, self.channels, self.imgsz, *self.normalization)
        source.backbone, source.recipe = backbone, self.recipe
        head = Head(self.layer, self.linear.weight, self.linear.bias)
        save_probed(file, source, head)
        images = random_images(2, self.channels or 3, self._side, self._side)
        try:
            again = type(self)(str(file), trusted=self.trusted, grows_head=True)
            same = torch.allclose(again(images)[0], self(images)[0], rtol=1e-2, atol=1e-3)
        except TypeError:
            same = False
        if not same:  # by the name of its architecture the library builds another one
            source.recipe = None
            save_probed(file, source, head)

    def become(self, file: str | Path, content_hash: str) -> None:
        """Be the teacher that `save` has written to a file of this SHA-256 from now on."""
        self.backbone, self.source, self.content_hash = self.backbone or self.source, str(file), content_hash
        self.waits_for_head, self._reopens, self._given_imgsz = False, True, None
        self.model = self.fuse(self.model)
