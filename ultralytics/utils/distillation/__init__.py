# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Knowledge-distillation losses between a student and a frozen teacher classifier, in pure PyTorch."""

from ultralytics.utils.distillation.features import attention_loss, feature_loss
from ultralytics.utils.distillation.logits import average_logits, compress_logits, restore_logits
from ultralytics.utils.distillation.loss import DistillationLoss
from ultralytics.utils.distillation.registry import feature_method, methods, response_method
from ultralytics.utils.distillation.responses import response_loss
from ultralytics.utils.distillation.schedules import GradientBalance, scheduled_share, scheduled_temperature

__all__ = (
    "DistillationLoss",
    "GradientBalance",
    "attention_loss",
    "average_logits",
    "compress_logits",
    "feature_loss",
    "feature_method",
    "methods",
    "response_loss",
    "response_method",
    "restore_logits",
    "scheduled_share",
    "scheduled_temperature",
)
