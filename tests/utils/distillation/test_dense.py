"""The losses between dense heads, each against an evaluation of its formula in NumPy that shares no code with it."""

import numpy as np
import pytest
import torch
from helpers import Waiting
from ultralytics.cfg.distillation.arguments import DENSE_LOSSES
from ultralytics.utils.distillation import dense
from ultralytics.utils.distillation.dense import TERMS, DenseDistillationLoss

B, C, A, R, M, K, SIDE = 2, 3, 20, 8, 4, 5, 16  # SIDE of the prototypes; the image is four times as large
KINDS = ("straight", "oriented")


def answer(seed, oriented=False, size=1.0, dtype=torch.float64):
    """What a head says of random boxes inside an image, with a graph."""
    draw = np.random.default_rng(seed)
    center, extent = draw.uniform(10, 54, (B, A, 2)), draw.uniform(4, 30, (B, A, 2))
    center[:, : A // 3] = center[:, A // 3 : 2 * (A // 3)] + 0.1  # some are of one object
    extent[:, : A // 3] = extent[:, A // 3 : 2 * (A // 3)]
    boxes = np.concatenate([center - extent / 2, center + extent / 2], 2)
    if oriented:
        boxes = np.concatenate([center, extent, draw.uniform(-0.7, 2.3, (B, A, 1))], 2)
    said = {
        "scores": size * draw.normal(-1, 2, (B, C, A)),
        "boxes": boxes,
        "bins": size * draw.normal(0, 2, (B, 4, R, A)),
        "coefficients": size * draw.normal(0, 1, (B, M, A)),
        "prototypes": draw.normal(0, 1, (B, M, SIDE, SIDE)),
        "keypoints": np.concatenate([draw.uniform(0, 64, (B, A, K, 2)), size * draw.normal(0, 2, (B, A, K, 1))], 3),
    }
    said = {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in said.items()}
    return {**said, "image": torch.tensor([[64.0, 64.0]], dtype=dtype).expand(B, 2)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def coin(p, q):
    """KL divergence of two coins."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def numpy_of(said):
    return {k: v.detach().numpy() for k, v in said.items()}


def confidence_of(teacher):
    return sigmoid(teacher["scores"]).max(1)


def weighted(losses, confidence):
    return (losses * confidence).sum() / max(confidence.sum(), 1)


def expected_response(student, teacher, beta=1.0):
    p, q = sigmoid(teacher["scores"]), sigmoid(student["scores"])
    total = sum(abs(p[i] - q[i]) ** beta * coin(p[i], q[i]) for i in np.ndindex(p.shape))
    return total / max(confidence_of(teacher).sum(), 1)


def expected_box(student, teacher):
    losses = np.zeros((B, A))
    for i in np.ndindex(B, A):
        a, b = student["boxes"][i], teacher["boxes"][i]
        areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
        overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        union = sum(areas) - overlap
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        losses[i] = 1 - (overlap / union - (hull - union) / hull)
    return weighted(losses, confidence_of(teacher))


def expected_oriented(student, teacher):
    """The Hellinger distance by matrices, as of any two normal distributions."""
    losses = np.zeros((B, A))
    for i in np.ndindex(B, A):
        means, covariances = [], []
        for said in (student, teacher):
            x, y, w, h, angle = said["boxes"][i]
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            means.append(np.array([x, y]))
            covariances.append(turn @ np.diag([w**2 / 12, h**2 / 12]) @ turn.T)
        middle, apart = (covariances[0] + covariances[1]) / 2, means[0] - means[1]
        distance = apart @ np.linalg.inv(middle) @ apart / 8
        distance += np.log(np.linalg.det(middle) / np.sqrt(np.prod([np.linalg.det(x) for x in covariances]))) / 2
        losses[i] = np.sqrt(1 - np.exp(-distance))
    return weighted(losses, confidence_of(teacher))


def expected_dfl(student, teacher, temperature):
    losses = np.zeros((B, A))
    for b, side, a in np.ndindex(B, 4, A):
        p, q = (np.exp(x["bins"][b, side, :, a] / temperature) for x in (teacher, student))
        p, q = p / p.sum(), q / q.sum()
        losses[b, a] += temperature**2 * (p * np.log(p / q)).sum() / 4
    return weighted(losses, confidence_of(teacher))


def chosen(confidence, boxes):
    """The most confident anchors of each image, but for those whose box is nearly that of a more confident one."""
    images = []
    for row, own in zip(confidence, boxes, strict=True):
        kept, order = [], np.argsort(-row)
        for n, a in enumerate(order):
            if all(iou(own[a], own[other]) <= 0.7 for other in order[:n]):
                kept.append(a)
        assert 8 < len(kept) < 16  # of the 20 that there are
        images.append(kept)
    return images


def iou(a, b):
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return overlap / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - overlap)


def expected_mask(student, teacher):
    confidence, total, count = confidence_of(teacher), 0.0, 0.0
    for b, anchors in enumerate(chosen(confidence, teacher["boxes"])):
        for a in anchors:
            p, q = (
                sigmoid(np.tensordot(x["coefficients"][b, :, a], x["prototypes"][b], 1)) for x in (teacher, student)
            )
            x1, y1, x2, y2 = teacher["boxes"][b, a]
            inside = [
                coin(p[y, x], q[y, x]) for y, x in np.ndindex(p.shape) if x1 < 4 * x + 2 < x2 and y1 < 4 * y + 2 < y2
            ]
            total += confidence[b, a] * np.mean(inside)
            count += confidence[b, a]
    return total / max(count, 1)


def expected_keypoint(student, teacher):
    confidence, total, count = confidence_of(teacher), 0.0, 0.0
    for b, anchors in enumerate(chosen(confidence, teacher["boxes"])):
        for a in anchors:
            s, t = student["keypoints"][b, a], teacher["keypoints"][b, a]
            x1, y1, x2, y2 = teacher["boxes"][b, a]
            visible = sigmoid(t[:, 2]) if t.shape[1] == 3 else np.ones(K)
            apart = ((s[:, :2] - t[:, :2]) ** 2).sum(1) / max((x2 - x1) * (y2 - y1), 1)
            total += confidence[b, a] * (visible * apart).sum() / visible.sum()
            count += confidence[b, a]
    return total / max(count, 1)


def build(*names, response="bckd", temperature=2.0, **settings):
    return DenseDistillationLoss(
        [],
        [],
        terms=dict.fromkeys(names),
        response_distill=response is not None,
        response_method=response or "bckd",
        feature_distill=False,
        attention_distill=False,
        temperature=temperature,
        **settings,
    )


def losses_of(loss, student, teacher, **known):
    return loss.losses({"one2many": student}, {"one2many": teacher}, **known)


@pytest.mark.parametrize(
    ("name", "oriented", "expected"),
    [
        ("response_loss", False, expected_response),
        ("box_distill_loss", False, expected_box),
        ("box_distill_loss", True, expected_oriented),
        ("dfl_distill_loss", False, lambda s, t: expected_dfl(s, t, 2.0)),
        ("mask_distill_loss", False, expected_mask),
        ("keypoint_distill_loss", False, expected_keypoint),
    ],
)
def test_each_loss_is_its_formula(name, oriented, expected):
    student, teacher = answer(0, oriented), answer(1, oriented)
    loss = build(*([] if name == "response_loss" else [name.removesuffix("_distill_loss")]))
    value = losses_of(loss, student, teacher)[name]
    assert value.item() == pytest.approx(expected(numpy_of(student), numpy_of(teacher)), rel=1e-5)
    value.backward()
    assert all(x.grad is None for x in teacher.values())
    assert sum(x.grad is not None for x in student.values()) >= 1


def test_points_of_two_values_are_all_visible_and_boxes_of_less_than_a_pixel_have_one():
    student, teacher = answer(0), answer(1)
    for said in (student, teacher):
        said["keypoints"] = said["keypoints"].detach()[..., :2].requires_grad_()
    with torch.no_grad():
        teacher["boxes"][:, 12:, 2:] = teacher["boxes"][:, 12:, :2] + 0.5
    value = losses_of(build("keypoint"), student, teacher)["keypoint_distill_loss"]
    assert value.item() == pytest.approx(expected_keypoint(numpy_of(student), numpy_of(teacher)), rel=1e-5)
    value.backward()
    assert student["keypoints"].grad.any()


@pytest.mark.parametrize("oriented", [False, True])
def test_the_host_waits_for_nothing(oriented):
    student, teacher = answer(0, oriented), answer(1, oriented)
    loss = build(*([*TERMS][:2] if oriented else TERMS))
    with Waiting() as waiting:
        losses = losses_of(loss, student, teacher, unknown=torch.zeros(B, A, dtype=torch.bool))
        torch.stack([*losses.values()]).sum().backward()
    assert waiting.operators == []
    with Waiting() as waiting:
        losses["response_loss"].item()
    assert waiting.operators == ["_local_scalar_dense"]


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_how_much_more_count_the_anchors_on_which_they_differ(beta):
    student, teacher = answer(0), answer(1)
    value = losses_of(build(response={"bckd": {"beta": beta}}), student, teacher)["response_loss"]
    assert value.item() == pytest.approx(expected_response(numpy_of(student), numpy_of(teacher), beta), rel=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("oriented", [False, True])
def test_the_same_answer_costs_nothing(oriented, size):
    student = answer(0, oriented, size, torch.float32)
    teacher = {k: v.detach() for k, v in student.items()}
    losses = losses_of(build(*([*TERMS][:2] if oriented else TERMS)), student, teacher)
    assert all(abs(x.item()) < 1e-4 for x in losses.values())


@pytest.mark.parametrize("oriented", [False, True])
def test_extremes_are_finite_and_so_are_their_gradients(oriented):
    student, teacher = answer(0, oriented, -1e4, torch.float32), answer(1, oriented, 1e4, torch.float32)
    with torch.no_grad():
        student["boxes"][0, :3], teacher["boxes"][0, 2:5] = 0, 0  # nothing, and nothing on both sides
        student["boxes"][1, 0, :4] = torch.tensor([-1e5, -1e5, 1e5, 1e5])
        student["boxes"][1, 1, :4] = torch.tensor([60.0, 60, 3, 3])  # corners the wrong way round
    losses = losses_of(build(*([*TERMS][:2] if oriented else TERMS)), student, teacher)
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    assert all(x.grad is None or x.grad.isfinite().all() for x in student.values())


def test_thin_oriented_boxes_are_compared_without_cancellation():
    """A covariance of numbers of a million hides a width of one pixel; in single precision the two must be equal."""
    box = torch.tensor([[[300.0, 300.0, 900.0, 1.0, 0.785]]])
    other = torch.tensor([[[300.0, 300.0, 900.0, 1.0, 0.795]]])
    assert dense.probiou_loss(box, box).item() == pytest.approx(0, abs=1e-4)
    student, teacher = ({"boxes": x.double().numpy().repeat(B, 0).repeat(A, 1)} for x in (box, other))
    teacher["scores"] = np.zeros((B, C, A))
    assert dense.probiou_loss(box, other).item() == pytest.approx(expected_oriented(student, teacher), rel=1e-2)


def test_an_oriented_box_is_the_same_after_a_quarter_turn_with_its_sides_exchanged():
    a = torch.tensor([30.0, 30.0, 20.0, 8.0, 0.3])
    b = torch.tensor([30.0, 30.0, 8.0, 20.0, 0.3 + np.pi / 2])
    assert dense.probiou_loss(a, b).item() == pytest.approx(0, abs=1e-3)


def test_where_the_teacher_is_to_be_ignored_nothing_is_compared():
    student, teacher = answer(0), answer(1)
    unknown = torch.zeros(B, A, dtype=torch.bool)
    unknown[0, 5:] = True
    sums = losses_of(build("box", "dfl"), student, teacher, unknown=unknown)
    changed = {**teacher, "scores": teacher["scores"].detach().clone()}
    changed["scores"][0, :, 5:] = 9.0
    again = losses_of(build("box", "dfl"), student, changed, unknown=unknown)
    assert {k: v.item() for k, v in again.items()} == pytest.approx({k: v.item() for k, v in sums.items()})
    sum(again.values()).backward()
    assert student["scores"].grad[0, :, 5:].count_nonzero() == 0
    assert student["scores"].grad[0, :, :5].count_nonzero() > 0
    assert student["bins"].grad[0, ..., 5:].count_nonzero() == 0


def test_branches_are_compared_with_their_like_and_count_each():
    loss = build("box")
    pairs = {"one2many": (answer(0), answer(1)), "one2one": (answer(2), answer(3))}
    each = [losses_of(loss, *pair) for pair in pairs.values()]
    both = loss.losses(*({k: pair[i] for k, pair in pairs.items()} for i in (0, 1)))
    for name, value in both.items():
        assert value.item() == pytest.approx(sum(x[name].item() for x in each), rel=1e-6)
    alone = loss.losses({k: s for k, (s, _) in pairs.items()}, {"one2one": pairs["one2one"][1]})
    assert alone["box_distill_loss"].item() == pytest.approx(each[1]["box_distill_loss"].item())


def test_a_teacher_that_is_sure_of_nothing_teaches_next_to_nothing():
    student, teacher = answer(0), answer(1)
    teacher["scores"] = torch.full((B, C, A), -12.0, dtype=torch.float64)
    losses = losses_of(build(*TERMS, response=None), student, teacher)
    assert all(0 <= x.item() < 0.02 for x in losses.values())


@pytest.mark.parametrize(("given", "weight"), [(None, 1.0), (3.0, 3.0)])
def test_weights(given, weight):
    assert build(response=None).weights == {}
    loss = DenseDistillationLoss(
        [],
        [],
        {"mask": given, "dfl": 0.0},
        feature_distill=False,
        attention_distill=False,
        response_method="bckd",
    )
    assert loss.weights == {"response_loss": 1.0, "mask_distill_loss": weight}
    total, items = loss({"one2many": answer(0)}, {"one2many": answer(1)})
    assert total.item() == pytest.approx(items["response_loss"].item() + weight * items["mask_distill_loss"].item())
    assert not any(x.requires_grad for x in items.values())


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({}, 1.0),
        ({"feature_method": "cwd"}, 2.0),
        ({"feature_method": {"mse": 0.5}}, 0.5),
        ({"feature_weight": 1.0}, 1.0),
        ({"balanced": True}, 1.0),
    ],
)
def test_maps_weigh_less_beside_a_loss_that_is_multiplied_by_the_batch_size(given, weight):
    loss = DenseDistillationLoss([4], [8], {}, response_distill=False, attention_distill=False, **given)
    assert loss.weights == {"feature_loss": pytest.approx(weight)}


def test_the_arguments_name_the_losses():
    assert tuple(TERMS) == DENSE_LOSSES


def test_which_losses_the_temperature_softens():
    loss = build("box", "dfl", temperature=3.0)
    assert [loss.temperature_of(name) for name in loss.weights] == [None, None, 3.0]


def test_prototypes_of_unequal_size_are_pooled_to_the_smaller():
    student, teacher = answer(0), answer(1)
    finer = {**teacher, "prototypes": teacher["prototypes"].detach().repeat_interleave(2, 2).repeat_interleave(2, 3)}
    loss = build("mask", response=None)
    value, expected = (losses_of(loss, student, x)["mask_distill_loss"].item() for x in (finer, teacher))
    assert value == pytest.approx(expected)


def test_of_many_anchors_on_an_object_one_is_chosen():
    """Of the more confident object all its anchors would be taken, and the other one overlooked."""
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0]] * 40 + [[30.0, 30.0, 50.0, 60.0]] + [[70.0, 0.0, 71.0, 1.0]] * 20)[
        None
    ]
    confidence = torch.cat([torch.linspace(0.9, 0.8, 40), torch.tensor([0.6]), torch.linspace(0.02, 0.01, 20)])[None]
    weights, anchors = dense.most_confident(confidence, boxes)
    assert anchors[0, :3].tolist() == [0, 40, 41]
    assert weights[0].tolist() == pytest.approx([0.9, 0.6, 0.02] + [0.0] * 13)


def test_no_more_objects_are_compared_than_an_image_has_room_for():
    corner = 10.0 * torch.arange(100)
    boxes = torch.stack([corner, corner, corner + 5, corner + 5], 1)[None]
    weights, anchors = dense.most_confident(torch.linspace(0, 1, 100)[None], boxes)
    assert anchors[0].tolist() == list(range(99, 83, -1))
    assert (weights > 0.8).all()
