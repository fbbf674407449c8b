"""The report of a run: its figures against upstream's validation, every kind of run, and a look at it in a browser."""

import csv
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import DISTILLATION_LOSSES, TRAINING, plain, train
from ultralytics import YOLO
from ultralytics.data import ClassificationDataset
from ultralytics.engine.distillation import trainer as distillation_trainer
from ultralytics.engine.distillation.compare import _page, _verdict, machine, summarise
from ultralytics.engine.distillation.report.baseline import check_baseline, find_baseline, read_curve
from ultralytics.engine.distillation.report.charts import draw_seeds
from ultralytics.engine.distillation.report.page import embed
from ultralytics.engine.distillation.report.run import FinishedRun, read_losses
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_report import TOP1
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.sources.base import without_folders
from ultralytics.utils import LOGGER, YAML

TASK = DistillationClassificationTrainer.task
CHARTS = {"accuracy", "losses", "classes", "calibration", "examples"}


@pytest.fixture(scope="module")
def reported(digits, teacher, tmp_path_factory):
    """A distilled run beside a plain one with the same arguments."""
    overrides = {
        **TRAINING,
        "model": "yolo11n-cls.yaml",
        "data": str(digits),
        "project": str(tmp_path_factory.mktemp("report")),
        "epochs": 2,
        "batch": 16,
    }
    train({**overrides, "name": "plain"}, ClassificationTrainer)
    return train({**overrides, "teacher": str(teacher), "plots": True, "name": "distilled"})


@pytest.fixture(scope="module")
def summary(reported):
    return json.loads((reported.save_dir / "distillation.json").read_text())


@pytest.fixture(scope="module")
def answers(reported, teacher):
    """What each network makes of each validation image, by networks that upstream has loaded."""
    dataset = ClassificationDataset(str(Path(reported.args.data) / "val"), reported.args, prefix="val")
    images = torch.stack([sample["img"] for sample in dataset])
    files = {
        "student": reported.best,
        "teacher": teacher,
        "baseline": reported.save_dir.parent / "plain/weights/best.pt",
    }
    with torch.no_grad():
        logits = {who: YOLO(file).model.float().eval()(images)[1] for who, file in files.items()}
    return logits, torch.tensor([sample["cls"] for sample in dataset])


def test_figures_are_those_of_the_networks(summary, answers):
    logits, labels = answers
    assert summary["images"] == len(labels) == 50
    assert list(summary["networks"]) == ["student", "teacher", "baseline"]
    named = {who: x.argmax(1) for who, x in logits.items()}
    for who, row in summary["networks"].items():
        assert row["top1"] == pytest.approx((named[who] == labels).double().mean().item())
        assert row["milliseconds"] > 0
    for row in summary["classes"]:
        chosen = labels == int(row["name"])
        assert row["images"] == chosen.sum()
        for who in named:
            assert row[who] == pytest.approx((named[who] == labels)[chosen].double().mean().item())
    assert {row["name"] for row in summary["classes"]} == set("0123456789")
    assert summary["agreement"] == pytest.approx((named["student"] == named["teacher"]).double().mean().item())
    p, q = (logits[who].double().softmax(1) for who in ("teacher", "student"))
    assert summary["divergence"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    assert summary["confusions"]
    for row in summary["confusions"]:
        for who, key in (("student", "student"), ("baseline", "compared")):
            chosen = (labels == int(row["label"])) & (named[who] == int(row["named"]))
            assert row[key] == chosen.sum()
    parameters = {who: row["parameters"] for who, row in summary["networks"].items()}
    assert parameters["student"] == parameters["baseline"] < parameters["teacher"]


def test_accuracy_is_upstreams(summary, reported):
    assert summary["networks"]["student"]["top1"] == pytest.approx(reported.metrics["metrics/accuracy_top1"], abs=1e-6)


def test_losses_are_those_of_results_csv(reported):
    rows, loss = reported.read_results_csv(), reported.distiller.loss
    run = FinishedRun(reported.plan, reported.save_dir, reported.best, loss, [], reported.device, rows, {})
    losses = read_losses(run)
    assert losses.keys() == {"loss", *DISTILLATION_LOSSES}
    with reported.csv.open() as file:
        written = list(csv.DictReader(file))
    for name, values in losses.items():
        assert values == pytest.approx([float(row[f"train/{name}"]) for row in written])


def test_verdict_is_the_gain_over_the_plain_run(summary, answers):
    logits, labels = answers
    right = {who: x.argmax(1) == labels for who, x in logits.items()}
    verdict = summary["verdict"]
    gain = 100 * (right["student"].double().mean() - right["baseline"].double().mean()).item()
    assert verdict["gain"] == pytest.approx(gain)
    half = 196 * max(1, (right["student"] ^ right["baseline"]).sum().item() ** 0.5) / len(labels)
    assert verdict["interval"] == pytest.approx([gain - half, gain + half])


def test_pull_is_measured(summary, reported):
    assert summary["pull"].keys() == {"loss", *DISTILLATION_LOSSES}
    assert sum(summary["pull"].values()) == pytest.approx(1)
    assert all(share > 0 for share in summary["pull"].values())


def test_pull_is_proportional_to_the_weight(overrides, undrawn):
    """Twice the weight on the same networks and batches is twice the pull."""
    still = {**overrides, "lr0": 1e-12, "warmup_epochs": 0.0, "plots": True}
    pulls = []
    for weight in (10, 20):
        trainer = train({**still, "feature_weight": weight, "name": f"pull{weight}"})
        pulls.append(json.loads((trainer.save_dir / "distillation.json").read_text())["pull"])
    once, twice = ({k: v / pull["loss"] for k, v in pull.items()} for pull in pulls)
    assert twice["feature_loss"] == pytest.approx(2 * once["feature_loss"], rel=0.01)
    assert twice["response_loss"] == pytest.approx(once["response_loss"], rel=0.01)


@pytest.mark.slow
def test_balanced_losses_pull_as_they_were_scaled(overrides, undrawn):
    """All but equally, where without the factors some pull many times as much as others."""
    still = {**overrides, "lr0": 1e-12, "warmup_epochs": 0.0, "plots": True, "distill_alpha": 0.5, "distill_beta": 0.5}
    pulls = []
    for name, given in (
        ("balanced", {"distill_balance": "auto"}),
        ("not", {"feature_weight": 1, "attention_weight": 1}),
    ):
        trainer = train({**still, **given, "name": name})
        pulls.append(json.loads((trainer.save_dir / "distillation.json").read_text())["pull"])
    balanced, unbalanced = ([pull[k] / pull["loss"] for k in DISTILLATION_LOSSES] for pull in pulls)
    assert balanced == pytest.approx([1, 1, 1], rel=0.5)
    assert max(unbalanced) > 3 * min(unbalanced)


def test_is_one_page_with_pictures_beside_it(reported):
    page = (reported.save_dir / "distillation.html").read_text()
    assert len(page) < 5e6
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert (page.count("<svg"), page.count("data:image/jpeg;base64,")) == (len(CHARTS) - 1, 1)
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names)) > 10
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(names)
    assert not re.search("#000000|#ffffff", page[page.index("<svg") :])  # which no dark page could turn
    assert {f.stem.removeprefix("distillation_") for f in reported.save_dir.glob("distillation_*.png")} == CHARTS
    for chart in CHARTS:
        picture = matplotlib.image.imread(reported.save_dir / f"distillation_{chart}.png")
        assert np.ptp(picture[..., :3]) > 0.5


@functools.cache
def _chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Say nothing."""


def browse(folder, page, tmp_path):
    """Open a page and return its text after scripts have run, and what was written to the console."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
    try:
        command = [_chromium(), *flags.split(), f"--user-data-dir={tmp_path / 'chromium'}"]
        url = f"http://127.0.0.1:{server.server_port}/{page}"
        done = subprocess.run([*command, url], capture_output=True, text=True, check=True, timeout=120)
    finally:
        server.shutdown()
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# In frames, as Chromium's own windows are at least 500 pixels wide
FRAMES = """<body><script>
for (const width of [1920, 1280, 390]) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {src: "page.html", width, height: 900, onload: () => {
    const page = frame.contentDocument, all = query => [...page.querySelectorAll(query)];
    const right = element => element.getBoundingClientRect().right;
    const head = all("table.sort th")[1], body = head.closest("table").tBodies[0];
    const lines = element => {
      const range = page.createRange();
      range.selectNodeContents(element);
      return range.getClientRects().length;
    };
    const column = () => [...body.rows].map(row => parseFloat(row.cells[1].textContent));
    head.querySelector("button").click();
    const falling = column();
    head.querySelector("button").click();
    const rising = column(), zoom = page.querySelector(".zoom");
    if (zoom) zoom.click();
    const enlarged = page.querySelector("dialog[open] img");
    document.body.append(JSON.stringify({
      width, overflow: page.documentElement.scrollWidth - frame.contentWindow.innerWidth,
      cut: all(".scroll").filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.textContent.trim().slice(0, 40)),
      broken: [...page.images].filter(x => !x.naturalWidth).length,
      charts: all("figure svg").length, pictures: all("figure img").length,
      narrowest: Math.min(...all("figure svg, figure img").map(x => x.getBoundingClientRect().width)),
      unnamed: all("img:not([alt]), [role=img]:not([aria-label])").length,
      beyond: Math.max(...all("svg text").map(x => right(x) - right(x.closest(".card")))),
      split: all(".first td:first-child").filter(x => lines(x) > 1).length,
      falling, rising, enlarges: enlarged ? enlarged.width >= enlarged.naturalWidth : !zoom,
      columns: new Set(all(".charts > .card").map(x => Math.round(right(x)))).size,
    }));
  }});
  document.body.append(frame);
}
</script></body>"""


def look_at(page, folder):
    """Return what a browser finds of a page, by the width of its window."""
    (folder / "page.html").write_text(page)
    (folder / "frames.html").write_text(FRAMES)
    text, console = browse(folder, "frames.html", folder)
    rows = re.findall(r"\{[^{}]*\}(?=\{|<|$)", text.split("</iframe>")[-1])
    assert not console
    found = {row["width"]: row for row in map(json.loads, rows)}
    assert found.keys() == {1920, 1280, 390}
    for width, row in found.items():
        assert row["overflow"] <= 0
        assert (row["cut"], row["broken"], row["unnamed"]) == ([], 0, 0), width
        assert 300 < row["narrowest"] <= width
        assert row["beyond"] <= 0  # nothing that is written in a chart is cut off
        assert row["falling"] == row["rising"][::-1] == sorted(row["rising"], reverse=True)
        assert row["enlarges"]
        assert row["split"] == 0  # a network's name stands on one line
    return found


@pytest.mark.slow
@pytest.mark.skipif(not _chromium(), reason="needs Chromium; CI installs it")
def test_in_a_browser(reported, tmp_path):
    """No errors in the console, all pictures shown, and nothing wider than the window, on desks and on a phone."""
    page = (reported.save_dir / "distillation.html").read_text()
    found = look_at(page.replace("Distillation: distilled</h1>", f"{'long' * 99}</h1>"), tmp_path)
    assert [(row["charts"], row["pictures"]) for row in found.values()] == [(len(CHARTS) - 1, 1)] * 3
    assert found[390]["columns"] == 1 < found[1280]["columns"] < found[1920]["columns"]  # charts use the width
    (tmp_path / "wrong.html").write_text("<script>nowhere()</script>")
    assert browse(tmp_path, "wrong.html", tmp_path)[1]


@pytest.mark.slow
@pytest.mark.skipif(not _chromium(), reason="needs Chromium; CI installs it")
def test_a_comparison_in_a_browser(tmp_path):
    scores = {"plain": {"0": 80.0, "1": 82.0, "2": 79.0}, "distilled": {"0": 84.0, "1": 85.5, "2": 84.0}}
    curves = {variant: {seed: [x / 200, x / 100] for seed, x in by_seed.items()} for variant, by_seed in scores.items()}
    setting = {"training": {"model": "yolo11n-cls.yaml", "epochs": 2}, "distillation": {"teacher": "t" * 99}}
    report = {"top1": scores, "curves": curves, "summary": summarise(scores), "machine": machine(), "setting": setting}
    (tmp_path / "distilled_0").mkdir()
    (tmp_path / "distilled_0" / "distillation.html").touch()
    verdict = _verdict(report["summary"]["distilled"], "top-1")
    _, picture = embed(draw_seeds(curves, TOP1.axis), "score")
    page = _page(report, verdict, TOP1, tmp_path, picture)
    assert re.findall(r'href="([^"#]+)"', page) == ["data:,", "distilled_0/distillation.html"]
    assert "The teacher helps: +4.17 points of top-1." in page
    for row in look_at(page, tmp_path).values():
        assert (row["charts"], row["pictures"]) == (1, 0)


@pytest.mark.parametrize(
    ("given", "networks", "losses"),
    [
        ({"feature_distill": False, "attention_distill": False}, ["student", "teacher"], {"loss", "response_loss"}),
        ({"response_distill": False}, ["student", "teacher"], {"loss", "feature_loss", "attention_loss"}),
        (
            {"teacher": "self", "distill_beta": 1, "feature_distill": False, "attention_distill": False},
            ["student"],
            {"loss", "response_loss"},
        ),
        ({"distill_balance": "auto", "mixup": 1.0}, ["student", "teacher"], {"loss", *DISTILLATION_LOSSES}),
        ({"teacher_cache": "ram"}, ["student", "teacher"], {"loss", *DISTILLATION_LOSSES}),
    ],
    ids=["response", "features", "self", "balance", "cache"],
)
def test_every_kind_of_run_has_one(given, networks, losses, overrides, monkeypatch, drawn_by_us):
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: warnings.append(str(message)))
    trainer = train({**overrides, **given, "plots": True, "fraction": 0.2, "batch": 16})
    assert not [w for w in warnings if "could not" in w]
    found = json.loads((trainer.save_dir / "distillation.json").read_text())
    assert list(found["networks"]) == networks
    assert found["pull"].keys() == losses
    assert ("agreement" in found) == ("teacher" in found["networks"])


@pytest.mark.parametrize("known", [["0", "1", "2", "3"], []])
def test_a_teacher_of_other_classes(known, overrides, undrawn):
    """It is judged on images of the classes that it knows, and not at all if it knows none."""
    names = [*known, *"abcdefghij"[len(known) :]]
    given = {"teacher_names": names, "response_distill": bool(known), "plots": True, "fraction": 0.2}
    trainer = train({**overrides, **given})
    found = json.loads((trainer.save_dir / "distillation.json").read_text())
    assert ("teacher" in found["networks"]) == bool(known)
    assert {row["name"] for row in found["classes"]} == set(known or "0123456789")
    assert found["images"] == 5 * len(known or names)


def test_a_report_that_fails_takes_nothing_away(overrides, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: warnings.append(str(message)))
    monkeypatch.setattr(distillation_trainer, "write_report", fail)
    trainer = train({**overrides, "fraction": 0.2, "plots": True})
    assert [w for w in warnings if "No space left on device" in w]
    assert YOLO(trainer.best).model is not None


@pytest.fixture
def beside(reported, tmp_path):
    """Return a function that puts a copy of the plain run, changed, beside the distilled one."""
    distilled = tmp_path / "distilled"
    distilled.mkdir()
    shutil.copy(reported.save_dir / "args.yaml", distilled)

    def put(name="other", **arguments):
        folder = shutil.copytree(reported.save_dir.parent / "plain", tmp_path / name)
        YAML.save(folder / "args.yaml", {**YAML.load(folder / "args.yaml"), **arguments})
        return distilled, folder

    return put


DIGITS = [str(c) for c in range(10)]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, True),
        ({"device": "0", "plots": True}, True),
        ({"seed": 1}, False),
        ({"epochs": 4}, False),
        ({"imgsz": 64}, False),
        ({"teacher": "x.pt"}, False),
    ],
)
def test_a_baseline_is_found(arguments, found, beside):
    run, other = beside(**arguments)
    assert find_baseline(run, DIGITS, 32, TASK) == (other if found else None)


@pytest.mark.parametrize("fault", ["no results", "bad arguments", "no mapping", "bad weights"])
def test_what_cannot_be_read_is_no_baseline(fault, beside):
    run, other = beside()
    _, good = beside("good")
    if fault == "no results":
        (other / "results.csv").unlink()
    elif fault == "bad weights":
        (other / "weights" / "best.pt").write_bytes(b"PK")
    else:
        (other / "args.yaml").write_text("a: [" if fault == "bad arguments" else "- a")
    os.utime(other / "weights" / "best.pt")  # the newest is looked at first
    assert find_baseline(run, DIGITS, 32, TASK) == good


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"names": DIGITS[:9]}, "has other classes"),
        ({"imgsz": 64}, "was trained at imgsz=32, not 64"),
        ({"teacher": "x.pt"}, "was trained with a teacher"),
        ({"epoch": 1}, "is not finished"),
        ({"network": "yolo11n.yaml"}, "is of no classification network"),
    ],
)
def test_what_cannot_be_compared_is_no_baseline(given, words, beside):
    _, other = beside(**{k: v for k, v in given.items() if k == "teacher"})
    best = other / "weights" / "best.pt"
    if "network" in given:
        torch.save({**torch.load(best, weights_only=False), "model": YOLO(given["network"]).model}, best)
    if "epoch" in given:
        torch.save({**torch.load(best, weights_only=False), "epoch": 1}, best)
    with pytest.raises(ValueError, match=words):
        check_baseline(other, given.get("names", DIGITS), given.get("imgsz", 32), TASK)


def test_a_baseline_of_other_arguments_is_warned_of(overrides, tmp_path, monkeypatch):
    given = {**plain(overrides), "fraction": 0.2, "project": str(tmp_path / "elsewhere")}
    baseline = train({**given, "batch": 16, "seed": 3}, ClassificationTrainer).save_dir
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: warnings.append(str(message)))
    for own, words in (({}, "was trained with another 'batch', 'seed'"), ({"batch": 16, "seed": 3}, None)):
        warnings.clear()
        DistillationClassificationTrainer(overrides={**overrides, "fraction": 0.2, "baseline": str(baseline), **own})
        assert [words in w for w in warnings if "was trained with" in w] == ([True] if words else [])


def test_epochs_that_were_not_validated_are_no_measurements(overrides, undrawn):
    epochs = 5  # the fewest of which is said whether they rose
    trainer = train({**overrides, "val": False, "epochs": epochs, "fraction": 0.2, "plots": True})
    curve = read_curve(trainer.save_dir, TOP1.column)
    assert np.isnan(curve).tolist() == [True] * (epochs - 1) + [False]
    assert curve[-1] > 0
    assert not any("rose" in x for x in json.loads((trainer.save_dir / "distillation.json").read_text())["findings"])


def test_a_run_of_which_only_the_end_is_left_has_one(overrides, undrawn):
    """Its losses, schedule and balance are those of the run that was stopped."""
    settings = {**overrides, "plots": True, "fraction": 0.2, "temperature_end": 2, "distill_balance": "auto"}

    class Interrupted(DistillationClassificationTrainer):
        def final_eval(self):
            raise KeyboardInterrupt

    whole = train({**settings, "name": "whole", "epochs": 2})
    stopped = Interrupted(overrides={**settings, "name": "stopped", "epochs": 2})
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = train({"resume": str(stopped.last)})
    a, b = (json.loads((x.save_dir / "distillation.json").read_text()) for x in (whole, resumed))
    assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-4)
    assert a["networks"]["student"]["top1"] == b["networks"]["student"]["top1"]
    assert a["pull"] == pytest.approx(b["pull"], abs=0.1)  # of other views of the images
    assert resumed.distillation_loss.temperature == 2
    rows = resumed.read_results_csv()
    assert len(rows["train/feature_loss"]) == 2
    assert rows["distill/feature_loss_factor"][1] != pytest.approx(1, rel=0.05)  # it was balanced


def test_an_earlier_report_is_not_left_in_the_folder(overrides, undrawn):
    settings = {**overrides, "fraction": 0.2, "name": "again", "exist_ok": True}
    folder = train({**settings, "plots": True}).save_dir
    assert (folder / "distillation.html").exists()
    (folder / "distillation_notes.txt").write_text("mine")
    train(settings)
    assert [file.name for file in folder.glob("distillation*")] == ["distillation_notes.txt"]


def test_a_wrong_baseline_is_refused_before_any_file(overrides):
    with pytest.raises(FileNotFoundError, match="'baseline=nowhere' is not a run's folder"):
        train({**overrides, "baseline": "nowhere"})
    assert not Path(overrides["project"]).exists()


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("a/b/best.pt", "best.pt"),
        ("timm:resnet18@a/b.safetensors", "timm:resnet18@b.safetensors"),
        ("torchvision:resnet50", "torchvision:resnet50"),
    ],
)
def test_networks_are_shown_without_folders(source, shown):
    assert without_folders(source) == shown
