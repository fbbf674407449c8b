# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Training, of any task, whose checkpoints are written whole or not at all, and whose resumed run is the same run."""

from __future__ import annotations

import errno
import filecmp
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ultralytics.engine.distillation.run_files import absolute, claim_folder, locked, whole_files
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOCAL_RANK, LOGGER, RANK
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import select_device, strip_optimizer, torch_distributed_zero_first, unwrap_model

__all__ = ("ResumableTrainer", "check_resumed")

STATE = "run_state"  # the key of a checkpoint that holds what upstream's leaves out


class _TrainedToEnd(Exception):
    """A run was stopped after its last epoch, so only its final evaluation is left."""


def check_resumed(given: Any) -> None:
    """Refuse a checkpoint to resume that is no file, where upstream would go on with the latest run.

    Raises:
        FileNotFoundError: If it is none.
    """
    if isinstance(given, (str, Path)) and given and not Path(given).is_file():
        what = "is a folder" if Path(given).is_dir() else "does not exist"
        raise FileNotFoundError(f"'resume={given}' {what}. Give the 'last.pt' of a run, in its folder 'weights'.")


class ResumableTrainer(BaseTrainer):
    """A trainer that loses nothing when it is stopped.

    Upstream's checkpoint keeps the EMA and the optimizer in half precision, and neither the student itself, nor
    gradients that wait for an optimizer step, nor the random state. Here a checkpoint of an unfinished run holds them,
    so that on the CPU a run that is stopped after an epoch and resumed ends with the same weights, bit for bit, as one
    that never stopped. Data loader workers and GPU kernels draw and round on their own: with them the runs are equal
    up to the order of images and rounding. Also `val/loss` is, as upstream shuffles the validation images.

    Files are written to a folder of their own and then moved, so a file that is there is a whole one. A run folder is
    made by one run and, while it trains, locked by it.
    """

    _accumulate = 1  # upstream's `accumulate`
    _carried = 0  # how much later the first optimizer step after a resume comes, see `accumulate`
    _iteration = _last_step = -1  # batches and the last optimizer step, counted from the run's start
    _resumed: dict[str, Any] | None = None
    _epoch_start: tuple[Any, Any] | None = None  # the state of the order's generator, and the loader's iterator
    _order: dict[str, Any] | None = None  # where the order of images began: its generator's state, and at which batch

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Complete the arguments and make the run's folder.

        Upstream calls this once its own arguments stand and nothing else has happened.

        Args:
            overrides (dict[str, Any]): Upstream's training arguments as given.

        Raises:
            FileNotFoundError: If what is to be resumed is no file.
            OSError: If the run's folder cannot be written to.
            RuntimeError: If another run trains in it.
            ValueError: If a copy of a run's checkpoint is resumed that would write to that run's folder.
        """
        check_resumed(self.args.resume)
        super().check_resume(overrides)
        if self.resume and "save_dir" not in overrides:
            self._stay_where_its_files_are(Path(self.args.resume))
        self.args.data = absolute(self.args.data)
        for name, value in vars(self.args).items():
            if isinstance(value, PurePath):  # of one Python and one system
                setattr(self.args, name, str(value))
        self._check_arguments()
        if RANK in {-1, 0}:
            select_device(self.args.device, verbose=False)  # refuses a device that is not there, before a folder is
            claim_folder(self.args, bool(self.resume))

    def _stay_where_its_files_are(self, checkpoint: Path) -> None:
        """Let a resumed run go on in the folder that its checkpoint lies in, wherever it was begun."""
        named, linked = Path(os.path.abspath(checkpoint)), checkpoint.resolve()
        for file in (named, linked):
            if file.parent.name == "weights":
                self.args.save_dir = str(file.parents[1])
                return
        if begun := getattr(self.args, "save_dir", None):
            raise ValueError(
                f"'resume={checkpoint}' is a copy from the run in '{begun}', without what else belongs to it. "
                f"Give a folder to go on in with 'save_dir', or resume the 'last.pt' in the 'weights' of a run."
            )

    def _check_arguments(self) -> None:
        """Refuse what cannot be trained with, while no file was written yet."""

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step; upstream's loop counts them from its start, so a resumed one is told the rest."""
        return self._accumulate + self._carried

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        self._accumulate = value

    def _setup_train(self) -> None:
        """Prepare training; several processes in the folder of the first."""
        if RANK != -1:
            folder = [self.save_dir]
            dist.broadcast_object_list(folder, 0)
            self.save_dir = folder[0]
            self.wdir, self.csv = self.save_dir / "weights", self.save_dir / self.csv.name
            self.last, self.best = self.wdir / self.last.name, self.wdir / self.best.name
        super()._setup_train()

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the batch, and note where a new order of images began."""
        if self._epoch_start is None:  # calibration of quantization and fitting of adapters come before the first epoch
            return super().preprocess_batch(batch)
        self._iteration += 1
        loader = self.train_loader
        loader.__dict__.pop("reset", None)
        began, iterator = self._epoch_start
        if loader.iterator is not iterator or self._order is None:
            self._order = {"generator": began, "iterator": loader.iterator is iterator, "batch": self._iteration}
            self._epoch_start = began, loader.iterator
        return super().preprocess_batch(batch)

    def optimizer_step(self) -> None:
        """Note which batch the step came after."""
        super().optimizer_step()
        self._last_step, self._carried = self._iteration, 0

    def _model_train(self) -> None:
        """Begin an epoch, the first one after a resume in the state in which the run was stopped."""
        super()._model_train()
        self._iteration = len(self.train_loader) * self.epoch - 1
        if self._resumed is not None:
            self._restore(self._resumed)
            self._resumed = None
        generator = self.train_loader.generator
        self._epoch_start = generator and generator.get_state(), self.train_loader.iterator

    def save_model(self) -> bool:
        """Write the checkpoints, complete and one by one whole.

        Raises:
            OSError: If they cannot be written; those of the epoch before are still there.
        """
        folder, last, best = self.wdir, self.last, self.best
        try:
            with self.whole_files(folder) as scratch:
                self.wdir, self.last, self.best = scratch, scratch / last.name, scratch / best.name
                saved = super().save_model()
                if saved:
                    torch.save({**torch_load(self.last, map_location="cpu"), STATE: self._state()}, self.last)
                    for file in set(scratch.iterdir()) - {self.last}:  # upstream writes one content to each
                        shutil.copyfile(self.last, file)
        finally:
            self.wdir, self.last, self.best = folder, last, best
        return saved

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Restore the run, as far as its first epoch is not concerned.

        Raises:
            _TrainedToEnd: If no epoch is left.
        """
        if not self.resume or ckpt is None:
            return super().resume_training(ckpt)
        self._resumed = ckpt.get(STATE)
        to_end = self._resumed is not None and self._resumed.get("stopped")
        if not to_end:
            super().resume_training(ckpt)
        self._forget_epochs_after(ckpt["epoch"])
        if to_end:
            self.epoch = ckpt["epoch"]
            raise _TrainedToEnd

    def _forget_epochs_after(self, epoch: int) -> None:
        """Take out of results.csv what was written after the checkpoint was."""
        if RANK in {-1, 0} and self.csv.exists():
            lines = self.csv.read_text(encoding="utf-8").splitlines(keepends=True)
            with self.whole_files(self.csv.parent) as scratch:
                (scratch / self.csv.name).write_text("".join(lines[: epoch + 2]), encoding="utf-8")

    def _do_train(self) -> None:
        """Train in a folder that no other run writes to."""
        with locked(self.save_dir):
            try:
                super()._do_train()
            except _TrainedToEnd:
                LOGGER.info(f"{self.args.model} was trained to its end: only the final evaluation is left.")
                self.final_eval()
                if RANK in {-1, 0}:
                    if self.args.plots:
                        self.plot_metrics()
                    self.run_callbacks("on_train_end")

    def plot_metrics(self) -> None:
        """Draw results.png, which is no reason to fail."""
        with self._surviving("draw its results"):
            super().plot_metrics()

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Let a run that is saved end well, whatever goes wrong with what is told about it."""
        try:
            yield
        except Exception as e:
            LOGGER.warning(f"The run is saved, but could not {what}: {type(e).__name__}: {e}")

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Restore student, EMA and optimizer in full precision, also after upstream's recovery from NaN."""
        state = ckpt.get(STATE)
        if state is None:  # of upstream's trainer, or of an earlier release
            return super()._load_checkpoint_state(ckpt)
        super()._load_checkpoint_state({**ckpt, "optimizer": state["optimizer"]})
        if all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point()):
            unwrap_model(self.model).load_state_dict(state["model"])
        if all(v.isfinite().all() for v in state["ema"].values() if v.is_floating_point()):
            self.ema.ema.load_state_dict(state["ema"])

    def final_eval(self) -> None:
        """Leave plain checkpoints behind, each replaced whole and last.pt last, then evaluate the best one."""
        with torch_distributed_zero_first(LOCAL_RANK):
            if RANK in {-1, 0} and self.last.exists():
                self._strip_files()
        if self.best.exists():
            LOGGER.info(f"\nValidating {self.best}...")
            self.validator.args.plots = self.args.plots
            self.validator.args.compile = False  # not worth it for one pass
            self.metrics = self.validator(model=self.best)
            self.metrics.pop("fitness", None)
            self.epoch += 1  # loggers get the best model's metrics as a step of their own
            self.run_callbacks("on_fit_epoch_end")
            self.epoch -= 1

    def _strip_files(self) -> None:
        """Replace last.pt and best.pt by what plain training leaves behind."""
        results = None
        with self.whole_files(self.wdir) as scratch:
            for file in filter(Path.exists, (self.last, self.best)):
                if file == self.best and filecmp.cmp(file, self.last, shallow=False):  # the last epoch was the best
                    shutil.copyfile(scratch / self.last.name, scratch / file.name)
                    continue
                ckpt = torch_load(file, map_location="cpu")
                if results is None:
                    results = ckpt["train_results"]  # those of last.pt
                ckpt.pop(STATE, None)
                self._strip(ckpt)
                torch.save(ckpt, scratch / file.name)
                strip_optimizer(scratch / file.name, updates={"train_results": results})

    @contextmanager
    def whole_files(self, folder: Path) -> Iterator[Path]:
        """Yield a folder to write in, see `run_files.whole_files`; last.pt comes last, as runs go on from it.

        Raises:
            OSError: If they cannot be written; it says how to go on.
        """
        with self._explained(folder, self.last), whole_files(folder, self.last.name) as scratch:
            yield scratch

    @contextmanager
    def _explained(self, folder: Path, last: Path) -> Iterator[None]:
        """Say what is saved, and how to go on, where writing fails."""
        full = os.strerror(errno.ENOSPC)
        try:
            yield
        except (OSError, RuntimeError) as e:
            if (
                not isinstance(e, OSError) and shutil.disk_usage(folder).free > 1 << 20
            ):  # what torch.save says of a disk
                raise
            raise OSError(
                getattr(e, "errno", None) or errno.ENOSPC,
                f"{getattr(e, 'strerror', None) or full}. What was saved before is whole: make room, then "
                + (f"go on with 'resume={last}'" if last.exists() else "start again, as no epoch was saved"),
                str(folder),
            ) from e

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Add an epoch to results.csv; a line that is cut short is taken out on resume."""
        with self._explained(self.csv.parent, self.last):
            super().save_metrics(metrics)

    def _strip(self, ckpt: dict[str, Any]) -> None:
        """Take out of a checkpoint what else plain training would not have written."""

    def _state(self) -> dict[str, Any]:
        """Return what upstream's checkpoint leaves out, as plain values and tensors."""
        student = unwrap_model(self.model)
        name, keys, *rest = np.random.get_state()
        return {
            "model": student.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gradients": {n: p.grad for n, p in student.named_parameters() if p.grad is not None},
            "stopped": bool(self.stop),  # no epoch is to follow
            "waited": self._iteration - self._last_step,  # batches since the last optimizer step
            "order": {**self._order, "drawn": self._iteration + 1 - self._order["batch"]},
            "mosaic": [list(dataset.buffer) for dataset in self._mosaic_datasets()],
            "random": random.getstate(),
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Set gradients, step count, order of images and random state to where the run was stopped."""
        for name, parameter in unwrap_model(self.model).named_parameters():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)
        self._last_step = self._iteration - state["waited"]  # an epoch may have another length now
        self._carried = self._last_step + 1
        if RANK != -1:  # each process has a random state of its own, and an order that upstream sets per epoch
            return
        self._restore_order(state["order"])
        for dataset, recent in zip(self._mosaic_datasets(), state.get("mosaic", ()), strict=False):
            for i in recent:
                dataset.get_image_and_label(i)
            dataset.buffer[:] = recent
        name, keys, *rest = state["numpy"]
        random.setstate(state["random"])
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([x.cpu() for x in state["cuda"]])

    def _mosaic_datasets(self) -> list[Any]:
        """Return the training datasets that draw the images of a mosaic from those that they have loaded last."""
        dataset = self.train_loader.dataset
        every = getattr(dataset, "datasets", [dataset])
        return [x for x in every if isinstance(getattr(x, "buffer", None), list) and x.cache != "ram"]

    def _restore_order(self, order: dict[str, Any]) -> None:
        """Go on in the order of images; data loader workers have drawn ahead, so with them it begins anew."""
        loader, self._order = self.train_loader, {**order, "batch": self._iteration + 1 - order["drawn"]}
        if loader.num_workers:
            return
        if order["iterator"]:  # made before the generator's state was noted
            loader.iterator = loader._get_iterator()
            loader.generator.set_state(order["generator"])
        else:
            loader.generator.set_state(order["generator"])
            loader.iterator = loader._get_iterator()
        for _ in range(order["drawn"]):
            loader.iterator._next_index()  # draws the order, loads no image
        if self.start_epoch > self.epochs - self.args.close_mosaic:
            loader.reset = lambda: None  # upstream's loop did so before the stop, and does it again
