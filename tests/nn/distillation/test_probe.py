"""Where a linear head goes, and how it is fitted: against scikit-learn's own predictions and in closed form."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from ultralytics.nn.distillation.probe import (
    FOLDS,
    STRENGTHS,
    UNSEEN,
    ProbedNetwork,
    find_head,
    fit_head,
    pooled,
    put_head,
)


def clusters(classes=3, images=30, views=2, spread=1.0, width=5):
    """Return features of images in views, around a point for each class, in units that differ by feature."""
    draw = np.random.default_rng(0)
    labels = np.tile(np.repeat(np.arange(classes), images), views)
    features = 3 * draw.normal(size=(classes, width))[labels] + spread * draw.normal(size=(len(labels), width))
    index = np.tile(np.arange(classes * images), views)
    return features * np.logspace(-3, 3, width) + 100, labels, index


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_is_scikit_learns_on_standardized_features(classes):
    features, labels, index = clusters(classes)
    steps = []
    head = fit_head(features, labels, index, classes, lambda: steps.append(1))
    assert (head.weight.shape, head.bias.shape, head.weight.dtype) == ((classes, 5), (classes,), torch.float32)
    z = (features - features.mean(0)) / features.std(0)
    expected = LogisticRegression(C=head.strength, max_iter=5000, tol=1e-8).fit(z, labels).predict_proba(z)
    found = (torch.from_numpy(features) @ head.weight.double().T + head.bias.double()).softmax(1)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)
    assert head.accuracy > 0.9
    assert len(steps) == len(STRENGTHS)


def test_noise_is_fitted_less_than_what_can_be_told():
    features, labels, index = clusters(spread=0.5)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert fit_head(features, shuffled, index, 3).strength == STRENGTHS[0]
    assert fit_head(features, labels, index, 3).strength > STRENGTHS[0]


def test_views_of_an_image_are_on_one_side():
    """Each image has a feature of its own, and its class is a coin's: a head that saw its other view would know it."""
    draw = np.random.default_rng(0)
    images = 62
    labels, index = np.tile(draw.permutation(np.repeat([0, 1], images // 2)), 4), np.tile(np.arange(images), 4)
    features = np.eye(images)[index] + 0.01 * draw.normal(size=(4 * images, images))
    assert fit_head(features, labels, index, 2).accuracy < 0.65
    assert fit_head(features, labels, np.arange(4 * images), 2).accuracy == 1  # were they other images


def test_a_class_without_images_is_less_likely_than_any_other():
    features, labels, index = clusters()
    head = fit_head(features, np.where(labels == 1, 3, labels), index, 5)
    logits = torch.from_numpy(features).float() @ head.weight.T + head.bias
    seen = logits[:, [0, 2, 3]]
    assert logits[:, [1, 4]].max().item() == pytest.approx(seen.min().item() - UNSEEN, abs=0.1)
    assert set(logits.argmax(1).tolist()) == {0, 2, 3}


def test_a_rare_class_does_not_keep_the_others_from_being_held_out():
    features, labels, index = clusters(spread=0.5)
    kept = (labels != 2) | (index < 62)  # two images of the last class
    head = fit_head(features[kept], labels[kept], index[kept], 3)
    assert head.accuracy > 0.9
    assert head.strength > STRENGTHS[0]


@pytest.mark.parametrize(("few", "held_out"), [(FOLDS - 1, False), (FOLDS, True)])
def test_classes_of_few_images_are_never_held_out(few, held_out):
    features, labels, index = clusters(images=few, views=1)
    head = fit_head(features, labels, index, 3)
    assert (head.accuracy is not None) == held_out
    assert held_out or head.strength == STRENGTHS[len(STRENGTHS) // 2]


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="class"):
        fit_head(np.ones((9, 2)), np.zeros(9, int), np.arange(9), 2)


class Averaged(nn.Module):
    """Two heads, of which neither makes the answer."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def forward(self, x):
        x = x.mean((2, 3)).repeat(1, 4)[:, :8]
        return (self.heads[0](x) + self.heads[1](x)) / 2


class Answers(nn.Module):
    """A backbone without a head, that answers what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def stem(*head):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


@pytest.mark.parametrize(
    ("network", "name", "features"),
    [
        (lambda: stem(nn.Linear(8, 6)), "3", 8),
        (lambda: stem(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "5", 8),  # two of one shape
        (lambda: stem(nn.Linear(8, 6), nn.Softmax(1)), "3", 8),
        (lambda: stem(nn.Linear(8, 6), nn.LogSoftmax(1)), "3", 8),
        (lambda: stem(nn.Linear(8, 6), nn.Sigmoid()), "3", 8),
        (lambda: stem(nn.Linear(8, 6), nn.LayerNorm(6)), "", 6),
        (Averaged, "", 4),
        (stem, "", 8),
        (lambda: Answers(lambda x: x[:, :, ::4, ::4]), "", 3),
        (lambda: Answers(lambda x: x.permute(0, 2, 3, 1)), "", 3),
        (lambda: Answers(lambda x: [x, x.repeat(1, 2, 1, 1)[:, :, ::2, ::2]]), "", 6),
        (lambda: Answers(lambda x: (x.flatten(2).transpose(1, 2), None)), "", 3),
    ],
    ids=[
        *("linear", "two", "softmax", "logarithms", "sigmoid", "norm", "averaged", "features"),
        *("maps", "maps with channels last", "maps of two levels", "tokens in a tuple"),
    ],
)
def test_the_head_takes_the_place_of_what_makes_the_answer(network, name, features):
    network = network().eval()
    x = torch.rand(2, 3, 16, 16)
    assert find_head(network, lambda: network(x)) == (name, features)
    before = torch.get_rng_state()
    put = put_head(network, name, features, 11)
    assert torch.equal(torch.get_rng_state(), before)  # of plain training
    assert isinstance(put, ProbedNetwork) == (not name)
    assert all(not module._forward_hooks for module in put.modules())
    linear = put.get_submodule(name or "head")
    behind = [x for x in network.children() if isinstance(x, (nn.Softmax, nn.LogSoftmax, nn.Sigmoid))]
    said = nn.Sequential(*behind)(linear.bias[None])  # as it has no weights yet
    torch.testing.assert_close(put(x), said.expand(2, 11))
    nn.init.normal_(linear.weight)
    seen = []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    answer = put(x)
    assert answer.shape == (2, 11)
    if not name:
        torch.testing.assert_close(seen[0], pooled(network(x)))


def test_maps_are_averaged_over_positions_in_either_format():
    maps = torch.rand(2, 5, 4, 4)
    for answer in (maps, maps.permute(0, 2, 3, 1), [torch.rand(2, 3, 8, 8), maps], (maps.mean((2, 3)), maps)):
        torch.testing.assert_close(pooled(answer), maps.mean((2, 3)))


@pytest.mark.parametrize("answer", [{"boxes": 1}, torch.zeros(3), []], ids=["dict", "vector", "nothing"])
def test_what_holds_no_features_is_refused(answer):
    with pytest.raises(TypeError, match="no features"):
        find_head(nn.Identity(), lambda: answer)
