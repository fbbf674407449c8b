# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Where a teacher comes from: one adapter per source, each returning a network and what is known about it."""

from __future__ import annotations

import ast
import copy
import difflib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine.model import Model
from ultralytics.nn.class_names import imagenet_names, read_names
from ultralytics.nn.safe_load import check_modules, is_torchscript, load_checkpoint_file, load_safetensors, regular_file
from ultralytics.nn.tasks import ClassificationModel, guess_model_task
from ultralytics.utils import SETTINGS
from ultralytics.utils.checks import REMOTE_FILE_PREFIXES, check_file, check_model_file_from_stem
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

__all__ = ("Source", "open_source")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATE_KEYS = ("model_ema", "state_dict_ema", "state_dict", "model_state_dict", "model")
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # what DDP, torch.compile and AveragedModel put before a name
MAX_SIDE = 2048  # pixels, and images at a time, that an ONNX file may ask for
NAME_KEYS = ("names", "class_names", "classes")


@dataclass
class Source:
    """A network and what its source says about it; None where it says nothing.

    Attributes:
        name (str): The teacher as args.yaml records it, files by absolute path.
        network (nn.Module): Takes (B, channels, imgsz, imgsz) images, returns class logits or probabilities.
        names (list[str] | None): Class names by index.
        channels (int | None): Input channels.
        imgsz (int | None): The one image side in pixels that it takes; None if it takes any.
        mean (Sequence[float]): Per-channel mean that its training subtracted from images in 0 to 1.
        std (Sequence[float]): Per-channel standard deviation that its training divided by.
        has_features (bool): Whether feature maps can be read inside it.
        file (str | None): The file that it was read from.
    """

    name: str
    network: nn.Module
    names: list[str] | None = None
    channels: int | None = None
    imgsz: int | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    has_features: bool = True
    file: str | None = None


def open_source(teacher: Any, imgsz: int | None = None, trusted: bool = False) -> Source:
    """Open a teacher, on the CPU.

    Args:
        teacher (Any): An Ultralytics `.pt` or its official name, `torchvision:NAME[@FILE]`, `timm:NAME[@FILE]`, a
            TorchScript or ONNX file, or an `nn.Module`.
        imgsz (int, optional): Image side in pixels to build a network of fixed size for.
        trusted (bool): Let a file run code of its own.

    Returns:
        (Source): The network and what is known about it.

    Raises:
        FileNotFoundError: If the file does not exist or cannot be downloaded.
        ImportError: If the source needs a library that is not installed.
        TypeError: If it is not a trained classifier, or the file is damaged or not safe to load.
        ValueError: If no teacher is given, or the library knows no such network.
    """
    if teacher is None:
        raise ValueError(
            "No teacher given. Set 'teacher' to a trained classification checkpoint, i.e. "
            "'teacher=runs/classify/train/weights/best.pt'."
        )
    if isinstance(teacher, nn.Module):
        return _open_module(teacher)
    library, _, rest = str(teacher).partition(":")
    if library == "module":
        raise ValueError(f"'teacher={teacher}' was a network given in Python: give it again, as 'teacher=network'.")
    if library in LIBRARIES:
        name, at, file = rest.partition("@")
        if at and not file:
            raise ValueError(f"'teacher={teacher}' names no file after '@'. Give one, or leave the '@' out.")
        return LIBRARIES[library](name, file, imgsz, trusted)
    file = _find(teacher)
    if Path(file).suffix.lower() == ".onnx":
        return _open_onnx(file, teacher)
    if is_torchscript(file):
        return _open_torchscript(file, teacher, trusted)
    return _open_ultralytics(file, teacher, trusted)


def _open_ultralytics(file: str, teacher: Any, trusted: bool) -> Source:
    """Open a checkpoint of Ultralytics' own."""
    if Path(file).suffix != ".pt":
        raise TypeError(
            f"'teacher={teacher}' is no '.pt', ONNX or TorchScript file. Give the 'best.pt' of a classification "
            f"training, or weights with the network that they belong to, i.e. 'timm:resnet18@{Path(file).name}'."
        )
    ckpt = load_checkpoint_file(file, teacher, trusted, ultralytics=True)
    try:
        model = (ckpt.get("ema") or ckpt.get("model")) if isinstance(ckpt, Mapping) else None
    except RuntimeError:  # a tensor is neither true nor false
        model = None
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"'teacher={teacher}' holds weights, but no Ultralytics network. Give the 'best.pt' of a classification "
            f"training, or name the network that the weights belong to, i.e. 'teacher=timm:resnet18@{Path(file).name}'."
        )
    try:
        if not trusted:
            check_modules(model)
        if not isinstance(model, ClassificationModel):
            task = guess_model_task(model)
            found = f"a {task} model" if task != "classify" else "a classification network, but not one of Ultralytics'"
            raise NotImplementedError(found)
        if ckpt.get("modelopt"):  # trained with quantize=8: the fake quantization is part of what it learned
            if not trusted:
                raise TypeError("its quantization needs code of another library; trust it with 'teacher_trusted=True'")
            from ultralytics.utils.torch_utils import restore_qat  # the oldest supported release has none

            restore_qat(model, ckpt["modelopt"])
        source = Source(file, model.float(), _names_of(model), model.yaml.get("channels", 3), file=file)
        return _checked(source, teacher)
    except NotImplementedError as e:
        raise TypeError(
            f"'teacher={teacher}' is {e}, but the teacher must be a classification model, i.e. "
            f"'teacher=yolo11l-cls.pt'."
        ) from e
    except _UntrainedError as e:
        raise TypeError(str(e)) from e
    except Exception as e:  # a network whose parts were damaged or made up
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: its network is damaged ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:120]}). Copy or train it again."
        ) from e


class _UntrainedError(TypeError):
    """A network that was never trained."""


def _open_module(module: nn.Module) -> Source:
    """Open a network given in Python: a copy, as it will be frozen."""
    if isinstance(module, Model):  # YOLO(...)
        module = module.model
        if not isinstance(module, nn.Module):
            raise TypeError(f"'teacher=YOLO({module})' is an exported model. Give the file itself, 'teacher={module}'.")
    known = getattr(module, "pretrained_cfg", None) or {}  # timm's
    try:
        network = copy.deepcopy(module).float().cpu()
    except Exception as e:
        raise TypeError(
            f"'teacher=module:{type(module).__name__}' cannot be copied ({type(e).__name__}). Save its weights, and "
            f"load them into a new network."
        ) from e
    return _checked(
        Source(
            f"module:{type(module).__name__}",
            network,
            _names_of(network),
            network.yaml.get("channels", 3) if isinstance(network, ClassificationModel) else None,
            _fixed_imgsz(network),
            known.get("mean", (0.0,)),
            known.get("std", (1.0,)),
        ),
        f"module:{type(module).__name__}",
    )


def _open_torchvision(name: str, file: str, imgsz: int | None, trusted: bool) -> Source:
    """Open a TorchVision classifier with its official weights or those of a file."""
    import torchvision.models as library

    teacher = f"torchvision:{name}" + (f"@{file}" if file else "")
    _check_known(name, library.list_models(module=library), teacher)
    if not file:
        weights = library.get_model_weights(name).DEFAULT
        # A first, restricted reading, as TorchVision's own would run what a file in its cache says
        _download(lambda: weights.get_state_dict(progress=True, check_hash=True, weights_only=True), teacher)
        network = library.get_model(name, weights=weights)
        preset = weights.transforms()
        return Source(
            teacher, network, imagenet_names(), 3, _fixed_imgsz(network), tuple(preset.mean), tuple(preset.std)
        )

    def build(num_classes: int, imgsz: int | None = None) -> nn.Module:
        extra = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}  # they warn without
        extra |= {"image_size": imgsz} if imgsz else {}
        return library.get_model(name, weights=None, num_classes=num_classes, **extra)

    source = _open_weights(teacher, f"torchvision:{name}", file, build, imgsz, trusted)
    source.mean, source.std = IMAGENET_MEAN, IMAGENET_STD
    return source


def _open_timm(name: str, file: str, imgsz: int | None, trusted: bool) -> Source:
    """Open a timm classifier with its official weights or those of a file."""
    teacher = f"timm:{name}" + (f"@{file}" if file else "")
    try:
        import timm
    except ImportError as e:
        raise ImportError(f"'teacher={teacher}' needs timm. Install it with 'pip install timm'.") from e
    if ":" not in name:  # hf-hub:owner/name is the Hub's to know
        _check_known(name.partition(".")[0], timm.list_models(), teacher)

    def build(num_classes: int | None = None, imgsz: int | None = None) -> nn.Module:
        extra = {"pretrained": True} if num_classes is None else {"num_classes": num_classes}
        return timm.create_model(name, **extra, **({"img_size": imgsz} if imgsz else {}))

    if file:
        source = _open_weights(teacher, f"timm:{name}", file, build, imgsz, trusted)
    else:

        def build_official() -> nn.Module:
            fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
            return build(imgsz=imgsz if fixed else None)

        network = _download(build_official, teacher)
        source = Source(teacher, network, imgsz=_fixed_imgsz(network))
        if network.num_classes == 1000:
            source.names = imagenet_names()
        elif subset := timm.data.infer_imagenet_subset(network):
            source.names = timm.data.ImageNetInfo(subset).label_names()
    config = timm.data.resolve_model_data_config(source.network)
    source.channels, source.mean, source.std = config["input_size"][0], config["mean"], config["std"]
    return source


LIBRARIES: dict[str, Callable[[str, str, int | None, bool], Source]] = {
    "torchvision": _open_torchvision,
    "timm": _open_timm,
}


def _open_weights(
    teacher: str,
    library: str,
    file: str,
    build: Callable[..., nn.Module],
    imgsz: int | None,
    trusted: bool,
) -> Source:
    """Fill a library's network with the weights of a file, every one of them."""
    file = regular_file(file, teacher)
    if Path(file).suffix.lower() == ".safetensors":
        saved, content = load_safetensors(file, teacher)
    else:
        content = load_checkpoint_file(file, teacher, trusted)
        saved = _state_of(content, teacher)
    state = {WRAPPERS.sub("", k): v for k, v in saved.items() if k != "n_averaged"}
    network = build(2)
    resized = imgsz if _fixed_imgsz(network) else None
    expected, other = build(2, resized).state_dict(), build(3, resized).state_dict()
    # The head is what grows with the number of classes; only a head that is there as a whole is built
    head = [k for k, v in expected.items() if other[k].shape != v.shape]
    classes = {tuple(state[k].shape[:1]) for k in head if k in state}
    if len(classes) == 1 and all(k in state and state[k].shape[1:] == expected[k].shape[1:] for k in head):
        network = build(max(*classes.pop(), 1), resized)
        expected = network.state_dict()
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in expected]
    unlike = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or unknown or unlike:
        faults = {"it lacks": missing, "it has besides": unknown, "shapes differ in": unlike}
        said = "; ".join(
            f"{what} {', '.join(map(str, x[:3]))}{' ...' * (len(x) > 3)}" for what, x in faults.items() if x
        )
        raise TypeError(
            f"'teacher={teacher}' does not fit {library}, and no part of a teacher is initialised at random: {said}. "
            f"Give the network that the file was saved from"
            + (", and the image size it was trained at as 'teacher_imgsz'." if _fixed_imgsz(network) else ".")
        )
    state = OrderedDict(state)
    state._metadata = getattr(saved, "_metadata", expected._metadata)  # some modules ask for its version
    network.load_state_dict(state, strict=False)
    return _checked(
        Source(f"{library}@{file}", network, _names_in(content), 3, _fixed_imgsz(network), file=file), teacher
    )


class _OnnxNetwork(nn.Module):
    """An ONNX graph, run by ONNX Runtime."""

    def __init__(self, session):
        super().__init__()
        self.session = session
        self.input = session.get_inputs()[0]

    def forward(self, images: Tensor) -> Tensor:
        """Return the graph's first output on the device of the images; a fixed batch size is fed piece by piece."""
        array = images.detach().float().cpu().numpy()
        array = array.astype("float16") if "float16" in self.input.type else array
        size = self.input.shape[0] if isinstance(self.input.shape[0], int) else len(array)
        answers = []
        for start in range(0, len(array), size):
            piece = torch.from_numpy(array[start : start + size])
            filled = torch.cat([piece, piece[-1:].expand(size - len(piece), *piece.shape[1:])])
            answer = torch.from_numpy(self.session.run(None, {self.input.name: filled.numpy()})[0])
            answers.append(answer[: len(piece)])
        return torch.cat(answers).to(images.device)


def _open_onnx(file: str, teacher: Any) -> Source:
    """Open an ONNX file: its operators compute, and can do nothing else."""
    try:
        import onnxruntime
    except ImportError as e:
        raise ImportError(f"'teacher={teacher}' needs ONNX Runtime. Install it with 'pip install onnxruntime'.") from e
    available = onnxruntime.get_available_providers()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(
            file, options, [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
        )
    except Exception as e:  # onnxruntime's exceptions share no class of their own
        raise TypeError(
            f"'teacher={teacher}' cannot be loaded: the file is damaged or no ONNX model ({type(e).__name__})."
        ) from e
    if len(session.get_inputs()) != 1 or len(session.get_inputs()[0].shape) != 4:
        raise TypeError(f"'teacher={teacher}' must take one batch of images, (B, channels, height, width).")
    batch, channels, height, width = (d if isinstance(d, int) else None for d in session.get_inputs()[0].shape)
    if any(d is not None and not 0 < d <= MAX_SIDE for d in (batch, channels, height, width)):
        raise TypeError(f"'teacher={teacher}' declares an input of shape {session.get_inputs()[0].shape!s:.80}.")
    if height != width:
        raise TypeError(f"'teacher={teacher}' takes images of {height}x{width}, but training images are square.")
    notes = session.get_modelmeta().custom_metadata_map
    return Source(file, _OnnxNetwork(session), _names_in(notes), channels, height, has_features=False, file=file)


def _open_torchscript(file: str, teacher: Any, trusted: bool) -> Source:
    """Open a TorchScript file, if it is trusted: its language can write files, when loaded and when called."""
    if not trusted:
        raise TypeError(
            f"'teacher={teacher}' is a TorchScript program, which can write files on this machine. If you know where "
            f"it comes from and trust it, set 'teacher_trusted=True'."
        )
    notes = {"config.txt": ""}  # Ultralytics' export writes it
    try:
        network = torch.jit.load(file, map_location="cpu", _extra_files=notes).float()
        known = json.loads(notes["config.txt"] or "{}")
        sides = known.get("imgsz") or [None]  # of the example that Ultralytics' export traced
        return Source(file, network, _names_in(known), known.get("channels"), sides[0], has_features=False, file=file)
    except (RuntimeError, ValueError, AttributeError, TypeError, LookupError) as e:
        raise TypeError(f"'teacher={teacher}' cannot be loaded: the TorchScript file is damaged.") from e


def _find(path: str | Path) -> str:
    """Return the path of a teacher's file, downloaded if it is an official one that is not there yet."""
    file = str(Path(check_model_file_from_stem(path)).expanduser()) if "://" not in str(path) else str(path)
    if Path(file).suffix.lower() in {".yaml", ".yml"}:
        raise TypeError(
            f"'teacher={path}' is a network description without trained weights. Train it first, i.e. "
            f"'yolo classify train model={path}', and give its 'best.pt'."
        )
    for local in (Path(file), Path(SETTINGS["weights_dir"]) / file):
        if local.is_file():
            return regular_file(local, path)
    if file.lower().startswith(REMOTE_FILE_PREFIXES):
        return regular_file(_download(lambda: check_file(file, download_dir=SETTINGS["weights_dir"]), path), path)
    if Path(file).name in GITHUB_ASSETS_NAMES:
        return regular_file(_download(lambda: attempt_download_asset(file), path), path)
    return regular_file(file, path)


def _download(get: Callable[[], Any], teacher: Any) -> Any:
    """Return what a library downloads, or say that it could not."""
    try:
        return get()
    except Exception as e:  # libraries and their networks fail in many ways
        raise FileNotFoundError(
            f"'teacher={teacher}' could not be downloaded ({type(e).__name__}: {' '.join(str(e).split())[:120]}). "
            f"Download it where there is a network, and give the file."
        ) from e


def _check_known(name: str, known: Sequence[str], teacher: str) -> None:
    """Refuse a network that a library does not have."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 3) or list(known[:3])
        raise ValueError(f"'teacher={teacher}' names no classifier of the library. Similar names are {near}.")


def _checked(source: Source, teacher: Any) -> Source:
    """Refuse a network that was never trained: only training moves BatchNorm statistics; without any, believe it."""
    norms = [m for m in source.network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    if norms and not any(m.running_mean.any() for m in norms):
        raise _UntrainedError(
            f"'teacher={teacher}' has never been trained: its BatchNorm statistics are those of a new network. "
            f"Train it first, i.e. 'yolo classify train model=yolo11l-cls.yaml', and give its 'best.pt'."
        )
    return source


def _fixed_imgsz(network: nn.Module) -> int | None:
    """Return the one image side that a network takes, as TorchVision's and timm's transformers say it, or None."""
    if (getattr(network, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        side = getattr(getattr(network, "patch_embed", None), "img_size", None)
        return (side[0] if isinstance(side, (tuple, list)) else side) or network.pretrained_cfg["input_size"][-1]
    side = getattr(network, "image_size", None)
    return side if isinstance(side, int) else None


def _names_of(network: nn.Module) -> list[str] | None:
    """Return a network's own class names, as Ultralytics' carry them."""
    names = getattr(network, "names", None)
    return _names_in({"names": names}) if names else None


def _state_of(content: Any, teacher: str) -> Mapping[str, Tensor]:
    """Return the state dict in a checkpoint, the averaged weights before the others."""
    nested = [content[k] for k in STATE_KEYS if k in content] if isinstance(content, Mapping) else []
    for state in [*nested, content]:
        if isinstance(state, Mapping) and state and all(map(_is_weight, state.items())):
            return state
    raise TypeError(f"'teacher={teacher}' holds no state dict. Save one with 'torch.save(model.state_dict(), ...)'.")


def _is_weight(item: tuple[Any, Any]) -> bool:
    """Tell a name and an ordinary tensor."""
    name, value = item
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized)
    )


def _names_in(content: Any) -> list[str] | None:
    """Return the class names that a checkpoint, or a file's notes, say beside the weights."""
    if not isinstance(content, Mapping):
        return None
    try:
        by_name = content.get("class_to_idx")
        if isinstance(by_name, Mapping):  # torchvision's ImageFolder
            return read_names({i: name for name, i in by_name.items()})
        names = next((content[k] for k in NAME_KEYS if k in content), None)
        if isinstance(names, str):  # notes hold text; a list in JSON reads the same
            names = ast.literal_eval(names) if len(names) < 1_000_000 else None
        return read_names(names) if isinstance(names, (list, tuple, Mapping)) else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # then they have to be given
        return None
