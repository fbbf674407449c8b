"""Every class, function and method of upstream's that this project overrides or calls, by name and parameters.

A release that moves one of them says so here at once. Runs on the installed release and on the oldest supported one.
What is listed is found in the code: a new override, call or import that is missing in the tables fails too.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
from ultralytics.engine.distillation.guarded import GuardedTrainer
from ultralytics.engine.distillation.resumable import ResumableTrainer
from ultralytics.engine.distillation.trainer import DistillationTrainer
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.classify import ClassificationTrainer

pytestmark = pytest.mark.oldest

OVERLAY = Path(__file__).resolve().parents[2] / "ultralytics"

# Of upstream's classification trainer, which our trainers override or call
METHODS = {
    "__init__": "self, cfg, overrides, _callbacks",
    "_clear_memory": "self, threshold",
    "_do_train": "self",
    "_load_checkpoint_state": "self, ckpt",
    "_model_train": "self",
    "_setup_ddp": "self",
    "_setup_train": "self",
    "add_callback": "self, event, callback",
    "auto_batch": "self, max_num_obj, dataset_size",
    "build_dataset": "self, img_path, mode, batch",
    "check_resume": "self, overrides",
    "final_eval": "self",
    "get_dataloader": "self, dataset_path, batch_size, rank, mode",
    "get_dataset": "self",
    "get_model": "self, cfg, weights, verbose",
    "get_validator": "self",
    "label_loss_items": "self, loss_items, prefix",
    "optimizer_step": "self",
    "plot_metrics": "self",
    "preprocess_batch": "self, batch",
    "progress_string": "self",
    "read_results_csv": "self",
    "resume_training": "self, ckpt",
    "run_callbacks": "self, event",
    "save_metrics": "self, metrics",
    "save_model": "self",
    "setup_model": "self",
}
# Of other classes of upstream's, which are called or called by upstream on what we put in place of one
OTHERS = {
    "ultralytics.nn.tasks.BaseModel.fuse": "self, verbose, imgsz",
    "ultralytics.nn.tasks.BaseModel.init_criterion": "self",
    "ultralytics.nn.tasks.BaseModel.loss": "self, batch, preds",
    "ultralytics.utils.loss.v8ClassificationLoss.__call__": "self, preds, batch",
    "ultralytics.utils.loss.E2ELoss.__call__": "self, preds, batch",
    "ultralytics.utils.loss.E2ELoss.update": "self",
    "ultralytics.nn.modules.head.Detect.fuse": "self",
    "ultralytics.nn.modules.head.Detect.forward": "self, x",
    "ultralytics.models.yolo.detect.DetectionValidator.init_metrics": "self, model",
    "ultralytics.models.yolo.detect.DetectionValidator.preprocess": "self, batch",
    "ultralytics.models.yolo.detect.DetectionValidator.postprocess": "self, preds",
    "ultralytics.models.yolo.detect.DetectionValidator.update_metrics": "self, preds, batch",
    "ultralytics.models.yolo.detect.DetectionValidator._prepare_batch": "self, si, batch",
    "ultralytics.models.yolo.detect.DetectionValidator._process_batch": "self, preds, batch",
    "ultralytics.models.yolo.obb.OBBValidator._process_batch": "self, preds, batch",
    "ultralytics.utils.metrics.DetMetrics.process": "self, save_dir, plot, on_plot",
    "ultralytics.data.base.BaseDataset.get_image_and_label": "self, index",
    "ultralytics.data.build.InfiniteDataLoader.reset": "self",
    "ultralytics.data.dataset.ClassificationDataset.__getitem__": "self, i",
    "ultralytics.engine.model.Model.val": "self, validator, kwargs",
}
FUNCTIONS = {
    "ultralytics.data.augment.classify_transforms": "size, mean, std, interpolation, crop_fraction",
    "ultralytics.cfg.cfg2dict": "cfg",
    "ultralytics.cfg.check_dict_alignment": "base, custom, e, allowed_custom_keys",
    "ultralytics.cfg.get_cfg": "cfg, overrides",
    "ultralytics.cfg.get_save_dir": "args, name",
    "ultralytics.cfg.merge_equals_args": "args",
    "ultralytics.cfg.parse_key_value_pair": "pair",
    "ultralytics.cfg.smart_value": "v",
    "ultralytics.engine.exporter.export_formats": "",
    "ultralytics.nn.tasks.guess_model_task": "model",
    "ultralytics.nn.tasks.load_checkpoint": "weight, device, inplace, fuse",
    "ultralytics.nn.tasks.yaml_model_load": "path",
    "ultralytics.nn.tasks.torch_safe_load": "weight, safe_only",
    "ultralytics.utils.colorstr": "input",
    "ultralytics.utils.checks.check_file": "file, suffix, download, download_dir, hard",
    "ultralytics.utils.checks.check_imgsz": "imgsz, stride, min_dim, max_dim, floor",
    "ultralytics.utils.checks.check_model_file_from_stem": "model",
    "ultralytics.utils.checks.check_yaml": "file, suffix, hard",
    "ultralytics.utils.downloads.attempt_download_asset": "file, repo, release, kwargs",
    "ultralytics.utils.files.get_latest_run": "search_dir",
    "ultralytics.utils.files.increment_path": "path, exist_ok, sep, mkdir",
    "ultralytics.utils.ops.xywh2xyxy": "x",
    "ultralytics.utils.ops.xywhr2xyxyxyxy": "x",
    "ultralytics.utils.ops.xyxy2xywh": "x",
    "ultralytics.utils.patches.imread": "filename, flags",
    "ultralytics.utils.patches.torch_load": "args, kwargs",
    "ultralytics.utils.tal.dist2bbox": "distance, anchor_points, xywh, dim",
    "ultralytics.utils.tal.dist2rbox": "pred_dist, pred_angle, anchor_points, dim",
    "ultralytics.utils.torch_utils.attempt_compile": "model, device, imgsz, use_autocast, warmup, mode",
    "ultralytics.utils.torch_utils.autocast": "enabled, device",
    "ultralytics.utils.torch_utils.get_flops": "model, imgsz",
    "ultralytics.utils.torch_utils.get_num_params": "model",
    "ultralytics.utils.torch_utils.restore_qat": "model, state",
    "ultralytics.utils.torch_utils.select_device": "device, newline, verbose",
    "ultralytics.utils.torch_utils.strip_optimizer": "f, s, updates",
    "ultralytics.utils.torch_utils.torch_distributed_zero_first": "local_rank",
    "ultralytics.utils.torch_utils.unwrap_model": "m",
}
LATER = {"ultralytics.utils.torch_utils.restore_qat"}  # imported where it is used, as the oldest release has none


def trees():
    """Yield the code of every file of ours."""
    scripts = [OVERLAY.parent / name for name in ("train.py", "distill_train_example.py")]
    for file in (*OVERLAY.rglob("*.py"), *scripts):
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def imported():
    """Return what our files import from upstream, as (module, name)."""
    ours = {".".join(file.relative_to(OVERLAY.parent).with_suffix("").parts) for file, _ in trees()}
    ours |= {name.removesuffix(".__init__") for name in ours}
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "ultralytics":
                found |= {(node.module, alias.name) for alias in node.names if node.module not in ours}
    return {(module, name) for module, name in found if f"{module}.{name}" not in ours}


def parameters(function):
    return ", ".join(inspect.signature(function).parameters)


def find(path):
    """Return what a dotted path leads to."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module) if module in sys.modules or spec(module) else find(module), name)


def spec(module):
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None


@pytest.mark.parametrize("name", METHODS)
def test_a_trainers_method_takes_what_it_did(name):
    assert parameters(getattr(ClassificationTrainer, name)) == METHODS[name]


@pytest.mark.parametrize("path", [*OTHERS, *FUNCTIONS])
def test_a_function_takes_what_it_did(path):
    if path in LATER and not hasattr(find(path.rpartition(".")[0]), path.rpartition(".")[2]):
        pytest.skip("the oldest supported release has none")
    assert parameters(find(path)) == {**OTHERS, **FUNCTIONS}[path]


def test_everything_that_is_imported_is_there():
    for module, name in imported():
        assert hasattr(importlib.import_module(module), name) or f"{module}.{name}" in LATER, f"{module}.{name}"


def test_every_function_that_is_imported_is_listed():
    functions = {f"{m}.{name}": getattr(importlib.import_module(m), name, None) for m, name in imported()}
    found = {path for path, function in functions.items() if inspect.isfunction(function)}
    assert len(found) > 20
    assert found - LATER == FUNCTIONS.keys() - LATER


def test_every_method_that_is_overridden_or_called_is_listed():
    used = set()
    for trainer_class in (ResumableTrainer, GuardedTrainer, DistillationTrainer):
        (definition,) = (
            node
            for file, tree in trees()
            if file == Path(inspect.getfile(trainer_class))
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == trainer_class.__name__
        )
        used |= {node.name for node in definition.body if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(definition):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"self", "super()"}:
                used.add(node.attr)
    assert {name for name in used if callable(getattr(ClassificationTrainer, name, None))} == METHODS.keys()


def test_the_order_of_upstreams_setup():
    """The EMA is copied before a run is resumed, and both before training: distillation is attached in between."""
    lines = inspect.getsource(BaseTrainer._setup_train)
    steps = ("self.setup_model()", "self.get_validator()", "ModelEMA(self.model)", "self.resume_training(ckpt)")
    places = [lines.index(step) for step in steps]
    assert places == sorted(places)
    lines = inspect.getsource(BaseTrainer._do_train)
    steps = ("self._model_train()", "self.preprocess_batch(batch)", ".criterion.update()", "self.save_model()")
    places = [lines.index(step) for step in steps]
    assert places == sorted(places)
