# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Training, of any task, in which a batch whose loss is not finite leaves no trace."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from ultralytics.engine.distillation.resumable import ResumableTrainer
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

__all__ = ("GuardedTrainer",)

MOST_SKIPPED = 10  # batches that any run may skip; beyond them one in ten


class _StepGuard(torch.amp.GradScaler):
    """Skips optimizer steps whose gradients are not finite, as a GradScaler does, and scales nothing.

    Upstream's own scaler does so for float16 only; here every precision is guarded, on CUDA without waiting for it.
    """

    def __init__(self, device: str):
        super().__init__(device, init_scale=1.0)
        self.skipped: list[Tensor] = []  # of the last step, one flag per device

    def step(self, optimizer, *args, **kwargs):
        """Step unless a gradient is not finite."""
        result = super().step(optimizer, *args, **kwargs)
        self.skipped = list(self._found_inf_per_device(optimizer).values())
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Keep the scale."""
        super().update(1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, as nothing is worth keeping: the run may go on in another precision."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the scale of another precision."""


def _scales(device: torch.device) -> bool:
    """Tell whether PyTorch's GradScaler can look at gradients on a device."""
    parameter = torch.nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    guard = _StepGuard(device.type)
    try:
        guard.scale(parameter.detach())
        guard.unscale_(torch.optim.SGD([parameter]))
    except (NotImplementedError, RuntimeError, AssertionError):
        return False
    return True


class GuardedTrainer(ResumableTrainer):
    """A trainer that skips a batch whose loss, or whose gradient, is not finite.

    Neither weights nor optimizer state nor BatchNorm statistics nor the loss means in results.csv change by it. Skipped
    batches are counted by their cause, and a run in which they are more than `MOST_SKIPPED` and more than one in ten
    stops, naming it.

    Attributes:
        skipped (Counter): Skipped batches by cause: the name of a loss item, "teacher" or "gradient".
    """

    def __init__(self, *args, **kwargs):
        self.skipped: Counter[str] = Counter()
        self._batches = 0
        self._guards = False  # where steps cannot be skipped, upstream recovers from NaN in its own way
        self._pending = False  # a batch that was not looked at yet
        self._statistics: list[Tensor] = []  # of the student's BatchNorm layers
        self._kept_statistics: list[Tensor] = []  # the same before the batch
        self._means: dict[str, Tensor] | None = None  # the running means of the losses before the batch
        self._skipped_before = 0  # in the epochs before
        super().__init__(*args, **kwargs)

    def _setup_train(self) -> None:
        """Prepare training, then guard its steps, and note the statistics that a bad batch would spoil."""
        super()._setup_train()
        self._guards = self.scaler.is_enabled() or _scales(self.device)
        if self._guards and not self.scaler.is_enabled():
            self.scaler = _StepGuard(self.device.type)
        self._statistics = [b for b in unwrap_model(self.model).buffers() if b.is_floating_point()]
        self._kept_statistics = [b.clone() for b in self._statistics]

    def _model_train(self) -> None:
        """Begin an epoch."""
        super()._model_train()
        self._skipped_before, self._means = self.skipped.total(), None

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Note that a batch has to be looked at."""
        self._pending = self._guards
        return super().preprocess_batch(batch)

    def run_callbacks(self, event: str) -> None:
        """Look at each batch before anyone else learns of it."""
        if event == "on_train_batch_start" and self._guards and self._means is None:
            self.tloss = None  # upstream's running mean would begin with what was skipped
        elif event in {"on_train_batch_end", "on_train_epoch_end"} and self._pending:
            self._pending = False
            self._look_at_batch()
        if event == "on_train_epoch_end":
            if RANK in {-1, 0} and self.skipped.total() > self._skipped_before:
                LOGGER.warning(
                    f"{self.skipped.total() - self._skipped_before} batches of this epoch were skipped, see above."
                )
            # Upstream's own scaler skips steps, too, and halves its scale each time, at first 65536
            if self.scaler.is_enabled() and not isinstance(self.scaler, _StepGuard) and self.scaler.get_scale() < 1:
                raise RuntimeError(
                    f"Training stopped, as steps had to be skipped until the loss was scaled by "
                    f"{self.scaler.get_scale():.1g}: {self._describe('gradient')}"
                )
        super().run_callbacks(event)

    def _look_at_batch(self) -> None:
        """Keep what a good batch left; after a bad one return to what was kept.

        Raises:
            RuntimeError: If too many batches were bad.
        """
        self._batches += 1
        names = list(self.loss_items)
        found = torch.stack([x.detach().float() for x in self.loss_items.values()]).isfinite().logical_not().float()
        stepped = self.scaler.skipped if isinstance(self.scaler, _StepGuard) else []
        found = torch.cat([found, *(x.reshape(1).to(found.device) for x in stepped)])
        if RANK != -1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)  # gradients are shared, so all processes skip
        faults = [bool(x) for x in found.tolist()]
        if stepped:
            self.scaler.skipped = []
        if not any(faults):
            torch._foreach_copy_(self._kept_statistics, self._statistics)
            self._means = self.tloss
            return
        torch._foreach_copy_(self._statistics, self._kept_statistics)
        model = unwrap_model(self.model).state_dict()
        for name, value in self.ema.ema.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                value.copy_(model[name])
        self.optimizer.zero_grad()
        self.loss = torch.zeros_like(self.loss)  # nothing for upstream to recover from
        self.tloss = self._means or self.tloss
        cause = next((name for name, fault in zip(names, faults, strict=False) if fault), "gradient")
        cause = self._cause(cause)
        if not self.skipped[cause]:
            LOGGER.warning(f"Skipping a batch: {self._describe(cause)}")
        self.skipped[cause] += 1
        count = self.skipped.total()
        if count > max(MOST_SKIPPED, self._batches / 10):
            cause = self.skipped.most_common(1)[0][0]
            raise RuntimeError(
                f"Training stopped, as {count} of {self._batches} batches had to be skipped: {self._describe(cause)}"
            )

    def _state(self) -> dict[str, Any]:
        """Return what upstream's checkpoint leaves out, the skipped batches among it."""
        return {**super()._state(), "skipped": dict(self.skipped), "batches": self._batches}

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from where the run was stopped, counting on."""
        self.skipped, self._batches = Counter(state["skipped"]), state["batches"]
        self._skipped_before = self.skipped.total()
        super()._restore(state)

    def _cause(self, name: str) -> str:
        """Return what made a loss item, or the gradient, not finite."""
        return name

    def _describe(self, cause: str) -> str:
        """Return a sentence that says what was not finite, and what can be done."""
        what = "the student's own loss" if cause == "loss" else f"the {cause.replace('_', ' ')}"
        return f"{what} is NaN or infinite. Lower 'lr0', or train with 'amp=False' or 'amp=bf16'."
