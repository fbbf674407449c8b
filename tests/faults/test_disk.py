"""A disk that is full or cannot be written to: a sentence that says so, and nothing lost."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import rows, same, train, weights
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.distillation.cache import TeacherCache

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, 300 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    """Take all of a disk's space."""
    with (folder / "others.bin").open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


@pytest.mark.parametrize("moment", ["on_train_epoch_end", "on_val_end"])
def test_a_disk_that_fills_up(moment, disk, overrides, tmp_path):
    """The run stops with a sentence; with room again it goes on, and ends as one that never stopped."""
    settings = {**overrides, "epochs": 3, "project": str(disk / "runs"), "fraction": 0.4}

    def fill_once(caller):
        if len(list(disk.glob("runs/*/weights/last.pt"))):
            fill(disk)

    with pytest.raises(OSError, match=r"No space left on device\. What was saved before is whole: .*resume=.*last.pt"):
        train(settings, **{moment: fill_once})
    (last,) = disk.glob("runs/*/weights/last.pt")
    assert torch.load(last, weights_only=False)["epoch"] == 0
    (disk / "others.bin").unlink()
    resumed = train({"resume": str(last)})
    assert [row["epoch"] for row in rows(resumed)] == ["1", "2", "3"]
    assert sorted(os.listdir(last.parent)) == ["best.pt", "last.pt"]
    whole = train({**settings, "project": str(tmp_path / "whole")})
    assert same(weights(last), weights(whole.last))


def test_a_disk_that_fills_up_at_the_end(disk, overrides):
    """Only the final evaluation is left to do."""
    settings = {**overrides, "project": str(disk / "runs"), "fraction": 0.4}
    with pytest.raises(OSError, match="What was saved before is whole: make room, then go on with 'resume="):
        train(settings, on_fit_epoch_end=lambda trainer: fill(disk))
    (last,) = disk.glob("runs/*/weights/last.pt")
    (disk / "others.bin").unlink()
    epochs = []
    resumed = train({"resume": str(last)}, on_train_epoch_start=epochs.append)
    assert not epochs
    assert len(rows(resumed)) == 1
    assert "run_state" not in torch.load(last, weights_only=False)
    assert sorted(os.listdir(last.parent)) == ["best.pt", "last.pt"]


def test_a_full_disk(disk, overrides):
    fill(disk)
    with pytest.raises(OSError, match=r"The run's folder cannot be written to: No space left.*'project'"):
        DistillationClassificationTrainer(overrides={**overrides, "project": str(disk / "runs")})


def test_a_cache_on_a_full_disk_is_refused_again_and_again(disk):
    """Not written to where there is no room, which would be a SIGBUS."""
    kinds, file = [((50_000_000,), torch.float16)], disk / "cache.bin"
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            TeacherCache(5, 1, kinds, file)
        assert file.stat().st_size == 0
    assert TeacherCache(1, 1, kinds, file).size == file.stat().st_size


def test_a_folder_that_cannot_be_written_to(disk, overrides):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(OSError, match=r"The run's folder cannot be written to: Read-only.*'project'"):
        DistillationClassificationTrainer(overrides={**overrides, "project": str(disk / "runs")})


def test_a_file_in_the_folders_place(overrides):
    Path(overrides["project"]).write_text("a file")
    with pytest.raises(OSError, match=r"The run's folder cannot be written to.*'project'"):
        DistillationClassificationTrainer(overrides=overrides)
    assert Path(overrides["project"]).read_text() == "a file"
