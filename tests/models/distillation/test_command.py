"""The console command: what it takes, what it gives back, and how it fails."""

import importlib.metadata
import json
import logging
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import Stopped, stop_after, train
from teachers import exported as exported_as
from ultralytics.cfg.distillation import DistillationArgs
from ultralytics.models.distillation import command
from ultralytics.models.distillation.command import COMMANDS, check_cuda, main, run
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.utils import LOGGER
from ultralytics.utils.distillation import methods


def line(name, settings):
    return [name, *(f"{k}={v}" for k, v in settings.items())]


class Records(logging.Handler):
    """What a logger lets through."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def errors(monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "error", lambda message, *args: said.append(str(message)))
    return said


def test_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="yolo-distill")
    assert entry.load() is main


@pytest.mark.parametrize("arguments", [[], ["help"], ["train", "--help"], ["-h"]])
def test_help_names_every_command_and_every_parameter(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"    yolo-distill {name}" in shown
    for f in fields(DistillationArgs):
        assert f"    {f.name}={f.default}: {f.metadata['meaning']}" in shown


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nonsense"], 2, "'nonsense' is no command. Give one of ['train', 'check'"),
        (["model=yolo11n-cls.yaml"], 2, "e.g. 'yolo-distill train'"),
        (["train", "epochs"], 2, "'epochs' is not a valid argument"),
        (["train", "data=x"], 1, "No 'model=' given"),
        (["train", "model=yolo11n-cls.yaml"], 1, "No 'data=' given"),
        (["train", "model=nowhere.yaml", "data=x"], 1, "'model=nowhere.yaml' does not exist"),
        (["train", "use_distillation=no"], 1, "Give True or False"),
        (["check", "model=yolo11n-cls.yaml", "data=x"], 1, "No teacher given"),
        (["compare", "model=yolo11n-cls.yaml", "data=x", "seeds=1"], 1, "Give two seeds or more"),
        (["compare", "model=[a.onnx, b.onnx]", "data=x"], 1, "are exported files alone. Give 'task=' too"),
        (["compare", "model=[a.onnx]", "data=x", "task=classify"], 1, "'model=a.onnx' does not exist"),
        (["compare", "model=[a.onnx]", "task=classify"], 1, "No 'data=' given"),
        (["compare", "model=[a.onnx]", "data=x", "task=classify", "temperature=2"], 1, "'temperature=' has no effect"),
        (["compare", "model=[a.onnx]", "data=x", "task=classify", "seeds=2"], 1, "'seeds=' has no effect"),
        (["train", "model=yolo11n-cls.yaml", "data=x", "temperatur=2"], 2, "'temperatur' is not a valid YOLO argument"),
        (["train", "model=yolo11n-cls.yaml", "data=x", "temperature="], 2, "'temperature=' has no value"),
        (["train", "resume=nowhere.pt"], 1, "'resume=nowhere.pt' does not exist. Give the 'last.pt' of a run"),
        (["train", "resume=/tmp"], 1, "'resume=/tmp' is a folder"),
        (["train", "model=folder.pt", "data=x"], 1, "'model=folder.pt' is a folder"),
        (["check", "use_distillation=False", "model=yolo11n-cls.yaml", "data=x"], 1, "is for 'train' alone"),
        (["report"], 1, "No 'run=' given"),
        (["report", "run=2026_11_28"], 1, "'run=2026_11_28' is not a run's folder"),
        (["report", "run=nowhere"], 1, "'run=nowhere' is not a run's folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_status(arguments, status, words, errors, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt").mkdir()
    logged = Records()
    LOGGER.addHandler(logged)
    try:
        assert main(arguments) == status
    finally:
        LOGGER.removeHandler(logged)
    (said,) = errors
    assert words in said
    assert "\n" not in said
    assert "Traceback" not in capfd.readouterr().err
    assert not any("yolo solutions" in text for text in logged.texts)  # the manual of upstream's command
    assert [x.name for x in tmp_path.rglob("*")] == ["folder.pt"]


def test_where_an_error_comes_from_is_shown_on_request(errors, capfd):
    assert main(["report", "run=nowhere", "verbose=True"]) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyError("names"), 1, "KeyError: 'names'. 'verbose=True' shows where"),
        (ValueError(), 1, "ValueError: . 'verbose=True' shows where"),
        (RuntimeError("\nThe disk\n  is full."), 1, "The disk is full."),
        (KeyboardInterrupt(), 130, "resume=path/to/last.pt"),
    ],
)
def test_what_no_one_has_foreseen_is_told_too(error, status, words, errors, monkeypatch):
    monkeypatch.setitem(COMMANDS, "train", lambda settings: (_ for _ in ()).throw(error))
    assert main(["train"]) == status
    assert words in errors[0]


def test_methods_are_all_there_with_their_hyperparameters(capsys):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    for argument in ("response_method", "feature_method"):
        _, _, part = shown.partition(f"{argument}=\n")
        for method in methods(argument).values():
            own = ", ".join(f"{k}={v}" for k, v in {"weight": method.weight, **method.defaults}.items())
            assert f"\n    {method.name} " in f"\n{part}"
            assert own in part
            assert method.function.__doc__.partition("\n")[0] in part


def test_what_reads_the_output_may_stop():
    """As `head` does."""
    script = "import sys; from ultralytics.models.distillation.command import main; sys.exit(main(['methods']))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 1
    assert "Traceback" not in said
    assert "Broken pipe" not in said


@pytest.mark.parametrize("distils", [True, False])
def test_trains_with_and_without_a_teacher(distils, overrides):
    settings = {**overrides, "fraction": 0.2, "temperature": 2, "use_distillation": distils}
    trainer = run(line("train", settings))
    assert type(trainer) is (DistillationClassificationTrainer if distils else ClassificationTrainer)
    assert getattr(trainer.args, "temperature", None) == (2 if distils else None)
    assert trainer.best.exists()


def test_a_run_with_a_teacher_does_not_go_on_without(overrides):
    with pytest.raises(Stopped):
        train({**overrides, "epochs": 2, "fraction": 0.2}, on_fit_epoch_end=stop_after(0))
    (last,) = Path(overrides["project"]).glob("*/weights/last.pt")
    with pytest.raises(ValueError, match=r"is of a run with a teacher\. Leave 'use_distillation=False' out"):
        run(["train", f"resume={last}", "use_distillation=False"])


@pytest.mark.parametrize("relative", [True, False])
def test_the_plain_run_beside_is_found_however_the_data_is_given(relative, overrides, tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(Path(overrides["data"]).parent)
    settings = {**overrides, "fraction": 0.34}
    settings["data"] = Path(overrides["data"]).name if relative else overrides["data"]
    plain_run = run(line("train", {**settings, "use_distillation": False, "name": "plain"}))
    folder = run(line("train", {**settings, "plots": True})).save_dir
    networks = json.loads((folder / "distillation.json").read_text())["networks"]
    assert networks["baseline"]["source"] == plain_run.save_dir.name


def test_files_of_several_tasks_are_not_compared(overrides, teacher, prepared):
    _, detector = prepared("detect")
    with pytest.raises(ValueError, match="is of the task 'detect', not of 'classify'"):
        run(line("compare", {"model": f"[{teacher},{detector}]", "data": overrides["data"]}))


def test_a_file_of_settings_is_read(overrides, tmp_path):
    (tmp_path / "s.yaml").write_text("\n".join(f"{k}: {v}" for k, v in {**overrides, "temperature": 0}.items()))
    with pytest.raises(ValueError, match="'temperature=0'"):
        run(["check", f"cfg={tmp_path / 's.yaml'}"])


@pytest.mark.parametrize(
    ("target", "library", "given", "smaller"),
    [
        ("onnx", "onnxruntime", {}, 1),
        ("openvino", "openvino", {}, 1),
        ("openvino", "nncf", {"quantize": 8}, 3),
        ("ncnn", "ncnn", {}, 1),
    ],
)
def test_compares_files_as_they_are(target, library, given, smaller, overrides, teacher, tmp_path, monkeypatch):
    """On the same images, each by what upstream runs it with; nothing is written."""
    pytest.importorskip(library)
    said = []
    monkeypatch.setattr(LOGGER, "info", lambda message, *args: said.append(str(message)))
    monkeypatch.chdir(tmp_path)
    data = {"data": overrides["data"]} if given else {}
    exported = exported_as(tmp_path, teacher, target, **given, **data)
    before = set(tmp_path.rglob("*"))
    settings = {"model": f"[{teacher}, {exported}]", "data": overrides["data"], "imgsz": 32, "device": "cpu"}
    first, second = run(line("compare", settings))
    assert [first["file"], second["file"]] == [str(teacher), str(exported)]
    assert first["top1"] > 0.1
    assert second["top1"] == pytest.approx(first["top1"], abs=0.021 if smaller == 1 else 0.061)  # one of 50 images
    if target == "onnx":
        assert second["megabytes"] == pytest.approx((tmp_path / "model.onnx").stat().st_size / 1e6)
    assert second["megabytes"] < 22.5 / smaller  # of 5.4 million weights
    assert min(first["milliseconds"], second["milliseconds"]) > 0
    table = said[-1].strip().splitlines()
    assert table[0] == "| file | MB | ms per image | top-1 | points to the first |"
    assert table[2].endswith(f"| {100 * first['top1']:.2f} | +0.00 |")
    assert set(tmp_path.rglob("*")) == before


def test_a_folder_of_an_export_is_as_large_as_its_files(tmp_path):
    from ultralytics.engine.distillation.compare import _megabytes

    (tmp_path / "x").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(1_000_000))
    (tmp_path / "x" / "b.bin").write_bytes(bytes(500_000))
    assert _megabytes(tmp_path) == 1.5
    assert _megabytes(tmp_path / "a.bin") == 1


def test_says_what_it_runs_on(monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "info", said.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_cuda() is False
    assert "CPU" in said[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert check_cuda() is True
    assert "2 x a GPU" in said[1]


def test_compare_is_given_the_settings(overrides, monkeypatch):
    compared = []
    monkeypatch.setattr(command, "compare", lambda *arguments: compared.append(arguments))
    run(line("compare", {**overrides, "seeds": 2}))
    ((trainer_class, given),) = compared
    assert trainer_class is DistillationClassificationTrainer
    assert given["seeds"] == 2
    assert given["teacher"] == overrides["teacher"]
