# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What does a teacher do for a student? Gain, speed of convergence, few labels, robustness and calibration.

Usage:
    python benchmarks/evidence.py source=path/to/idx/files
    python benchmarks/evidence.py experiments=digits_s_n seeds=0,1,2

Each experiment is a pair of yolo11 sizes, teacher and student, on a dataset, with all labels or a part of them, and
is written to `output`/NAME.json after every run; an interrupted one goes on where it stopped. Students of an
experiment take as many steps, whatever part of the labels they have. Other arguments are those of accuracy.py, but for
`variants`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torchvision.transforms.v2.functional import affine, gaussian_blur
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data import ClassificationDataset
from ultralytics.engine.distillation.compare import run_name
from ultralytics.utils.distillation.metrics import calibration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, read_settings, write_results
from benchmarks.paired_runs import PROJECT, RUN_SETTINGS, TRAINING, compare, train_teacher, write_dataset

SETTINGS = {
    **RUN_SETTINGS,
    "seeds": (0, 1, 2, 3, 4),
    "output": str(RESULTS / "evidence"),  # a folder
    "experiments": None,  # separated by commas; all by default
}
FASHION = {"dataset": "fashion-mnist", "teacher_train": 2500, "teacher_epochs": 10}
DIGITS = {"dataset": "digits", "teacher_train": 1000, "teacher_epochs": 20, "epochs": 10, "fliplr": 0.0}
EXPERIMENTS = {  # 143 is all that the digits have of most classes
    "fashion_s_n": {**FASHION, "train": 600, "epochs": 8},
    "fashion_s_n_third": {**FASHION, "train": 200, "epochs": 24},
    "fashion_s_n_tenth": {**FASHION, "train": 60, "epochs": 80},
    "digits_s_n": {**DIGITS, "train": 1000},
    "digits_s_n_third": {**DIGITS, "train": 48, "epochs": 30},
    "digits_s_n_tenth": {**DIGITS, "train": 14, "epochs": 100},
    "digits_m_s": {**DIGITS, "train": 1000, "teacher_model": "yolo11m-cls.yaml", "model": "yolo11s-cls.yaml"},
    "fashion_m_s": {
        **FASHION,
        "train": 600,
        "teacher_train": 1000,
        "teacher_model": "yolo11m-cls.yaml",
        "model": "yolo11s-cls.yaml",
    },
}
CORRUPTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of images in 0 to 1, 32 px wide
    "clean": lambda x: x,
    "noise": lambda x: (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
    "blur": lambda x: gaussian_blur(x, [5, 5], [1.0, 1.0]),
    "shift": lambda x: affine(x, angle=0, translate=[3, 3], scale=1, shear=[0, 0]),
}


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    _, given = read_settings(arguments, __doc__, {})  # an experiment's settings stand between the defaults and these
    chosen = {**SETTINGS, **given}
    names, output = chosen["experiments"], Path(chosen["output"])
    output.mkdir(exist_ok=True)
    for name in names.split(",") if names else EXPERIMENTS:
        own = {**TRAINING, **SETTINGS, **EXPERIMENTS[name], **given}
        own |= {"runs": name, "output": str(output / f"{name}.json")}
        settings = {k: own.pop(k) for k in SETTINGS}
        report = compare(settings, own, {"plain": None, "distilled": {}})
        evaluate_all(report, settings, own)
        report["findings"] = findings(report)
        write_results(settings["output"], report)
    files = {name: output / f"{name}.json" for name in EXPERIMENTS}
    print(f"\n{table({name: json.loads(file.read_text()) for name, file in files.items() if file.exists()})}")


def evaluate_all(report: dict[str, Any], settings: dict[str, Any], training: dict[str, Any]) -> None:
    """Add accuracy under corruptions and calibration error, in percent, of the teacher and every student."""
    args = get_cfg(overrides={k: training[k] for k in ("imgsz",)})
    dataset = ClassificationDataset(str(write_dataset(settings, settings["train"]) / "val"), args, prefix="val")
    samples = [dataset[i] for i in range(len(dataset))]
    images, labels = torch.stack([s["img"] for s in samples]), torch.tensor([s["cls"] for s in samples])
    measured = report.setdefault("measured", {})
    if "teacher" not in measured:
        teacher = settings["teacher"] or train_teacher(settings, training)
        measured["teacher"] = {"": measure(teacher, images, labels)}
    for variant, by_seed in report["top1"].items():
        for seed in by_seed.keys() - measured.setdefault(variant, {}).keys():
            file = PROJECT / report["runs"] / run_name(variant, seed) / "weights" / "best.pt"
            measured[variant][seed] = measure(file, images, labels)


def measure(file: Path | str, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return accuracy on images corrupted in each way, and expected calibration error on clean ones, in percent."""
    model = YOLO(file).model.eval()
    figures = {}
    with torch.inference_mode():
        for name, corrupt in CORRUPTIONS.items():
            logits = torch.cat([model(part)[1] for part in corrupt(images).split(256)])
            figures[name] = 100 * (logits.argmax(1) == labels).double().mean().item()
            if name == "clean":
                figures["calibration error"] = 100 * calibration(logits, labels).error
    return figures


def findings(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the experiment shows: for each figure its mean, 95 % interval and values by seed.

    `epochs to plain, %` is the first epoch at whose end the distilled student is as good as the plain one ever got, in
    percent of the epochs that the plain one trained; a student that never is counts as one epoch more than it trained.
    `gap closed, %` is NaN where plain student and teacher are equally good.
    """
    plain, distilled = report["top1"]["plain"], report["top1"]["distilled"]
    curves, measured, teacher = report["curves"], report["measured"], report["teacher_top1"]
    seeds = sorted(plain.keys() & distilled.keys(), key=int)
    values = {
        "gain": [distilled[s] - plain[s] for s in seeds],
        "gap closed, %": [100 * (distilled[s] - plain[s]) / (teacher - plain[s] or np.nan) for s in seeds],
        "epochs to plain, %": [epochs_to(curves["distilled"][s], curves["plain"][s]) for s in seeds],
    }
    for name in measured["teacher"][""]:
        values[f"{name}, change"] = [measured["distilled"][s][name] - measured["plain"][s][name] for s in seeds]
    rows = {}
    for name, by_seed in values.items():
        interval = list(stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)) if len(by_seed) > 1 else None
        rows[name] = {"mean": float(np.mean(by_seed)), "interval": interval, "by seed": by_seed}
    return rows


def epochs_to(distilled: list[float], plain: list[float]) -> float:
    """Return the share of the epochs, percent, after which one curve reaches the best of the other."""
    reached = next((i for i, top1 in enumerate(distilled, start=1) if top1 >= max(plain)), len(distilled) + 1)
    return 100 * reached / len(plain)


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Format the findings of all experiments as two Markdown tables: accuracy, and what else changed."""
    reports = {name: report for name, report in reports.items() if "findings" in report}
    lines = [[], []]
    for experiment, report in reports.items():
        tops = [report["teacher_top1"], *(report["summary"][k]["mean"] for k in ("plain", "distilled"))]
        found = {name: row for name, row in report["findings"].items() if name != "clean, change"}  # which is the gain
        names = list(found)[:3], list(found)[3:]
        heads = ["experiment", "seeds", "teacher", "plain", "distilled", *names[0]], ["experiment", *names[1]]
        cells = [experiment, str(len(found["gain"]["by seed"])), *(f"{x:.2f}" for x in tops)], [experiment]
        for part, head, own, chosen in zip(lines, heads, cells, names, strict=True):
            if not part:
                part += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            part.append(f"| {' | '.join([*own, *(show(found[name]) for name in chosen)])} |")
    return "\n\n".join("\n".join(part) for part in lines)


def show(row: dict[str, Any]) -> str:
    """Return a finding's mean, and its interval if there are seeds enough."""
    interval = " ({:.1f} to {:.1f})".format(*row["interval"]) if row["interval"] else ""
    return f"{row['mean']:.1f}{interval}"


if __name__ == "__main__":
    main(sys.argv[1:])
