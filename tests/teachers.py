"""Teachers of every source, made without a download: trained or random weights, saved as their users would."""

import os
import tempfile
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from ultralytics import YOLO

from distill_train_example import load_digit_images

NAMES = [str(c) for c in range(10)]


def seen(network: nn.Module, imgsz: int = 64) -> nn.Module:
    """Return a network of random weights whose BatchNorm layers have seen images."""
    with torch.no_grad():
        network.train()(torch.rand(8, 3, imgsz, imgsz))
    return network.eval()


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def shell(canary):
    """What, in a file, makes another file when it is unpickled."""
    return Call(os.system, f"echo run > {canary}")


def with_path(checkpoint: Path, file: Path, module: str, name: str) -> Path:
    """Write a checkpoint that holds a path of a class of another Python or system, and return its file."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "plain.pt")
        torch.save({**torch.load(checkpoint, weights_only=False), "path": PurePosixPath("runs")}, plain)
        old, new = (f"c{x}\n".encode() for x in ("pathlib\nPurePosixPath", f"{module}\n{name}"))
        with zipfile.ZipFile(plain) as whole, zipfile.ZipFile(file, "w") as crafted:
            for record in whole.namelist():
                content = whole.read(record)
                if record.endswith("/data.pkl"):
                    assert content.count(old) == 1
                    content = content.replace(old, new)
                crafted.writestr(record, content)
    return file


class Centroids(nn.Module):
    """A real classifier without training: logits are minus the squared distances to each class's mean digit."""

    def __init__(self, names=NAMES, shuffle=None):
        super().__init__()
        images, labels, _ = load_digit_images()
        means = torch.stack([torch.tensor(images[labels == c]).float().div(255).mean(0).flatten() for c in range(10)])
        self.means = nn.Parameter(means if shuffle is None else means[shuffle])
        self.names = list(names)

    def forward(self, x):
        return -torch.cdist(x.mean(1).flatten(1), self.means[: len(self.names)]).square() / 4


class Answer(torch.nn.Module):
    """A network that answers what it is told."""

    def __init__(self, answer, names=None):
        super().__init__()
        self.answer = answer
        if names:
            self.names = names

    def forward(self, x):
        return self.answer(x)


def ultralytics(folder: Path, teacher: Path):
    return str(teacher)


def torchvision_file(folder: Path, teacher: Path):
    network = seen(torchvision.models.resnet18(num_classes=10))
    torch.save(
        {"state_dict": network.state_dict(), "class_to_idx": {n: i for i, n in enumerate(NAMES)}}, folder / "w.pth"
    )
    return f"torchvision:resnet18@{folder / 'w.pth'}"


def timm_safetensors(folder: Path, teacher: Path):
    network = seen(timm.create_model("resnet18", num_classes=10))
    save_file(network.state_dict(), folder / "w.safetensors", {"names": str(NAMES)})
    return f"timm:resnet18@{folder / 'w.safetensors'}"


def timm_convnext(folder: Path, teacher: Path):
    network = timm.create_model("convnext_atto", num_classes=10)
    torch.save({"model": network.state_dict(), "names": NAMES}, folder / "w.pth")
    return f"timm:convnext_atto@{folder / 'w.pth'}"


def timm_vit(folder: Path, teacher: Path):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64)
    torch.save({"model": network.state_dict(), "names": NAMES}, folder / "w.pth")
    return {"teacher": f"timm:vit_tiny_patch16_224@{folder / 'w.pth'}", "teacher_imgsz": 64}


def exported(folder: Path, teacher: Path, target: str, **settings):
    file = folder / "model.pt"
    file.write_bytes(teacher.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return YOLO(file).export(format=target, imgsz=32, device="cpu", **settings)


def torchscript(folder: Path, teacher: Path):
    return {"teacher": exported(folder, teacher, "torchscript"), "teacher_trusted": True}


def onnx(folder: Path, teacher: Path):
    return exported(folder, teacher, "onnx")


def module(folder: Path, teacher: Path):
    network = seen(torchvision.models.resnet18(num_classes=10))
    network.names = NAMES
    return network


def several(folder: Path, teacher: Path):
    return {"teacher": [str(teacher), timm_safetensors(folder, teacher)], "teacher_weights": [2, 1]}


def itself(folder: Path, teacher: Path):
    return "self"


SOURCES = {
    f.__name__: f
    for f in (
        *(ultralytics, torchvision_file, timm_safetensors, timm_convnext, timm_vit),
        *(torchscript, onnx, module, several, itself),
    )
}


def arguments(source: str, folder: Path, teacher: Path) -> dict:
    """Return the training arguments that name a teacher of a source."""
    given = SOURCES[source](folder, teacher)
    return given if isinstance(given, dict) else {"teacher": given}
