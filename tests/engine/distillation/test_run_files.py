"""Files that are there whole or not at all, and folders that one run alone writes to."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from ultralytics.engine.distillation import run_files
from ultralytics.engine.distillation.run_files import LOCK, SCRATCH, claim_folder, locked, sweep, whole_files


def names(folder):
    return sorted(os.listdir(folder))


def test_files_appear_together_and_the_last_one_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(run_files.os, "replace", lambda a, b: moved.append(Path(b).name) or replace(a, b))
    with whole_files(tmp_path, last="b") as scratch:
        for name in "abc":
            (scratch / name).write_text(name)
        assert names(tmp_path) == [SCRATCH]
    assert moved == ["a", "c", "b"]
    assert names(tmp_path) == ["a", "b", "c"]


def test_folders_appear_too(tmp_path):
    with whole_files(tmp_path, scratch=".mine") as scratch:
        (scratch / "data" / "train").mkdir(parents=True)
        (scratch / "data" / "train" / "0.png").write_bytes(b"0")
        assert names(tmp_path) == [".mine"]
    assert (tmp_path / "data" / "train" / "0.png").read_bytes() == b"0"
    assert names(tmp_path) == ["data"]


def test_what_was_there_stays_if_writing_fails(tmp_path):
    (tmp_path / "a").write_text("before")

    def fill_up():
        with whole_files(tmp_path) as scratch:
            (scratch / "a").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill_up()
    assert (tmp_path / "a").read_text() == "before"
    assert names(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_not_taken_for_whole(tmp_path):
    (tmp_path / SCRATCH).mkdir()
    (tmp_path / SCRATCH / "old").write_text("half")
    with whole_files(tmp_path) as scratch:
        (scratch / "new").write_text("whole")
    assert names(tmp_path) == ["new"]


def test_a_folder_is_held_by_one(tmp_path):
    with locked(tmp_path):
        assert (tmp_path / "weights" / LOCK).exists()
        with pytest.raises(RuntimeError, match="Another run is training in"), locked(tmp_path):
            pass
    assert names(tmp_path / "weights") == []
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("held", [False, True])
def test_leftovers_are_swept_unless_a_run_is_at_work(held, tmp_path):
    weights = tmp_path / "weights"
    (weights / SCRATCH).mkdir(parents=True)
    if held:
        with locked(tmp_path):
            sweep(weights)
            assert names(weights) == [LOCK, SCRATCH]
    else:
        sweep(weights)
        assert names(weights) == []


def arguments(tmp_path, **given):
    return SimpleNamespace(
        **{"project": str(tmp_path / "runs"), "name": "run", "exist_ok": False, "task": "t", **given}
    )


def test_each_run_gets_a_folder_of_its_own(tmp_path):
    claimed = []
    for _ in range(2):
        args = arguments(tmp_path)
        claim_folder(args)
        claimed.append(Path(args.save_dir).name)
    assert claimed == ["run", "run-2"]
    claim_folder(args := arguments(tmp_path, exist_ok=True))
    assert Path(args.save_dir).name == "run"


@pytest.mark.parametrize(("resumed", "mend"), [(False, "'project'"), (True, "'save_dir'")])
def test_a_folder_that_cannot_be_made(resumed, mend, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match=f"The run's folder cannot be written to: .* with {mend}"):
        claim_folder(arguments(tmp_path), resumed)
