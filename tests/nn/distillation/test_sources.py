"""Where a teacher comes from: what each source reads, and what is refused and in which words."""

import argparse
import hashlib
import json
import pickle
import re
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from teachers import exported, seen
from ultralytics import YOLO, settings
from ultralytics.nn.distillation.classifier import ClassificationTeacher as Teacher
from ultralytics.nn.distillation.classifier import TeacherEnsemble
from ultralytics.nn.distillation.sources import Expected, open_source
from ultralytics.nn.distillation.sources.base import trained
from ultralytics.nn.tasks import DetectionModel

DIGITS = [str(i) for i in range(10)]


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


@pytest.mark.parametrize("link", [True, False])
def test_a_file_is_what_it_is_named_or_holds(link, teacher, tmp_path):
    """As in caches of files, which name by links what has a name without a suffix."""
    network = seen(torchvision.models.resnet18(num_classes=3))
    blobs = {"best.pt": tmp_path / "3ece1cb2", "weights.safetensors": tmp_path / "77aa"}
    shutil.copy(teacher, blobs["best.pt"])
    save_file(network.state_dict(), blobs["weights.safetensors"])
    for name, blob in blobs.items():
        (tmp_path / name).symlink_to(blob.name)
    files = {name: str(tmp_path / name) if link else str(blob) for name, blob in blobs.items()}
    frozen = Teacher(f"torchvision:resnet18@{files['weights.safetensors']}")
    assert torch.equal(frozen.model.fc.weight, network.fc.weight)
    assert frozen.source == f"torchvision:resnet18@{files['weights.safetensors']}"
    if link:
        frozen = Teacher(files["best.pt"])
        assert frozen.source == files["best.pt"]
        assert frozen.content_hash == hashlib.sha256(teacher.read_bytes()).hexdigest()
    else:
        refused(files["best.pt"], TypeError, "holds a checkpoint, but its name does not end in '.pt'", "a link")


def test_a_sound_file_of_another_kind_is_not_called_damaged(tmp_path):
    file = tmp_path / "best.pt"
    weights = {"weight": torch.ones(3)}
    save_file(weights, file)
    refused(file, TypeError, "holds safetensors weights", f"teacher=timm:resnet18@{file}")
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    refused(file, TypeError, "a checkpoint from before torch 1.6", "teacher_trusted=True")
    pointer, page = "version https://git-lfs.github.com/spec/v1\n", "<!DOCTYPE html>"
    for text, words in ((pointer, "git lfs pull"), (page, "web page")):
        file.write_text(text)
        refused(file, TypeError, words, "but no")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.onnx", {"lfs": "git lfs pull", "page": "a web page", "checkpoint": "does not end in '.pt'"}),
        ("x.safetensors", {"lfs": "git lfs pull", "checkpoint": "does not end in '.pt'", "onnx": "an ONNX model"}),
        ("x.torchscript", {"lfs": "git lfs pull", "checkpoint": "a checkpoint"}),
        (
            "x.pt",
            {"lfs": "git lfs pull", "onnx": "its name does not end in '.onnx'", "pickle": "Python's pickle wrote"},
        ),
    ],
)
def test_what_a_file_holds_is_said_whatever_reads_it(name, words, tmp_path):
    """Trusted or not: what fetching a repository without its large files leaves, e.g., is not damaged."""
    file = tmp_path / name
    write = {
        "lfs": lambda: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "page": lambda: file.write_text("<!DOCTYPE html>"),
        "checkpoint": lambda: torch.save({"weight": torch.ones(3)}, file),
        "onnx": lambda: file.write_bytes(b"\x08\x08\x12\x04none"),
        "pickle": lambda: file.write_bytes(pickle.dumps([1])),
    }
    for kind, word in words.items():
        write[kind]()
        source = f"timm:resnet18@{file}" if name.endswith("safetensors") else str(file)
        for trusted in (True, False) if name != "x.torchscript" else (True,):
            with pytest.raises(TypeError) as e:
                Teacher(source, trusted=trusted)
            assert word in str(e.value)
            assert "damaged" not in str(e.value)
            assert "sound" not in str(e.value)


def test_an_onnx_file_is_no_weights_for_a_librarys_network(tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(b"\x08\x08\x12\x04none")
    refused(f"torchvision:resnet18@{file}", TypeError, "no weights for another network", f"give it as 'teacher={file}'")


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("densenet121", lambda k: re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k)),
        ("vit_b_32", lambda k: k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")),
    ],
)
def test_torchvisions_own_files_name_layers_as_they_were_called(name, old, tmp_path):
    size = {"image_size": 64} if name.startswith("vit") else {}
    network = seen(torchvision.models.get_model(name, num_classes=3, **size))
    weights = {old(k): v for k, v in network.state_dict().items()}
    assert weights.keys() != network.state_dict().keys()
    torch.save(weights, tmp_path / "w.pth")
    frozen = Teacher(f"torchvision:{name}@{tmp_path / 'w.pth'}", imgsz=64)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in frozen.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "program"),
    [
        *(("best.engine", "TensorRT"), ("best.mlpackage", "CoreML"), ("best_openvino_model", "OpenVINO")),
        *(("best_openvino_model/best.xml", "OpenVINO"), ("best_float32.tflite", ""), ("best.keras", "Keras")),
    ],
)
def test_what_to_give_instead_of_another_programs_export(name, program, tmp_path):
    refused(tmp_path / name, TypeError, name, f"is for {program}", "'.pt' that it was made of", "format=onnx")


def state(network, **notes):
    return {"state_dict": network.state_dict(), **notes}


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


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.student.", "_orig_mod.module.", ""])
@pytest.mark.parametrize("place", ["state_dict", "model", "model_ema", "net", "ema_state_dict", None])
def test_weights_of_other_loops_find_their_places(prefix, place, tmp_path):
    network = seen(torchvision.models.resnet18(num_classes=3))
    weights = {f"{prefix}{k}": v for k, v in network.state_dict().items()}
    if prefix:
        weights["criterion.weight"] = torch.ones(3)
    if "student" in prefix:
        weights["module.teacher.fc.weight"] = torch.ones(3, 512)
    torch.save({place: weights, "epoch": 3} if place else weights, tmp_path / "w.pth")
    frozen = Teacher(f"torchvision:resnet18@{tmp_path / 'w.pth'}")
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in frozen.model.state_dict().items())


def test_of_several_networks_in_a_file_none_is_chosen(tmp_path):
    weights = seen(torchvision.models.resnet18(num_classes=3)).state_dict()
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in weights.items()}
    torch.save(both, tmp_path / "w.pth")
    refused(f"torchvision:resnet18@{tmp_path / 'w.pth'}", TypeError, "['student.', 'teacher.']", "the teacher alone")


def numbered():
    return torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(512, 3))


def named():
    return torch.nn.Sequential(OrderedDict(drop=torch.nn.Dropout(0.3), out=torch.nn.Linear(512, 3)))


def nested_deeper():
    return torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Sequential(torch.nn.Linear(512, 3)))


@pytest.mark.parametrize(
    ("name", "place", "head"),
    [
        ("resnet18", "fc", numbered),
        ("resnet18", "fc", named),
        ("resnet18", "fc", nested_deeper),
        ("mobilenet_v2", "classifier.1", lambda: torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1280, 3))),
        ("mobilenet_v2", "classifier", lambda: torch.nn.Linear(1280, 3)),
        ("mobilenet_v2", "classifier", lambda: torch.nn.Sequential(torch.nn.Linear(1280, 3))),
        (
            "efficientnet_b0",
            "classifier",
            lambda: torch.nn.Sequential(*[torch.nn.Dropout()] * 2, torch.nn.Linear(1280, 3)),
        ),
    ],
)
def test_a_head_of_other_layers_is_its_linear_layer(name, place, head, tmp_path):
    network = seen(torchvision.models.get_model(name))
    network.set_submodule(place, head())
    torch.save(network.eval().state_dict(), tmp_path / "w.pth")
    images = torch.rand(2, 3, 64, 64)
    frozen = Teacher(f"torchvision:{name}@{tmp_path / 'w.pth'}", mean=0, std=1)
    assert torch.equal(frozen(images)[0], network(images))


def test_a_head_of_several_layers_with_weights_is_refused(tmp_path):
    network = seen(torchvision.models.resnet18())
    network.fc = torch.nn.Sequential(torch.nn.Linear(512, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    refused(f"torchvision:resnet18@{tmp_path / 'w.pth'}", TypeError, "a head 'fc' of 2 layers", "in Python")
    network = seen(torchvision.models.mobilenet_v3_small())
    network.classifier = torch.nn.Linear(576, 3)  # in the place of two with weights
    torch.save(network.state_dict(), tmp_path / "w.pth")
    refused(f"torchvision:mobilenet_v3_small@{tmp_path / 'w.pth'}", TypeError, "lacks classifier.0.weight", "fit")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_a_loss_keeps_beside_the_network_is_left_out(prefix, tmp_path):
    network = seen(torchvision.models.resnet18(num_classes=3))
    weights = {f"{prefix}{k}": v for k, v in network.state_dict().items()}
    torch.save({**weights, "criterion.weight": torch.ones(3)}, tmp_path / "w.pth")
    assert torch.equal(Teacher(f"torchvision:resnet18@{tmp_path / 'w.pth'}").model.fc.weight, network.fc.weight)
    torch.save({**weights, f"{prefix}extra.weight": torch.ones(3)}, tmp_path / "w.pth")
    refused(f"torchvision:resnet18@{tmp_path / 'w.pth'}", TypeError, "it has besides extra.weight", "does not fit")


@pytest.mark.parametrize("key", ["params", "params_ema", "weights", "network", "student", "teacher"])
def test_where_training_loops_keep_the_weights(key, tmp_path):
    network = seen(torchvision.models.resnet18(num_classes=3))
    torch.save({"epoch": 3, key: network.state_dict()}, tmp_path / "w.pth")
    assert torch.equal(Teacher(f"torchvision:resnet18@{tmp_path / 'w.pth'}").model.fc.weight, network.fc.weight)


def test_what_hugging_face_writes_beside_the_weights(tmp_path):
    network = seen(timm.create_model("resnet18", num_classes=3))
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file(network.state_dict(), weights)
    for names in ({"label_names": ["a", "b", "c"]}, {"id2label": {"2": "c", "0": "a", "1": "b"}}):
        config.write_text(json.dumps(names))
        assert Teacher(f"timm:resnet18@{weights}").names == ["a", "b", "c"]
    save_file({"resnet.embedder.weight": torch.ones(3)}, weights)
    config.write_text(json.dumps({"transformers_version": "4.40.0", "architectures": ["ResNetForImageClassification"]}))
    refused(f"timm:resnet18@{weights}", TypeError, "Hugging Face's transformers", f"from_pretrained('{tmp_path}')")
    save_file({"resnet.encoder.stages.0.weight": torch.ones(3), "classifier.1.weight": torch.ones(3)}, weights)
    for beside in (lambda: config.write_text("{}"), config.unlink):  # then the names of the weights tell
        beside()
        refused(f"timm:resnet18@{weights}", TypeError, "Hugging Face's transformers", "from_pretrained")
    save_file({"encoder.weight": torch.ones(3)}, weights)
    refused(f"timm:resnet18@{weights}", TypeError, "does not fit", "it has besides encoder.weight")


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
        ("torchvision:raft_small", "'alexnet'"),  # where none is near, the first ones
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


def test_what_is_known_of_a_checkpoint(teacher):
    """The network is as it was saved: what a teacher makes of it is the teacher's."""
    source = open_source(str(teacher))
    assert (source.name, source.file) == (str(teacher), str(teacher))
    assert source.content_hash == hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert (source.names, source.channels, source.has_features) == (DIGITS, 3, True)
    assert hasattr(source.network.model[0], "bn")
    assert not hasattr(Teacher(teacher).model.model[0], "bn")


def test_a_task_says_which_networks_it_takes(teacher, tmp_path):
    model = YOLO("yolo11n.yaml")
    model.model.train()
    model.model(torch.rand(2, 3, 64, 64))
    model.save(tmp_path / "detector.pt")
    detectors = Expected("detect", DetectionModel, "yolo11l.pt")
    assert type(open_source(str(tmp_path / "detector.pt"), expected=detectors).network) is DetectionModel
    with pytest.raises(TypeError, match="is a detect model, but the teacher must be a classification model"):
        open_source(str(tmp_path / "detector.pt"))
    with pytest.raises(TypeError, match=r"is a classify model, .* a detection model, e.g. 'teacher=yolo11l.pt'"):
        open_source(str(teacher), expected=detectors)
    YOLO("yolo11n.yaml").save(tmp_path / "new.pt")
    with pytest.raises(TypeError, match=r"never been trained.*'yolo detect train model=yolo11l.yaml'"):
        trained(open_source(str(tmp_path / "new.pt"), expected=detectors), detectors)
