"""Several runs at once: each has a folder of its own, and none disturbs another."""

import sys
import threading
from pathlib import Path

import pytest
from helpers import rows, train
from ultralytics import YOLO
from ultralytics.engine.distillation.run_files import claim_folder
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer

sys.path.insert(0, str(Path(__file__).parent))

from mortal import Process

pytestmark = pytest.mark.slow


def test_runs_that_start_at_once(overrides, monkeypatch):
    """Also the dataset's cache files are written by both."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for cache in Path(overrides["data"]).glob("*.cache"):
        cache.unlink()
    start = Process.context.Barrier(3)
    folders = [run.end() for run in [Process({**overrides, "epochs": 2}, start=start) for _ in range(3)]]
    assert sorted(Path(str(folder)).name for folder in folders) == ["train", "train-2", "train-3"]
    for folder in map(Path, folders):
        epochs = [line.split(",")[0] for line in (folder / "results.csv").read_text().splitlines()]
        assert epochs == ["epoch", "1", "2"]
        assert YOLO(folder / "weights" / "best.pt").names[9] == "9"


def test_many_runs_claim_a_folder_each(overrides):
    """Threads are enough to race for the names."""
    folders, start = [], threading.Barrier(8)

    def claim():
        args = args_of(overrides)
        start.wait()
        claim_folder(args)
        folders.append(args.save_dir)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == len(folders) == 8


def args_of(overrides):
    return DistillationClassificationTrainer(overrides={**overrides, "name": "other"}).args.__class__(
        project=overrides["project"], name="train", exist_ok=False, device="cpu", task="classify", mode="train"
    )


@pytest.mark.parametrize("second", ["exist_ok", "resume"])
def test_a_folder_in_use_is_refused(second, overrides):
    """The run that trains in it is not disturbed, and when it has ended the folder is free."""
    refused = []

    def start_second(trainer):
        if trainer.epoch == 1:
            arguments = {"resume": str(trainer.last)} if second == "resume" else {**overrides, "exist_ok": True}
            before = trainer.csv.read_text(), (trainer.save_dir / "args.yaml").read_text()
            with pytest.raises(RuntimeError, match=r"Another run is training in '.*train'\. Wait"):
                DistillationClassificationTrainer(overrides=arguments)
            refused.append(before == (trainer.csv.read_text(), (trainer.save_dir / "args.yaml").read_text()))

    trainer = train({**overrides, "epochs": 3, "fraction": 0.4}, on_train_epoch_start=start_second)
    assert refused == [True]
    assert len(rows(trainer)) == 3
    train({**overrides, "exist_ok": True, "fraction": 0.4})


def test_a_run_that_failed_leaves_its_folder_free(overrides):
    """As in a notebook, where the trainer that failed is still there."""

    def fail(trainer):
        raise KeyboardInterrupt

    trainer = DistillationClassificationTrainer(overrides={**overrides, "epochs": 2, "fraction": 0.4})
    trainer.add_callback("on_fit_epoch_end", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert train({"resume": str(trainer.last)}).start_epoch == 1
