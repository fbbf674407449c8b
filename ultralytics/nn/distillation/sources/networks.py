# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Teachers that are networks already: Ultralytics' own checkpoints, and modules given in Python."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.nn.distillation.files import refuse_other
from ultralytics.nn.distillation.safe_load import check_modules, load_checkpoint_file
from ultralytics.nn.distillation.sources.base import Expected, Source, fixed_imgsz, names_of
from ultralytics.nn.distillation.sources.libraries import timm_recipe
from ultralytics.nn.distillation.sources.probed import PROBE, describe_probed, open_probed
from ultralytics.nn.tasks import BaseModel, guess_model_task

__all__ = ("open_module", "open_ultralytics")


def open_ultralytics(file: str, teacher: Any, trusted: bool, expected: Expected) -> Source:
    """Open a checkpoint of Ultralytics' own, of the task that is expected."""
    if Path(file).suffix != ".pt":
        refuse_other(file, teacher)
        raise TypeError(
            f"'teacher={teacher}' is no '.pt', ONNX or TorchScript file. Give the 'best.pt' of a {expected.noun} "
            f"training, or weights with the network that they belong to, e.g. 'timm:resnet18@{Path(file).name}'."
        )
    ckpt = load_checkpoint_file(file, teacher, trusted, ultralytics=True)
    if isinstance(ckpt, nn.Module):  # saved as a whole, which only a trusted file can be
        return replace(open_module(ckpt, expected), name=file, file=file)
    probe = ckpt.get(PROBE) if isinstance(ckpt, Mapping) else None
    if isinstance(probe, Mapping) and "model" not in ckpt:
        return open_probed(file, ckpt)
    try:
        model = (ckpt.get("ema") or ckpt.get("model")) if isinstance(ckpt, Mapping) else None
    except RuntimeError:  # a tensor is neither true nor false
        model = None
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"'teacher={teacher}' holds weights, but no Ultralytics network. Give the 'best.pt' of a {expected.noun} "
            f"training, or name the network that the weights belong to, e.g. 'teacher=timm:resnet18@{Path(file).name}'."
        )
    if trusted and not isinstance(model, BaseModel):  # as training scripts of others save it
        return replace(open_module(model, expected), name=file, file=file)
    try:
        if not trusted:
            check_modules(model)
        _check_task(model, expected)
        if ckpt.get("modelopt"):  # trained with quantize=8: the fake quantization is part of what it learned
            if not trusted:
                raise TypeError("its quantization needs code of another library; trust it with 'teacher_trusted=True'")
            from ultralytics.utils.torch_utils import restore_qat  # the oldest supported release has none

            restore_qat(model, ckpt["modelopt"])
        source = Source(file, model.float(), names_of(model), model.yaml.get("channels", 3), file=file)
        side = (ckpt.get("train_args") or {}).get("imgsz")
        source.trained_imgsz = side if isinstance(side, int) else None
        return describe_probed(source, probe) if probe else source
    except NotImplementedError as e:
        raise TypeError(
            f"'teacher={teacher}' is {e}, but the teacher must be a {expected.noun} model, e.g. "
            f"'teacher={expected.example}'."
        ) from e
    except Exception as e:  # a network whose parts were damaged or made up
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: its network is damaged ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:120]}). Copy or train it again."
        ) from e


def _check_task(model: nn.Module, expected: Expected) -> None:
    """Refuse a network of another task; upstream's classes build on each other.

    Raises:
        NotImplementedError: If it is one, saying what it is.
    """
    task = expected.task if type(model) is expected.network_class else guess_model_task(model)
    if task is None:  # upstream's guess knows no RT-DETR, which is built on a detector
        task = expected.task if isinstance(model, expected.network_class) else "different"
    if not isinstance(model, expected.network_class) or task != expected.task:
        unlike = f"a {expected.noun} network, but not one of Ultralytics'"
        raise NotImplementedError(unlike if task == expected.task else f"a {task} model")


def open_module(module: nn.Module, expected: Expected) -> Source:
    """Open a network given in Python: a copy, as it will be frozen."""
    if isinstance(module, Model):  # YOLO(...)
        module = module.model
        if not isinstance(module, nn.Module):
            raise TypeError(f"'teacher=YOLO({module})' is an exported model. Give the file itself, 'teacher={module}'.")
    known = getattr(module, "pretrained_cfg", None) or {}  # timm's
    try:
        if isinstance(module, BaseModel):
            _check_task(module, expected)
        network = copy.deepcopy(module).float().cpu()
    except NotImplementedError as e:
        raise TypeError(
            f"'teacher=module:{type(module).__name__}' is {e}, but the teacher must be a {expected.noun} model, e.g. "
            f"'teacher={expected.example}'."
        ) from e
    except Exception as e:
        raise TypeError(
            f"'teacher=module:{type(module).__name__}' cannot be copied ({type(e).__name__}). Save its weights, and "
            f"load them into a new network."
        ) from e
    name, mean, std = f"module:{type(module).__name__}", known.get("mean", (0.0,)), known.get("std", (1.0,))
    channels = network.yaml.get("channels", 3) if isinstance(network, BaseModel) else None
    source = Source(name, network, names_of(network), channels, fixed_imgsz(network), mean, std)
    source.recipe = timm_recipe(network)
    return source
