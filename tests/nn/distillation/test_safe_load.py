"""Hostile and damaged teachers: each is refused in one sentence, nothing in it runs, and no folder is left behind."""

import contextlib
import hashlib
import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from teachers import Call, seen, shell, with_path
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.distillation.classifier import ClassificationTeacher
from ultralytics.nn.distillation.safe_load import load_checkpoint_file
from ultralytics.nn.tasks import load_checkpoint


class Storage:
    """Pickles as the storage of a tensor."""


class Foreign(nn.Module):
    """A class that no other installation has."""


def archive(file, content, numel=4, record=bytes(16), compression=zipfile.ZIP_STORED):
    """Write what torch.save would, with a declared number of elements and a record of our choice."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(obj, Storage) else None

    index = io.BytesIO()
    Pickler(index, 2).dump(content)
    with zipfile.ZipFile(file, "w", compression) as z:
        for name, data in (("data.pkl", index.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            z.writestr(f"archive/{name}", data, zipfile.ZIP_STORED)
        z.writestr("archive/data/0", record)


def tensor(shape, stride, offset=0):
    return {"weight": Call(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, OrderedDict())}


def changed(file, teacher, change):
    ckpt = torch.load(teacher, weights_only=False)
    change(ckpt)
    torch.save(ckpt, file)


def poison(ckpt):
    ckpt["model"].model[4].cv1.conv.weight.data[0, 0] = float("nan")


def adopt(ckpt):
    ckpt["model"].model.add_module("extra", Foreign())


def scripted(file, canary):
    class Writer(nn.Module):
        def __init__(self, canary: str):
            super().__init__()
            self.canary = canary

        def forward(self, x):
            torch.serialization.save(x, self.canary)
            return x.mean((2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Writer(str(canary))).save(file)


def nested(file, teacher):
    with zipfile.ZipFile(file, "w") as z:
        z.write(teacher, "archive/best.pt")


def reload(file, canary):
    """Upstream's list of safe classes has one whose constructor reads another file without any restriction."""
    other = file.with_name("other.pt")
    torch.save({"model": shell(canary)}, other)
    student = nn.Identity()
    student.yaml = {}
    torch.save({"model": Call(DistillationModel, str(other), student)}, file)


def hooked(ckpt):
    ckpt["model"].model[2]._forward_pre_hooks[0] = nn.Identity()


def replaced(ckpt):
    ckpt["model"].model[2].__dict__["forward"] = nn.SiLU


def two_directories(file, canary):
    """Write a zip whose end names a directory that Python's reader does not use: there the record is compressed."""
    archive(file, tensor((100,), (1,)), 100, bytes(400))
    data = file.read_bytes()
    start = data.index(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    directory = data[start:end]
    file.write_bytes(data[:start] + directory + directory + data[end:])


def nested_tuples(depth):
    nested = (1,)
    for _ in range(depth):
        nested = (nested, nested)
    return nested


HOSTILE = {
    "os.system": (lambda f, t, c: torch.save({"model": shell(c)}, f), "system"),
    "builtins.exec": (lambda f, t, c: torch.save({"model": Call(exec, f"open({str(c)!r}, 'w')")}, f), "exec"),
    "within a trained model": (lambda f, t, c: changed(f, t, lambda ckpt: ckpt.update(git=shell(c))), "system"),
    "a bare pickle": (lambda f, t, c: f.write_bytes(pickle.dumps(shell(c))), "holds what Python's pickle wrote"),
    "the format before torch 1.6": (
        lambda f, t, c: torch.save({"model": shell(c)}, f, _use_new_zipfile_serialization=False),
        "torch 1.6",
    ),
    "a nested zip": (lambda f, t, c: nested(f, t), "no data.pkl"),
    "a truncated zip": (lambda f, t, c: f.write_bytes(t.read_bytes()[:-10_000]), "cut short"),
    "torn in the middle": (lambda f, t, c: f.write_bytes(t.read_bytes()[:20_000] + t.read_bytes()[30_000:]), "damaged"),
    "zero bytes": (lambda f, t, c: f.touch(), "0 bytes"),
    "a text file": (lambda f, t, c: f.write_text("weights, honestly\n"), "damaged"),
    "a folder": (lambda f, t, c: f.mkdir(), "is a folder"),
    "a symlink loop": (lambda f, t, c: f.symlink_to(f), "leads nowhere or to itself"),
    "a pipe": (lambda f, t, c: os.mkfifo(f), "no regular file"),
    "NaN weights": (lambda f, t, c: changed(f, t, poison), "NaN or infinite"),
    "a foreign class": (lambda f, t, c: changed(f, t, adopt), "Foreign"),
    "a huge declared storage": (lambda f, t, c: archive(f, tensor((4,), (1,)), numel=10**12), "declares 1000000000000"),
    "a huge declared shape": (lambda f, t, c: archive(f, tensor((10**12,), (1,))), "shape (1000000000000,)"),
    "a shape repeated without data": (lambda f, t, c: archive(f, tensor((10**12,), (0,))), "shape (1000000000000,)"),
    "a shape beyond its data": (lambda f, t, c: archive(f, tensor((2,), (10**9,))), "4 elements"),
    "a negative offset": (lambda f, t, c: archive(f, tensor((4,), (1,), -1)), "forged"),
    "a compressed bomb": (
        lambda f, t, c: archive(f, tensor((10**6,), (1,)), 10**6, bytes(4 * 10**6), zipfile.ZIP_DEFLATED),
        "unfold to 4,000,000 bytes",
    ),
    "a compressed record": (
        lambda f, t, c: archive(f, tensor((100,), (1,)), 100, bytes(400), zipfile.ZIP_DEFLATED),
        "record 'archive/data/0'",
    ),
    "a huge layer to build": (lambda f, t, c: archive(f, Call(nn.Linear, 60_000, 60_000)), "Linear"),
    "a class that loads another file": (lambda f, t, c: reload(f, c), "DistillationModel"),
    "a hook": (lambda f, t, c: changed(f, t, hooked), "brings a '_forward_pre_hooks' of its own"),
    "a method replaced": (lambda f, t, c: changed(f, t, replaced), "brings a 'forward' of its own"),
    "a quantized model": (lambda f, t, c: changed(f, t, lambda ckpt: ckpt.update(modelopt={"x": 1})), "quantization"),
    "two directories": (lambda f, t, c: two_directories(f, c), "its directory lies elsewhere"),
    "an index that never ends": (lambda f, t, c: archive(f, Call(OrderedDict, nested_tuples(60))), "no plain value"),
    "a key that is never hashed": (lambda f, t, c: archive(f, {nested_tuples(20): 1}), "no plain value"),
    "a tensor made without data": (lambda f, t, c: archive(f, Call(torch.FloatTensor, 10**9)), "FloatTensor"),
    "many layers to build": (lambda f, t, c: archive(f, [Call(nn.Linear, 9, 9)] * 9), "Linear"),
    "a huge byte array": (lambda f, t, c: archive(f, Call(bytearray, 10**12)), "bytearray"),
    "a TorchScript that writes": (lambda f, t, c: scripted(f, c), "teacher_trusted=True"),
    "a detection model": (lambda f, t, c: YOLO("yolo11n.yaml").save(f), "is a detect model"),
    "an untrained model": (lambda f, t, c: YOLO("yolo11n-cls.yaml").save(f), "never been trained"),
    "a state dict": (lambda f, t, c: torch.save(load_checkpoint(t)[0].state_dict(), f), "no Ultralytics network"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_and_damaged_files_are_refused(kind, overrides, teacher, tmp_path):
    write, words = HOSTILE[kind]
    file, canary = tmp_path / "hostile.pt", tmp_path / "canary"
    write(file, teacher, canary)
    with pytest.raises((TypeError, ValueError, FileNotFoundError)) as e:
        DistillationClassificationTrainer(overrides={**overrides, "teacher": str(file)})
    said = str(e.value)
    assert str(file) in said
    assert words in said
    assert "\n" not in said
    assert len(said) < 500
    assert not canary.exists()
    assert not Path(overrides["project"]).exists()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath", "PureWindowsPath"])
def test_paths_of_another_python_or_system_are_read(module, name, teacher, tmp_path):
    """As Python 3.13 names them, and as they are named on Windows."""
    file = str(with_path(teacher, tmp_path / "other.pt", module, name))
    assert str(load_checkpoint_file(file, file, ultralytics=True)["path"]) == "runs"


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
@pytest.mark.parametrize(
    "kind", ["os.system", "a huge declared storage", "a text file", "a folder", "a TorchScript that writes"]
)
def test_hostile_weights_of_a_library_network_are_refused(kind, name, teacher, tmp_path):
    write, words = HOSTILE[kind]
    write(tmp_path / "weights.pth", teacher, tmp_path / "canary")
    words = "TorchScript program" if "TorchScript" in kind else words
    with pytest.raises((TypeError, FileNotFoundError), match=words):
        ClassificationTeacher(f"{name}@{tmp_path / 'weights.pth'}")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("suffix", ["onnx", "safetensors"])
@pytest.mark.parametrize("content", [b"\x00" * 64, b"\xff" * 8 + b"{}", b"text"])
def test_damaged_files_of_other_formats_are_refused(content, suffix, tmp_path):
    file = tmp_path / f"teacher.{suffix}"
    file.write_bytes(content)
    with pytest.raises(TypeError, match="cannot be loaded"):
        ClassificationTeacher(str(file) if suffix == "onnx" else f"timm:resnet18@{file}")


@pytest.mark.parametrize("kind", ["os.system", "builtins.exec", "within a trained model", "a TorchScript that writes"])
def test_trusted_files_may_run_their_code(kind, teacher, tmp_path):
    """The other side: these files do what they are accused of once they are trusted."""
    HOSTILE[kind][0](tmp_path / "hostile.pt", teacher, tmp_path / "canary")
    with contextlib.suppress(TypeError):  # there is no network in two of them
        ClassificationTeacher(tmp_path / "hostile.pt", trusted=True).vet(32, 3)
    assert (tmp_path / "canary").exists()


def test_loading_leaves_nothing_allowed_behind(teacher):
    before = set(torch.serialization.get_safe_globals())
    ClassificationTeacher(teacher)
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_trusted_foreign_class_loads(teacher, tmp_path):
    changed(tmp_path / "best.pt", teacher, adopt)
    assert isinstance(ClassificationTeacher(tmp_path / "best.pt", trusted=True).model.model.extra, Foreign)


def test_a_trusted_network_saved_as_a_whole_loads_or_says_what_it_lacks(tmp_path, monkeypatch):
    file = tmp_path / "whole.pt"
    network = seen(torchvision.models.resnet18(num_classes=3))
    torch.save(network, file)
    teacher = ClassificationTeacher(file, trusted=True)
    assert teacher.source == str(file)
    assert teacher.content_hash == hashlib.sha256(file.read_bytes()).hexdigest()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(teacher(images)[0], network(images))
    monkeypatch.delattr("torchvision.models.resnet.BasicBlock")
    with pytest.raises(TypeError, match=r"code that is not here .*BasicBlock.*timm:resnet18@") as e:
        ClassificationTeacher(file, trusted=True)
    assert "damaged" not in str(e.value)


def test_torch_without_a_safe_reader_is_not_trusted_with_files(teacher, monkeypatch):
    monkeypatch.delattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
    with pytest.raises(TypeError, match=r"torch 2\.6 or newer"):
        ClassificationTeacher(teacher)


def test_no_memory_is_taken_before_sizes_are_known(tmp_path):
    """A declared gigabyte is refused while the address space has no room for it."""
    pytest.importorskip("resource")
    archive(tmp_path / "best.pt", tensor((2**28,), (0,)))
    code = (
        "import resource\n"
        "import sys\n"
        "from ultralytics.nn.distillation.classifier import ClassificationTeacher\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    ClassificationTeacher(sys.argv[1])\n"
        "except TypeError as e:\n"
        "    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "best.pt"], capture_output=True, text=True, check=False
    )
    assert "damaged or forged" in done.stdout, done.stderr
