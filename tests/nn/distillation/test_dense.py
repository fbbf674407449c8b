"""Heads of anchors: what is read in them is what upstream decodes, in training and in eval form, of every family."""

import copy

import pytest
import torch
from ultralytics.nn.distillation.dense import DenseHead, DenseTeacher, DenseTeachers
from ultralytics.nn.distillation.sources import Expected, Source
from ultralytics.nn.tasks import (
    DetectionModel,
    OBBModel,
    PoseModel,
    RTDETRDetectionModel,
    SegmentationModel,
    WorldModel,
)
from ultralytics.utils.ops import xyxy2xywh

MODELS = {"": DetectionModel, "-seg": SegmentationModel, "-pose": PoseModel, "-obb": OBBModel}
FAMILIES = ("v8", "11", "12", "26")
CLASSES = 3
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


class Detector(DenseTeacher):
    """A trained detector, frozen."""

    expected = Expected("detect", DetectionModel, "yolo11l.pt")


def network(family, suffix="", seed=0):
    """A network with weights that say something, as those of a new head all say the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[suffix](f"yolo{family}n{suffix}.yaml", nc=CLASSES, verbose=False)
        for name, parameter in model.named_parameters():
            if "dfl" not in name:
                parameter.data += 0.02 * torch.randn_like(parameter)
    model.names = {0: "cat", 1: "dog", 2: "bird"}
    return model.eval()


def teachers(*names, family="11"):
    """A teacher that is asked by a run whose dataset has these classes."""
    joined = DenseTeachers([Detector(Source("teacher.pt", network(family), ["cat", "dog", "bird"]))])
    return joined, joined.align(names)


@pytest.mark.parametrize("suffix", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_upstream_decodes(family, suffix):
    model = network(family, suffix)
    head = DenseHead.of(model)
    assert head.strides == (8, 16, 32)
    assert head.branches == (("one2many", "one2one") if family == "26" else ("one2many",))
    assert head.bins == (1 if family == "26" else 16)
    for branch in head.branches:
        module = model.model[-1]
        if family == "26":  # eval mode decodes one branch; before it sorts
            module.end2end = branch == "one2one"
            module.postprocess = lambda x: x.permute(0, 2, 1)
        with torch.no_grad():
            output = model(IMAGES)
        decoded = output[0][0] if isinstance(output[0], tuple) else output[0]
        said = head.read(output)[branch]
        boxes, scores, *others = decoded.split([4, CLASSES, decoded.shape[1] - 4 - CLASSES], 1)
        corners = branch == "one2one" and not head.oriented
        own = said["boxes"][..., :4] if head.oriented or corners else xyxy2xywh(said["boxes"])
        torch.testing.assert_close(own.transpose(1, 2), boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(said["scores"].sigmoid(), scores)
        if head.oriented:
            torch.testing.assert_close(said["boxes"][..., 4:].transpose(1, 2), others[0])
        if head.masks:
            torch.testing.assert_close(said["coefficients"], others[0])
            assert said["prototypes"].shape == (2, 32, 16, 24)
        if head.keypoints:
            visible = said["keypoints"][..., 2:].sigmoid()
            points = torch.cat([said["keypoints"][..., :2], visible], -1).flatten(2).transpose(1, 2)
            torch.testing.assert_close(points, others[0], rtol=1e-4, atol=1e-3)
        assert said["image"].tolist() == [[64, 96]] * 2
        assert head.points(model.train()(IMAGES)).shape == (8 * 12 + 4 * 6 + 2 * 3, 2)
        model.eval()


@pytest.mark.parametrize("suffix", MODELS)
@pytest.mark.parametrize("family", ["11", "26"])
def test_training_and_eval_form_are_read_alike(family, suffix):
    model = network(family, suffix)
    head = DenseHead.of(model)
    with torch.no_grad():
        in_eval = head.read(model(IMAGES))
        model.model[-1].training = True  # the form alone: BatchNorm stays as it is
        in_training = head.read(model(IMAGES))
    for branch, said in in_eval.items():
        assert said.keys() == in_training[branch].keys()
        for name, x in said.items():
            torch.testing.assert_close(in_training[branch][name], x)


@pytest.mark.parametrize("suffix", MODELS)
def test_a_fused_teacher_says_the_same_with_all_its_branches(suffix):
    model = network("26", suffix)
    with torch.no_grad():
        expected = DenseHead.of(model).read(model(IMAGES))
        fused = Detector(Source("teacher.pt", model)).fuse(copy.deepcopy(model))
        output = fused(IMAGES)
    assert isinstance(output, dict)  # nothing was decoded and sorted for no one
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules()) < 10
    said = DenseHead.of(fused).read(output)
    assert said.keys() == {"one2many", "one2one"}
    for branch, answer in expected.items():
        for name, x in answer.items():
            torch.testing.assert_close(said[branch][name], x, rtol=1e-3, atol=2e-3)


def test_heads_that_upstream_fused_have_one_branch_left():
    model = network("26").fuse(verbose=False)
    head = DenseHead.of(model)
    assert head.branches == ("one2many",)
    with torch.no_grad():
        assert head.read(model(IMAGES)).keys() == {"one2many"}


@pytest.mark.parametrize(
    ("model", "file"), [(RTDETRDetectionModel, "rtdetr-l.yaml"), (WorldModel, "yolov8s-world.yaml")]
)
def test_what_has_no_anchors_is_refused(model, file):
    with torch.device("meta"):
        other = model(file, nc=2, verbose=False)
    with pytest.raises(TypeError, match="says nothing of anchors that could be compared"):
        DenseHead.of(other)


@pytest.mark.parametrize(
    ("names", "classes", "columns", "words"),
    [
        (("cat", "dog", "bird"), [0, 1, 2], None, ()),
        (("bird", "cat", "dog"), [0, 1, 2], [2, 0, 1], ("3 of its 3 classes",)),
        (("Dog", "cat"), [0, 1], [1, 0], ("2 of its 3 classes",)),
        (("cow", "dog"), [1], [1], ("1 of its 3 classes", "knows 1 of 2 classes", "'cow'")),
        (("cow", "horse"), [], None, ()),
    ],
)
def test_classes_are_matched_by_name(names, classes, columns, words):
    joined, notes = teachers(*names)
    assert joined.classes == classes
    assert all(any(word in note for note in notes) for word in words)
    assert len(notes) == (0 if not words else 1 if len(words) == 1 else 2)
    assert (joined.known_classes is None) == (len(classes) in {0, len(names)})
    own, _ = joined.first(IMAGES)
    said, _ = joined(IMAGES)
    expected = own["one2many"]["scores"]
    assert torch.equal(said["one2many"]["scores"], expected if columns is None else expected[:, columns])


def test_classes_that_are_not_trained_on_are_not_compared():
    joined, _ = teachers("cat", "cow", "dog")
    notes = joined.align(["cat", "cow", "dog"], [2])
    assert (joined.classes, joined.known_classes.tolist()) == ([2], [2])
    assert len(notes) == 1  # nothing of cows, which are not there
    own, _ = joined.first(IMAGES)
    assert torch.equal(joined(IMAGES)[0]["one2many"]["scores"], own["one2many"]["scores"][:, [1]])
    assert "knows 1 of 2 classes" in joined.align(["cat", "cow", "dog"], [1, 2])[1]


@pytest.mark.parametrize("what", ["nan", "names"])
def test_what_says_no_sense_is_refused(what):
    model = network("11")
    if what == "nan":
        model.model[-1].cv3[0][-1].bias.data[0] = torch.nan
    teacher = Detector(Source("teacher.pt", model, ["cat", "dog"] if what == "names" else None))
    words = {"nan": "gives NaN or infinite predictions", "names": "scores of 3 classes, but has 2 class names"}[what]
    with pytest.raises(ValueError, match=words):
        teacher.vet(64, 3)
