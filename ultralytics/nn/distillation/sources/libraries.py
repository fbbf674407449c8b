# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Teachers of TorchVision and timm, with their official weights or those of a file."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.distillation.class_names import imagenet_names
from ultralytics.nn.distillation.files import is_safetensors, load_safetensors, regular_file
from ultralytics.nn.distillation.safe_load import load_checkpoint_file
from ultralytics.nn.distillation.sources.base import Source, download, fixed_imgsz, names_in

__all__ = ("LIBRARIES", "OPTIONS", "build_network", "head_layers", "timm_recipe", "without_layers")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIONS = ("transform_input", "aux_logits")  # of TorchVision's Inception networks, with and without weights
STATE_KEYS = (  # where training loops keep the weights, the averaged ones before the others
    *("model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "params", "weights", "teacher", "student"),
)
LEGACY = (  # names in TorchVision's own files, by which it has called the layers of DenseNet and ViT
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\bmlp\.linear_1\."), "mlp.0."),
    (re.compile(r"\bmlp\.linear_2\."), "mlp.3."),
)
LOSSES = {"criterion", "loss", "loss_fn", "loss_func"}  # which may keep weights of classes beside the network
TRANSFORMERS = re.compile(r"\.(embeddings|embedder|encoder\.(layer|stages))\.")  # in names of Hugging Face's weights


def _open_torchvision(name: str, file: str, imgsz: int | None, trusted: bool, grows_head: bool) -> Source:
    """Open a TorchVision classifier with its official weights or those of a file."""
    import torchvision.models as library

    teacher = f"torchvision:{name}" + (f"@{file}" if file else "")
    _check_known(name, library.list_models(module=library), teacher)
    if not file:
        weights = library.get_model_weights(name).DEFAULT
        # A first, restricted reading, as TorchVision's own would run what a file in its cache says
        download(lambda: weights.get_state_dict(progress=True, check_hash=True, weights_only=True), teacher)
        network = library.get_model(name, weights=weights)
        preset = weights.transforms()
        mean, std = tuple(preset.mean), tuple(preset.std)
        source = Source(teacher, network, imagenet_names(), 3, fixed_imgsz(network), mean, std)
        source.trained_imgsz = preset.crop_size[0]
        source.recipe = _recipe(f"torchvision:{name}", network)
        return source

    def build(num_classes: int, imgsz: int | None = None) -> nn.Module:
        return build_network("torchvision", name, imgsz, {}, num_classes)

    source = _open_weights(teacher, f"torchvision:{name}", file, build, imgsz, trusted, grows_head)
    source.mean, source.std = IMAGENET_MEAN, IMAGENET_STD
    source.recipe = {**_recipe(f"torchvision:{name}", source.network), **source.recipe}
    return source


def _open_timm(name: str, file: str, imgsz: int | None, trusted: bool, grows_head: bool) -> Source:
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
        source = _open_weights(teacher, f"timm:{name}", file, build, imgsz, trusted, grows_head)
    else:

        def build_official() -> nn.Module:
            fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
            return build(imgsz=imgsz if fixed else None)

        network = download(build_official, teacher)
        source = Source(teacher, network, imgsz=fixed_imgsz(network))
        source.trained_imgsz = network.pretrained_cfg["input_size"][-1]
        if network.num_classes == 1000:
            source.names = imagenet_names()
        elif subset := timm.data.infer_imagenet_subset(network):
            source.names = timm.data.ImageNetInfo(subset).label_names()
    config = timm.data.resolve_model_data_config(source.network)
    source.channels, source.mean, source.std = config["input_size"][0], config["mean"], config["std"]
    source.recipe = {**(timm_recipe(source.network) or {}), **(source.recipe or {})}
    return source


LIBRARIES: dict[str, Callable[[str, str, int | None, bool, bool], Source]] = {
    "torchvision": _open_torchvision,
    "timm": _open_timm,
}


def timm_recipe(network: nn.Module) -> dict[str, Any] | None:
    """Return how timm builds a network of its own, None for another."""
    architecture = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    return architecture and {
        **_recipe(f"timm:{architecture}", network),
        "classes": getattr(network, "num_classes", None),
    }


def _recipe(name: str, network: nn.Module) -> dict[str, Any]:
    """Return how a library builds a network, see `Source`."""
    options = {key: getattr(network, key) for key in OPTIONS if hasattr(network, key)}
    return {"network": name, "side": fixed_imgsz(network), "options": options}


def build_network(
    library: str, name: str, side: int | None, options: Mapping[str, Any], classes: int | None = None
) -> nn.Module:
    """Return a network of a library without weights.

    Args:
        library (str): "torchvision" or "timm".
        name (str): Its name of the network.
        side (int, optional): Image side in pixels, of a network that is built for one size.
        options (Mapping[str, Any]): Further arguments of the library's constructor.
        classes (int, optional): Classes of its head, 0 for none where the library can; None for its usual ones.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If it knows no such network.
    """
    if classes is not None:
        options = {**options, "num_classes": classes}
    if library == "timm":
        import timm

        _check_known(name.partition(".")[0], timm.list_models(), f"timm:{name}")
        return timm.create_model(name, **options, **({"img_size": side} if side else {}))
    import torchvision.models

    _check_known(name, torchvision.models.list_models(module=torchvision.models), f"torchvision:{name}")
    quiet = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}  # they warn without
    return torchvision.models.get_model(
        name, weights=None, **quiet, **options, **({"image_size": side} if side else {})
    )


def head_layers(recipe: Mapping[str, Any]) -> list[str]:
    """Return the names of the layers that make the class scores of a library's network, see `Source`."""
    library, _, name = recipe["network"].partition(":")
    two, three = (build_network(library, name, recipe["side"], recipe["options"], n).state_dict() for n in (2, 3))
    return _layers_of(_growing(two, three))


def _growing(state: Mapping[str, Tensor], larger: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights that have another shape in a network of more classes."""
    return [k for k, v in state.items() if larger[k].shape != v.shape]


def _layers_of(weights: Iterable[str]) -> list[str]:
    """Return the names of the layers that have weights of these names."""
    return sorted({name.rpartition(".")[0] for name in weights})


def without_layers(network: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Return a network in which the layers of these names give what they are given.

    Raises:
        AttributeError: If it has no such layer.
    """
    for layer in layers:
        network.get_submodule(layer)
        network.set_submodule(layer, nn.Identity())
    return network


def _open_weights(
    teacher: str,
    library: str,
    file: str,
    build: Callable[..., nn.Module],
    imgsz: int | None,
    trusted: bool,
    grows_head: bool,
) -> Source:
    """Fill a library's network with the weights of a file, every one of them but those of a head that it may lack."""
    file = regular_file(file, teacher)
    if Path(file).suffix.lower() == ".safetensors" or is_safetensors(file):
        saved, content = load_safetensors(file, teacher)
    else:
        content = load_checkpoint_file(file, teacher, trusted)
        saved = _state_of(content, teacher)
    network = build(2)
    state = _named_as(network.state_dict(), _renamed(saved, network.state_dict()), teacher)
    resized = imgsz if fixed_imgsz(network) else None
    network = build(2, resized) if resized else network
    expected = network.state_dict()
    head = _growing(expected, build(3, resized).state_dict())
    state = _head_renamed(state, expected, head, teacher)
    # Only a head that is there as a whole is built
    sizes = {len(state[k]) if state[k].ndim else 0 for k in head if k in state}
    recipe: dict[str, Any] = {}
    if len(sizes) == 1 and all(k in state and state[k].shape[1:] == expected[k].shape[1:] for k in head):
        recipe["classes"] = max(*sizes, 1)
        network = build(recipe["classes"], resized)
    elif grows_head and not sizes:
        recipe = {"classes": None, "without": _layers_of(head)}
        network = without_layers(network, recipe["without"])
    expected = network.state_dict()
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in expected]
    unlike = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    beside = _config_beside(file)
    if missing and ("transformers_version" in beside or any(map(TRANSFORMERS.search, state))):
        raise TypeError(
            f"'teacher={teacher}' holds weights of Hugging Face's transformers, which names them otherwise than "
            f"{library}. Load them in Python, 'AutoModelForImageClassification.from_pretrained("
            f"{str(Path(file).parent)!r})', and give that network as 'teacher'."
        )
    if missing or unknown or unlike:
        faults = {"it lacks": missing, "it has besides": unknown, "shapes differ in": unlike}
        said = "; ".join(
            f"{what} {', '.join(map(str, x[:3]))}{' ...' * (len(x) > 3)}" for what, x in faults.items() if x
        )
        raise TypeError(
            f"'teacher={teacher}' does not fit {library}, and no part of a teacher is initialised at random: {said}. "
            f"Give the network that the file was saved from"
            + (", and the image size it was trained at as 'teacher_imgsz'." if fixed_imgsz(network) else ".")
        )
    state = OrderedDict(state)
    state._metadata = getattr(saved, "_metadata", expected._metadata)  # some modules ask for its version
    network.load_state_dict(state, strict=False)
    names = (names_in(content) or names_in(beside)) if sizes or not grows_head else None
    return Source(f"{library}@{file}", network, names, 3, fixed_imgsz(network), file=file, recipe=recipe)


def _check_known(name: str, known: Sequence[str], teacher: str) -> None:
    """Refuse a network that a library does not have."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 3) or list(known[:3])
        raise ValueError(f"'teacher={teacher}' names no classifier of the library. Similar names are {near}.")


def _renamed(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights with the names that a library has given to layers since the file was written."""
    renamed = {}
    for name, weight in state.items():
        others = (pattern.sub(now, name) for pattern, now in LEGACY)
        now = next((x for x in others if x != name and any(x.endswith(k) for k in expected)), name)
        renamed[now] = weight
    return renamed


def _named_as(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], teacher: str) -> dict[str, Tensor]:
    """Return weights without the prefix that a training loop has put before their names, e.g. `module.student.`.

    Args:
        expected (Mapping[str, Tensor]): Those of the network that they belong to.
        state (Mapping[str, Tensor]): The weights; what has another prefix is not of the network, and is left out.
        teacher (str): The teacher as the user gave it, for the messages.

    Raises:
        TypeError: If there are several networks.
    """
    fitting: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        rests = (".".join(parts[i:]) for i in range(len(parts)))
        fitting.update(name.removesuffix(rest) for rest in rests if rest in expected)
    networks = [prefix for prefix, count in fitting.items() if count > len(expected) / 2]
    if len(networks) > 1:
        raise TypeError(
            f"'teacher={teacher}' holds several networks, whose weights begin with {networks}. Save the state dict of "
            f"the teacher alone."
        )
    prefix = networks[0] if networks else ""
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


def _head_renamed(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: Sequence[str], teacher: str
) -> dict[str, Tensor]:
    """Return weights in which the head has the library's name, where it lies inside that, beside it or holds it there.

    So it is where someone has put a linear layer behind others without weights, e.g. dropout, in the place of the head,
    or one in the place of such. What a loss has kept beside the network is left out.

    Raises:
        TypeError: If several layers are in its place: what lies between them is not known.
    """
    state = {name: weight for name, weight in state.items() if name.split(".")[0] not in LOSSES or name in expected}
    other = _layers_of(name for name in state if name not in expected)
    lacking = _layers_of(name for name in head if name not in state)
    if len(other) != 1 or len(lacking) != 1:
        inside = [layer for layer in other for place in lacking if layer.startswith(f"{place}.")]
        if len(inside) > 1:
            raise TypeError(
                f"'teacher={teacher}' has a head '{lacking[0]}' of {len(inside)} layers, and a state dict does not say "
                f"what lies between them. Build the network in Python, load the weights, and give it as 'teacher'."
            )
        return state
    (theirs,), (ours,) = other, lacking
    beside = "." in ours and theirs.rpartition(".")[0] == ours.rpartition(".")[0]  # in one sequence
    if not (beside or theirs.startswith(f"{ours}.") or ours.startswith(f"{theirs}.")):
        return state
    renamed = {f"{ours}.{k.removeprefix(f'{theirs}.')}" if k not in expected else k: v for k, v in state.items()}
    fits = all(name in renamed and renamed[name].shape[1:] == expected[name].shape[1:] for name in head)
    return renamed if fits and len(renamed) == len(state) else state


def _config_beside(file: str) -> dict[str, Any]:
    """Return what the `config.json` beside a file says, as Hugging Face's libraries write it; nothing without."""
    try:
        content = json.loads(Path(file).with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    names = content.get("label_names") or content.get("id2label")
    return {**content, "names": names} if names else content


def _state_of(content: Any, teacher: str) -> Mapping[str, Tensor]:
    """Return the state dict in a checkpoint, the averaged weights before the others."""
    nested = [content[k] for k in STATE_KEYS if k in content] if isinstance(content, Mapping) else []
    for state in [*nested, content]:
        if isinstance(state, nn.Module):  # of a trusted file
            state = state.state_dict()
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
