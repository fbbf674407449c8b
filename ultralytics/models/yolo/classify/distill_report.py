# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The report of a distilled run: what the teacher did for the student, where, and what to try next."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import pickle
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor
from ultralytics.cfg.distillation import as_list
from ultralytics.data.wrapped import spaced_batches
from ultralytics.models.yolo.classify.distill_charts import (
    Example,
    draw_accuracy,
    draw_calibration,
    draw_classes,
    draw_examples,
    draw_losses,
)
from ultralytics.nn.class_names import read_names
from ultralytics.nn.taps import FeatureTaps
from ultralytics.nn.tasks import ClassificationModel, load_checkpoint
from ultralytics.utils import DEFAULT_CFG_DICT, YAML
from ultralytics.utils.distillation.advice import Figures, advise
from ultralytics.utils.distillation.metrics import agreement, calibration, divergence, normalized_entropy
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import get_flops, get_num_params

if TYPE_CHECKING:
    from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer

__all__ = ("check_baseline", "find_baseline", "read_curve", "remove_report", "without_folders", "write_report")

CHARTS = ("accuracy", "losses", "classes", "calibration", "examples")
IMAGES = 2000  # of the validation split, evenly spaced
EXAMPLES = 6  # images shown
CLASSES, CONFUSIONS = 20, 10  # rows of the tables
FREE = {  # what two runs may differ in and still be compared; upstream's classifiers ignore the last line
    *("name", "project", "save_dir", "exist_ok", "resume"),
    *("plots", "verbose", "save", "save_period", "workers", "device", "profile"),
    *("mixup", "cutmix"),
}


@dataclass
class _Network:
    """A network as the report sees it.

    Attributes:
        source (str): File or name.
        answer (Callable): Gives logits of shape (B, K) for (B, C, H, W) images.
        modules (list[torch.nn.Module]): What its parameters are counted in.
        sizes (list[int]): Side of the images that each of these takes.
        classes (list[int]): The dataset's classes that the columns stand for.
        curve (list[float]): Top-1 accuracy per epoch, empty of a teacher.
    """

    source: str
    answer: Callable[[Tensor], Tensor]
    modules: list[torch.nn.Module]
    sizes: list[int]
    classes: list[int]
    curve: list[float] = field(default_factory=list)


class _Images(NamedTuple):
    """Validation images, and what the networks make of them.

    Attributes:
        index (list[int]): Their places in the dataset, N of them.
        labels (Tensor): Class indices, (N,).
        logits (dict[str, Tensor]): By network, (N, K).
        named (dict[str, Tensor]): The class that each network names, by network, (N,).
    """

    index: list[int]
    labels: Tensor
    logits: dict[str, Tensor]
    named: dict[str, Tensor]


def check_baseline(folder: str | Path, names: Sequence[str], imgsz: int) -> None:
    """Refuse what is not the folder of a finished plain run that a run can be compared with.

    Args:
        folder (str | Path): The plain run's folder.
        names (Sequence[str]): The class names that it must have.
        imgsz (int): The side of the images that it must have been trained at.

    Raises:
        FileNotFoundError: If the folder is not one of a run.
        ValueError: If the run is not finished, had a teacher, or has other classes or images.
    """
    folder = Path(folder)
    best, arguments = folder / "weights" / "best.pt", folder / "args.yaml"
    if not (best.exists() and arguments.exists() and (folder / "results.csv").exists()):
        raise FileNotFoundError(
            f"'baseline={folder}' is not a run's folder: it lacks 'args.yaml', 'results.csv' or 'weights/best.pt'. "
            f"Give one that 'use_distillation=False' has trained, i.e. 'baseline=runs/classify/train'."
        )
    arguments = YAML.load(arguments)
    try:
        ckpt = torch_load(best, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"'baseline={folder}' has a 'weights/best.pt' that cannot be read: {e}") from e
    model = ckpt.get("model") or ckpt.get("ema")
    faults = {
        "is no classifier": not isinstance(model, ClassificationModel),
        "was trained with a teacher": "teacher" in arguments,
        "is not finished": ckpt.get("epoch") != -1,
        "has other classes": list(getattr(model, "names", {}).values()) != list(names),
        f"was trained at imgsz={arguments.get('imgsz')}, not {imgsz}": arguments.get("imgsz") != imgsz,
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise ValueError(
            f"'baseline={folder}' {fault}. Give a run that 'use_distillation=False' has trained on the same data."
        )


def without_folders(source: Any) -> str:
    """Return the name of a network as it is shown: files, alone or behind an @, without their folders."""
    return re.sub(r"(^|@)[^@]*[/\\]", r"\1", str(source))


def read_curve(run: Path) -> list[float]:
    """Return the top-1 accuracy of each epoch of a run, 0 to 1; NaN where it was not measured."""
    with (run / "results.csv").open(encoding="utf-8") as file:
        curve = [float(row["metrics/accuracy_top1"]) for row in csv.DictReader(file, skipinitialspace=True)]
    if YAML.load(run / "args.yaml").get("val") is False:
        curve[:-1] = [math.nan] * (len(curve) - 1)
    return curve


def find_baseline(run: Path, names: Sequence[str], imgsz: int) -> Path | None:
    """Return the newest plain run beside a run that was trained with the same arguments, seed included, or None."""
    own = _plain_arguments(run)
    for best in sorted(run.parent.glob("*/weights/best.pt"), key=lambda file: file.stat().st_mtime, reverse=True):
        folder = best.parents[1]
        with suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):  # unreadable ones
            if _plain_arguments(folder) == own:
                check_baseline(folder, names, imgsz)
                return folder
    return None


def _plain_arguments(run: Path) -> dict[str, Any]:
    """Return the arguments of a run that decide what plain training makes."""
    return {k: v for k, v in YAML.load(run / "args.yaml").items() if k in DEFAULT_CFG_DICT.keys() - FREE}


def write_report(trainer: DistillationClassificationTrainer, pull: dict[str, float]) -> Path:
    """Write `distillation.html`, its figures as `distillation.json` and its charts beside it.

    Args:
        trainer (DistillationClassificationTrainer): At the end of its training.
        pull (dict[str, float]): Share of each weighted loss in the gradient where all of them meet, or empty.

    Returns:
        (Path): The HTML file; it needs no other.

    Raises:
        OSError: If it cannot be written.
        ValueError: If no validation image shows a class that the teacher knows.
    """
    networks = _networks(trainer)
    images = _answer(trainer, networks)
    calibrations = {
        who: calibration(images.logits[who], _columns(images.labels, n.classes)) for who, n in networks.items()
    }
    figures = _figures(trainer, networks, images, pull)
    classes = _per_class(figures)
    partial = "teacher" in networks and len(networks["teacher"].classes) < len(trainer.data["names"])
    summary = {
        "images": len(images.labels),
        "known_to_teacher_only": partial,
        "networks": {who: _describe(network, trainer) for who, network in networks.items()},
        "pull": pull,
        "entropy": figures.entropy,
        "findings": advise(figures),
        "classes": classes,
        "confusions": _confusions(figures, images.named),
    }
    for who, row in summary["networks"].items():
        row |= {"top1": figures.top1(who), "calibration_error": calibrations[who].error}
    top1 = figures.top1("teacher") if "teacher" in networks and not partial else None
    charts = {
        "accuracy": draw_accuracy({who: n.curve for who, n in networks.items() if n.curve}, top1),
        "losses": draw_losses(*_losses(trainer)),
        "classes": draw_classes(classes[:CLASSES], list(networks)),
        "calibration": draw_calibration(calibrations),
    }
    if "teacher" in networks:
        student = images.logits["student"][:, networks["teacher"].classes]
        apart = divergence(student, images.logits["teacher"])
        summary["agreement"] = agreement(student, images.logits["teacher"])
        summary["divergence"] = apart.mean().item()
        most = apart.topk(min(EXAMPLES, len(apart))).indices.tolist()
        charts["examples"] = draw_examples(
            _examples(trainer, networks["student"], images, most), [level.stride for level, _ in trainer.levels]
        )
    arguments = {k: getattr(trainer.args, k) for k in vars(trainer.distillation)}
    arguments["teacher"] = ", ".join(without_folders(source) for source in as_list(arguments["teacher"]))
    arguments = {k: v for k, v in arguments.items() if v is not None}
    with trainer._whole_files(trainer.save_dir) as folder:
        pictures = {name: _save(chart, folder / f"distillation_{name}.png") for name, chart in charts.items()}
        (folder / "distillation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        page = _render(trainer.save_dir.name, summary, pictures, arguments)
        (folder / "distillation.html").write_text(page, encoding="utf-8")
    return trainer.save_dir / "distillation.html"


def remove_report(run: Path) -> None:
    """Take away what `write_report` wrote in a run's folder, and nothing else."""
    for name in ("distillation.html", "distillation.json", *(f"distillation_{chart}.png" for chart in CHARTS)):
        (run / name).unlink(missing_ok=True)


def _save(chart: Figure, file: Path) -> str:
    """Write a chart as PNG and return it as a URL that holds it."""
    buffer = io.BytesIO()
    chart.savefig(buffer, format="png", dpi=160)
    file.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _render(name: str, summary: dict[str, Any], pictures: dict[str, str], arguments: dict[str, Any]) -> str:
    """Return the page."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    return page.render(
        name=name,
        summary=summary,
        shown=summary["classes"][:CLASSES],
        pictures=pictures,
        compared=_compared(summary["networks"]),
        arguments=arguments,
    )


def _networks(trainer: DistillationClassificationTrainer) -> dict[str, _Network]:
    """Return the student, the teacher if it knows classes of the dataset, and the baseline if there is one."""
    everything, imgsz = list(range(len(trainer.data["names"]))), trainer.args.imgsz

    def checkpoint(file: Path, name: str) -> _Network:
        model = load_checkpoint(file, device=trainer.device)[0].float().eval()
        curve = read_curve(file.parents[1])
        return _Network(name, lambda images: model(images)[1], [model], [imgsz], everything, curve)

    networks = {"student": checkpoint(trainer.best, without_folders(trainer.args.model))}
    ensemble = trainer.teacher
    if not (ensemble.classes or trainer.self_distillation):
        with suppress(ValueError):  # it may teach by its maps alone, and know other classes
            ensemble.align(read_names(trainer.data["names"]))
            ensemble.to(trainer.device)
    if ensemble.classes and not trainer.self_distillation:
        sizes = [member.imgsz or imgsz for member in ensemble.members]
        modules = [member.model for member in ensemble.members]
        source = ", ".join(without_folders(member.source) for member in ensemble.members)
        networks["teacher"] = _Network(source, lambda images: ensemble(images)[0], modules, sizes, ensemble.classes)
    names = read_names(trainer.data["names"])
    if folder := trainer.distillation.baseline or find_baseline(trainer.save_dir, names, imgsz):
        networks["baseline"] = checkpoint(Path(folder) / "weights" / "best.pt", Path(folder).name)
    return networks


def _answer(trainer: DistillationClassificationTrainer, networks: dict[str, _Network]) -> _Images:
    """Ask all networks about validation images of the classes that all of them know."""
    dataset, known = trainer.test_loader.dataset, set.intersection(*(set(n.classes) for n in networks.values()))
    kept, labels, logits = [], [], {who: [] for who in networks}
    for index, batch, classes in spaced_batches(dataset, known, IMAGES):
        batch = batch.to(trainer.device)
        with torch.no_grad():
            for who, network in networks.items():
                logits[who].append(network.answer(batch).float().cpu())
        kept += index
        labels += classes
    if not kept:
        raise ValueError("no validation image shows a class that the teacher knows")
    logits = {who: torch.cat(parts) for who, parts in logits.items()}
    named = {who: torch.tensor(n.classes)[logits[who].argmax(1)] for who, n in networks.items()}
    return _Images(kept, torch.tensor(labels), logits, named)


def _figures(
    trainer: DistillationClassificationTrainer,
    networks: dict[str, _Network],
    images: _Images,
    pull: dict[str, float],
) -> Figures:
    """Return what advice is drawn from."""
    temperature = trainer.distillation_loss.temperature if trainer._tempered else None
    softened = "teacher" in networks and temperature is not None and images.logits["teacher"].shape[1] > 1
    return Figures(
        images.labels,
        [name.replace("`", "'") for name in read_names(trainer.data["names"])],
        {who: answer == images.labels for who, answer in images.named.items()},
        networks["student"].curve,
        pull,
        normalized_entropy(images.logits["teacher"], temperature) if softened else None,
        temperature,
        trainer.distillation.distill_balance is not None,
    )


def _describe(network: _Network, trainer: DistillationClassificationTrainer) -> dict[str, Any]:
    """Return what a network is and costs."""
    image = trainer.test_loader.dataset[0]["img"][None].to(trainer.device).float()
    return {
        "source": network.source,
        "parameters": sum(map(get_num_params, network.modules)) or None,  # an exported file does not say
        "gflops": sum(map(get_flops, network.modules, network.sizes)) or None,
        "milliseconds": _milliseconds(network.answer, image),
    }


def _columns(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the columns that stand for the labels."""
    return torch.tensor([classes.index(label) for label in labels.tolist()])


def _milliseconds(answer: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Return how long one image takes, the median of ten."""
    times = []
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            answer(image).sum().item()  # waits for the device
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


def _compared(networks: Iterable[str]) -> str | None:
    """Return which network the student is compared with: the plain one, or else its teacher."""
    return next((who for who in ("baseline", "teacher") if who in networks), None)


def _per_class(figures: Figures) -> list[dict[str, Any]]:
    """Return each network's accuracy on each class, those first on which the student differs most, or is worst."""
    rows, other = [], _compared(figures.right)
    for c in figures.labels.unique().tolist():
        chosen = figures.labels == c
        accuracy = {who: right[chosen].double().mean().item() for who, right in figures.right.items()}
        rows.append({"name": figures.names[c], "images": int(chosen.sum()), **accuracy})
    return sorted(rows, key=lambda row: -abs(row["student"] - row[other]) if other else row["student"])


def _confusions(figures: Figures, named: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the pairs of classes that the student confuses more, or less, often than what it is compared with."""
    other = _compared(named)
    if other is None:
        return []
    student, compared = (
        Counter(zip(figures.labels.tolist(), named[who].tolist(), strict=True)) for who in ("student", other)
    )
    changes = {pair: student[pair] - compared[pair] for pair in student | compared if pair[0] != pair[1]}
    first = sorted((pair for pair in changes if changes[pair]), key=lambda pair: -abs(changes[pair]))[:CONFUSIONS]
    return [
        {
            "label": figures.names[label],
            "named": figures.names[answer],
            "student": student[label, answer],
            "compared": compared[label, answer],
        }
        for label, answer in first
    ]


def _losses(trainer: DistillationClassificationTrainer) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the losses of every epoch, as they were and as they were weighted."""
    loss, beta = trainer.distillation_loss, trainer.distillation.distill_beta
    rows = {k: np.array(v, dtype=float) for k, v in trainer.read_results_csv().items()}
    raw = {k.removeprefix("train/"): v for k, v in rows.items() if k.startswith("train/")}
    weighted = {}
    for name, values in raw.items():
        factor = rows.get(f"distill/{name}_factor", 1.0)  # with `distill_balance`
        weighted[name] = values * (
            rows["distill/alpha"] * loss.weights[name] * factor if name in loss.weights else beta
        )
    return raw, weighted


def _examples(
    trainer: DistillationClassificationTrainer, student: _Network, images: _Images, chosen: Sequence[int]
) -> list[Example]:
    """Return images with what student and teacher name them, and where each of them looks at every level."""
    names, dataset = trainer.data["names"], trainer.test_loader.dataset
    samples = [dataset[images.index[i]] for i in chosen]
    batch = torch.stack([sample["img"] for sample in samples]).to(trainer.device).float()
    taps = FeatureTaps(student.modules[0], [level for level, _ in trainer.levels])
    with torch.no_grad():
        student.answer(batch)
        pairs = list(zip(taps.take(), trainer.teacher(batch)[1], strict=True))
    taps.remove()
    return [
        Example(
            sample["img"].permute(1, 2, 0).cpu().numpy(),
            names[int(sample["cls"])],
            {who: names[int(images.named[who][i])] for who in ("student", "teacher")},
            [tuple(x[row].float().square().mean(0).cpu().numpy() for x in pair) for pair in pairs],
        )
        for row, (i, sample) in enumerate(zip(chosen, samples, strict=True))
    ]
