# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Losses between what two dense heads say of the same anchors: classes, boxes, their distributions, masks, keypoints.

What a head says of B images at A anchors is a dict of tensors, as far as its task has them:

    scores        (B, C, A)     class logits
    boxes         (B, A, 4)     x1, y1, x2, y2 in pixels; or, oriented, (B, A, 5): centre, size, angle in radians
    bins          (B, 4, R, A)  logits of how far an anchor's four sides are, in R steps of its stride
    coefficients  (B, M, A)     of the masks
    prototypes    (B, M, h, w)  that these weigh
    keypoints     (B, A, K, d)  x, y in pixels and, where d is 3, the logit of being visible
    image         (B, 2)        height and width in pixels

With `w_a` the teacher's confidence at an anchor, its largest probability of a class, losses of a batch read
`sum_a w_a l_a / max(1, sum_a w_a)`, over all its anchors, or of masks and keypoints over one for each of an image's
most confident objects. That of the classes is summed over all anchors alike, and divided by the same. Each is 0 where
both say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils.distillation.logits import full_precision
from ultralytics.utils.distillation.loss import DistillationLoss
from ultralytics.utils.distillation.registry import response_method

__all__ = ("TERMS", "DenseDistillationLoss", "Term", "bckd", "box_loss", "dfl_loss", "keypoint_loss", "mask_loss")

MOST_OBJECTS = 16  # of an image, the most confident ones, whose masks and keypoints are compared
MOST_ANCHORS = 64  # of an image, the most confident ones, among which objects are looked for
SAME = 0.7  # IoU from which on two boxes are of one object, upstream's for suppression
TINY = 1e-6  # in squares of pixels, or of a distance between 0 and 1

Said = Mapping[str, Tensor]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(sigmoid(teacher) || sigmoid(student)) of each pair of logits, as of a coin's two sides, in nats."""
    p = teacher.sigmoid()
    own = F.binary_cross_entropy_with_logits(teacher, p, reduction="none")
    return F.binary_cross_entropy_with_logits(student, p, reduction="none") - own


@response_method("bckd", of="anchors")
def bckd(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Return for each anchor how far the student's classes, each one's yes or no, are from the teacher's.

    `sum_k |p_k - q_k|^beta KL(p_k || q_k)` with `p = sigmoid(teacher)` and `q = sigmoid(student)`; the paper has the
    cross-entropy, which differs by the teacher's entropy, so that here 0 means equal. Gradients flow through both
    factors, as in the quality focal loss.

    Args:
        student (Tensor): Class logits (B, C, A).
        teacher (Tensor): Class logits (B, C, A).
        beta (float): How much more the anchors count on which the two differ; the paper's is 1, 0 is the divergence.

    Returns:
        (Tensor): Losses (B, A).

    References:
        Yang et al. 2023, "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", the
        binary classification loss; Li et al. 2020, "Generalized Focal Loss", the quality focal loss.
    """
    loss = divergence(student, teacher)
    if beta:
        loss = loss * (teacher.sigmoid() - student.sigmoid()).abs().clamp_min(TINY) ** beta  # or roots have no slope
    return loss.sum(1)


def box_loss(student: Said, teacher: Said, confidence: Tensor, temperature: float) -> Tensor:
    """Return how little the boxes overlap: 1 - GIoU, or of oriented ones 1 - ProbIoU.

    Args:
        student (Mapping[str, Tensor]): What the student's head says: `boxes`.
        teacher (Mapping[str, Tensor]): What the teacher's says.
        confidence (Tensor): Weights of the anchors, (B, A).
        temperature (float): Without effect.

    References:
        Wang et al. 2024, "CrossKD", and Yang et al. 2023, "Bridging Cross-task Protocol Inconsistency", both with GIoU;
        Rezatofighi et al. 2019, "Generalized Intersection over Union"; Llerena et al. 2021, "Gaussian Bounding Boxes
        and Probabilistic Intersection-over-Union for Object Detection".
    """
    pair = student["boxes"], teacher["boxes"]
    return _mean(probiou_loss(*pair) if pair[0].shape[-1] == 5 else giou_loss(*pair), confidence)


def giou_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - GIoU of boxes: of their overlap in their union, less what of the hull is in neither.

    Args:
        student (Tensor): Boxes (..., 4): x1, y1, x2, y2. Where a side is negative, as a head without distributions may
            say, the box is empty.
        teacher (Tensor): Boxes (..., 4).

    Returns:
        (Tensor): Losses (...), 0 to 2.

    References:
        Rezatofighi et al. 2019, "Generalized Intersection over Union", algorithm 1.
    """
    (low, high), (true_low, true_high) = (x.split(2, -1) for x in (student, teacher))

    def area(start: Tensor, end: Tensor) -> Tensor:
        return (end - start).clamp_min(0).prod(-1)

    overlap = area(torch.maximum(low, true_low), torch.minimum(high, true_high))
    union = (area(low, high) + area(true_low, true_high) - overlap).clamp_min(TINY)
    hull = area(torch.minimum(low, true_low), torch.maximum(high, true_high)).clamp_min(TINY)
    return 1 - overlap / union + (hull - union).clamp_min(0) / hull


def probiou_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - ProbIoU of oriented boxes: the Hellinger distance of the Gaussians with their moments.

    `sqrt(1 - exp(-D))` with `D` the Bhattacharyya distance of normal distributions whose means are the centres and
    whose covariances are those of uniform ones on the boxes.

    Args:
        student (Tensor): Boxes (..., 5): centre x, y, width, height in pixels, and angle in radians.
        teacher (Tensor): Boxes (..., 5).

    Returns:
        (Tensor): Distances (...), 0 to 1.

    References:
        Llerena et al. 2021, "Gaussian Bounding Boxes and Probabilistic Intersection-over-Union for Object Detection".
    """
    apart = student[..., :2] - teacher[..., :2]
    moments, across = [], 0.0
    for box in (student, teacher):
        x, y = (box[..., 2:4].square() / 12).clamp_min(TINY).unbind(-1)  # variances along its sides
        cos, sin = box[..., 4].cos(), box[..., 4].sin()
        along = apart[..., 0] * cos + apart[..., 1] * sin
        aside = apart[..., 1] * cos - apart[..., 0] * sin
        across = across + y * along.square() + x * aside.square()
        moments.append((x, y))
    (x1, y1), (x2, y2) = moments
    turn = student[..., 4] - teacher[..., 4]
    # The determinant of the covariances' sum, in terms of which none is negative: nothing cancels for thin boxes
    mixed = (x1 * x2 + y1 * y2) * turn.sin().square() + (x1 * y2 + y1 * x2) * turn.cos().square()
    determinant = x1 * y1 + x2 * y2 + mixed
    unlike = (determinant / (4 * (x1 * y1).sqrt() * (x2 * y2).sqrt())).clamp_min(1).log() / 2
    square = -torch.expm1(-(across / determinant / 4 + unlike))
    return square / (square + TINY).sqrt()  # its root, whose gradient is finite where the two are equal


def dfl_loss(student: Said, teacher: Said, confidence: Tensor, temperature: float) -> Tensor:
    """Return the softened KL divergence between the distributions of where a box's sides are, mean over the sides.

    `temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature))`; the authors' code takes the
    mean over the R bins, R times smaller.

    Args:
        student (Mapping[str, Tensor]): What the student's head says: `bins`.
        teacher (Mapping[str, Tensor]): What the teacher's says, with as many of them.
        confidence (Tensor): Weights of the anchors, (B, A).
        temperature (float): Softening temperature, > 0; the paper's is 10.

    References:
        Zheng et al. 2022, "Localization Distillation for Dense Object Detection".
    """
    said, true = (F.log_softmax(x["bins"] / temperature, 2) for x in (student, teacher))
    return _mean((true.exp() * (true - said)).sum(2).mean(1) * temperature**2, confidence)


def mask_loss(student: Said, teacher: Said, confidence: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the masks, mean over the pixels in the teacher's box, of its most confident objects.

    Prototypes of two networks have nothing in common, but the masks that they are put together to have.

    Args:
        student (Mapping[str, Tensor]): What the student's head says: `coefficients` and `prototypes`.
        teacher (Mapping[str, Tensor]): What the teacher's says, and `boxes`.
        confidence (Tensor): Weights of the anchors, (B, A).
        temperature (float): Without effect.
    """
    confidence, chosen = most_confident(confidence, teacher["boxes"])
    size = tuple(map(min, student["prototypes"].shape[2:], teacher["prototypes"].shape[2:]))
    masks = []
    for said in (student, teacher):
        prototypes = said["prototypes"]
        if prototypes.shape[2:] != size:
            prototypes = F.adaptive_avg_pool2d(prototypes, size)
        coefficients = said["coefficients"].transpose(1, 2).gather(1, _rows(chosen, said["coefficients"].shape[1]))
        masks.append(torch.einsum("bkm,bmhw->bkhw", coefficients, prototypes))
    boxes = teacher["boxes"].gather(1, _rows(chosen, teacher["boxes"].shape[-1]))
    inside = _inside(boxes, size, teacher["image"])
    return _mean((divergence(*masks) * inside).sum((2, 3)) / inside.sum((2, 3)).clamp_min(1), confidence)


def _inside(boxes: Tensor, size: tuple[int, int], image: Tensor) -> Tensor:
    """Return whether the pixels of masks lie in boxes (B, K, 4) of images whose (height, width) is given, (B, 2)."""
    (h, w), like = size, {"device": boxes.device, "dtype": boxes.dtype}
    y, x = ((torch.arange(n, **like) + 0.5) / n for n in (h, w))
    x1, y1, x2, y2 = (side[..., None] for side in boxes.unbind(-1))
    x, y = x * image[:, 1, None, None], y * image[:, 0, None, None]
    columns, rows = (x > x1) & (x < x2), (y > y1) & (y < y2)
    return rows[..., :, None] & columns[..., None, :]


def keypoint_loss(student: Said, teacher: Said, confidence: Tensor, temperature: float) -> Tensor:
    """Return the squared distance of the keypoints by the area of the teacher's box, of its most confident objects.

    Mean over the K points, weighed by how visible the teacher finds them. It is the exponent of object keypoint
    similarity with one constant for all points.

    Args:
        student (Mapping[str, Tensor]): What the student's head says: `keypoints`.
        teacher (Mapping[str, Tensor]): What the teacher's says, and `boxes`.
        confidence (Tensor): Weights of the anchors, (B, A).
        temperature (float): Without effect.

    References:
        Maji et al. 2022, "YOLO-Pose: Enhancing YOLO for Multi Person Pose Estimation Using Object Keypoint Similarity
        Loss", without the exponential, whose gradient vanishes where the points are far apart.
    """
    confidence, chosen = most_confident(confidence, teacher["boxes"])
    rows = chosen[..., None, None].expand(-1, -1, *teacher["keypoints"].shape[2:])
    said, true = (x["keypoints"].gather(1, rows) for x in (student, teacher))
    x1, y1, x2, y2 = teacher["boxes"].gather(1, _rows(chosen, 4)).unbind(-1)
    area = ((x2 - x1) * (y2 - y1)).clamp_min(1)[..., None]
    visible = true[..., 2].sigmoid() if true.shape[-1] == 3 else torch.ones_like(true[..., 0])
    apart = (said[..., :2] - true[..., :2]).square().sum(-1) / area
    return _mean((visible * apart).sum(-1) / visible.sum(-1).clamp_min(TINY), confidence)


def most_confident(confidence: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Choose an anchor for each of an image's most confident objects, by Fast NMS: at once, without asking the device.

    Args:
        confidence (Tensor): Of each anchor, (B, A).
        boxes (Tensor): Of each anchor, (B, A, 4): x1, y1, x2, y2.

    Returns:
        confidence (Tensor): Of the chosen anchors, (B, k); 0 where an image has fewer objects.
        chosen (Tensor): Which they are, (B, k).

    References:
        Bolya et al. 2019, "YOLACT: Real-time Instance Segmentation", section 3.3.
    """
    confidence, anchors = confidence.topk(min(MOST_ANCHORS, confidence.shape[1]), dim=1)
    boxes = boxes.gather(1, _rows(anchors, 4))
    low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]
    other_low, other_high = boxes[:, None, :, :2], boxes[:, None, :, 2:]
    overlap = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp_min(0).prod(-1)
    area = (high - low).clamp_min(0).prod(-1)
    union = (area + area.transpose(1, 2) - overlap).clamp_min(TINY)
    repeats = (overlap / union).triu(1).amax(1) > SAME  # of a more confident one
    confidence, places = confidence.masked_fill(repeats, 0).topk(min(MOST_OBJECTS, confidence.shape[1]), dim=1)
    return confidence, anchors.gather(1, places)


def _rows(chosen: Tensor, width: int) -> Tensor:
    """Return indices to gather rows of some width by."""
    return chosen[..., None].expand(-1, -1, width)


def _mean(losses: Tensor, confidence: Tensor) -> Tensor:
    """Return the mean of losses of anchors, weighed by the teacher's confidence."""
    return (losses * confidence).sum() / confidence.sum().clamp_min(1)


@dataclass(frozen=True)
class Term:
    """A loss of dense heads besides that of the classes.

    Attributes:
        function (Callable): The loss, given what both say, the confidence (B, A) and the temperature.
        softens (bool): Whether the temperature has an effect.
    """

    function: Callable[[Said, Said, Tensor, float], Tensor]
    softens: bool = False


TERMS = {
    "box": Term(box_loss),
    "dfl": Term(dfl_loss, softens=True),
    "mask": Term(mask_loss),
    "keypoint": Term(keypoint_loss),
}


class DenseDistillationLoss(DistillationLoss):
    """The weighted sum of the losses between two dense heads and their feature maps.

    Attributes:
        terms (dict[str, Term]): The losses of `TERMS` that are on, by the names of their items, e.g.
            `box_distill_loss`.
    """

    feature_scale = 0.04  # beside a loss that is multiplied by the batch size; chosen for `mse`, whose weight is then 1

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        terms: Mapping[str, float | None],
        **settings: Any,
    ):
        """Initialize the loss for one pair of networks.

        Args:
            student_channels (Sequence[int]): Channels of the student's map at each level.
            teacher_channels (Sequence[int]): Channels of the teacher's map at each level.
            terms (Mapping[str, float | None]): Which of `TERMS`, with weights; None for 1.
            **settings (Any): As for `DistillationLoss`.
        """
        super().__init__(student_channels, teacher_channels, **settings)
        self.terms: dict[str, Term] = {}
        for name, given in terms.items():
            if weight := 1.0 if given is None else given:
                self.terms[f"{name}_distill_loss"] = TERMS[name]
                self.weights[f"{name}_distill_loss"] = weight

    def temperature_of(self, name: str) -> float | None:
        """Return the temperature that a loss, by the name of its item, softens with; None if it does not."""
        if name in self.terms:
            return self.temperature if self.terms[name].softens else None
        return super().temperature_of(name)

    def forward(self, *answers: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of `losses`, and them detached and unweighted."""
        return self._sum(self.losses(*answers), torch.zeros(()))

    def losses(
        self,
        student: Mapping[str, Said],
        teacher: Mapping[str, Said],
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        unknown: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the enabled losses in full precision, unweighted and with their graph.

        Args:
            student (Mapping[str, Mapping[str, Tensor]]): What each branch of its head says, see this module.
            teacher (Mapping[str, Mapping[str, Tensor]]): The same of the branches to compare, on the same anchors and
                the same classes; receives no gradient.
            student_features (Sequence[Tensor]): One (B, c_l, h, w) map per level; unused without a feature-based loss.
            teacher_features (Sequence[Tensor]): One (B, c'_l, h', w') map per level.
            unknown (Tensor, optional): Whether an anchor lies on an object that the teacher does not know, (B, A): what
                it says there is not compared.

        Returns:
            (dict[str, Tensor]): Scalars, keyed like `weights`; each is the sum over the branches, as but one of them
                reaches the student's backbone.
        """
        sums: dict[str, list[Tensor]] = {}
        tensors = [*student_features, *(said["scores"] for said in student.values())]
        with torch.autocast(tensors[0].device.type, enabled=False):
            for branch in teacher:
                said, true = ({k: full_precision(v) for k, v in x[branch].items()} for x in (student, teacher))
                true = {k: v.detach() for k, v in true.items()}
                confidence = true["scores"].sigmoid().amax(1)
                if unknown is not None:
                    confidence = confidence.masked_fill(unknown, 0)
                count = confidence.sum().clamp_min(1)
                for name, choice in self._responses.items():
                    loss = choice(said["scores"], true["scores"], temperature=self.temperature)
                    if unknown is not None:
                        loss = loss.masked_fill(unknown, 0)
                    sums.setdefault(name, []).append(loss.sum() / count)
                for name, term in self.terms.items():
                    sums.setdefault(name, []).append(term.function(said, true, confidence, self.temperature))
            losses = {name: torch.stack(values).sum() for name, values in sums.items()}
            return {**losses, **self.feature_losses(student_features, teacher_features)}
