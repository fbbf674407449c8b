"""Teachers that get a head: the file of both opens by itself, and answers as the network did that it was saved from."""

import pytest
import teachers
import timm
import torch
import torchvision
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.distillation.classifier import ClassificationTeacher
from ultralytics.nn.distillation.sources.probed import PROBE
from ultralytics.nn.tasks import ClassificationModel

CLASSES = ["cat", "dog", "cow"]


class Backbone(nn.Module):
    """A network in Python that answers maps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def squeezenet(folder, teacher):
    """Its head is a convolution, so it is taken for features as a whole."""
    torch.save(torchvision.models.squeezenet1_1(num_classes=1000).state_dict(), folder / "w.pth")
    return f"torchvision:squeezenet1_1@{folder / 'w.pth'}"


def fitted(source, folder, imgsz=64):
    """Return a teacher with a head of random weights, as it becomes."""
    given = source if isinstance(source, dict) else {"teacher": source}
    own = ClassificationTeacher(given["teacher"], imgsz=given.get("teacher_imgsz"), fused=False)
    own.grow_head(CLASSES, imgsz, 3)
    assert own.waits_for_head
    own.vet(imgsz, 3)
    torch.manual_seed(1)
    own.wear_head(torch.randn(own._linear.weight.shape), torch.randn(3))
    own.save(folder / "probe.pt")
    own.become(folder / "probe.pt")
    assert not own.waits_for_head
    return own


@pytest.mark.parametrize(
    "source",
    [
        *(teachers.ultralytics, teachers.torchvision_file, teachers.timm_safetensors),
        *(teachers.timm_convnext, teachers.timm_vit, squeezenet),
    ],
    ids=lambda f: f.__name__,
)
def test_the_file_is_the_teacher(source, teacher, tmp_path):
    given = source(tmp_path, teacher)
    own = fitted(given, tmp_path)
    opened = ClassificationTeacher(str(tmp_path / "probe.pt"))
    opened.vet(64, 3)
    assert opened.names == own.names == CLASSES
    assert opened.backbone == own.backbone
    assert (opened.content_hash, opened.source) == (own.content_hash, own.source)
    assert (opened.imgsz, opened.channels, opened.normalization) == (own.imgsz, own.channels, own.normalization)
    images = torch.rand(4, 3, 64, 64)
    (logits, _), (expected, _) = opened(images), own(images)
    assert torch.equal(logits, expected)
    assert logits.shape == (4, 3)
    assert logits.std() > 0
    features = own.features(images)
    torch.testing.assert_close(features @ own._linear.weight.T + own._linear.bias, expected)
    assert list(opened.find_levels(64, 3)) == list(own.find_levels(64, 3)) != []
    assert own.title == opened.title
    assert "fitted head" in own.title


def test_ultralytics_opens_it_as_its_own(teacher, tmp_path):
    own = fitted(str(teacher), tmp_path)
    model = YOLO(tmp_path / "probe.pt")
    assert (model.task, model.names) == ("classify", dict(enumerate(CLASSES)))
    assert isinstance(own.model, ClassificationModel)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.model.eval()(images)[1], own(images)[0], rtol=1e-3, atol=1e-4)  # which is fused
    assert own.head(list(own.find_levels(64, 3).values())[-1]) is not None


def test_a_network_in_python_has_to_be_given_again(tmp_path):
    network = teachers.seen(Backbone())
    own = fitted(network, tmp_path)
    with pytest.raises(TypeError, match=r"given in Python.*'teacher=network' with 'teacher_probe=.*probe.pt'"):
        ClassificationTeacher(str(tmp_path / "probe.pt"))
    again = ClassificationTeacher(network, fused=False)
    again.grow_head(CLASSES, 64, 3)
    again.take_head(tmp_path / "probe.pt")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(images)[0], own(images)[0])


def test_a_timm_network_that_timm_would_not_build_alike(tmp_path):
    """The library's name opens what was built by it with its own arguments, and nothing else."""
    for given, opens in (({}, True), ({"act_layer": nn.Hardswish}, False)):
        fitted(teachers.seen(timm.create_model("resnet18", num_classes=7, **given)), tmp_path)
        if opens:
            assert ClassificationTeacher(str(tmp_path / "probe.pt")).names == CLASSES
        else:
            with pytest.raises(TypeError, match="given in Python"):
                ClassificationTeacher(str(tmp_path / "probe.pt"))


def test_a_head_of_something_else_is_refused(teacher, tmp_path):
    own = fitted(str(teacher), tmp_path)
    other = ClassificationTeacher(str(teacher), fused=False)
    other.grow_head(["a", "b"], 64, 3)
    with pytest.raises(ValueError, match=r"knows the classes \('cat'.*dataset has \('a', 'b'\)"):
        other.take_head(own.source)
    network = ClassificationTeacher(teachers.seen(Backbone()), fused=False)
    network.grow_head(CLASSES, 64, 3)
    with pytest.raises(ValueError, match="another network"):
        network.take_head(own.source)
    with pytest.raises(TypeError, match="holds no fitted head"):
        network.take_head(teacher)
    with pytest.raises(FileNotFoundError):
        network.take_head(tmp_path / "none.pt")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda known: known.pop("backbone"),
        lambda known: known.update(std=[0.0]),
        lambda known: known.update(imgsz="64"),
        lambda known: known.update(features=7),
        lambda known: known.update(network="timm:resnet19"),
        lambda known: known.pop("layer"),
    ],
    ids=["backbone", "std", "imgsz", "features", "network", "layer"],
)
def test_a_damaged_file_is_refused(spoil, teacher, tmp_path):
    fitted(teachers.timm_safetensors(tmp_path, teacher), tmp_path)
    content = torch.load(tmp_path / "probe.pt", weights_only=True)
    spoil(content[PROBE])
    torch.save(content, tmp_path / "probe.pt")
    with pytest.raises(TypeError, match=r"damaged|does not fit|given in Python"):
        ClassificationTeacher(str(tmp_path / "probe.pt"))


def test_an_exported_file_has_no_features(teacher, tmp_path):
    own = ClassificationTeacher(teachers.onnx(tmp_path, teacher), fused=False)
    with pytest.raises(ValueError, match=r"'teacher_probe=True' needs the features.*checkpoint that it was exported"):
        own.grow_head(CLASSES, 32, 3)
