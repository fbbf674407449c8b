# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""A linear head on a network's frozen features: where it goes, and how it is fitted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.nn.distillation.taps import is_channels_last

__all__ = ("STRENGTHS", "FittedHead", "ProbedNetwork", "find_head", "fit_head", "part_of", "put_head")

STRENGTHS = tuple(10.0**k for k in range(-4, 1))  # of which one is chosen: scikit-learn's C, small is strongly regular
FOLDS = 3
MOST_STEPS = 500  # of the solver
ANSWERS = (
    torch.clone,
    partial(torch.softmax, dim=1),
    partial(torch.log_softmax, dim=1),
    torch.sigmoid,
)  # that networks make of logits
BLANK = -1.0, 4.0  # logits of a head without weights, from which one sees what the network makes of logits
UNSEEN = 10.0  # by how much a class without images is less likely than any other, in logits


class FittedHead(NamedTuple):
    """A linear head.

    Attributes:
        weight (Tensor): Weights of shape (C, d), float32.
        bias (Tensor): Biases of shape (C,), float32.
        strength (float): scikit-learn's C, chosen by cross-validation.
        accuracy (float | None): Fraction of the images held out that it then named correctly; None where each class has
            too few images to hold any out.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    accuracy: float | None


class ProbedNetwork(nn.Module):
    """A network whose answer is taken for features, with a linear head behind it."""

    def __init__(self, network: nn.Module, features: int, classes: int):
        """Put a head without weights behind a network."""
        super().__init__()
        self.network = network
        self.head = _blank(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (B, classes)."""
        return self.head(pooled(self.network(images)))


def part_of(answer: Any) -> Any:
    """Return of an answer in several parts the first, and of several maps the last, which has seen most."""
    if not isinstance(answer, (tuple, list)) or not answer:
        return answer
    maps = all(isinstance(part, Tensor) and part.ndim == 4 for part in answer)
    return answer[-1 if maps else 0]


def pooled(answer: Any) -> Tensor:
    """Return features of shape (B, d): what counts of a network's answer, averaged over positions or tokens.

    Raises:
        TypeError: If it is no tensor of 2 to 4 dimensions.
    """
    answer = part_of(answer)
    answer = getattr(answer, "logits", answer)
    if not isinstance(answer, Tensor) or not 2 <= answer.ndim <= 4:
        raise TypeError(f"an answer of type {type(answer).__name__} holds no features")
    if answer.ndim == 4 and is_channels_last(answer.shape):
        answer = answer.flatten(1, 2)
    return answer.mean({3: (1,), 4: (2, 3)}[answer.ndim]) if answer.ndim > 2 else answer


def find_head(network: nn.Module, ask: Callable[[], Any]) -> tuple[str, int]:
    """Find the linear layer that makes a network's answer.

    Args:
        network (nn.Module): The network.
        ask (Callable): Lets it answer some images, and returns what it says.

    Returns:
        name (str): Dotted name of the layer; "" if no linear layer makes the answer, which is then features itself.
        features (int): Width of its input, or of the answer.

    Raises:
        TypeError: If the answer holds no features.
    """
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        answer = ask()
    finally:
        for handle in handles:
            handle.remove()
    for name, output in reversed(seen.items()):
        is_like = isinstance(answer, Tensor) and output.ndim == 2 and output.shape == answer.shape
        if is_like and any(torch.allclose(said(output), answer) for said in ANSWERS):
            return name, network.get_submodule(name).in_features
    return "", pooled(answer).shape[1]


def put_head(network: nn.Module, name: str, features: int, classes: int) -> nn.Module:
    """Return a network with a new head without weights, in the place that `find_head` found."""
    if not name:
        return ProbedNetwork(network, features, classes)
    network.set_submodule(name, _blank(features, classes))
    return network


def _blank(features: int, classes: int) -> nn.Linear:
    """Return a linear layer without weights but a bias, that draws nothing from the random stream."""
    layer = nn.utils.skip_init(nn.Linear, features, classes).requires_grad_(False)
    layer.weight.zero_(), layer.bias.copy_(torch.linspace(*BLANK, classes))
    return layer


def fit_head(
    features: np.ndarray,
    labels: np.ndarray,
    images: np.ndarray,
    classes: int,
    on_step: Callable[[], Any] = lambda: None,
) -> FittedHead:
    """Fit multinomial logistic regression on standardized features.

    The strength of its L2 regularisation is the one of `STRENGTHS` with the least log-loss in cross-validation: each
    third of a class's images is named by a head that was fitted on the others, all views of an image on one side.

    Args:
        features (np.ndarray): Features of shape (N, d).
        labels (np.ndarray): Class indices of shape (N,).
        images (np.ndarray): Which image each row is a view of, (N,).
        classes (int): Number of classes, at least 2. One without images gets logits below all others.
        on_step (Callable): Called after each strength that was tried.

    Returns:
        (FittedHead): The head, for features as they are.

    Raises:
        ValueError: If fewer than two classes have images.
    """
    # Not at import: only who fits a head waits for these
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def regression(strength: float):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=MOST_STEPS))

    if len(np.unique(labels)) < 2:
        raise ValueError(
            "A head tells classes apart, but only one has training images that are used. Give more of them, e.g. with "
            "another 'fraction'."
        )
    features = np.asarray(features, np.float64)
    folds = _folds(labels, images)
    strength, accuracy, least = STRENGTHS[len(STRENGTHS) // 2], None, np.inf
    for tried in STRENGTHS:
        said = []  # of each row that was held out: the probability of its class, and whether that is the largest
        for fold in set(folds[folds >= 0]):
            held_out = folds == fold
            fitted = regression(tried).fit(features[~held_out], labels[~held_out])
            own = np.searchsorted(fitted.classes_, labels[held_out])[:, None]
            p = fitted.predict_proba(features[held_out])
            said.append(np.stack([np.take_along_axis(p, own, 1)[:, 0], p.argmax(1) == own[:, 0]]))
        if said:
            probability, right = np.concatenate(said, 1)
            if (loss := -np.log(probability.clip(1e-12)).mean()) < least:
                least, strength, accuracy = loss, tried, float(right.mean())
        on_step()
    scaler, fitted = (step for _, step in regression(strength).fit(features, labels).steps)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # of two classes only the difference is fitted
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    every = np.zeros((classes, features.shape[1])), np.full(classes, (features @ weight.T + bias).min() - UNSEEN)
    for whole, part in zip(every, (weight, bias), strict=True):
        whole[fitted.classes_] = part
    return FittedHead(*(torch.from_numpy(x).float() for x in every), strength, accuracy)


def _folds(labels: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return which part holds a row out, -1 for none: each class's images in turn, if it has one for each part."""
    _, first, row = np.unique(images, return_index=True, return_inverse=True)
    folds = np.full(len(first), -1)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels[first] == label)
        if len(members) >= FOLDS:
            folds[members] = np.arange(len(members)) % FOLDS
    return folds[row]
