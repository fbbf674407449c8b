"""What may teach, what is refused and in which words, and what a teacher answers."""

import argparse
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from teachers import exported, seen
from torch._inductor.utils import run_and_get_code
from ultralytics import YOLO, settings
from ultralytics.nn.distillation.classifier import ClassificationTeacher as Teacher
from ultralytics.nn.distillation.classifier import TeacherEnsemble
from ultralytics.nn.tasks import load_checkpoint

DIGITS = [str(i) for i in range(10)]


def test_answers_as_the_checkpoint_does(teacher):
    """Fusing changes nothing beyond rounding: the logits and maps are the unfused network's."""
    frozen = Teacher(teacher)
    levels = frozen.find_levels(32, 3)
    frozen.levels = [levels["model.6"], levels["model.4"]]
    x = torch.rand(3, 3, 32, 32)
    logits, (stride16, stride8) = frozen(x)
    model, _ = load_checkpoint(teacher)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x)[1], rtol=1e-3, atol=1e-4)
        for layer in model.model[:5]:
            x = layer(x)
        torch.testing.assert_close(stride8, x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stride16, model.model[6](model.model[5](x)), rtol=1e-3, atol=1e-4)
    assert frozen.names == DIGITS
    assert not any(m._forward_hooks for m in frozen.model.modules())


def test_without_logits_the_pass_ends_at_the_last_level(teacher):
    frozen = Teacher(teacher)
    levels = frozen.find_levels(32, 3)
    frozen.levels = [levels["model.6"], levels["model.4"]]
    x, ran = torch.rand(3, 3, 32, 32), []
    for i in (6, 7):
        frozen.model.model[i].register_forward_hook(lambda *_, i=i: ran.append(i))
    _, expected = frozen(x)
    assert ran == [6, 7]
    logits, maps = TeacherEnsemble([frozen, Teacher(teacher)])(x, head=False)
    assert ran == [6, 7, 6]
    assert logits.shape == (3, 0)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert [len(m._forward_hooks) for m in frozen.model.model[4:8]] == [0, 0, 1, 1]


def compiles(monkeypatch):
    """Replace the compiler by one that leaves networks as they are and counts their forward passes."""
    shapes = []

    def attempt_compile(module, device, mode):
        module.register_forward_hook(lambda module, args, output: shapes.append((mode, tuple(args[0].shape))))
        return module

    monkeypatch.setattr("ultralytics.nn.distillation.teacher.attempt_compile", attempt_compile)
    return shapes


def test_batches_of_the_compiled_shape_are_answered_by_the_compiled_network(teacher, monkeypatch):
    shapes = compiles(monkeypatch)
    frozen = Teacher(teacher)
    frozen.levels = [frozen.find_levels(32, 3)["model.4"]]
    x = torch.rand(5, 3, 32, 32)
    expected = frozen(x)
    for _ in range(2):
        TeacherEnsemble([frozen]).compile("default", x.shape)
        logits, (stride8,) = frozen(x)
        assert torch.equal(logits, expected[0])
        assert torch.equal(stride8, expected[1][0])
    assert torch.equal(frozen(x, head=False)[1][0], expected[1][0])
    torch.testing.assert_close(frozen(x[:3])[0], expected[0][:3])
    assert shapes == [("default", (5, 3, 32, 32))] * 3
    with torch.no_grad():
        frozen.model.model[0].conv.weight.zero_()  # the weights are there once
    assert not torch.equal(frozen(x)[0], expected[0])
    assert not any(m._forward_hooks for m in frozen.model.modules())
    frozen.compile("default", (3, 3, 32, 32))
    frozen(x[:3])
    assert shapes[-1] == ("default", (3, 3, 32, 32))


@pytest.mark.parametrize(("mode", "kept"), [("reduce-overhead", True), ("default", False)])
def test_answers_outlive_the_memory_of_cuda_graphs(mode, kept, teacher, monkeypatch):
    """A graph answers in the same memory each time, and shares it with those of other networks."""

    def attempt_compile(module, device, mode):
        memory = {}

        def replay(images, logits):
            answer, maps = module(images, logits)
            new = [*(answer or ()), *maps]
            same = memory.setdefault(logits, [x.clone() for x in new])
            for old, x in zip(same, new, strict=True):
                old.copy_(x)
            return (tuple(same[:-1]) if logits else None), same[-1:]

        return replay

    monkeypatch.setattr("ultralytics.nn.distillation.teacher.attempt_compile", attempt_compile)
    frozen = Teacher(teacher)
    frozen.levels = [frozen.find_levels(32, 3)["model.4"]]
    first, second = torch.rand(2, 3, 3, 32, 32)
    expected, (expected_map,) = frozen(first)
    frozen.compile(mode, first.shape)
    logits, (stride8,) = frozen(first)
    frozen(second)
    assert torch.equal(logits, expected) == kept
    assert torch.equal(stride8, expected_map) == kept
    frozen.compile(mode, second.shape)
    (stride8,) = frozen(second, head=False)[1]
    assert torch.equal(stride8, frozen(second)[1][0])


@pytest.mark.slow
def test_the_compiler_changes_nothing_beyond_rounding(teacher):
    frozen = Teacher(teacher)
    levels = frozen.find_levels(32, 3)
    frozen.levels = [levels["model.6"], levels["model.4"]]
    x = torch.rand(4, 3, 32, 32)
    expected, expected_maps = frozen(x)
    frozen.compile(True, x.shape)
    assert hasattr(frozen._compiled, "_orig_mod")
    for _ in range(2):
        logits, maps = frozen(x)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(maps, expected_maps, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_teacher_leaves_out_what_is_not_asked_for(teacher):
    frozen = Teacher(teacher)
    frozen.levels = [frozen.find_levels(32, 3)["model.4"]]
    x = torch.rand(4, 3, 32, 32)
    _, expected = frozen(x, head=False)
    frozen.compile(True, x.shape)
    (_, maps), (code,) = run_and_get_code(frozen, x, head=False)
    _, (whole,) = run_and_get_code(frozen, x)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4)
    assert code.count("convolution") < 0.6 * whole.count("convolution")
    assert "addmm" in whole
    assert "addmm" not in code


def test_is_frozen_and_fused(teacher):
    frozen = Teacher(teacher)
    logits, features = frozen(torch.rand(2, 3, 32, 32))
    assert not logits.requires_grad
    assert features == []
    assert not any(p.requires_grad for p in frozen.model.parameters())
    assert not any(m.training for m in frozen.model.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.model.modules())


@pytest.mark.parametrize(("imgsz", "expected"), [(64, False), (96, True)])
def test_memory_format(imgsz, expected, teacher):
    """Channels last where that was measured to be faster; the answers are the same up to rounding."""
    plain, fast = Teacher(teacher), Teacher(teacher)
    fast.vet(imgsz, 3)
    for each in (plain, fast):
        each.to(torch.device("cpu"))
        each.levels = list(each.find_levels(imgsz, 3).values())[-3:]
    weight = fast.model.model[1].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == expected
    assert plain.model.model[1].conv.weight.is_contiguous()
    images = torch.rand(4, 3, imgsz, imgsz)
    for a, b in zip((plain(images)[0], *plain(images)[1]), (fast(images)[0], *fast(images)[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize(
    ("count", "imgsz", "own_size", "sizes"),
    [
        (16, 32, None, [16]),  # 16 x 32 x 32 pixels are the most at once
        (17, 32, None, [9, 8]),
        (40, 32, None, [14, 13, 13]),
        (8, 32, 64, [4, 4]),  # of the size that it sees
        (7, 128, None, [3, 2, 2]),  # never one image alone
        (3, 128, None, [3]),
        (1, 256, None, [1]),
    ],
)
def test_large_batches_are_answered_in_pieces(count, imgsz, own_size, sizes, logits, teacher, monkeypatch):
    monkeypatch.setattr("ultralytics.nn.distillation.teacher.PIXELS_AT_ONCE", 16 * 32 * 32)
    pieces, whole = (
        Teacher(teacher, imgsz=own_size).to(torch.device("cpu")),
        Teacher(teacher, imgsz=own_size),
    )
    seen = []
    for each in (pieces, whole):
        each.levels = list(each.find_levels(imgsz, 3).values())[-3:]
    pieces.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    images = torch.rand(count, 3, imgsz, imgsz)
    found, expected = pieces(images, logits), whole(images, logits)
    assert seen == sizes
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [x.stride() for x in found[1]] == [x.stride() for x in expected[1]]


@pytest.mark.parametrize("where", ["vetted", "another device", "an exported file", "compiled for"])
def test_batches_are_answered_whole(where, teacher, monkeypatch, tmp_path):
    """Where two images have to be, where it gains nothing, or where the network is compiled for so many."""
    monkeypatch.setattr("ultralytics.nn.distillation.teacher.PIXELS_AT_ONCE", 32)
    compiles(monkeypatch)
    whole = Teacher(exported(tmp_path, teacher, "onnx") if where == "an exported file" else teacher)
    seen, images = [], torch.rand(6, 3, 32, 32)
    whole.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    if where == "vetted":
        whole.vet(32, 3)
        assert seen == [2]
        return
    if where == "another device":
        assert whole.to(torch.device("meta")).pixels_at_once == math.inf
        return
    whole.to(torch.device("cpu"))
    if where == "compiled for":
        whole.compile(True, images.shape)
        whole(images[:5])
        assert seen == [3, 2]  # those of another shape are not
        seen.clear()
    whole(images)
    assert seen == [6]


@pytest.mark.parametrize("name", ["yolov8n-cls", "yolo11m-cls", "yolo12n-cls", "yolo26n-cls", "yolov8n-cls-resnet50"])
def test_every_family_loads(name, tmp_path):
    model = YOLO(f"{name}.yaml")
    model.model.train()
    model.model(torch.rand(2, 3, 64, 64))  # BatchNorm has seen data
    model.save(tmp_path / "best.pt")
    logits, _ = Teacher(tmp_path / "best.pt")(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 1000)


def refused(path, error, *words):
    with pytest.raises(error) as e:
        Teacher(path)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)


def test_refusals_of_a_path(tmp_path):
    refused(None, ValueError, "No teacher given", "teacher=")
    refused("timm:resnet18@", ValueError, "no file after '@'")
    refused("http://localhost:1/best.pt", FileNotFoundError, "could not be downloaded")
    refused(tmp_path / "missing.pt", FileNotFoundError, "missing.pt", "does not exist")
    refused("yolo11l-cls.yaml", TypeError, "yolo11l-cls.yaml", "without trained weights", "Train it first")
    (tmp_path / "model.pth").write_bytes(b"weights")
    refused(tmp_path / "model.pth", TypeError, "model.pth", "no '.pt'", "timm:resnet18@model.pth")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
def test_damaged_files_are_refused(content, tmp_path):
    (tmp_path / "best.pt").write_bytes(content)
    refused(tmp_path / "best.pt", TypeError, "best.pt", "damaged")


def test_a_cut_file_is_refused(teacher, tmp_path):
    (tmp_path / "best.pt").write_bytes(teacher.read_bytes()[:-10_000])
    refused(tmp_path / "best.pt", TypeError, "best.pt", "damaged")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "best.pt")
    refused(tmp_path / "best.pt", TypeError, "best.pt", "no Ultralytics network", "timm:")


@pytest.mark.parametrize("name", ["yolo11n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb"])
def test_other_tasks_are_refused(name, tmp_path):
    YOLO(f"{name}.yaml").save(tmp_path / "best.pt")
    task = {"": "detect", "seg": "segment"}.get(name[8:], name[8:])
    refused(tmp_path / "best.pt", TypeError, f"is a {task} model", "must be a classification model")


def test_an_untrained_network_is_refused(tmp_path):
    YOLO("yolo11n-cls.yaml").save(tmp_path / "best.pt")
    refused(tmp_path / "best.pt", TypeError, "never been trained", "Train it first")


def test_found_in_the_weights_folder(teacher):
    """As upstream finds `model=`: a bare name may lie in the settings' weights folder."""
    folder = Path(settings["weights_dir"])
    folder.mkdir(exist_ok=True)
    shutil.copy(teacher, folder / "named.pt")
    assert Teacher("named.pt").source == str(folder / "named.pt")


@pytest.mark.parametrize("name", ["yolo11l-cls", "yolo11l-cls.pt"])
def test_official_names_are_downloaded_by_upstream(name, teacher, monkeypatch):
    asked = []

    def download(file):
        asked.append(file)
        return str(teacher)

    monkeypatch.setattr("ultralytics.nn.distillation.sources.attempt_download_asset", download)
    assert Teacher(name).source == str(teacher)
    assert asked == ["yolo11l-cls.pt"]


def test_a_failed_download_says_so(monkeypatch):
    def fail(file):
        raise ConnectionError("offline")

    monkeypatch.setattr("ultralytics.nn.distillation.sources.attempt_download_asset", fail)
    refused("yolo11l-cls.pt", FileNotFoundError, "teacher=yolo11l-cls.pt", "could not be downloaded", "give the file")


def test_home_is_expanded(teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(teacher, tmp_path / "mine.pt")
    assert Teacher("~/mine.pt").source == str(tmp_path / "mine.pt")


def state(network, **notes):
    return {"state_dict": network.state_dict(), **notes}


def test_images_are_brought_to_the_teachers_own_size_mean_and_standard_deviation():
    given = []

    class Recorder(torch.nn.Module):
        names = ("a", "b")

        def forward(self, x):
            given.append(x)
            return x.mean((2, 3))[:, :2]

    images = torch.rand(2, 3, 64, 64)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    Teacher(Recorder())(images)
    assert given.pop() is images  # upstream's convention is the default: 0 to 1, mean 0, standard deviation 1
    Teacher(Recorder(), mean=mean, std=std)(images)
    for channel in range(3):
        torch.testing.assert_close(given[0][:, channel], (images[:, channel] - mean[channel]) / std[channel])
    given.clear()
    Teacher(Recorder(), imgsz=32)(images)
    assert given[0].shape == (2, 3, 32, 32)
    torch.testing.assert_close(given[0].mean((2, 3)), images.mean((2, 3)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("source", "mean", "std"),
    [
        ("torchvision:resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("timm:resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("timm:vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_library_networks_know_their_normalisation(source, mean, std, tmp_path):
    library, name = source.split(":")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    network = seen(make(name, num_classes=3), 224)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    frozen = Teacher(f"{source}@{tmp_path / 'w.pth'}", names=["a", "b", "c"])
    images = torch.rand(2, 3, 224, 224)
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(frozen(images)[0], network(normalised))
    assert frozen.imgsz == (224 if "vit" in name else None)
    assert frozen.source == f"{source}@{tmp_path / 'w.pth'}"


@pytest.mark.parametrize(
    ("notes", "names"),
    [
        ({}, None),
        ({"names": ["a", "b", "c"]}, ["a", "b", "c"]),
        ({"class_names": {0: "a", 1: "b", 2: "c"}}, ["a", "b", "c"]),
        ({"classes": ("a", "b", "c")}, ["a", "b", "c"]),
        ({"classes": 3}, None),
        ({"class_to_idx": {"b": 1, "a": 0, "c": 2}}, ["a", "b", "c"]),
    ],
)
def test_names_come_from_the_file(notes, names, tmp_path):
    torch.save(state(seen(torchvision.models.resnet18(num_classes=3)), **notes), tmp_path / "w.pth")
    source = f"torchvision:resnet18@{tmp_path / 'w.pth'}"
    assert Teacher(source).names == names
    assert Teacher(source, names=["x", "y", "z"]).names == [
        "x",
        "y",
        "z",
    ]  # what is given stands above the file


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet", "mnasnet0_5"])
@pytest.mark.parametrize("classes", [2, 7])
def test_the_head_is_as_wide_as_the_file_says(classes, name, tmp_path):
    network = seen(torchvision.models.get_model(name, num_classes=classes))
    torch.save(state(network), tmp_path / "w.pth")
    frozen = Teacher(f"torchvision:{name}@{tmp_path / 'w.pth'}")
    frozen.vet(64, 3)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in frozen.model.state_dict().items())


def test_what_timm_and_torchvision_save_in_training_is_read(tmp_path):
    network = seen(timm.create_model("resnet18", num_classes=3))
    args = argparse.Namespace(model="resnet18", lr=0.1, mean=(0.5, 0.5))
    optimizer = torch.optim.SGD(network.parameters(), 0.1).state_dict()
    torch.save(state(network, arch="resnet18", epoch=3, args=args, optimizer=optimizer), tmp_path / "best.pth.tar")
    frozen = Teacher(f"timm:resnet18@{tmp_path / 'best.pth.tar'}")
    assert torch.equal(frozen.model.fc.weight, network.fc.weight)
    torch.save(state(network.half()), tmp_path / "half.pt")
    frozen = Teacher(f"timm:resnet18@{tmp_path / 'half.pt'}")
    assert frozen.model.fc.weight.dtype == torch.float32


def test_harmless_things_beside_the_weights_are_read(tmp_path):
    network = seen(torchvision.models.resnet18(num_classes=3))
    beside = {
        "top1": np.float64(0.9),
        "frozen": set(range(1, 21)),
        "shape": torch.Size([512, 3, 640, 640]),
        "one": torch.ones(1).expand(7),
        "nothing": torch.zeros(0),
    }
    averaged = torch.optim.swa_utils.AveragedModel(network).state_dict()
    torch.save({"model_ema": averaged, **beside}, tmp_path / "w.pth")
    frozen = Teacher(f"torchvision:resnet18@{tmp_path / 'w.pth'}")
    assert torch.equal(frozen.model.fc.weight, network.fc.weight)
    compiled = {f"_orig_mod.module.{k}": v for k, v in network.state_dict().items()}
    torch.save(compiled, tmp_path / "w.pth")
    assert torch.equal(Teacher(f"torchvision:resnet18@{tmp_path / 'w.pth'}").model.fc.weight, network.fc.weight)


@pytest.mark.parametrize("names", [{1: "a", 2: "b", 3: "c"}, [], [None] * 3, {"a": [0]}, "-" * 1000 + "1"])
@pytest.mark.parametrize("key", ["names", "class_to_idx"])
def test_names_in_a_file_that_are_none_can_be_given(key, names, tmp_path):
    torch.save(state(seen(torchvision.models.resnet18(num_classes=3)), **{key: names}), tmp_path / "w.pth")
    source = f"torchvision:resnet18@{tmp_path / 'w.pth'}"
    assert Teacher(source, names=["a", "b", "c"]).names == ["a", "b", "c"]
    if key == "names":
        assert Teacher(source).names is None


def test_only_a_head_that_is_there_is_built(tmp_path):
    weights = seen(torchvision.models.resnet18(num_classes=3)).state_dict()
    for bias in (torch.zeros(2_000_000, dtype=torch.int8), torch.tensor(1.0), torch.zeros(0)):
        torch.save({**weights, "fc.bias": bias}, tmp_path / "w.pth")
        with pytest.raises(TypeError, match=r"shapes differ in fc\.weight"):
            Teacher(f"torchvision:resnet18@{tmp_path / 'w.pth'}")


def test_a_windowed_transformer_of_another_size(tmp_path):
    """Its tables of positions, too, have another first dimension."""
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, img_size=64)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    frozen = Teacher(f"timm:swin_tiny_patch4_window7_224@{tmp_path / 'w.pth'}", imgsz=64)
    frozen.vet(32, 3)
    assert frozen(torch.rand(2, 3, 32, 32))[0].shape == (2, 7)


def test_averaged_weights_come_first_and_wrappers_names_are_dropped(tmp_path):
    plain, averaged = (seen(torchvision.models.resnet18(num_classes=3)) for _ in range(2))
    wrapped = {f"module.{k}": v for k, v in averaged.state_dict().items()}
    torch.save({"model": plain.state_dict(), "model_ema": wrapped}, tmp_path / "w.pth")
    frozen = Teacher(f"torchvision:resnet18@{tmp_path / 'w.pth'}")
    assert torch.equal(frozen.model.fc.weight, averaged.fc.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if "fc" not in k}, "it lacks fc.weight, fc.bias"),
        (lambda s: {**s, "neck.weight": torch.zeros(3)}, "it has besides neck.weight"),
        (
            lambda s: {**s, "conv1.weight": torch.zeros(64, 1, 7, 7)},
            r"conv1.weight \(64, 1, 7, 7\) for \(64, 3, 7, 7\)",
        ),
    ],
)
def test_no_part_of_a_teacher_is_initialised_at_random(change, words, tmp_path):
    torch.save(change(seen(torchvision.models.resnet18(num_classes=3)).state_dict()), tmp_path / "w.pth")
    with pytest.raises(TypeError, match=words) as e:
        Teacher(f"torchvision:resnet18@{tmp_path / 'w.pth'}")
    assert "no part of a teacher is initialised at random" in str(e.value)


def test_a_transformer_of_another_size_is_told_to_say_so(tmp_path):
    for library, name, extra in (
        ("timm", "vit_tiny_patch16_224", "img_size"),
        ("torchvision", "vit_b_16", "image_size"),
    ):
        make = timm.create_model if library == "timm" else torchvision.models.get_model
        torch.save(make(name, num_classes=3, **{extra: 64}).state_dict(), tmp_path / "w.pth")
        source = f"{library}:{name}@{tmp_path / 'w.pth'}"
        with pytest.raises(TypeError, match="'teacher_imgsz'"):
            Teacher(source)
        frozen = Teacher(source, imgsz=64)
        frozen.vet(32, 3)
        assert frozen(torch.rand(1, 3, 32, 32))[0].shape == (1, 3)


def test_official_torchvision_weights(monkeypatch):
    official = torchvision.models.ResNet18_Weights.DEFAULT
    network = seen(torchvision.models.resnet18())
    readings = []

    def get_state_dict(self, **kwargs):
        readings.append(kwargs.get("weights_only", False))
        return network.state_dict()

    monkeypatch.setattr(type(official), "get_state_dict", get_state_dict)
    frozen = Teacher("torchvision:resnet18")
    assert readings[0]  # the restricted reading comes first
    assert torch.equal(frozen.model.fc.weight, network.fc.weight)
    assert (frozen.names[0], len(frozen.names), frozen.source) == ("tench", 1000, "torchvision:resnet18")
    assert TeacherEnsemble([frozen]).align(["n01440764", "n02102040"])
    monkeypatch.setattr(type(official), "get_state_dict", fail)
    refused("torchvision:resnet18", FileNotFoundError, "could not be downloaded", "offline")


def test_official_timm_weights(monkeypatch):
    create, network = timm.create_model, seen(timm.create_model("resnet18"))
    asked = []

    def create_model(name, pretrained=False, **kwargs):
        asked.append((name, pretrained, kwargs))
        return network if pretrained else create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    frozen = Teacher("timm:resnet18.a1_in1k")
    assert asked == [("resnet18.a1_in1k", True, {})]
    assert (frozen.names[1], len(frozen.names), frozen.channels) == ("goldfish", 1000, 3)
    monkeypatch.setattr(timm, "create_model", fail)
    for name in ("resnet18", "hf-hub:someone/network"):
        refused(f"timm:{name}", FileNotFoundError, f"timm:{name}", "could not be downloaded", "offline")


def fail(*args, **kwargs):
    raise ConnectionError("offline")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("torchvision:resnet81", "'resnet18'"),
        ("timm:convnext_attoo", "'convnext_atto'"),
        ("torchvision:raft_small", "no"),
    ],
)
def test_unknown_networks_get_the_nearest(source, words):
    refused(source, ValueError, source, "names no classifier", words)


@pytest.mark.parametrize(
    ("library", "source", "command"),
    [
        ("timm", "timm:resnet18", "pip install timm"),
        ("onnxruntime", "teacher.onnx", "pip install onnxruntime"),
        ("safetensors", "torchvision:resnet18@teacher.safetensors", "pip install safetensors"),
    ],
)
def test_a_missing_library_names_the_command_that_installs_it(library, source, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher.onnx", "teacher.safetensors"):
        Path(name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    refused(source, ImportError, command)


class Answer(torch.nn.Module):
    """A network that answers what it is told."""

    def __init__(self, answer, names=None):
        super().__init__()
        self.answer = answer
        if names:
            self.names = names

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x.mean(), "answers 2 images with ()"),
        (lambda x: x, "answers 2 images with (2, 3, 32, 32)"),
        (lambda x: {"out": x}, "answers 2 images with dict"),
        (lambda x: x.mean((2, 3)) * float("nan"), "NaN or infinite"),
        (lambda x: x.mean((2, 3)) / 0, "NaN or infinite"),
        (lambda x: x.mean((2, 3))[:, :2], "gives 2 logits per image, but has 3 class names"),
        (lambda x: x.reshape(2, 3, 224, 224), "cannot process a batch of 2 images of 3x32x32 (RuntimeError"),
    ],
)
def test_a_wrong_answer_is_refused(answer, words):
    with pytest.raises(ValueError, match=re.escape(words)) as e:
        Teacher(Answer(answer, ["a", "b", "c"])).vet(32, 3)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("names", "error"), [("cat", TypeError), ("none.yaml", FileNotFoundError), ({0: "a", 2: "b"}, ValueError)]
)
def test_names_that_are_none_are_refused(names, error, teacher):
    with pytest.raises(error, match="'teacher_names=") as e:
        Teacher(teacher, names=names)
    assert "\n" not in str(e.value)


def test_probabilities_are_read_as_logits(tmp_path):
    """An exported classifier that ends in a softmax teaches what its logits would."""
    for transform in (lambda x: x, lambda x: x.softmax(1)):
        frozen = Teacher(Answer(lambda x, f=transform: f(x.mean((2, 3)) * 5), ["a", "b", "c"]))
        frozen.vet(32, 3)
        images = torch.rand(2, 3, 32, 32)
        expected = (images.mean((2, 3)) * 5 / 4).softmax(1)
        torch.testing.assert_close((frozen(images)[0] / 4).softmax(1), expected)


def test_a_probability_of_zero_stays_finite():
    frozen = Teacher(Answer(lambda x: torch.tensor([[1.0, 0.0, 0.0]]).expand(len(x), 3), ["a", "b", "c"]))
    frozen.vet(32, 3)
    assert frozen(torch.rand(2, 3, 32, 32))[0].isfinite().all()


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_must_fit(channels, teacher):
    with pytest.raises(ValueError, match=f"takes images of 3 channels, but the dataset's have {channels}"):
        Teacher(teacher).vet(32, channels)


def test_mean_and_standard_deviation_are_per_channel(teacher):
    with pytest.raises(ValueError, match="'teacher_mean' and 'teacher_std' need 1 or 3 values"):
        Teacher(teacher, mean=[0.5, 0.5]).vet(32, 3)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_exported_teachers_answer_as_the_checkpoint_does(target, dynamic, teacher, tmp_path):
    """Also where the file has a batch size of its own, which no batch of a training is a multiple of."""
    file = exported(tmp_path, teacher, target, dynamic=dynamic, batch=1 if dynamic else 4)
    frozen = Teacher(file, trusted=target == "torchscript")
    frozen.vet(32, 3)
    images = torch.rand(6, 3, 32, 32)
    answer, features = frozen(images)
    assert features == []
    assert frozen.names == DIGITS
    assert not frozen.has_features
    torch.testing.assert_close(answer.softmax(1), Teacher(teacher)(images)[0].softmax(1), rtol=1e-3, atol=1e-4)


def test_a_yolo_object_teaches_as_its_file_does(teacher):
    images = torch.rand(2, 3, 32, 32)
    model = YOLO(teacher)
    torch.testing.assert_close(Teacher(model)(images)[0], Teacher(teacher)(images)[0])
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.model.modules())  # a copy was fused, not the user's


def test_an_untrained_module_is_refused():
    refused(torchvision.models.resnet18(), TypeError, "module:ResNet", "never been trained")


def test_several_judge_the_classes_that_all_know():
    a = Teacher(Answer(lambda x: x.flatten(1)[:, :4], ["a", "b", "c", "d"]))
    b = Teacher(Answer(lambda x: x.flatten(1)[:, 4:7], ["c", "b", "x"]))
    both = TeacherEnsemble([a, b], [1, 3], temperature=2.0)
    notes = both.align(["a", "b", "c", "e"])
    assert both.classes == [1, 2]
    assert both.weights == [0.25, 0.75]
    assert any("2 of 4 classes" in note and "'a', 'e'" in note for note in notes)
    x = torch.rand(5, 1, 2, 4)
    logits, _ = both(x)
    one, other = x.flatten(1)[:, [1, 2]], x.flatten(1)[:, [5, 4]]
    expected = 0.25 * (one / 2).softmax(1) + 0.75 * (other / 2).softmax(1)
    torch.testing.assert_close((logits / 2).softmax(1), expected)


def test_a_teacher_without_names_says_what_to_give():
    with pytest.raises(ValueError, match=r"does not say which classes.*teacher_names=ImageNet\.yaml"):
        TeacherEnsemble([Teacher(Answer(lambda x: x.mean((2, 3))))]).align(["a", "b"])


def test_judged_images_are_spread_evenly_and_of_known_classes():
    data = [{"img": torch.full((3, 8, 8), i / 10), "cls": i % 4} for i in range(10)]
    ensemble = TeacherEnsemble([Teacher(Answer(lambda x: x.mean((2, 3)), ["a", "d", "x"]))])
    ensemble.align(["a", "b", "c", "d"])
    (logits,), labels = ensemble.judge(data, batch=3)
    assert labels.tolist() == [0, 1, 0, 1, 0]  # of images 0, 3, 4, 7, 8
    torch.testing.assert_close(logits[:, 0], torch.tensor([0.0, 0.3, 0.4, 0.7, 0.8]))
    assert ensemble.judge(data, limit=2)[1].tolist() == [0]  # of images 0 and 9, which is of class 1
