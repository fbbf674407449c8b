# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Losses between the feature maps of a student and a teacher.

Maps come in full precision, paired in spatial size. Relations between images are read from the last level's maps, which
is where embeddings are in the papers; they need two images to say something, and are 0 for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from ultralytics.utils.distillation.logits import full_precision
from ultralytics.utils.distillation.registry import feature_method
from ultralytics.utils.distillation.responses import correlation, unit

__all__ = ("attention_loss", "feature_loss", "pair_maps", "standardize")

ROUNDING = 2**-8  # of bfloat16, relative to a number: a teacher's answers may come in it
LEAST = 4  # values of a channel


def pair_maps(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return (student, detached teacher) maps per level, in full precision, of one spatial size.

    A student's map is brought to channels last where the teacher's is.

    Raises:
        ValueError: If the lists are empty or differ in length, or a pair differs in batch size.
    """
    if not student_features or len(student_features) != len(teacher_features):
        raise ValueError(
            f"Student and teacher need one feature map each per level, but got shapes "
            f"{[tuple(x.shape) for x in student_features]} and {[tuple(x.shape) for x in teacher_features]}."
        )
    pairs = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.ndim != 4 or teacher.ndim != 4 or student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"Feature maps must have shape (B, C, h, w) with one B, but got a student map of shape "
                f"{tuple(student.shape)} and a teacher map of shape {tuple(teacher.shape)}."
            )
        size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
        student, teacher = (
            x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)
            for x in (full_precision(student), full_precision(teacher.detach()))
        )
        last = {"memory_format": torch.channels_last}
        if teacher.is_contiguous(**last) and not student.is_contiguous(**last):  # two formats are slow to compare
            student = student.contiguous(**last)
            if student.requires_grad:
                student.register_hook(Tensor.contiguous)  # the student gets its gradient in its own
        pairs.append((student, teacher))
    return pairs


class _MeanSquare(torch.autograd.Function):
    """The mean of squares over some dimensions, which are kept; its gradient is one product where PyTorch has three.

    First derivatives only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.count = math.prod(x.shape[d] for d in dims)
        if len(dims) == x.ndim or x.is_contiguous(memory_format=torch.channels_last):  # or it is slow
            norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)  # whose squares take no memory
            return norm.square() / max(ctx.count, 1)
        return x.square().mean(dims, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return x * (gradient * (2 / max(ctx.count, 1))), None


def _adapter(student: int, teacher: int) -> nn.Conv2d:
    return nn.Conv2d(student, teacher, 1)


def _adapter_if_needed(student: int, teacher: int) -> nn.Module:
    return nn.Identity() if student == teacher else _adapter(student, teacher)


def feature_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Return the mean squared error between feature maps, averaged over levels.

    FitNets sums the squares; the mean makes a weight mean the same at every width, image and batch size.

    Args:
        student_features (Sequence[Tensor]): One (B, C_l, h, w) map per level, already brought to the teacher's C_l.
        teacher_features (Sequence[Tensor]): One (B, C_l, h', w') map per level; receive no gradient. Where the sizes
            differ, the larger map is average-pooled to the smaller.

    Returns:
        (Tensor): Scalar, float32 (float64 for float64 maps).

    Raises:
        ValueError: If the lists are empty or differ in length, or a pair differs in batch or channels.

    References:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3 (mean instead of sum).
    """
    pairs = pair_maps(student_features, teacher_features)
    for student, teacher in pairs:
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"feature_loss needs equal channels, but got a student map of shape {tuple(student.shape)} and a "
                f"teacher map of shape {tuple(teacher.shape)}."
            )
    return torch.stack([mse(student, teacher) for student, teacher in pairs]).mean()


def standardize(x: Tensor) -> Tensor:
    """Return a map whose channels have mean 0 and standard deviation 1 over images and positions.

    A channel that varies by less than half precision can say becomes 0; so does every channel where there are fewer
    than `LEAST` values, which say nothing of how it varies.

    Args:
        x (Tensor): Map (B, c, h, w), at least float32.

    Returns:
        (Tensor): Map (B, c, h, w).
    """
    if x[:, 0].numel() < LEAST:
        return torch.zeros_like(x)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    says = variance > (variance + mean.square()) * ROUNDING**2
    return (x - mean).mul_(torch.where(says, variance, torch.inf).rsqrt())


def attention_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Return the squared distance between normalised spatial attention maps, averaged over images and levels.

    `mean_l mean_b || Q(student_l)_b - Q(teacher_l)_b ||^2`, where `Q(F)` is the channel mean of `F^2` as a vector of
    unit L2 norm. Each image and level contributes a value in [0, 2].

    Known discrepancy: eq. 2 of the paper has the norm itself, the authors' code its square averaged over positions.
    This is the square summed over positions, h*w times the authors' code, so that a weight means the same at every
    image size.

    Args:
        student_features (Sequence[Tensor]): One (B, c_l, h, w) map per level.
        teacher_features (Sequence[Tensor]): One (B, c'_l, h', w') map per level; receive no gradient. Channels may
            differ. Where the sizes differ, the larger map is average-pooled to the smaller.

    Returns:
        (Tensor): Scalar, float32 (float64 for float64 maps).

    Raises:
        ValueError: If the lists are empty or differ in length, or a pair differs in batch size.

    References:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", eq. 2, and the authors' code.
    """
    pairs = pair_maps(student_features, teacher_features)
    return torch.stack([attention(student, teacher) for student, teacher in pairs]).mean()


@feature_method("fitnets", weight=50.0, adapter=_adapter)
@feature_method("mse", weight=25.0, adapter=_adapter, standardize=True)
def mse(student: Tensor, teacher: Tensor, fresh: bool = False) -> Tensor:
    """Return the mean squared error of one level, see `feature_loss`.

    As `mse` to the teacher's standardized map, so that its weight, which was measured (see benchmarks), means the same
    for every teacher; as `fitnets` to the map as it is.

    Args:
        student (Tensor): Map (B, c, h, w).
        teacher (Tensor): Map (B, c, h, w).
        fresh (bool): Whether the student's map is nobody else's, so that it may be overwritten.
    """
    difference = student.sub_(teacher) if fresh else student - teacher
    return _MeanSquare.apply(difference, (0, 1, 2, 3)).reshape(())


@feature_method("attention", weight=10.0)
def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of the attention maps of one level, see `attention_loss`."""
    return (_attention(student) - _attention(teacher)).square().sum(1).mean()


@feature_method("rkd", last=True)
def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Return how the distances and the angles between images differ.

    `distance * mean_ij H(d_ij / mean(d)) + angle * mean_ijk H(cos(ijk))`, with `H` the Huber loss of the difference to
    the teacher's, `d_ij` Euclidean distances of the maps' means over positions, and `ijk` the angle at image i between
    j and k. The work for the angles grows with the cube of the batch.

    Args:
        student (Tensor): Map (B, c, h, w).
        teacher (Tensor): Map (B, c', h, w).
        distance (float): Weight of the distances.
        angle (float): Weight of the angles.

    References:
        Park et al. 2019, "Relational Knowledge Distillation", eq. 5 to 9; the weights are those for classification.
    """
    student, teacher = student.mean((2, 3)), teacher.mean((2, 3))
    loss = student.sum() * 0
    if distance:
        loss = loss + distance * F.smooth_l1_loss(_distances(student), _distances(teacher))
    if angle:
        loss = loss + angle * F.smooth_l1_loss(_angles(student), _angles(teacher))
    return loss


@feature_method("sp", weight=3000.0, last=True)
def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how the similarities between images differ.

    `||G(student) - G(teacher)||_F^2 / B^2`, with `G(F)` the products of all pairs of images' maps, its rows
    of unit norm.

    Args:
        student (Tensor): Map (B, c, h, w).
        teacher (Tensor): Map (B, c', h, w).

    References:
        Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", eq. 4; the weight is the paper's.
    """
    student, teacher = (F.normalize(x @ x.T, dim=1) for x in (student.flatten(1), teacher.flatten(1)))
    return F.mse_loss(student, teacher)


@feature_method("cc", weight=100.0, last=True)
def cc(student: Tensor, teacher: Tensor, *, gamma: float = 0.4) -> Tensor:
    """Return how the correlations between images differ, in a Gaussian kernel.

    `||C(student) - C(teacher)||_F^2 / B^2` with `C_ij = exp(-2 gamma) * sum_p (2 gamma)^p / p! * (f_i . f_j)^p` for p
    from 0 to 2, the kernel's Taylor series, and `f` the maps' means over positions, of unit norm. The paper's learned
    projections to one width are left out, as the products of unit vectors can be compared without.

    Args:
        student (Tensor): Map (B, c, h, w).
        teacher (Tensor): Map (B, c', h, w).
        gamma (float): Width of the kernel, 1 / (2 variances).

    References:
        Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", eq. 5 to 11. The weight is our own.
    """
    kernels = []
    for x in (student, teacher):
        x = F.normalize(x.mean((2, 3)), dim=1)
        products = 2 * gamma * (x @ x.T)
        kernels.append(math.exp(-2 * gamma) * (1 + products + products.square() / 2))
    return F.mse_loss(*kernels)


def _vid_adapter(student: int, teacher: int) -> nn.ModuleDict:
    scale = nn.Embedding(1, teacher)  # one learned number per channel, in a module that every installation knows
    nn.init.constant_(scale.weight, math.log(math.expm1(5.0)))  # variances start at 5
    convolutions = [nn.Conv2d(student, teacher, 1), nn.ReLU(), nn.Conv2d(teacher, teacher, 1), nn.ReLU()]
    return nn.ModuleDict({"mean": nn.Sequential(*convolutions, nn.Conv2d(teacher, teacher, 1)), "scale": scale})


@feature_method("vid", adapter=_vid_adapter)
def vid(student: Tensor, teacher: Tensor, adapter: nn.ModuleDict) -> Tensor:
    """Return the negative log-likelihood of the teacher's map under Gaussians around what the student's predicts.

    `mean((teacher - mu(student))^2 / (2 var_c) + log(var_c) / 2)`, with three 1x1 convolutions for `mu` and a learned
    variance per channel. It bounds the mutual information of the maps; it is not 0 where they are equal, and can be
    negative.

    Args:
        student (Tensor): Map (B, c, h, w).
        teacher (Tensor): Map (B, c', h, w).
        adapter (nn.ModuleDict): `mean`, the convolutions, and `scale`, whose softplus is the variance.

    References:
        Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", eq. 5 and 6.
    """
    variance = F.softplus(adapter["scale"].weight).reshape(1, -1, 1, 1) + 1e-5
    return ((teacher - adapter["mean"](student)).square() / variance + variance.log()).mean() / 2


@feature_method("pkd", weight=6.0, adapter=_adapter_if_needed)
def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how far the maps are from being correlated, channel by channel.

    `mean_c(1 - r(student_c, teacher_c))`, with `r` Pearson's correlation over images and positions: half the mean
    squared error of maps whose channels have mean 0 and variance 1. Blind to scale and offset of each channel.

    Args:
        student (Tensor): Map (B, c', h, w), through a 1x1 convolution if the channels differ.
        teacher (Tensor): Map (B, c', h, w).

    References:
        Cao et al. 2022, "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
        eq. 4 and 5; the weight is that of its detectors.
    """
    return 1 - correlation(*(x.transpose(0, 1).flatten(1) for x in (student, teacher)), dim=1).mean()


@feature_method("cwd", weight=50.0, adapter=_adapter_if_needed)
def cwd(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return the KL divergence between softmaxes over positions, channel by channel.

    `temperature**2 * mean_bc KL(softmax(teacher_bc / temperature) || softmax(student_bc / temperature))`.

    Args:
        student (Tensor): Map (B, c', h, w), through a 1x1 convolution if the channels differ.
        teacher (Tensor): Map (B, c', h, w).
        temperature (float): Softening temperature.

    References:
        Shu et al. 2021, "Channel-wise Knowledge Distillation for Dense Prediction", eq. 3 and 4; temperature and weight
        are the paper's for feature maps.
    """
    student, teacher = (F.log_softmax(x.flatten(2) / temperature, dim=2) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / student.shape[:2].numel() * temperature**2


def _srrl_adapter(student: int, teacher: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher), nn.ReLU())


@feature_method("srrl", adapter=_srrl_adapter, last=True)
def srrl(
    student: Tensor, teacher: Tensor, classify: Callable[[Tensor], Tensor], *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Return how the maps differ, and what the teacher's own head makes of the student's.

    `alpha * MSE(mean of student over positions, of teacher) + beta * MSE(head(student), head(teacher))`, means over
    images and channels or classes.

    Args:
        student (Tensor): Map (B, c', h, w), through a 1x1 convolution with BatchNorm and ReLU.
        teacher (Tensor): Map (B, c', h, w).
        classify (Callable): The teacher's head, from a map to logits (B, C).
        alpha (float): Weight of the maps.
        beta (float): Weight of the logits.

    References:
        Yang et al. 2021, "Knowledge Distillation via Softmax Regression Representation Learning", eq. 4 and 6.
    """
    with torch.no_grad():
        target = classify(teacher)
    features = F.mse_loss(student.mean((2, 3)), teacher.mean((2, 3)))
    return alpha * features + beta * F.mse_loss(classify(student), target)


def _attention(x: Tensor) -> Tensor:
    """Return the spatial attention of a (B, C, h, w) map as unit vectors of shape (B, h*w); zeros stay zeros."""
    return F.normalize(_MeanSquare.apply(x, (1,)).flatten(1), dim=1)


def _distances(x: Tensor) -> Tensor:
    """Return the Euclidean distances of (B, c) vectors relative to their mean, shape (B, B)."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # exact, where they are small too
    mean = distances.sum() / max(len(x) * (len(x) - 1), 1)
    return distances / mean.clamp_min(torch.finfo(x.dtype).eps)


def _angles(x: Tensor) -> Tensor:
    """Return the cosines of the angles that all pairs of (B, c) vectors span at each, shape (B, B, B)."""
    differences = x - x[:, None]
    # Vectors as good as equal span no angle, and its gradient would have no bound
    differences = unit(differences, 2, 1e-4 * differences.detach().norm(dim=2).mean())
    return differences @ differences.transpose(1, 2)
