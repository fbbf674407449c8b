"""The documents: the parameter tables against the code, and every command and example run as written."""

import copy
import inspect
import json
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import helpers
import pytest
from helpers import ROOT, TRAINING, Stopped, anchors, links, load_benchmark, plain, resolve, stop_after, train
from teachers import onnx, timm_safetensors
from ultralytics.cfg import DEFAULT_CFG_DICT, entrypoint, parse_key_value_pair
from ultralytics.cfg.distillation import DistillationArgs, parse_arguments
from ultralytics.engine.distillation.compare import table
from ultralytics.models.distillation import TRAINERS, command
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.distillation import DistillationLoss, methods, registry, response_loss
from ultralytics.utils.distillation.dense import DenseDistillationLoss

from distill_train_example import main as example_script
from distill_train_example import write_scenes
from train import main as train_script

MANUALS = list(helpers.MANUALS)
PAGES = {f"{MANUALS[0]}/{x.name}": f"{MANUALS[1]}/{x.name}" for x in sorted((ROOT / MANUALS[0]).glob("*.md"))}
SHORT = {"DISTILLATION_README.md": "DISTILLATION_README.zh-CN.md"}
TRANSLATED = {**SHORT, **PAGES}
DOCUMENTS = ["README.md", *TRANSLATED, *TRANSLATED.values(), "CONTRIBUTING.md", "benchmarks/README.md"]
CI = (ROOT / ".ci/run").read_text() + (ROOT / "Makefile").read_text()


def read(*place):
    return ROOT.joinpath(*place).read_text(encoding="utf-8")


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", read(document), re.DOTALL)


def commands(document):
    """Return the single commands of a document's bash blocks."""
    return [c.strip() for block in blocks(document, "bash") for line in block.splitlines() for c in line.split("&&")]


def named(document):
    """Return the commands of ours that a document's sentences and tables name."""
    text = re.sub(r"```.*?```", "", read(document), flags=re.DOTALL)
    inline = re.findall(r"`((?:yolo-distill|python train\.py)[^`]*)`", text)
    return [shlex.split(x.replace("python train.py", "yolo-distill train")) for x in inline]


def meaning(command):
    """Return a program and its arguments, whatever their order."""
    first, *arguments = shlex.split(command)
    return first, frozenset(arguments)


WRITTEN = sorted({c for document in DOCUMENTS for c in commands(document) if c})
COMMANDS = {meaning(c): c for c in WRITTEN}  # those that mean the same once
OF_THE_SCRIPT = {k: c for k, c in COMMANDS.items() if meaning(c.replace("python train.py", "yolo-distill train")) != k}
OF_BOTH = [c for c in OF_THE_SCRIPT.values() if meaning(c.replace("python train.py", "yolo-distill train")) in COMMANDS]


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
    assert "\n".join(rows()) in read(MANUALS[0], "reference.md")


def test_the_chinese_table_has_the_same_parameters():
    _, _, table = read(MANUALS[1], "reference.md").partition("| 参数 | 默认值 |")
    shown = re.findall(r"^\| `(\w+)` \| (\S+) \| ([^|]*) \|[^|]*\|[^|]*\|$", table.split("\n\n")[0], re.MULTILINE)
    assert shown == [(f.name, str(f.default), default_elsewhere(f.name)) for f in fields(DistillationArgs)]


def test_the_manuals_have_the_same_pages():
    assert {f"{MANUALS[1]}/{x.name}" for x in (ROOT / MANUALS[1]).iterdir()} == set(PAGES.values())


@pytest.mark.parametrize("document", TRANSLATED)
def test_the_manuals_are_in_step(document):
    """Page by page: headings by level, examples, rows by their cells, figures, commands, code and links."""
    pair = document, TRANSLATED[document]
    english, chinese = map(read, pair)
    for pattern in (r"^#+ ", r"```\w+", r"^\|.*\|.*\|$"):
        found = [re.findall(pattern, manual, re.MULTILINE) for manual in (english, chinese)]
        assert [x.count("|") or x for x in found[0]] == [x.count("|") or x for x in found[1]], pattern
    figures = [re.findall(r"[+-]?\d+\.\d+", manual) for manual in (english, chinese)]
    assert figures[0] == figures[1]
    assert commands(pair[0]) == commands(pair[1])
    code = [[re.sub(r" +#.*", "", example) for example in blocks(name, "python")] for name in pair]
    assert code[0] == code[1]  # but for its comments
    files = [[resolve(name, file) for file, _ in links(read(name)) if file] for name in pair]
    assert sorted(x if x == pair[1] else TRANSLATED.get(x, x) for x in files[0]) == sorted(
        pair[1] if x == pair[0] else x for x in files[1]
    )


@pytest.mark.parametrize("language", [list(TRANSLATED), list(TRANSLATED.values())], ids=MANUALS)
def test_each_page_leads_to_the_others(language):
    """The pages by their first paragraph."""
    other = {**TRANSLATED, **{chinese: english for english, chinese in TRANSLATED.items()}}
    for page in language:
        text = read(page)
        first = text if page.startswith("DISTILLATION_README") else text.split("\n\n")[0]
        assert {resolve(page, file) for file, _ in links(first) if file} == {*language, other[page]} - {page}, page


@pytest.mark.parametrize("manual", MANUALS)
def test_the_commands_are_those_of_the_code(manual):
    shown = re.findall(r"^\| `yolo-distill (\w+)` \|", read(manual, "start.md"), re.MULTILINE)
    assert shown == list(command.COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_sentences_can_be_read(document):
    for _, *arguments in named(document):
        _, given = command.read_command(arguments)
        DistillationArgs.split({k: v for k, v in given.items() if k != "use_distillation"})


@pytest.mark.parametrize("manual", MANUALS)
@pytest.mark.parametrize("argument", ["response_method", "feature_method"])
def test_the_methods_are_those_of_the_code_with_their_figures(manual, argument):
    """Every method has a row, with its weight, its hyper-parameters and what the benchmark measured."""
    _, _, table = read(manual, "losses.md").partition(f"| `{argument}=` |")
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
    assert evidence.table(reports) in read("benchmarks/README.md")
    manual = read(MANUALS[0], "results.md")
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
    assert table(report[what], words) in read("benchmarks/README.md")


def test_what_the_readme_says_of_gains_was_measured():
    _, _, text = read("README.md").partition("<!-- gains -->")
    rows = [line.split(" | ")[4:] for line in text.partition("<!--")[0].strip().splitlines()[2:]]
    names = {"photos": "test summary", "dense_few": "summary", "dense_segment": "summary", "dense_pose": "summary"}
    for row, (name, what) in zip(rows, {**names, "dense_obb": "summary"}.items(), strict=True):
        summary = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())[what]
        plain, distilled = summary["plain"], summary["distilled"]
        gain = "{:+.2f}, {:+.2f} to {:+.2f}".format(distilled["difference"], *distilled["interval"])
        assert row == [f"{plain['mean']:.2f}", f"{distilled['mean']:.2f}", gain, f"{plain['seeds']} |"]
    report = json.loads((ROOT / "benchmarks/results/dense_few.json").read_text())
    plain, ours, upstream = (report["summary"][k]["mean"] for k in ("plain", "distilled", "upstream"))
    assert f"plain {plain:.2f} % | {upstream:.2f} % | {ours:.2f} % |" in text
    assert f"| 1 | {report['cost']['ratios']['distilled / upstream']['median']:.2f} |" in text


def test_the_cost_of_a_step_is_what_was_measured():
    text = read("benchmarks/README.md")
    show = load_benchmark("common").show
    for name in ("speed", "speed_threads", "teacher"):
        results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["results"]
        for key in {"steps", "forward"} & results[0].keys():
            for what in results[0][key].keys() - {"eager"}:
                assert " | ".join(show(row[key][what]) for row in results) in text, f"{name}: {what}"


def test_the_cost_of_a_detectors_step_is_what_was_measured():
    text = read("benchmarks/README.md")
    show = load_benchmark("common").show
    results = [
        json.loads((ROOT / f"benchmarks/results/dense_{name}.json").read_text())["cost"]["ratios"]
        for name in ("few", "segment", "pose", "obb")
    ]
    for name in results[0]:
        assert f"| {name} | {' | '.join(show(ratios[name]) for ratios in results)} |" in text


@pytest.mark.parametrize("manual", MANUALS)
def test_what_each_loss_of_a_detector_gains_alone_is_what_was_measured(manual):
    text = read(manual, "dense.md")
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


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    """To a file, or to a heading of a document, of its own or another."""
    for file, anchor in links(read(document)):
        target = resolve(document, file) if file else document
        assert (ROOT / target).exists(), f"{file}#{anchor}"
        assert not anchor or anchor in anchors(read(target)), f"{file}#{anchor}"


def test_anchors_are_githubs():
    text = "# `a_b`: c-d, e's\n```bash\n# no heading\n```\n## 检测、掩码 与 GPU\n## A [link](x.md)\n### a link\n"
    assert anchors(text) == {"a_b-c-d-es", "检测掩码-与-gpu", "a-link", "a-link-1"}


@pytest.mark.parametrize(("manual", "words"), list(zip(MANUALS, ("are divided by {}", "除以 {}"), strict=True)))
def test_the_manuals_say_what_feature_methods_weigh_for_detectors(manual, words):
    assert words.format(round(1 / DenseDistillationLoss.feature_scale)) in read(manual, "dense.md")


def test_the_loss_and_the_arguments_have_the_same_defaults():
    parameters = inspect.signature(DistillationLoss).parameters
    shared = {f.name for f in fields(DistillationArgs)} & parameters.keys()
    assert shared == parameters.keys() - {"student_channels", "teacher_channels", "balanced", "classify"}
    for name in shared:
        assert parameters[name].default == getattr(DistillationArgs(), name), name
    assert inspect.signature(response_loss).parameters["temperature"].default == DistillationArgs().temperature


@pytest.fixture(scope="module")
def made(digits, teacher, tmp_path_factory):
    """Return a function that gives what a placeholder of the documents stands for, each made once."""
    folder = tmp_path_factory.mktemp("made")
    own = {**TRAINING, "fraction": 0.2, "model": "yolo11n-cls.yaml", "data": str(digits), "project": str(folder)}
    distilled = {**own, "teacher": str(teacher)}
    files = {"path/to/best.pt": teacher, "path/to/dataset": digits}

    def scenes():
        return write_scenes(folder / "scenes", "detect", train=8, val=4, side=64)

    def detector():
        given = {**own, "fraction": 1.0, "imgsz": 64, "model": "yolo11n.yaml", "data": str(make("path/to/scenes.yaml"))}
        return train(given, DetectionTrainer).best

    def stopped():
        with pytest.raises(Stopped):
            train({**distilled, "epochs": 2, "name": "stopped"}, on_fit_epoch_end=stop_after(0))
        return folder / "stopped" / "weights" / "last.pt"

    makers = {
        "path/to/weights.safetensors": lambda: timm_safetensors(folder, teacher).rpartition("@")[2],
        "path/to/model.onnx": lambda: onnx(folder, teacher),
        "path/to/student.pt": lambda: shutil.copy(teacher, folder / "student.pt"),
        "path/to/scenes.yaml": scenes,
        "path/to/detector.pt": detector,
        "path/to/last.pt": stopped,
        "path/to/run": lambda: train({**distilled, "name": "run"}).save_dir,
        "path/to/plain_run": lambda: train({**plain(own), "name": "plain_run"}, ClassificationTrainer).save_dir,
    }

    def make(place):
        if place not in files:
            files[place] = makers[place]()
        return str(files[place])

    def put(argument):
        return re.sub(r"path/to/[\w.]+", lambda place: make(place[0]), argument)

    return put


@pytest.mark.parametrize("written", OF_BOTH)
def test_the_script_does_what_the_command_does(written, monkeypatch):
    """What is written for both runs below as the command's."""
    given = []
    monkeypatch.setitem(command.COMMANDS, "train", given.append)
    arguments = shlex.split(written)[2:]
    train_script(arguments)
    command.run(["train", *arguments])
    assert given[0] == {"use_distillation": True, **given[1]}


@pytest.mark.slow
@pytest.mark.parametrize("written", [c for c in COMMANDS.values() if c not in OF_BOTH])
def test_every_command_runs(written, made, tmp_path, monkeypatch, undrawn):
    """As written, but for the paths, and briefly."""
    first, *arguments = [x for x in shlex.split(written) if not re.match("[A-Z_]+=", x)]  # without the environment
    if first in {"pip", "make", "pytest"}:
        assert written in CI or written in {"pip install -e .", 'pytest -m "not slow"'}
        return
    if first == "torchrun":  # tests/models/yolo/classify/test_distill_train_ddp.py runs the like
        DistillationArgs.split(parse_arguments(arguments[arguments.index("train.py") + 1 :]))
        return
    if first == "python" and arguments[0].startswith("benchmarks/"):
        # tests/benchmarks runs them; as written they take longer than all other tests
        script, *arguments = arguments
        given = parse_arguments(arguments)
        runs = load_benchmark("paired_runs")
        runs.check_variants(runs.parse_variants(given.get("variants", "plain"), {}, {"plain": None}))
        own = load_benchmark(Path(script).stem).SETTINGS
        _, given = DistillationArgs.split({k: v for k, v in given.items() if k not in own})
        assert given.keys() <= DEFAULT_CFG_DICT.keys()
        return
    if first == "yolo" and arguments[0] != "export":  # upstream's own command
        assert {k for k, _ in map(parse_key_value_pair, arguments[2:])} <= DEFAULT_CFG_DICT.keys()
        return
    monkeypatch.chdir(tmp_path)
    arguments = [made(argument) for argument in arguments]
    if first == "yolo":
        entrypoint(" ".join([first, *arguments, "imgsz=32", "device=cpu"]))
        return
    main = command.run
    if first == "python":
        script, *arguments = arguments
        if script == "distill_train_example.py" and set(arguments) <= {"task=detect"}:
            return  # tests/test_example.py runs these
        main = {"train.py": train_script, "distill_train_example.py": example_script}[script]
    if not {"report", "methods", "help", "--help"} & set(arguments) and "resume=" not in written:
        brief = {**TRAINING, "fraction": 0.2, "project": str(tmp_path)}
        if "teacher=self" in arguments:
            brief["self_distill_start"] = 0  # of the one epoch
        if "seeds=3" in arguments:
            brief["seeds"] = 2
        if main is example_script and "teacher=path" not in written:
            brief["teacher_epochs"] = 1
        arguments += [f"{k}={v}" for k, v in brief.items()]
    main(arguments)


@pytest.mark.slow
def test_python_examples_run(made, monkeypatch, tmp_path):
    """The English ones, as the Chinese are the same."""
    examples = [example for document in TRANSLATED for example in blocks(document, "python")]
    assert len(examples) == 3
    monkeypatch.setattr(registry, "_METHODS", copy.deepcopy(registry._METHODS))  # one example adds a method
    brief = f", project={str(tmp_path)!r}, imgsz=32, batch=32, device='cpu', plots=False, fraction=0.2"
    for example in examples:
        exec(made(example).replace("epochs=50", f"epochs=1{brief}"), {})
    assert len(list(tmp_path.rglob("best.pt"))) == 3
