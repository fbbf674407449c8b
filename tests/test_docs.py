"""The documents: the parameter tables against the code, and every command and example run as written."""

import copy
import inspect
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import helpers
import pytest
from helpers import ROOT, TRAINING, Stopped, load_benchmark, stop_after, train
from teachers import onnx, timm_safetensors
from ultralytics.cfg import DEFAULT_CFG_DICT, parse_key_value_pair
from ultralytics.cfg.distillation import DistillationArgs, parse_arguments
from ultralytics.engine.distillation.compare import table
from ultralytics.models.distillation import TRAINERS
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.distillation import DistillationLoss, methods, registry, response_loss
from ultralytics.utils.distillation.dense import DenseDistillationLoss

from distill_train_example import main as example_script
from distill_train_example import write_scenes
from train import main as train_script

MANUALS = list(helpers.MANUALS)
DOCUMENTS = ["README.md", *MANUALS, "CONTRIBUTING.md", "benchmarks/README.md"]
CI = (ROOT / ".ci/run").read_text() + (ROOT / "Makefile").read_text()


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def commands(document):
    """Return the single commands of a document's bash blocks."""
    return [c.strip() for block in blocks(document, "bash") for line in block.splitlines() for c in line.split("&&")]


COMMANDS = sorted({command for document in DOCUMENTS for command in commands(document) if command})


def default_elsewhere(name):
    """Return how the tables show an argument's default for the tasks that have another one than classification."""
    own = {task: x.task.defaults[name] for task, x in TRAINERS.items() if name in x.task.defaults}
    if not own:
        return ""
    (value,) = set(own.values())
    return f"{value}" if own.keys() == TRAINERS.keys() - {"classify"} else f"{value} ({', '.join(own)})"


def rows():
    for f in fields(DistillationArgs):
        default, elsewhere = f.default, default_elsewhere(f.name)
        yield f"| `{f.name}` | {default} | {elsewhere} | {f.metadata['kind'].values} | {f.metadata['meaning']} |"


def test_the_table_is_the_code():
    manual = (ROOT / MANUALS[0]).read_text(encoding="utf-8")
    assert "\n".join(rows()) in manual


def test_the_chinese_table_has_the_same_parameters():
    manual = (ROOT / MANUALS[1]).read_text(encoding="utf-8")
    _, _, table = manual.partition("| 参数 | 默认值 |")
    shown = re.findall(r"^\| `(\w+)` \| (\S+) \| ([^|]*) \|[^|]*\|[^|]*\|$", table.split("\n\n")[0], re.MULTILINE)
    assert shown == [(f.name, str(f.default), default_elsewhere(f.name)) for f in fields(DistillationArgs)]


def test_the_manuals_are_in_step():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in MANUALS)
    for pattern in (r"^#+ ", r"```\w+", r"^\|.*\|.*\|$"):  # headings, examples, rows
        found = [re.findall(pattern, manual, re.MULTILINE) for manual in (english, chinese)]
        assert len(found[0]) == len(found[1]), pattern
    figures = [re.findall(r"[+-]?\d+\.\d+", manual) for manual in (english, chinese)]
    assert figures[0] == figures[1]
    assert [commands(name) for name in MANUALS[:1]] == [commands(name) for name in MANUALS[1:]]


@pytest.mark.parametrize("document", MANUALS)
@pytest.mark.parametrize("argument", ["response_method", "feature_method"])
def test_the_methods_are_those_of_the_code_with_their_figures(document, argument):
    """Every method has a row, with its weight, its hyper-parameters and what the benchmark measured."""
    manual = (ROOT / document).read_text(encoding="utf-8")
    _, _, table = manual.partition(f"| `{argument}=` |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n\n")[0].splitlines()[2:]]
    assert [row[0].strip("`") for row in rows] == list(methods(argument))
    measured = json.loads((ROOT / "benchmarks/results/methods.json").read_text())["summary"]
    for (name, _, settings, top1, _), method in zip(rows, methods(argument).values(), strict=True):
        name = name.strip("`")
        row = measured[f"feature-{name}" if (argument, name) == ("feature_method", "mse") else name]
        assert top1 == f"{row['mean']:.2f} ± {row['std']:.2f}"
        assert float(re.match(r"[\d.]+", settings)[0]) == method.weight
        shown = dict(re.findall(r"`(\w+)` ([\w.]+)", settings))
        assert shown.keys() == method.defaults.keys()
        for key, default in method.defaults.items():
            assert type(default)(shown[key]) == default


def test_evidence_is_what_was_measured():
    """The tables are those that the benchmark prints, and the manual's are made of the same files."""
    evidence = load_benchmark("evidence")
    files = {name: ROOT / "benchmarks" / "results" / "evidence" / f"{name}.json" for name in evidence.EXPERIMENTS}
    reports = {name: json.loads(file.read_text()) for name, file in files.items()}
    for report in reports.values():
        assert len(report["findings"]["gain"]["by seed"]) >= 5
        assert report["findings"] == json.loads(json.dumps(evidence.findings(report)))
    assert evidence.table(reports) in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    manual = (ROOT / MANUALS[0]).read_text(encoding="utf-8")
    for report in reports.values():
        tops = [report["teacher_top1"], *(report["summary"][k]["mean"] for k in ("plain", "distilled"))]
        found = [evidence.show(report["findings"][name]) for name in ("gain", "epochs to plain, %")]
        assert " | ".join([*(f"{x:.2f}" for x in tops), *found]) in manual


@pytest.mark.parametrize(
    ("name", "what", "words", "seeds"),
    [
        ("photos", "test summary", "test top-1", 5),
        ("photos_long", "test summary", "test top-1", 2),
        ("photos_224", "test summary", "test top-1", 2),
        ("photos_started", "test summary", "test top-1", 2),
        ("photos_response", "test summary", "test top-1", 1),
        ("photos_yolo", "test summary", "test top-1", 2),
        ("accuracy_digits", "summary", "top-1", 5),
        ("fashion_today", "summary", "top-1", 3),
        ("fashion_response", "summary", "top-1", 2),
        ("dense_few", "summary", "mAP50-95", 5),
        ("dense_few", "test summary", "test mAP50-95", 5),
        ("dense_all", "summary", "mAP50-95", 5),
        ("dense_all", "test summary", "test mAP50-95", 5),
        ("dense_started", "summary", "mAP50-95", 3),
        ("dense_started", "test summary", "test mAP50-95", 3),
        ("dense_segment", "summary", "mask mAP50-95", 3),
        ("dense_pose", "summary", "pose mAP50-95", 3),
        ("dense_obb", "summary", "mAP50-95", 3),
    ],
)
def test_what_todays_losses_reach_is_what_was_measured(name, what, words, seeds):
    report = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert report[what]["plain"]["seeds"] == seeds
    assert table(report[what], words) in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")


def test_the_cost_of_a_step_is_what_was_measured():
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    show = load_benchmark("common").show
    for name in ("speed", "speed_threads", "teacher"):
        results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["results"]
        for key in {"steps", "forward"} & results[0].keys():
            for what in results[0][key].keys() - {"eager"}:
                assert " | ".join(show(row[key][what]) for row in results) in text, f"{name}: {what}"


def test_the_cost_of_a_detectors_step_is_what_was_measured():
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    show = load_benchmark("common").show
    results = [
        json.loads((ROOT / f"benchmarks/results/dense_{name}.json").read_text())["cost"]["ratios"]
        for name in ("few", "segment", "pose", "obb")
    ]
    for name in results[0]:
        assert f"| {name} | {' | '.join(show(ratios[name]) for ratios in results)} |" in text


@pytest.mark.parametrize("manual", MANUALS)
def test_what_each_loss_of_a_detector_gains_alone_is_what_was_measured(manual):
    text = (ROOT / manual).read_text(encoding="utf-8")
    lines = re.search(r"\| (switch|开关) \|.*?\n\n", text, re.DOTALL).group().splitlines()
    for task, own in (("pose", "keypoint"), ("segment", "mask")):
        summary = json.loads((ROOT / f"benchmarks/results/dense_{task}.json").read_text())["summary"]
        losses = ("response", "box", "dfl", own, "attention")
        for name in (own,) if task == "segment" else (*losses, "feature"):
            off = " ".join(f"{x}_distill=False" for x in losses if x != name)
            gain = summary[f"{off} feature_distill=True" if name == "feature" else off]["difference"]
            (line,) = [x for x in lines if x.startswith(f"| `{name}_distill`")]
            assert line.split(" | ")[3] == f"{gain:+.1f}"
        others = {
            name.rpartition("feature_method=")[2]: row for name, row in summary.items() if "feature_method" in name
        }
        assert others.keys() == (
            methods("feature_method").keys() - {"mse", "attention", "srrl"} if task == "pose" else set()
        )
        assert all(f"`{name}` {row['difference']:+.1f}" in text for name, row in others.items())


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"
        headings = [re.sub(r"[^\w\- ]", "", x.lower()) for x in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
        for target in re.findall(r"\]\(#([^)]+)\)", text):
            assert target in {heading.replace(" ", "-") for heading in headings}, f"{document}: #{target}"


@pytest.mark.parametrize(("manual", "words"), list(zip(MANUALS, ("are divided by {}", "除以 {}"), strict=True)))
def test_the_manuals_say_what_feature_methods_weigh_for_detectors(manual, words):
    assert words.format(round(1 / DenseDistillationLoss.feature_scale)) in (ROOT / manual).read_text(encoding="utf-8")


def test_the_loss_and_the_arguments_have_the_same_defaults():
    parameters = inspect.signature(DistillationLoss).parameters
    shared = {f.name for f in fields(DistillationArgs)} & parameters.keys()
    assert shared == parameters.keys() - {"student_channels", "teacher_channels", "balanced", "classify"}
    for name in shared:
        assert parameters[name].default == getattr(DistillationArgs(), name), name
    assert inspect.signature(response_loss).parameters["temperature"].default == DistillationArgs().temperature


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, overrides, teacher, tmp_path, monkeypatch):
    """As written, but for the paths, and briefly."""
    first = shlex.split(command)[0]
    if first == "yolo":  # upstream's own command
        assert {k for k, _ in map(parse_key_value_pair, shlex.split(command)[3:])} <= DEFAULT_CFG_DICT.keys()
        return
    if first in {"pip", "make", "pytest"}:
        assert command in CI or command in {"pip install -e .", 'pytest -m "not slow"'}
        return
    if first == "torchrun":  # tests/models/yolo/classify/test_distill_train_ddp.py runs the like
        script, *arguments = shlex.split(command)[shlex.split(command).index("train.py") :]
        DistillationArgs.split(parse_arguments(arguments))
        return
    script = shlex.split(command)[1]
    arguments = shlex.split(command)[2:]
    if script.startswith("benchmarks/"):  # tests/benchmarks runs them; as written they take longer than all other tests
        given = parse_arguments(arguments)
        runs = load_benchmark("paired_runs")
        runs.check_variants(runs.parse_variants(given.get("variants", "plain"), {}, {"plain": None}))
        own = load_benchmark(Path(script).stem).SETTINGS
        _, given = DistillationArgs.split({k: v for k, v in given.items() if k not in own})
        assert given.keys() <= DEFAULT_CFG_DICT.keys()
        return
    if script == "distill_train_example.py" and set(arguments) <= {"task=detect"}:  # tests/test_example.py runs these
        return
    if "resume=path/to/last.pt" in arguments:
        with pytest.raises(Stopped):
            train({**overrides, "epochs": 2, "fraction": 0.2}, on_fit_epoch_end=stop_after(0))
        (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
        done = subprocess.run([sys.executable, ROOT / script, f"resume={last}"], cwd=tmp_path)
        assert done.returncode == 0
        return
    places = {"path/to/best.pt": overrides["teacher"], "path/to/dataset": overrides["data"]}
    for place, make in (("path/to/weights.safetensors", timm_safetensors), ("path/to/model.onnx", onnx)):
        if place in command:
            places[place] = make(tmp_path, teacher).rpartition("@")[2]
    if "path/to/scenes.yaml" in command:
        data = write_scenes(tmp_path / "scenes", "detect", train=8, val=4, side=64)
        detector = {
            **TRAINING,
            "imgsz": 64,
            "model": "yolo11n.yaml",
            "data": str(data),
            "project": str(tmp_path / "made"),
        }
        places |= {"path/to/scenes.yaml": str(data), "path/to/detector.pt": str(train(detector, DetectionTrainer).best)}
    for place, path in places.items():
        arguments = [argument.replace(place, path) for argument in arguments]
    if "teacher=self" in arguments:
        arguments.append("self_distill_start=0")  # of the one epoch
    if arguments and "--help" not in arguments:
        brief = {**TRAINING, "fraction": 0.2, "project": str(tmp_path)}
        brief |= {"teacher_epochs": 1} if "example" in script and "teacher=path" not in command else {}
        arguments += [f"{k}={v}" for k, v in brief.items()]
    elif "example" in script:
        arguments = ["epochs=1", "teacher_epochs=1", "fraction=0.2"]
    monkeypatch.chdir(tmp_path)
    {"train.py": train_script, "distill_train_example.py": example_script}[script](arguments)


@pytest.mark.slow
@pytest.mark.parametrize("document", MANUALS)
def test_python_examples_run(document, overrides, monkeypatch, tmp_path):
    examples = blocks(document, "python")
    assert len(examples) == 3
    monkeypatch.setattr(registry, "_METHODS", copy.deepcopy(registry._METHODS))  # one example adds a method
    brief = f", project={str(tmp_path)!r}, imgsz=32, batch=32, device='cpu', plots=False, fraction=0.2"
    for example in examples:
        code = example.replace("path/to/best.pt", overrides["teacher"]).replace("path/to/dataset", overrides["data"])
        exec(code.replace("epochs=50", f"epochs=1{brief}"), {})
    assert len(list(tmp_path.rglob("best.pt"))) == 3
