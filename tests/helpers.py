"""Settings and data that several test modules share."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np

from distill_train_example import load_digit_images, write_image_folder

TRAINING = {"imgsz": 32, "batch": 32, "epochs": 1, "optimizer": "AdamW", "lr0": 0.002, "plots": False, "device": "cpu"}


def write_digits(
    folder: Path, train: int = 20, val: int = 5, classes: int = 10, names: list[str] | None = None
) -> Path:
    """Write the first digits of each class as an image folder."""
    images, labels, digits = load_digit_images()
    names = names or digits
    by_class = [np.flatnonzero(labels == c) for c in range(len(names))]
    chosen = {
        "train": np.concatenate([i[:train] for i in by_class]),
        "val": np.concatenate([i[train : train + val] for i in by_class]),
    }
    return write_image_folder(folder, {k: (images[i], labels[i]) for k, i in chosen.items()}, names)


def load_benchmark(name: str) -> ModuleType:
    """Import a benchmark script from its file."""
    file = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
