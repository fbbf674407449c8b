# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Classification training whose checkpoints are written whole or not at all, and whose resumed run is the same run."""

from __future__ import annotations

import io
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.utils import RANK
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import unwrap_model

__all__ = ("ResumableClassificationTrainer",)

STATE = "run_state"  # the key of a checkpoint that holds what upstream's leaves out


class ResumableClassificationTrainer(ClassificationTrainer):
    """A ClassificationTrainer that loses nothing when it is stopped.

    Upstream's checkpoint keeps the EMA and the optimizer in half precision, and neither the student itself, nor
    gradients that wait for an optimizer step, nor the random state. Here a checkpoint of an unfinished run holds them,
    so that on the CPU a run that is stopped after an epoch and resumed ends with the same weights, bit for bit, as one
    that never stopped. Data loader workers and GPU kernels draw and round on their own: with them the runs are equal
    up to the order of images and rounding. Also `val/loss` is, as upstream shuffles the validation images.

    Checkpoints are written to a folder of their own and then moved, so a file that is there is a whole one.
    """

    _carried = 0  # how much later the first optimizer step after a resume comes, see `accumulate`
    _iteration = _last_step = -1  # batches and the last optimizer step, counted from the run's start
    _resumed: dict[str, Any] | None = None
    _epoch_start: tuple[Any, Any] = (None, None)  # the state of the order's generator, and the loader's iterator
    _order: dict[str, Any] | None = None  # where the order of images began: its generator's state, and at which batch

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step; upstream's loop counts them from its start, so a resumed one is told the rest."""
        return self._accumulate + self._carried

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        self._accumulate = value

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the batch, and note where a new order of images began."""
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
        """Write the checkpoints, complete and one by one whole."""
        folder, last, best = self.wdir, self.last, self.best
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        self.wdir, self.last, self.best = partial, partial / last.name, partial / best.name
        try:
            saved = super().save_model()
            if saved:
                ckpt = torch_load(self.last, map_location="cpu")
                content = _serialize({**ckpt, STATE: self._state()})
                for file in partial.iterdir():  # upstream writes one content to each
                    _replace(folder / file.name, content, partial)
        finally:
            self.wdir, self.last, self.best = folder, last, best
            shutil.rmtree(partial, ignore_errors=True)
        return saved

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Restore the run, as far as its first epoch is not concerned."""
        super().resume_training(ckpt)
        if self.resume and ckpt is not None:
            self._resumed = ckpt.get(STATE)

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
        """Leave plain checkpoints behind, then evaluate the best one."""
        if RANK in {-1, 0}:
            for file in (self.last, self.best):
                self._make_plain(file)
        super().final_eval()

    def _make_plain(self, file: Path) -> None:
        """Rewrite a checkpoint of this run as upstream's trainer would have written it."""
        if file.exists() and STATE in (ckpt := torch_load(file, map_location="cpu")):
            del ckpt[STATE]
            self._strip(ckpt)
            partial = self.wdir / ".partial"
            partial.mkdir(exist_ok=True)
            _replace(file, _serialize(ckpt), partial)
            shutil.rmtree(partial)

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
            "last_step": self._last_step,
            "order": self._order,
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
        self._last_step, self._carried = state["last_step"], state["last_step"] + 1
        if RANK != -1:  # each process has a random state of its own, and an order that upstream sets per epoch
            return
        self._restore_order(state["order"])
        name, keys, *rest = state["numpy"]
        random.setstate(state["random"])
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([x.cpu() for x in state["cuda"]])

    def _restore_order(self, order: dict[str, Any]) -> None:
        """Go on in the order of images; data loader workers have drawn ahead, so with them it begins anew."""
        loader, self._order = self.train_loader, order
        if loader.num_workers:
            return
        if order["iterator"]:  # made before the generator's state was noted
            loader.iterator = loader._get_iterator()
            loader.generator.set_state(order["generator"])
        else:
            loader.generator.set_state(order["generator"])
            loader.iterator = loader._get_iterator()
        for _ in range(self._iteration + 1 - order["batch"]):
            loader.iterator._next_index()  # draws the order, loads no image
        if self.start_epoch > self.epochs - self.args.close_mosaic:
            loader.reset = lambda: None  # upstream's loop did so before the stop, and does it again


def _serialize(ckpt: dict[str, Any]) -> bytes:
    """Return a checkpoint as the bytes of a file."""
    buffer = io.BytesIO()
    torch.save(ckpt, buffer)
    return buffer.getvalue()


def _replace(file: Path, content: bytes, partial: Path) -> None:
    """Write a file whole or not at all: into a folder beside it, to the disk, and only then in its place."""
    whole = partial / file.name
    with whole.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(whole, file)
