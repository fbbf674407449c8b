"""What people have and do: images of every kind, folders of every layout and name, many classes, threads, modules."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import rows, train, write_digits
from PIL import Image
from teachers import seen, with_path
from ultralytics import YOLO
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.classifier import ClassificationTeacher
from ultralytics.nn.distillation.safe_load import load_checkpoint_file


def as_16_bits(image, file):
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(file.with_suffix(".png"))


def as_turned(image, file):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation
    image.rotate(90).save(file.with_suffix(".jpg"), exif=exif)


def as_pages(image, file):
    image.save(file.with_suffix(".tiff"), save_all=True, append_images=[image.rotate(180)])


def as_mode(mode, suffix, **how):
    return lambda image, file: image.convert(mode).save(file.with_suffix(suffix), **how)


KINDS = {
    "16 bits": as_16_bits,
    "CMYK": as_mode("CMYK", ".jpg"),
    "RGBA": as_mode("RGBA", ".png"),
    "grey with alpha": as_mode("LA", ".png"),
    "palette": as_mode("P", ".png"),
    "one bit": as_mode("1", ".png"),
    "turned by EXIF": as_turned,
    "WebP": as_mode("RGB", ".webp"),
    "several pages": as_pages,
    "upper case": as_mode("RGB", ".JPG", format="jpeg"),
}


@pytest.fixture
def copy(digits, tmp_path, overrides):
    """A copy of the digits, and the arguments of a run on it."""
    folder = tmp_path / "copy"
    shutil.copytree(digits, folder, ignore=shutil.ignore_patterns("*.cache", "*.npy"))
    return folder, {**overrides, "data": str(folder)}


def test_images_of_every_kind_are_learned_from(copy):
    """One of 1 pixel too, which upstream leaves out."""
    folder, settings = copy
    files = sorted((folder / "train").rglob("*.png"))
    for file, save in zip(files, KINDS.values(), strict=False):
        image = Image.open(file).copy()
        file.unlink()
        save(image, file)
    Image.new("RGB", (1, 1)).save(files[-1])
    trainer = train(settings)
    kept = {Path(file).name for file, *_ in trainer.train_loader.dataset.samples}
    assert len(kept) + 1 >= len({file.name for file in (folder / "train").rglob("*.*")})
    assert {Path(x).suffix for x in kept} == {".png", ".jpg", ".webp", ".tiff", ".JPG"}
    assert float(rows(trainer)[0]["train/response_loss"]) > 0


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_the_images_to_validate_on_lie_in_a_folder_of_another_name(name, copy):
    folder, settings = copy
    (folder / "val").rename(folder / name)
    trainer = train({**settings, "fraction": 0.2})
    assert len(trainer.test_loader.dataset) == 50
    assert trainer.best.exists()


def test_numbers_as_names_are_matched_as_names(teacher, tmp_path, overrides):
    """Folders are sorted as text, 10 before 2; a teacher's classes may be in the order of the numbers."""
    data = write_digits(tmp_path / "digits", train=4, val=2, names=[str(i) for i in range(1, 11)])
    names = [str(i) for i in range(1, 11)]
    settings = {**overrides, "data": str(data), "teacher_names": names}
    trainer = DistillationClassificationTrainer(overrides=settings)
    assert list(trainer.data["names"].values())[:2] == ["1", "10"]
    images = torch.rand(2, 3, 32, 32)
    own = ClassificationTeacher(teacher)(images)[0]
    order = [names.index(name) for name in trainer.data["names"].values()]
    assert torch.equal(trainer.teacher(images)[0], own[:, order])


def test_three_hundred_classes(tmp_path, overrides):
    data = write_digits(tmp_path / "many", train=1, val=1, names=[f"class {i}" for i in range(10)])
    for split in ("train", "val"):
        for i in range(10, 300):
            shutil.copytree(data / split / f"class {i % 10}", data / split / f"class {i}")
    network = seen(torchvision.models.resnet18(num_classes=300))
    network.names = [f"class {i}" for i in range(300)]
    trainer = train({**overrides, "data": str(data), "teacher": network})
    assert trainer.data["nc"] == 300
    assert float(rows(trainer)[0]["train/response_loss"]) > 0


def test_paths_with_spaces_and_accents(copy, teacher, tmp_path):
    folder, settings = copy
    place = tmp_path / "mes données" / "été 2026"
    place.mkdir(parents=True)
    folder.rename(place / "chiffres à lire")
    shutil.copy(teacher, place / "maître.pt")
    given = {
        "data": str(place / "chiffres à lire"),
        "teacher": str(place / "maître.pt"),
        "project": str(place / "nœud"),
    }
    trainer = train({**settings, **given, "fraction": 0.2})
    assert trainer.save_dir.parent == place / "nœud"
    assert YOLO(trainer.best).names == {i: str(i) for i in range(10)}


def test_runs_in_threads_are_those_without(overrides):
    """As servers and notebooks start them; what a run draws is the process's, so one runs after the other."""
    trainers = []
    for name in ("one", "two"):
        thread = threading.Thread(
            target=lambda n=name: trainers.append(train({**overrides, "fraction": 0.2, "name": n}))
        )
        thread.start()
        thread.join()
    losses = [[row["train/loss"] for row in rows(trainer)] for trainer in trainers]
    assert losses[0] == losses[1] == [row["train/loss"] for row in rows(train({**overrides, "fraction": 0.2}))]


NOTEBOOK = """
import multiprocessing
multiprocessing.set_start_method("spawn")
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer as Trainer
trainer = Trainer(overrides={})
trainer.train()
print("trained", trainer.best.exists())
"""


@pytest.mark.slow
def test_a_run_where_no_file_is_the_program(overrides):
    """As in a notebook, whose cells the loader's workers cannot read, also where they start afresh."""
    settings = {**overrides, "workers": 1, "fraction": 0.2}
    script = NOTEBOOK.format(settings)
    done = subprocess.run([sys.executable], input=script, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert "trained True" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_modules_as_they_are_at_hand_teach(wrap, overrides):
    network = seen(torchvision.models.resnet18(num_classes=10), 32)
    network.names = [str(i) for i in range(10)]
    images = torch.rand(2, 3, 32, 32)
    expected = network(images)
    given = wrap(network)
    names = {} if hasattr(given, "names") else {"teacher_names": network.names}
    trainer = train({**overrides, "teacher": given, "fraction": 0.2, **names})
    torch.testing.assert_close(trainer.teacher(images)[0], expected, atol=0.05, rtol=0.05)
    assert float(rows(trainer)[0]["train/feature_loss"]) > 0


def test_checkpoints_are_read_by_the_restricted_unpickler(overrides):
    """Those of a run that is still training too."""
    kept = {}

    def read(trainer):
        kept.update(load_checkpoint_file(str(trainer.last), trainer.last, ultralytics=True))

    trainer = train({**overrides, "data": Path(overrides["data"]), "fraction": 0.2}, on_model_save=read)
    assert kept["run_state"]["optimizer"]
    for file in (trainer.last, trainer.best):
        found = load_checkpoint_file(str(file), file, ultralytics=True)
        assert all(isinstance(v, (str, int, float, bool, list, dict, type(None))) for v in found["train_args"].values())


@pytest.mark.parametrize("argument", ["model", "pretrained"])
def test_a_student_that_a_newer_python_has_saved(argument, overrides, tmp_path):
    """It names paths otherwise."""
    student = tmp_path / "yolo11n-cls.pt"
    YOLO("yolo11n-cls.yaml").save(student)
    file = with_path(student, tmp_path / "newer.pt", "pathlib._local", "PosixPath")
    trainer = train({**overrides, argument: str(file), "fraction": 0.1})
    assert len(rows(trainer)) == 1
