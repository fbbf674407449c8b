"""Training on kept answers: the teacher is asked once, and the run is the one that asks it every time."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DISTILLATION_LOSSES, TRAINING, rows, same, train, weights
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from ultralytics import YOLO
from ultralytics.data import ClassificationDataset
from ultralytics.data.distillation.views import RepeatableViews
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.classifier import ClassificationTeacher
from ultralytics.utils import LOGGER

KEEPING = {"fraction": 0.4, "teacher_cache": "disk", "teacher_views": 2}


class Asking(DistillationClassificationTrainer):
    """Counts the images that the teacher answers while training."""

    asked = 0

    def preprocess_batch(self, batch):
        hook = self.teacher.first.model.register_forward_hook(self._count)
        try:
            batch = super().preprocess_batch(batch)
            batch[LESSON].answer()
            return batch
        finally:
            hook.remove()

    def _count(self, module, args, output):
        self.asked += len(args[0])


class Uncached(DistillationClassificationTrainer):
    """The same views, each asked for every time, in full precision."""

    def _setup_train(self):
        super()._setup_train()
        cached = self.distiller.cached
        cached.cache.read = None

        class Direct:
            cache, report = cached.cache, ""

            def __call__(self, images, index, view):
                return cached.teacher(images)

            def lap(self, event):
                """Take no time."""

        self.distiller.cached = Direct()


@pytest.fixture
def cached(overrides, digits, tmp_path):
    """Arguments of a run with a cache, on a copy of the digits."""
    shutil.copytree(digits, tmp_path / "digits", ignore=shutil.ignore_patterns("teacher_cache"))
    return {**overrides, **KEEPING, "data": str(tmp_path / "digits"), "epochs": 4}


@pytest.fixture(scope="module")
def once_kept(digits, teacher, tmp_path_factory):
    """Digits of which a run of one epoch has kept the answers to the first views."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(digits, folder / "digits", ignore=shutil.ignore_patterns("teacher_cache"))
    own = {"model": "yolo11n-cls.yaml", "teacher": str(teacher), "data": str(folder / "digits"), "project": str(folder)}
    train({**TRAINING, **own, **KEEPING, "epochs": 1})
    return folder / "digits"


@pytest.fixture
def kept(overrides, once_kept):
    """Arguments of another run of one epoch; what it keeps is let go, so that the next finds what this one found."""
    settings = {**overrides, **KEEPING, "data": str(once_kept), "epochs": 1}
    before = files(settings)
    yield settings
    for file in {*files(settings)} - {*before}:
        file.unlink()
    assert files(settings) == before


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    lines = []
    monkeypatch.setattr(LOGGER, "info", lambda message, *args: lines.append(str(message)))
    return lines


def files(cached):
    return sorted((Path(cached["data"]) / "teacher_cache").glob("*.bin"))


@pytest.mark.parametrize("where", ["ram", "disk", True])
def test_the_teacher_is_asked_once_about_each_view(where, cached, said):
    trainer = train({**cached, "teacher_cache": where}, Asking)
    assert trainer.asked == 2 * 80
    assert (trainer.distiller.cached.cache.hits, trainer.distiller.cached.cache.misses) == (160, 160)
    assert trainer.args.teacher_cache == ("disk" if where == "disk" else "ram")
    assert len(files(cached)) == (where == "disk")
    assert any("held 160 of 320 answers" in line and "MB" in line for line in said)
    assert all(float(row[f"train/{name}"]) > 0 for row in rows(trainer) for name in DISTILLATION_LOSSES)


def test_the_next_run_reads_what_is_there_and_is_the_same_run(cached, said):
    cold = train(cached, Asking)
    said.clear()
    warm = train(cached, Asking)
    assert (cold.asked, warm.asked) == (160, 0)
    assert same(weights(cold.last), weights(warm.last))
    assert any(re.search(r"held 320 of 320 answers .*; it spared the teacher about \d+ s", line) for line in said)
    assert not any("more are there" in line for line in said)
    content = bytearray(files(cached)[0].read_bytes())
    for i in range(1000, len(content), len(content) // 7):
        content[i] ^= 255
    files(cached)[0].write_bytes(content)
    damaged = train(cached, Asking)
    assert damaged.asked == 7
    for a, b in zip(rows(cold), rows(damaged), strict=True):  # answers to other batches are rounded otherwise
        assert float(a["train/feature_loss"]) == pytest.approx(float(b["train/feature_loss"]), rel=1e-2)


def test_it_is_the_run_that_asks_every_time(cached):
    """To half precision: the losses of the first epoch, and the weights."""
    settings = {**cached, "epochs": 1}
    kept, direct = train(settings), train(settings, Uncached)
    for name in DISTILLATION_LOSSES:
        a, b = (float(rows(trainer)[0][f"train/{name}"]) for trainer in (kept, direct))
        # Logits of the first steps are small, and follow rounding most
        assert a == pytest.approx(b, rel=3e-2 if name == "response_loss" else 2e-3)
    a, b = (
        torch.cat([v.flatten() for k, v in weights(t.last).items() if k.endswith("weight")]) for t in (kept, direct)
    )
    assert (a - b).norm() < 0.01 * b.norm()


def retrain_teacher(settings, tmp_path):
    ckpt = torch.load(settings["teacher"], weights_only=False)
    with torch.no_grad():
        ckpt["model"].model[-1].linear.bias += 1
    torch.save(ckpt, tmp_path / "other.pt")
    return {"teacher": str(tmp_path / "other.pt")}


@pytest.mark.parametrize(
    "change",
    [
        retrain_teacher,
        lambda settings, tmp_path: {"imgsz": 64},
        lambda settings, tmp_path: {"erasing": 0.1},
        lambda settings, tmp_path: {"teacher_imgsz": 64},
        lambda settings, tmp_path: {"teacher_views": 3},
        lambda settings, tmp_path: {"temperature": 2.0},  # at which probabilities are summed
        lambda settings, tmp_path: {"feature_distill": False, "attention_distill": False},
        lambda settings, tmp_path: {"fraction": 0.3},
    ],
    ids=["teacher", "imgsz", "erasing", "teacher_imgsz", "views", "temperature", "levels", "fraction"],
)
def test_answers_to_something_else_are_not_read(change, kept, tmp_path, said):
    other = train({**kept, **change(kept, tmp_path)}, Asking)
    assert other.asked == len(other.train_loader.dataset)
    assert len(files(kept)) == 2
    assert any("1 more are there. Delete those that no run needs." in line for line in said)


def test_answers_to_an_image_that_was_changed_are_not_read(cached, said):
    settings = {**cached, "epochs": 1}
    train(settings)
    said.clear()
    file = min((Path(settings["data"]) / "train" / "0").iterdir())
    file.write_bytes((Path(settings["data"]) / "val" / "0" / "00000.png").read_bytes())
    other = train(settings, Asking)
    assert other.asked == len(other.train_loader.dataset)
    assert len(files(cached)) == 2
    assert any("1 more are there. Delete those that no run needs." in line for line in said)


@pytest.mark.parametrize("change", [{"seed": 5}, {"lr0": 0.01}, {"distill_alpha": 0.5}, {"batch": 16}], ids=str)
def test_answers_serve_other_runs(change, kept):
    assert train({**kept, **change}, Asking).asked == 0


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_a_stopped_run_resumes_as_the_same_run(where, cached, tmp_path):
    class Stopped(Exception):
        pass

    def stop(trainer):
        if trainer.epoch == 1:
            raise Stopped

    settings = {**cached, "teacher_cache": where}
    whole = train({**settings, "project": str(tmp_path / "whole")})
    with pytest.raises(Stopped):
        train(settings, on_fit_epoch_end=stop)
    (last,) = Path(settings["project"]).glob("*/weights/last.pt")
    assert same(weights(train({"resume": str(last)}).last), weights(whole.last))


@pytest.mark.parametrize(("views", "resets"), [(1, 0), (3, 1)])
def test_loader_workers_start_anew_where_views_change_alone(views, resets, cached, monkeypatch):
    trainer, called = DistillationClassificationTrainer(overrides={**cached, "teacher_views": views}), []
    trainer._setup_train()
    monkeypatch.setattr(trainer.train_loader, "num_workers", 2)
    monkeypatch.setattr(trainer.train_loader, "reset", lambda: called.append("reset"))
    trainer.epoch = 1
    trainer._model_train()
    assert len(called) == resets
    assert int(trainer.train_loader.dataset.epoch) == 1


@pytest.mark.slow
def test_loader_workers_show_each_epoch_its_view(cached):
    """They draw ahead, but not in the view of the epoch before."""
    seen = {}

    class WithWorkers(DistillationClassificationTrainer):
        def get_dataloader(self, *args, **kwargs):
            self.args.workers = 2  # upstream sets none on the CPU
            return super().get_dataloader(*args, **kwargs)

        def preprocess_batch(self, batch):
            seen.setdefault(self.epoch, []).extend(zip(batch["index"].tolist(), batch["view"].tolist(), strict=True))
            return super().preprocess_batch(batch)

    train({**cached, "teacher_views": 3, "epochs": 3, "plots": False}, WithWorkers)
    for epoch in range(3):
        assert sorted(seen[epoch]) == [(i, epoch) for i in range(80)]


def test_a_subclass_builds_a_dataset_of_its_own(cached):
    """As upstream's guide says how to augment in another way: its views repeat too, and are what the student sees."""

    class Own(Asking):
        def build_dataset(self, img_path, mode="train", batch=None):
            dataset = ClassificationDataset(img_path, self.args, augment=mode == "train", prefix=mode)
            if mode == "train":
                dataset.torch_transforms = v2.Compose([v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32)])
            return dataset

    trainer = train({**cached, "epochs": 2, "teacher_views": 1}, Own)
    assert trainer.asked == 80
    assert isinstance(trainer.train_loader.dataset, RepeatableViews)
    assert trainer.train_loader.dataset[0]["img"].max() > 1  # not divided by 255


class InMemory(Dataset):
    """All that upstream asks of a dataset: samples and transforms, and no folder."""

    def __init__(self, folder, files):
        self.folder = ImageFolder(folder)
        self.samples = [(file if files else i, c) for i, (file, c) in enumerate(self.folder.samples)]
        self.torch_transforms = v2.Compose([v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        image, c = self.folder[i]
        return {"img": self.torch_transforms(image), "cls": c}


@pytest.mark.parametrize("files", [True, False])
def test_a_dataset_without_a_folder_is_kept_on_disk_if_it_names_its_files(files, cached, monkeypatch):
    """Else in memory, as nothing would tell that an image has changed."""
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: warnings.append(str(message)))

    class Own(Asking):
        def build_dataset(self, img_path, mode="train", batch=None):
            return InMemory(img_path, files)

    asked = [train({**cached, "epochs": 1, "teacher_views": 1}, Own).asked for _ in range(2)]
    assert asked == [200, 0 if files else 200]
    assert any("which are no files" in w for w in warnings) != files
    assert bool(list((Path(cached["data"]) / "teacher_cache").glob("*.bin"))) == files


@pytest.mark.parametrize("damaged", [False, True])
def test_a_teacher_whose_answers_are_all_kept_is_let_go_until_one_is_missing(damaged, cached, undrawn):
    """And opened again for the report."""
    there = []

    def on_epoch(trainer):
        there.append(trainer.teacher.first._model is not None)

    settings = {**cached, "teacher_views": 2, "epochs": 3, "plots": True}
    cold = train(settings, on_train_epoch_end=on_epoch)
    assert there == [True, True, False]
    if damaged:
        (file,) = files(cached)
        content = bytearray(file.read_bytes())
        content[100] ^= 1  # of the first record; its sum stays
        file.write_bytes(content)
    there.clear()
    warm = train(settings, on_train_epoch_end=on_epoch)
    assert there == 3 * [damaged]
    assert warm.distiller.cached.cache.misses == damaged
    assert (warm.save_dir / "distillation.html").exists()
    assert same(weights(warm.last), weights(cold.last)) or damaged


def test_a_teacher_that_changed_while_it_was_let_go_is_refused(teacher, tmp_path):
    file = tmp_path / "teacher.pt"
    file.write_bytes(Path(teacher).read_bytes())
    frozen, images = ClassificationTeacher(str(file)), torch.rand(2, 3, 32, 32)
    expected = frozen(images)[0]
    frozen.release()
    assert torch.equal(frozen(images)[0], expected)
    frozen.release()
    ckpt = torch.load(file, weights_only=False)
    ckpt["date"] = "another"
    torch.save(ckpt, file)
    with pytest.raises(ValueError, match="has changed while it taught"):
        frozen(images)


class Inverted(ClassificationDataset):
    """Shows each image as upstream does, but for its colours."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return {**sample, "img": 1 - sample["img"]}


def test_a_dataset_that_shows_other_views_has_answers_of_its_own(cached):
    """Though its files and its transforms are the same."""

    class Own(Asking):
        def build_dataset(self, img_path, mode="train", batch=None):
            return Inverted(img_path, self.args, augment=mode == "train", prefix=mode)

    settings = {**cached, "epochs": 1}
    train(settings)
    assert [train(settings, Own).asked for _ in range(2)] == [80, 0]


def test_networks_with_the_same_weights_do_not_share_answers(cached, teacher):
    """What an nn.Module does is not in its weights."""
    network = YOLO(teacher).model
    settings = {**cached, "epochs": 1, "response_distill": True, "feature_distill": False, "attention_distill": False}
    train({**settings, "teacher": network})
    assert train({**settings, "teacher": network}, Asking).asked == 0
    network.model[-1].linear.register_forward_hook(lambda module, args, output: 2 * output)
    assert train({**settings, "teacher": network}, Asking).asked == 80


def test_a_teacher_that_is_not_finite_is_not_kept(cached):
    def spoil(trainer):
        trainer.teacher.first.model.model[4].register_forward_hook(lambda module, args, output: output * torch.nan)

    settings = {**cached, "epochs": 1}
    assert train(settings, on_train_start=spoil).skipped == {"teacher": 3}
    assert train(settings, Asking).asked == 80


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_cache": "tape"}, "'teacher_cache=tape' is an invalid value"),
        ({"teacher_cache": "ram", "teacher_views": 0}, "'teacher_views=0' is an invalid value"),
        ({"teacher_cache": "ram", "teacher": "self"}, "its answers change"),
        ({"teacher_cache": "ram", "device": "0,1"}, "Set 'teacher_cache=disk'"),
        ({"teacher_cache": "ram", "teacher_views": 10**9}, "'teacher_cache=ram' cannot keep 1000000000 views"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings, message, overrides):
    with pytest.raises((ValueError, MemoryError), match=message):
        train({**overrides, **settings})


@pytest.mark.parametrize("fault", ["a file is in its place", "the dataset is read-only"])
def test_a_folder_that_cannot_be_written_to(fault, cached, monkeypatch):
    """Refused before the run has a folder, with the folder that is meant."""
    if "file" in fault:
        (place := Path(cached["data"]) / "teacher_cache").write_text("")
    else:
        place, allowed = Path(cached["data"]), os.access  # a superuser may write anywhere but on such a disk
        refused = lambda path, mode: Path(path) == place and mode & os.W_OK  # noqa: E731
        monkeypatch.setattr(os, "access", lambda path, mode: not refused(path, mode) and allowed(path, mode))
    with pytest.raises(OSError, match=f"where nothing can be written. Make '{place}' a folder"):
        DistillationClassificationTrainer(overrides=cached)
    assert not Path(cached["project"]).exists()


def test_a_folder_is_not_looked_at_where_nothing_is_kept_there(cached):
    (Path(cached["data"]) / "teacher_cache").write_text("")
    for given in ({"teacher_cache": "ram"}, {"teacher_cache": None}, {"distill_alpha": 0}):
        DistillationClassificationTrainer(overrides={**cached, **given})


def test_a_cache_of_someone_else_is_named(cached, monkeypatch):
    def open_other(file, *args, opened=os.open, **kwargs):
        if str(file).endswith(".bin"):
            raise PermissionError(13, "Permission denied")
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_other)
    with pytest.raises(PermissionError, match=r"in .*\.bin: Permission denied. Let it be written to, or delete it."):
        train(cached)


def test_a_disk_without_room_is_named(cached, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="'teacher_cache=disk' cannot keep 2 views of 80 images: No space left"):
        train(cached)
