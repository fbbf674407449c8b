"""Teachers that get a head: the file of both opens by itself, and answers as the network did that it was saved from."""

import pytest
import teachers
import timm
import torch
import torchvision
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.distillation.classifier import ClassificationTeacher
from ultralytics.nn.distillation.sources import hash_file
from ultralytics.nn.distillation.sources.probed import PROBE, Head, read_head
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils import LOGGER

CLASSES = ["cat", "dog", "cow"]


class Backbone(nn.Module):
    """A network in Python that answers maps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def squeezenet(folder, teacher):
    """Its head is a convolution, which is left out."""
    torch.save(torchvision.models.squeezenet1_1(num_classes=40).state_dict(), folder / "w.pth")
    return f"torchvision:squeezenet1_1@{folder / 'w.pth'}"


def two_heads(folder, teacher):
    """Neither makes the answer, which is their mean: both are left out."""
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, img_size=64)
    torch.save(network.state_dict(), folder / "w.pth")
    return {"teacher": f"timm:deit_tiny_distilled_patch16_224@{folder / 'w.pth'}", "teacher_imgsz": 64}


def torchvision_headless(folder, teacher):
    """As self-supervised weights are published."""
    state = teachers.seen(torchvision.models.resnet18()).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, folder / "w.pth")
    return f"torchvision:resnet18@{folder / 'w.pth'}"


def timm_headless(folder, teacher):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    torch.save(network.state_dict(), folder / "w.pth")
    return {"teacher": f"timm:vit_tiny_patch16_224@{folder / 'w.pth'}", "teacher_imgsz": 64}


def fitted(source, folder, name="probe.pt", imgsz=64):
    """Return a teacher with a head of random weights, as it becomes."""
    given = source if isinstance(source, dict) else {"teacher": source}
    own = ClassificationTeacher(given["teacher"], imgsz=given.get("teacher_imgsz"), grows_head=True)
    own.grow_head(CLASSES, imgsz, 3)
    assert own.waits_for_head
    own.vet(imgsz, 3)
    torch.manual_seed(1)
    own.wear_head(Head(own.layer, torch.randn(own.linear.weight.shape), torch.randn(3)))
    file = folder / name
    own.save(file)
    own.become(file, hash_file(str(file)))
    assert not own.waits_for_head
    return own


@pytest.mark.parametrize(
    "source",
    [
        *(teachers.ultralytics, teachers.torchvision_file, teachers.timm_safetensors),
        *(teachers.timm_convnext, teachers.timm_vit, squeezenet, two_heads, torchvision_headless, timm_headless),
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
    torch.testing.assert_close(features @ own.linear.weight.T + own.linear.bias, expected)
    assert list(opened.find_levels(64, 3)) == list(own.find_levels(64, 3)) != []
    assert own.title == opened.title
    assert "fitted head" in own.title


def test_weights_without_a_head_are_only_for_who_gets_one(tmp_path):
    with pytest.raises(
        TypeError, match=r"no part of a teacher is initialised at random: it lacks fc\.weight, fc\.bias"
    ):
        ClassificationTeacher(torchvision_headless(tmp_path, None))


@pytest.mark.parametrize(("source", "features"), [(squeezenet, 512), (two_heads, 192), (timm_headless, 192)])
def test_the_head_sees_what_class_scores_are_made_of(source, features, tmp_path):
    assert fitted(source(tmp_path, None), tmp_path).linear.in_features == features


@pytest.mark.parametrize(("classes", "warned"), [(31, True), (32, False)])
def test_that_next_to_nothing_is_seen_is_warned_of(classes, warned, tmp_path, monkeypatch):
    """Of a network in Python no one knows which layer is its head, but of one that makes its answer."""
    said = []
    monkeypatch.setattr(LOGGER, "warning", said.append)
    head = nn.Sequential(nn.Linear(8, classes), nn.LayerNorm(classes))
    fitted(nn.Sequential(teachers.seen(Backbone()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), tmp_path)
    assert [f"no more than its answer, {classes} values" in text for text in said] == [True] * warned


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
    with pytest.raises(TypeError, match=r"no library builds.*'teacher=network' with 'teacher_probe=True'"):
        ClassificationTeacher(str(tmp_path / "probe.pt"))
    again = ClassificationTeacher(network, grows_head=True)
    again.grow_head(CLASSES, 64, 3)
    again.wear_head(read_head(own.source))
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(images)[0], own(images)[0])


@pytest.mark.parametrize("classes", [2, 3, 40])
@pytest.mark.parametrize(
    ("behind", "meaning"),
    [
        (nn.Identity(), "logits"),
        (nn.Softmax(1), "probabilities"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.LogSoftmax(1), "logits"),
    ],
)
def test_what_stands_behind_a_new_head_is_seen(behind, meaning, classes):
    """As its answers are logits again only so."""
    network = nn.Sequential(teachers.seen(Backbone()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), behind)
    own = ClassificationTeacher(network, grows_head=True)
    own.grow_head([str(i) for i in range(classes)], 64, 3)
    own.vet(64, 3, torch.rand(8, 3, 64, 64))
    assert own.meaning == meaning
    own.wear_head(Head(own.layer, torch.randn(classes, own.linear.in_features), torch.randn(classes)))
    images = torch.rand(3, 3, 64, 64)
    logits = own.linear(own.features(images))
    torch.testing.assert_close(own(images)[0].softmax(1), logits.softmax(1))


def test_what_a_new_head_says_is_not_told(teacher):
    own = ClassificationTeacher(teachers.seen(Backbone()), output="sigmoid", grows_head=True)
    own.grow_head(CLASSES, 64, 3)
    with pytest.raises(ValueError, match=r"'teacher_output=sigmoid' is for networks of others.* fitted to give logits"):
        own.vet(64, 3)


@pytest.mark.parametrize(
    "source", [teachers.ultralytics, teachers.torchvision_file, teachers.timm_safetensors, squeezenet]
)
def test_a_fitted_teacher_can_be_fitted_for_other_classes(source, teacher, tmp_path):
    """Its file is as whole as the first, and names the network that both sit on."""
    first = fitted(source(tmp_path, teacher), tmp_path)
    second = fitted(first.source, tmp_path, "second.pt")
    opened = ClassificationTeacher(second.source)
    assert opened.backbone == first.backbone
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(opened(images)[0], second(images)[0])


def test_a_timm_network_that_timm_would_not_build_alike(tmp_path):
    """The library's name opens what was built by it with its own arguments, and nothing else."""
    for given, opens in (({}, True), ({"num_classes": 0}, True), ({"act_layer": nn.Hardswish}, False)):
        fitted(teachers.seen(timm.create_model("resnet18", **{"num_classes": 7, **given})), tmp_path)
        if opens:
            assert ClassificationTeacher(str(tmp_path / "probe.pt")).names == CLASSES
        else:
            with pytest.raises(TypeError, match="no library builds"):
                ClassificationTeacher(str(tmp_path / "probe.pt"))


def test_of_several_levels_of_timms_the_last_is_seen():
    network = teachers.seen(timm.create_model("resnet18", features_only=True))
    own = ClassificationTeacher(network, grows_head=True)
    own.grow_head(CLASSES, 64, 3)
    assert own.linear.in_features == 512


def test_a_head_of_something_else_is_refused(teacher, tmp_path):
    own = fitted(str(teacher), tmp_path)
    other = ClassificationTeacher(str(teacher), grows_head=True)
    other.grow_head(["a", "b"], 64, 3)
    network = ClassificationTeacher(teachers.seen(Backbone()), grows_head=True)
    network.grow_head(CLASSES, 64, 3)
    for unlike in (other, network):
        with pytest.raises(ValueError, match="does not fit"):
            unlike.wear_head(read_head(own.source))
        assert unlike.waits_for_head
    with pytest.raises(TypeError, match="holds no fitted head"):
        read_head(str(teacher))
    with pytest.raises(FileNotFoundError):
        read_head(str(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda known: known.pop("backbone"),
        lambda known: known.update(std=[0.0]),
        lambda known: known.update(imgsz="64"),
        lambda known: known.update(weight=known["weight"][:, :7].clone()),
        lambda known: known.update(std=[float("nan")]),
        lambda known: known.update(side=1 << 20),
        lambda known: known.update(classes=1 << 30),
        lambda known: known.update(without=["layer5"]),
        lambda known: known.update(names="http://127.0.0.1:9/names.yaml"),
        lambda known: known.update(network="timm:resnet19"),
        lambda known: known.pop("layer"),
    ],
    ids=["backbone", "std", "imgsz", "features", "nan", "side", "classes", "without", "names", "network", "layer"],
)
def test_a_damaged_file_is_refused(spoil, teacher, tmp_path):
    fitted(teachers.timm_safetensors(tmp_path, teacher), tmp_path)
    content = torch.load(tmp_path / "probe.pt", weights_only=True)
    spoil(content[PROBE])
    torch.save(content, tmp_path / "probe.pt")
    with pytest.raises(TypeError, match=r"damaged|does not fit|no library builds"):
        ClassificationTeacher(str(tmp_path / "probe.pt"))


def test_a_file_cannot_ask_a_library_for_more_than_its_network(teacher, tmp_path, monkeypatch):
    """E.g. for weights of somewhere else."""
    fitted(teachers.timm_safetensors(tmp_path, teacher), tmp_path)
    content = torch.load(tmp_path / "probe.pt", weights_only=True)
    content[PROBE]["options"] = {"pretrained": True, "checkpoint_path": "x.pth", "aux_logits": "yes"}
    torch.save(content, tmp_path / "probe.pt")
    asked = []
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append(options) or build(name))
    ClassificationTeacher(str(tmp_path / "probe.pt"))
    assert asked == [{"aux_logits": True, "num_classes": 10}]


def test_an_exported_file_has_no_features(teacher, tmp_path):
    own = ClassificationTeacher(teachers.onnx(tmp_path, teacher), grows_head=True)
    with pytest.raises(ValueError, match=r"'teacher_probe=True' needs the features.*checkpoint that it was exported"):
        own.grow_head(CLASSES, 32, 3)
