# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The distillation losses of other libraries, on the networks that speed.py trains."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.steps import CLASSES


class Logits(torch.nn.Module):
    """A YOLO classifier as other libraries know classifiers: it gives logits, and says how its images are prepared."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.num_classes, self.in_chans = CLASSES, 3
        self.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, in evaluation too."""
        answer = self.model.predict(images)
        return answer[1] if isinstance(answer, tuple) else answer


def timm_loss(student: torch.nn.Module, teacher: torch.nn.Module) -> Callable[[dict], tuple[torch.Tensor, dict]]:
    """Return the loss of timm's logit distillation."""
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        Logits(student),
        Logits(teacher).eval(),
        torch.nn.CrossEntropyLoss(),
        task_loss_weight=0.3,
        temperature=4.0,
        device=next(student.parameters()).device,
        verbose=False,
    )

    def loss(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        answer = task(batch["img"], batch["cls"])
        return answer["loss"], {"loss": answer["task_loss"].detach(), "kd": answer["kd_loss"].detach()}

    return loss


def torchdistill_loss(
    student: torch.nn.Module, teacher: torch.nn.Module
) -> Callable[[dict], tuple[torch.Tensor, dict]]:
    """Return the loss of torchdistill's DistillationBox."""
    from torchdistill.core.distillation import DistillationBox

    device = next(student.parameters()).device
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    term = {"criterion": {"key": "KDLoss", "kwargs": {**logits, "temperature": 4.0, "alpha": 0.3}}, "weight": 1.0}
    criterion = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": term}}}
    config = {
        "num_epochs": 1,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"requires_grad": True, "forward_proc": "forward_batch_only"},
        "criterion": criterion,
    }
    box = DistillationBox(Logits(teacher).eval(), Logits(student), {}, config, device, None, False, 1.0)

    def loss(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total = box.forward_process(batch["img"], batch["cls"])
        return total, {"loss": total.detach()}

    return loss


PEERS = {"timm": timm_loss, "torchdistill": torchdistill_loss}
