# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What does a teacher cost? Steps, whole epochs and memory of distilled training against plain training.

Usage:
    python benchmarks/speed.py
    python benchmarks/speed.py imgsz=224 batch=16 repeats=30 model=yolo11n-cls.yaml teacher_model=yolo11l-cls.yaml

Every step is one of the real trainer: forward, losses, backward, clipping, optimizer, EMA and a look at the loss. They
are timed in turn in one process, so that what else the machine does falls on all of them; medians and their ratios
are reported. Epochs are the trainer's own, with its data loader; memory is that of a process for each kind of training.
timm's and torchdistill's steps are of the same two networks, as they are loaded, with the same optimizer and EMA, where
these packages are installed.
`pairs`, i.e. `s>n,x>l`, are sizes of networks, teacher>student, that are measured too, and plotted beside the output.
A sweep is lists of `imgsz` and `batch`, i.e. `imgsz=32,64 batch=256,16 kinds=plain,distilled epochs=0 memory=0`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.cfg.distillation import parse_arguments
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_compare import machine
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.teacher import Teacher
from ultralytics.utils.torch_utils import autocast, select_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import CLASSES, PEERS

from distill_train_example import write_image_folder

SETTINGS = {
    "imgsz": (32, 224),
    "batch": (64, 16),  # one for each image size
    "repeats": 40,
    "warmup": 5,
    "model": "yolo11n-cls.yaml",
    "teacher_model": "yolo11s-cls.yaml",
    "images": (6000, 320),  # of the epochs, one for each image size
    "data": None,  # image folder of the epochs; None for random images
    "epochs": 2,  # of each kind, in turn; 0 for none
    "memory": 3,  # processes of each kind, in turn; 0 for none
    "kinds": None,  # of steps; None for all
    "threads": None,  # of steps on a CPU; None for upstream's
    "pairs": None,  # teacher>student,... by their size of yolo11, at the first image size
    "device": None,
    "amp": True,
    "output": str(Path(__file__).with_name("results") / "speed.json"),
}
LOGITS = {"feature_distill": False, "attention_distill": False}
KINDS = {
    "plain": None,
    "distilled": {},
    "sequential": {"teacher_overlap": False},
    "compiled": {"teacher_compile": True},
    "overlapped": {"teacher_compile": "reduce-overhead", "teacher_overlap": True},  # on CUDA only
    "response": LOGITS,
    "sequential response": {**LOGITS, "teacher_overlap": False},
    "cached": {"teacher_cache": "ram", "teacher_views": 1},
    "cached response": {**LOGITS, "teacher_cache": "ram", "teacher_views": 1},
}
EPOCH_KINDS = ("plain", "distilled", "sequential", "response", "cached", "cached response")
MEMORY_KINDS = ("plain", "distilled", "sequential", "response", "sequential response", "cached response")
RATIOS = (
    # With the sum of its parts
    *((kind, ("plain", "teacher")) for kind in ("distilled", "sequential", "compiled", "overlapped")),
    ("distilled", ("plain",)),
    ("sequential", ("plain",)),
    ("response", ("plain",)),
    ("sequential response", ("plain",)),
    ("cached", ("plain",)),
    ("cached response", ("plain",)),
    ("timm", ("response",)),
    ("torchdistill", ("response",)),
)


def main(arguments: list[str]) -> None:
    """Run the benchmark with `key=value` arguments."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    given = parse_arguments(arguments)
    settings = {k: given.pop(k, v) for k, v in SETTINGS.items()}
    output = Path(settings.pop("output"))
    per_size = [np.atleast_1d(settings[k]).tolist() for k in ("imgsz", "batch", "images")]
    if not settings["epochs"]:
        per_size[2] = [0] * len(per_size[0])
    if len(per_size[0]) > 1 and len({len(values) for values in per_size}) > 1:
        raise ValueError(
            "'imgsz', 'batch' and 'images' need one value for each image size, as many of one as of another."
        )
    sizes = list(zip(*per_size, strict=False))  # of one size, the first of each
    if kind := given.pop("memory_of", None):
        print(peak_memory(settings, given, *sizes[0][:2], kind))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for imgsz, batch, images in sizes:
            place = Path(folder) / f"{imgsz}_{batch}"
            own = {**settings, "images": images}
            row = {"imgsz": imgsz, "batch": batch, **measure_steps(own, given, imgsz, batch, place, kinds_of(own))}
            row["epochs"] = measure_epochs(own, given, imgsz, batch, place / "epochs")
            row["memory"] = measure_memory(own, given, imgsz, batch)
            results.append(row)
        pairs = measure_pairs(settings, given, *sizes[0][:2], Path(folder) / "pairs")
    print("".join(f"\n{table(results, what)}\n" for what in ("steps", "epochs", "memory") if results[0][what]))
    settings["data"] = settings["data"] and Path(settings["data"]).name
    report = {"machine": machine(), "setting": {**settings, **given}, "results": results, "pairs": pairs}
    if pairs:
        print(f"\n{table(pairs, 'steps')}")
        plot(pairs, output.with_suffix(".png"))
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Saved to {output}")


def kinds_of(settings: dict[str, Any]) -> list[str]:
    """Return the kinds of steps to measure, plain ones first."""
    on_cuda = select_device(settings["device"], verbose=False).type == "cuda"
    valid = [kind for kind in KINDS if on_cuda or kind != "overlapped"]
    chosen = str(settings["kinds"]).split(",") if settings["kinds"] else valid
    if unknown := [kind for kind in chosen if kind not in valid]:
        raise ValueError(f"'kinds={settings['kinds']}' has unknown {unknown}. Valid kinds are {valid}.")
    return list(dict.fromkeys(["plain", *chosen]))


def table(results: list[dict[str, Any]], what: str) -> str:
    """Return a Markdown table of one thing that was measured, a row for each image size."""
    names = list(results[0][what])
    of = [name for name in ("teacher", "student", "imgsz", "batch") if name in results[0]]
    lines = [f"| {' | '.join([*of, *names])} |", "|---" * len([*of, *names]) + "|"]
    for r in results:
        lines.append(f"| {' | '.join([*(str(r[k]) for k in of), *(show(r[what][name]) for name in names)])} |")
    return "\n".join(lines)


def show(figure: Any) -> str:
    """Return a figure, with its quartiles if it has them."""
    if not isinstance(figure, dict):
        return f"{figure:.2f}"
    low, high = figure["quartiles"]
    return f"{figure['median']:.3f} ({low:.3f} to {high:.3f})"


def make_data(folder: Path, count: int, imgsz: int) -> tuple[Path, list[str]]:
    """Write random images of every class, and return their folder and the class names."""
    images = np.random.default_rng(0).integers(0, 256, (count, imgsz, imgsz, 3), dtype=np.uint8)
    labels = np.arange(count) % CLASSES
    names = [str(c) for c in range(CLASSES)]
    val = slice(4 * CLASSES)
    return write_image_folder(folder, {"train": (images, labels), "val": (images[val], labels[val])}, names), names


def make_overrides(settings: dict[str, Any], data: Path, imgsz: int, batch: int, project: Path) -> dict[str, Any]:
    """Return the arguments of a plain run."""
    return {
        **{k: settings[k] for k in ("model", "device", "amp")},
        **{"data": str(data), "imgsz": imgsz, "batch": batch, "optimizer": "AdamW", "plots": False},
        **{"project": str(project), "verbose": False, "epochs": 10},
    }


def make_trainer(overrides: dict[str, Any], kind: str, teacher: Path, given: dict[str, Any]) -> ClassificationTrainer:
    """Return the trainer of one kind of training."""
    if KINDS[kind] is None:
        return ClassificationTrainer(overrides=dict(overrides))
    return DistillationClassificationTrainer(
        overrides={**overrides, "teacher": str(teacher), "teacher_check": False, **KINDS[kind], **given}
    )


def prepare(trainer: ClassificationTrainer) -> ClassificationTrainer:
    """Bring a trainer to its first step."""
    trainer._setup_train()
    trainer.epoch = 0
    trainer._model_train()
    return trainer


def measure_steps(
    settings: dict[str, Any],
    given: dict[str, Any],
    imgsz: int,
    batch: int,
    folder: Path,
    kinds: Iterable[str],
) -> dict[str, Any]:
    """Time steps of every kind in turn, and return their medians and the ratios of these."""
    data, names = make_data(folder / "data", max(2 * batch, 4 * CLASSES), imgsz)
    overrides = make_overrides(settings, data, imgsz, batch, folder)
    teacher_file = make_teacher(settings["teacher_model"], names, folder / "teacher.pt")
    trainers = {kind: prepare(make_trainer(overrides, kind, teacher_file, given)) for kind in kinds}
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])  # only now, as each trainer sets upstream's
    plain = trainers["plain"]
    bare = Teacher(teacher_file).to(plain.device)
    x = torch.rand(batch, 3, imgsz, imgsz)
    inputs = {
        "img": x,
        "cls": torch.arange(batch) % CLASSES,
        "index": torch.arange(batch),
        "view": torch.zeros(batch).long(),
    }
    inputs = {k: v.to(plain.device) if k in {"img", "cls"} else v for k, v in inputs.items()}

    def forward() -> None:
        with precision(plain):
            bare(inputs["img"])

    runs = {"teacher": forward}
    for kind, trainer in trainers.items():
        runs[kind] = partial(step, trainer, inputs, trainer.model)
    for name in PEERS if "response" in trainers else ():  # whose work they do
        trainer = prepare(make_trainer(overrides, "plain", teacher_file, given))
        try:
            teacher = YOLO(teacher_file).model.requires_grad_(False)  # as a user of theirs has it, not fused
            loss = PEERS[name](trainer.model, teacher.to(plain.device))
        except ImportError as e:
            print(f"{name} is not measured: {e}")
            continue
        runs[name] = partial(step, trainer, inputs, loss)
    for _ in range(settings["warmup"]):
        for run in runs.values():
            run()
    times = take_turns(runs, settings["repeats"], plain.device)
    ratios = {}
    for over, under in RATIOS:
        if {over, *under} <= runs.keys():
            name = f"{over} / ({' + '.join(under)})" if len(under) > 1 else f"{over} / {under[0]}"
            ratios[name] = ratio(times[over], *(times[k] for k in under))
    return {"median_ms": {k: 1000 * statistics.median(v) for k, v in times.items()}, "steps": ratios}


def take_turns(
    runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device, before: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Return the seconds of every repeat of each run, without those of what is called before each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before()
            times[name].append(timed(run, device))
    return times


def ratio(over: list[float], *under: list[float]) -> dict[str, Any]:
    """Return the ratio of the medians of some times to the sum of others', and the quartiles of each repeat's."""
    each = [a / sum(b) for a, *b in zip(over, *under, strict=True)]
    median = statistics.median(over) / sum(map(statistics.median, under))
    return {"median": median, "quartiles": np.quantile(each, (0.25, 0.75)).tolist()}


def measure_pairs(
    settings: dict[str, Any], given: dict[str, Any], imgsz: int, batch: int, folder: Path
) -> list[dict[str, Any]]:
    """Time the steps of networks of many sizes."""
    rows = []
    for pair in settings["pairs"].split(",") if settings["pairs"] else ():
        teacher, student = (f"yolo11{size}-cls.yaml" for size in pair.split(">"))
        names = {"teacher_model": teacher, "model": student}
        place = folder / pair.replace(">", "_")
        row = {"teacher": teacher, "student": student, "imgsz": imgsz, "batch": batch}
        row |= measure_steps({**settings, **names}, given, imgsz, batch, place, ("plain", "distilled"))
        row["parameters"] = sum(p.numel() for p in Teacher(place / "teacher.pt").model.parameters())
        rows.append(row)
    return rows


def plot(pairs: list[dict[str, Any]], file: Path) -> None:
    """Draw the cost of a distilled step against the teacher's size, a line for each student."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for student in dict.fromkeys(row["student"] for row in pairs):
        rows = sorted((r for r in pairs if r["student"] == student), key=lambda r: r["parameters"])
        sizes = [r["parameters"] / 1e6 for r in rows]
        axes.plot(sizes, [r["steps"]["distilled / plain"]["median"] for r in rows], "o-", label=Path(student).stem)
    axes.set(xlabel="teacher's parameters, million", ylabel="distilled step / plain step", ylim=(0, None))
    axes.legend(title="student")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def measure_epochs(
    settings: dict[str, Any], given: dict[str, Any], imgsz: int, batch: int, folder: Path
) -> dict[str, Any]:
    """Return whole epochs of each kind relative to plain ones: loader, training, saving, validation."""
    if not settings["epochs"]:
        return {}
    if settings["data"]:
        data = Path(settings["data"])
        names = sorted(x.name for x in (data / "train").iterdir() if x.is_dir())
        folder.mkdir(parents=True)
    else:
        data, names = make_data(folder / "data", settings["images"], imgsz)
    teacher = make_teacher(settings["teacher_model"], names, folder / "teacher.pt")
    overrides = make_overrides(settings, data, imgsz, batch, folder)
    seconds: dict[str, list[float]] = {kind: [] for kind in EPOCH_KINDS}
    for _ in range(settings["epochs"]):  # in turn; of each run the second epoch, when a cache of one view is warm
        for kind in EPOCH_KINDS:
            trainer, ends = make_trainer({**overrides, "epochs": 2}, kind, teacher, given), []
            trainer.add_callback("on_fit_epoch_end", lambda trainer, ends=ends: ends.append(time.perf_counter()))
            trainer.train()
            seconds[kind].append(ends[1] - ends[0])
    return {f"{kind} / plain": ratio(seconds[kind], seconds["plain"]) for kind in EPOCH_KINDS[1:]}


def measure_memory(settings: dict[str, Any], given: dict[str, Any], imgsz: int, batch: int) -> dict[str, Any]:
    """Return the peak memory of processes of each kind, MB, and relative to plain ones."""
    if not settings["memory"]:
        return {}
    peaks: dict[str, list[float]] = {kind: [] for kind in MEMORY_KINDS}
    for _ in range(settings["memory"]):
        for kind, values in peaks.items():
            arguments = [f"{k}={v}" for k, v in {**settings, **given, "imgsz": imgsz, "batch": batch}.items()]
            command = [sys.executable, __file__, *arguments, f"memory_of={kind}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout.split()[-1]))
    plain = peaks.pop("plain")
    return {
        "plain, MB": statistics.median(plain),
        **{f"{kind} / plain": ratio(values, plain) for kind, values in peaks.items()},
    }


def peak_memory(settings: dict[str, Any], given: dict[str, Any], imgsz: int, batch: int, kind: str) -> float:
    """Return what training takes at most in a few steps beyond what the libraries take, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        data, names = make_data(Path(folder) / "data", max(2 * batch, 4 * CLASSES), imgsz)
        teacher = make_teacher(settings["teacher_model"], names, Path(folder) / "teacher.pt")
        overrides = make_overrides(settings, data, imgsz, batch, Path(folder))
        run_steps(prepare(make_trainer({**overrides, "batch": 2}, "plain", teacher, given)))  # loads the libraries
        gc.collect()
        before = memory_now(reset=True)
        trainer = prepare(make_trainer(overrides, kind, teacher, given))
        run_steps(trainer)
        if trainer.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        return (memory_now(peak=True) - before) / 1e3


def run_steps(trainer: ClassificationTrainer) -> None:
    """Run a few steps on the data."""
    for _ in range(3):
        for inputs in trainer.train_loader:
            step(trainer, inputs, trainer.model)


def memory_now(peak: bool = False, reset: bool = False) -> float:
    """Return the kilobytes of this process that are in memory, or their peak since the last reset, as Linux counts."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first
        Path("/proc/self/clear_refs").write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    name = "VmHWM" if peak else "VmRSS"
    return float(next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line).split()[1])


def make_teacher(name: str, names: list[str], file: Path) -> Path:
    """Save a network that counts as trained: its BatchNorm layers have seen a batch. Weights do not change the time."""
    model = YOLO(name)
    model.model = type(model.model)(model.model.yaml, nc=len(names), verbose=False)
    model.model.names = dict(enumerate(names))
    model.model.train()(torch.rand(4, 3, 64, 64))
    model.save(file)
    return file


def precision(trainer: ClassificationTrainer) -> AbstractContextManager:
    """Return the autocast of upstream's training loop."""
    return autocast(torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp, device=trainer.device.type)


def step(trainer: ClassificationTrainer, batch: dict[str, torch.Tensor], model: Callable) -> None:
    """Run one training step as upstream's loop does."""
    trainer.run_callbacks("on_train_batch_start")
    with precision(trainer):
        loss, trainer.loss_items = model(trainer.preprocess_batch(dict(batch)))
        trainer.loss, trainer.tloss = loss.sum(), trainer.loss_items
    trainer.scaler.scale(trainer.loss).backward()
    trainer.optimizer_step()
    trainer.run_callbacks("on_train_batch_end")


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
