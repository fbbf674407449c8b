"""Settings and data that several test modules share."""

import csv
import gzip
import importlib.util
import json
import os.path
import re
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.tasks import load_checkpoint

from distill_train_example import load_digit_images, write_image_folder

TRAINING = {"imgsz": 32, "batch": 32, "epochs": 1, "optimizer": "AdamW", "lr0": 0.002, "plots": False, "device": "cpu"}
ROOT = Path(__file__).resolve().parents[1]
MANUALS = {"docs": ("works", "refused"), "docs/zh-CN": ("可用", "拒绝")}  # folders of pages
DISTILLATION_LOSSES = ("response_loss", "feature_loss", "attention_loss")


def write_digits(folder: Path, train: int = 20, val: int = 5, names: list[str] | None = None) -> Path:
    """Write the first digits of each class as an image folder."""
    images, labels, digits = load_digit_images()
    names = names or digits
    by_class = [np.flatnonzero(labels == c) for c in range(len(names))]
    chosen = {
        "train": np.concatenate([i[:train] for i in by_class]),
        "val": np.concatenate([i[train : train + val] for i in by_class]),
    }
    return write_image_folder(folder, {k: (images[i], labels[i]) for k, i in chosen.items()}, names)


def write_idx(folder: Path) -> None:
    """Write digits in Fashion-MNIST's file format."""
    images, labels, _ = load_digit_images()
    images = images[:, 2:30, 2:30]
    for split, start in (("train", 0), ("t10k", 1000)):
        x, y = images[start : start + 600], labels[start : start + 600].astype(np.uint8)
        header = struct.pack(">IIII", 2051, len(x), 28, 28)
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + x.tobytes()))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">II", 2049, len(y)) + y.tobytes())
        )


def spoil_pixels(file):
    """Write a PNG whose chunks are all in order, but whose pixels are noise that does not unpack."""
    content = file.read_bytes()
    start = content.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    data = b"IDAT" + bytes(range(1, 9))
    chunk = struct.pack(">I", 8) + data + struct.pack(">I", zlib.crc32(data))
    file.write_bytes(content[:start] + chunk + content[start + 12 + length :])


def load_benchmark(name: str) -> ModuleType:
    """Import a benchmark script from its file."""
    file = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(document, target):
    """Return the path, from the root, of what a link of a document leads to."""
    return Path(os.path.normpath(Path(document).parent / target)).as_posix()


def links(text):
    """Return the file and the anchor of each link that stays in the repository."""
    targets = [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", x)]
    return [tuple(unquote(x).partition("#")[::2]) for x in targets]


def anchors(text):
    """Return the anchors of the headings of a text, by GitHub's rules."""
    found = Counter()
    for heading in re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()  # of a link, its words
        kinds = zip(shown, map(unicodedata.category, shown), strict=True)
        found[
            "".join(c for c, kind in kinds if c in " -" or kind[0] in "LM" or kind in {"Nd", "Pc"}).replace(" ", "-")
        ] += 1
    return {f"{anchor}-{i}" if i else anchor for anchor, times in found.items() for i in range(times)}


def compatibility_table(manual: str, mark: str) -> dict[str, str]:
    """Return what a manual says of each of upstream's settings, in the table at a mark: works or refused."""
    text = (ROOT / manual / "reference.md").read_text(encoding="utf-8")
    table = re.search(rf"<!-- {mark} -->\n\n(.*?)\n(\n|$)", text, re.DOTALL).group(1)
    words = dict(zip(MANUALS[manual], MANUALS["docs"], strict=True))
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {first.strip("`"): words[result] for first, result, *_ in cells}


PREDICT = """
import importlib, json, sys
ours = set(json.loads(sys.argv[1]))
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ours:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
for name in ours:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as e:
        assert str(e) in ours, e
    else:
        raise SystemExit(f'{name} is not blocked')
from ultralytics import YOLO
for file in sys.argv[4:]:
    model = YOLO(file)
    result = model.predict(sys.argv[2], imgsz=int(sys.argv[3]), verbose=False, device='cpu')[0]
    said = result.probs if model.task == 'classify' else result.obb if model.task == 'obb' else result.boxes
    print('opened', model.task, float(said.data.sum()))
"""


def predict_elsewhere(files, image, imgsz, folder):
    """Return the task of checkpoints and the sum of what they say, in a process that can import no module of ours."""
    ours = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in (ROOT / "ultralytics").rglob("*.py")
    ]
    assert DistillationClassificationTrainer.__module__ in ours
    script = folder / "predict.py"
    script.write_text(PREDICT)
    command = [sys.executable, script, json.dumps(ours), image, str(imgsz), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("opened")]


def train(overrides, trainer_class=DistillationClassificationTrainer, **callbacks):
    """Train to the end, with callbacks by event, and return the trainer."""
    trainer = trainer_class(overrides=overrides)
    for event, callback in callbacks.items():
        trainer.add_callback(event, callback)
    trainer.train()
    return trainer


def plain(overrides):
    """Return the arguments that a plain run takes."""
    return {k: v for k, v in overrides.items() if k in {*TRAINING, "model", "data", "project", "epochs", "seed"}}


def rows(trainer):
    """Return the lines of a run's results.csv."""
    with trainer.csv.open() as file:
        return list(csv.DictReader(file))


def weights(file):
    """Return a checkpoint's state dict."""
    return load_checkpoint(file)[0].state_dict()


def same(a, b):
    """Tell whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Waiting(TorchDispatchMode):
    """Records what would make the host wait for a GPU."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().removeprefix("aten::").partition(".")[0]
        selects = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if selects or name in self.OPERATORS:
            self.operators.append(name)
        return operator(*args, **(kwargs or {}))


class Stopped(Exception):
    """Stands for whatever ends a run early."""


def compile_by_tracing(monkeypatch):
    """Let PyTorch compile without a compiler of C++, which takes minutes; it traces all the same."""
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda network, **given: traced(network))


def stop_after(epoch):
    """Return a callback that ends a run after an epoch, counted from 0."""

    def callback(trainer):
        if trainer.epoch == epoch:
            raise Stopped

    return callback
