# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Classification training in which a frozen trained teacher guides the student."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from ultralytics.cfg import cfg2dict
from ultralytics.cfg.distillation import DistillationArgs, as_list
from ultralytics.data.views import RepeatableViews
from ultralytics.data.wrapped import ReadableDataset
from ultralytics.models.yolo.classify.distill_cache import check_cache_folder, open_cache
from ultralytics.models.yolo.classify.distill_criterion import DistillationCriterion, TrainingStep
from ultralytics.models.yolo.classify.distill_report import check_baseline, remove_report, without_folders, write_report
from ultralytics.models.yolo.classify.guarded import GuardedClassificationTrainer
from ultralytics.nn.class_names import match_classes, read_names
from ultralytics.nn.taps import FeatureLevel, FeatureTaps, find_levels, match_levels
from ultralytics.nn.tasks import ClassificationModel, load_checkpoint
from ultralytics.nn.teacher import Teacher, TeacherEnsemble
from ultralytics.nn.teacher_cache import CachedTeacher
from ultralytics.nn.teacher_overlap import Answer, SideStream, SideThread, at_once, usable_cores
from ultralytics.nn.teacher_sources import Source
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK, IterableSimpleNamespace, colorstr
from ultralytics.utils.checks import check_imgsz, check_model_file_from_stem
from ultralytics.utils.distillation import (
    DistillationLoss,
    GradientBalance,
    scheduled_share,
    scheduled_temperature,
)
from ultralytics.utils.distillation.registry import choose
from ultralytics.utils.torch_utils import autocast, get_flops, get_num_params, unwrap_model

__all__ = ("DistillationClassificationTrainer",)

DISTILLATION_KEYS = frozenset(f.name for f in fields(DistillationArgs))
RESUMED_ANEW = {"teacher", "teacher_hash", "baseline"}  # what may be given again to a run that is resumed
CHECKED_IMAGES = 512
CHECK_ADVICE = "Check its classes, 'teacher_imgsz', 'teacher_mean' and 'teacher_std', or give a better one."


class DistillationClassificationTrainer(GuardedClassificationTrainer):
    """A ClassificationTrainer whose student also learns from a frozen teacher.

    Takes every training argument of upstream's and those of `DistillationArgs`. The student stays an ordinary
    `ClassificationModel` throughout; distillation enters as its criterion and, while training, as a child module
    `distill_adapters` of plain 1x1 convolutions. The final `best.pt` and `last.pt` are what plain training would write.

    Attributes:
        distillation (DistillationArgs): The distillation arguments in force.
        teacher (TeacherEnsemble): The frozen teacher, or several that answer as one.
        distillation_loss (DistillationLoss | None): The loss, once the student is set up; None if `distill_alpha` is 0.
        levels (list[tuple[FeatureLevel, FeatureLevel]]): The matched (student, teacher) feature maps.

    Examples:
        >>> from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
        >>> args = dict(model="yolo11n-cls.yaml", teacher="path/to/best.pt", data="path/to/dataset", epochs=50)
        >>> trainer = DistillationClassificationTrainer(overrides=args)
        >>> trainer.train()
    """

    def __init__(self, cfg=DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict | None = None):
        """Initialize the trainer; everything that can be wrong with the teacher is refused here, before any file.

        Args:
            cfg (str | Path | dict | SimpleNamespace): Training configuration, may hold distillation arguments.
            overrides (dict[str, Any], optional): Arguments that override it; not changed.
            _callbacks (dict, optional): Callback functions by event.

        Raises:
            SyntaxError: If a key is neither a training nor a distillation argument.
            TypeError: If an argument has the wrong type, or a teacher is no trained classifier or not safe to load.
            ValueError: If an argument is out of range, or a teacher does not fit the dataset.
            FileNotFoundError: If a teacher's file does not exist.
            ImportError: If a teacher needs a library that is not installed.
            OSError: If `teacher_cache=disk` has nowhere to write.
        """
        from_cfg, cfg = DistillationArgs.split(cfg2dict(cfg))
        given, overrides = DistillationArgs.split(overrides or {})
        self._given = {**from_cfg, **given}
        self.data = None
        self.levels: list[tuple[FeatureLevel, FeatureLevel]] = []
        self.distillation_loss: DistillationLoss | None = None
        self._taps: FeatureTaps | None = None
        self._cached: CachedTeacher | None = None
        self._beside: Callable[[Callable[[], Answer], Tensor], Callable[[], Answer]] = at_once
        self._balance: GradientBalance | None = None
        self._labelled = True
        self._share = 1.0  # of distill_alpha, in the epoch
        self._answer: Callable[[], Answer] | None = None  # gives the teacher's to the last batch
        super().__init__(cfg, overrides, _callbacks)
        if RANK != -1:
            self.world_size = int(os.environ["WORLD_SIZE"])  # upstream counts this host's devices, torchrun all hosts'

    def _check_arguments(self) -> None:
        """Complete the arguments, from the checkpoint if the run is resumed, and vet the teacher.

        Nothing was written yet, so that args.yaml, loggers, checkpoints and multi-GPU workers see the distillation
        arguments like any other.
        """
        super()._check_arguments()
        given = self._given
        if self.resume:
            stored = {k: v for k, v in vars(self.args).items() if k in DISTILLATION_KEYS}
            if not stored:
                self._sweep(Path(self.args.resume).parent)
                raise ValueError(
                    f"'resume={self.args.resume}' is of a finished run or of one without a teacher, so there is no "
                    f"distillation to resume. To go on from its weights, start a new run with 'model=' and 'teacher='."
                )
            if ignored := [k for k, v in given.items() if k not in RESUMED_ANEW and v != stored.get(k)]:
                LOGGER.warning(f"Resume ignores {ignored}, using checkpoint values. Start a new run to change them.")
            given = {**stored, **{k: v for k, v in given.items() if k in RESUMED_ANEW and v is not None}}
        self.distillation = DistillationArgs(**given)
        start, close = self.distillation.self_distill_start * self.self_distillation, self.distillation.close_distill
        if start + close >= self.args.epochs:
            raise ValueError(
                f"The teacher would be silent in all of 'epochs={self.args.epochs}', with 'self_distill_start={start}' "
                f"and 'close_distill={close}'. Lower these, or train longer."
            )
        self._check_methods()
        members = None if self.self_distillation else self._open_teachers()
        self._imgsz = check_imgsz(self.args.imgsz, stride=32, floor=32, max_dim=1)  # as upstream finds it later
        source = self.args.data
        data = self.get_dataset()
        self.args.data = source  # callbacks and args.yaml see the data as given, until upstream resolves it
        check_cache_folder(self)
        if self.distillation.distill_beta == 0 and members is not None:
            self._take_classes_of(members[0])
        names = read_names(data["names"])
        if self.distillation.baseline is not None:
            check_baseline(self.distillation.baseline, names, self._imgsz)
        if members is None:  # the EMA takes its place once there is one
            members = [Teacher(Source("self", torch.nn.Identity(), names, data["channels"]))]
        self.teacher = TeacherEnsemble(members, self.distillation.teacher_weights, self.distillation.temperature)
        if not self.self_distillation:
            self.distillation = replace(self.distillation, teacher_hash=self._check_hash())
            self._vet_teachers(data["channels"])
        if self.distillation.response_distill:
            self._log(self.teacher.align(names))
        if RANK in {-1, 0}:
            self._match_levels(self._described_student())  # refuses what cannot be matched
        vars(self.args).update({key: getattr(self.distillation, key) for key in DISTILLATION_KEYS})
        self.args.teacher = self.teacher.source
        if self.distillation.distill_alpha == 0:
            LOGGER.warning("'distill_alpha=0': the teacher has no effect on this run.")
        elif self.self_distillation and self.distillation.distill_alpha > self.distillation.distill_beta:
            LOGGER.warning(
                "'teacher=self' holds the student to what it knows already where 'distill_alpha' is above "
                "'distill_beta'. Set i.e. 'distill_alpha=0.3 distill_beta=1'."
            )

    @property
    def self_distillation(self) -> bool:
        """Whether the student's own EMA teaches it."""
        return self.distillation.teacher == "self"

    @property
    def _tempered(self) -> bool:
        """Whether a response method softens by the training's `temperature`."""
        chosen = choose("response_method", self.distillation.response_method)
        return self.distillation.response_distill and any(c.temperature(0.0) == 0 for c in chosen)

    def _check_methods(self) -> None:
        """Refuse methods that are not known, or that do not go with other arguments."""
        args = self.distillation
        on = {"response": args.response_distill, "feature": args.uses_feature_method}
        chosen = {kind: choose(f"{kind}_method", getattr(args, f"{kind}_method")) for kind in on}
        for kind in on:
            if on[kind] and not chosen[kind]:
                raise ValueError(
                    f"'{kind}_method={getattr(args, f'{kind}_method')}' leaves no method with a share above 0. Give "
                    f"one, or set '{kind}_distill=False'."
                )
        if "temperature" in self._given and args.response_distill and not self._tempered:
            LOGGER.warning(
                f"'temperature={args.temperature}' has no effect on 'response_method={args.response_method}', which "
                f"has a temperature of its own, to be given among its hyper-parameters, or none."
            )
        adapted = on["feature"] and any(choice.method.adapter for choice in chosen["feature"])
        if self.args.quantize == 8 and args.distill_alpha and adapted:
            raise ValueError(
                "'quantize=8' would quantize the adapters of the feature loss with the student. Set "
                "'feature_distill=False', or train without 'quantize' and quantize on export."
            )
        if self.args.compile and args.distill_balance:
            raise ValueError(
                "'distill_balance=auto' measures gradients inside the student, which 'compile=True' hides. Give one of "
                "them."
            )
        if self.args.mixup + self.args.cutmix > 1:
            raise ValueError(
                f"'mixup={self.args.mixup}' and 'cutmix={self.args.cutmix}' are the probabilities of a batch to be "
                f"mixed one way or the other, and must not exceed 1 together."
            )
        if args.teacher_cache == "ram" and (RANK != -1 or "," in str(self.args.device)):
            raise ValueError("'teacher_cache=ram' would keep all answers in every process. Set 'teacher_cache=disk'.")
        if args.teacher_cache and (self.args.mixup or self.args.cutmix):
            raise ValueError(
                "'mixup' and 'cutmix' make images that no one has seen before, so 'teacher_cache' cannot know the "
                "teacher's answers. Leave out one or the other."
            )

    def _take_classes_of(self, teacher: Teacher) -> None:
        """Give the student the teacher's classes where the training folders are no classes that it knows."""
        folders, split = read_names(self.data["names"]), Path(self.data[self.args.split])
        measured = {x.name for x in split.iterdir() if x.is_dir()}
        if teacher.names is None or (
            len(folders) > 1 and measured <= set(folders) and len(match_classes(teacher.names, folders)) > 1
        ):
            return
        if any(c.needs_labels for c in choose("response_method", self.distillation.response_method)):
            raise ValueError(
                f"'data={self.args.data}' has no labels that 'teacher={teacher.source}' knows, and "
                f"'response_method={self.distillation.response_method}' needs them. Set i.e. 'response_method=kl'."
            )
        unknown = sorted(measured - set(teacher.names))
        if unknown:
            raise ValueError(
                f"Without labels the student learns the teacher's classes, but '{split}' has folders that are none of "
                f"them: {unknown[:5]}. Name its folders like the teacher's classes, of which there are "
                f"{len(teacher.names)}, i.e. '{teacher.names[0]}'."
            )
        self._labelled = False
        self.data.update(names=dict(enumerate(teacher.names)), nc=len(teacher.names))
        self._log(
            [f"The training images count as unlabelled: the student learns the teacher's {self.data['nc']} classes."]
        )

    def _open_teachers(self) -> list[Teacher]:
        """Open the teachers, or refuse them."""
        args = self.distillation
        if any(not isinstance(x, str) for x in args.teachers) and "," in str(self.args.device):
            raise ValueError(
                f"'device={self.args.device}' starts a process per device, which a teacher given as nn.Module cannot "
                f"reach. Save it to a file, or train on one device."
            )
        return [Teacher(**given) for given in args.per_teacher() or [{"source": None}]]

    def _check_hash(self) -> str | list[str]:
        """Return the teachers' content as the run records it, compared with what it has to be."""
        found, expected = self.teacher.content_hash, self.distillation.teacher_hash
        if expected is not None and [x.lower() for x in as_list(expected)] != as_list(found):
            asked = "the run began with" if self.resume else "was asked for"
            raise ValueError(
                f"'teacher={self.teacher.source}' is not what {asked}: its SHA-256 is {found}, not {expected}. Give "
                f"the right one, or accept this one with 'teacher_hash={found}'."
            )
        return found

    def _vet_teachers(self, channels: int) -> None:
        """Check the teachers' answers, and switch off the losses that they cannot serve."""
        args, first = self.distillation, self.teacher.first
        self.teacher.vet(self._imgsz, channels)
        if not args.uses_features:
            return
        if not first.find_levels(self._imgsz, channels):
            asked = [k for k in ("feature_distill", "attention_distill") if k in self._given and getattr(args, k)]
            no_features = f"'teacher={first.source}' gives logits only"
            if asked:
                raise ValueError(
                    f"{no_features}, but '{asked[0]}=True' needs its feature maps. Set '{asked[0]}=False', or give "
                    f"the checkpoint that the file was exported from."
                )
            LOGGER.warning(f"{no_features}: 'feature_distill' and 'attention_distill' are switched off.")
            self.distillation = replace(args, feature_distill=False, attention_distill=False)
        elif len(args.teachers) > 1:
            ending = "." if args.response_distill else "; the others have no effect without the response loss."
            self._log([f"Feature and attention losses use the first of the teachers, {first.source}{ending}"])

    def _described_student(self) -> torch.nn.Module | None:
        """Return a student of the architecture that will be trained, or None where `model` is no YOLO's."""
        model = check_model_file_from_stem(str(self.args.model))
        suffix = Path(model).suffix.lower()
        if suffix not in {".pt", ".yaml", ".yml"}:
            return None
        return self.get_model(cfg=load_checkpoint(model)[0].yaml if suffix == ".pt" else model, verbose=False)

    def _match_levels(self, student: torch.nn.Module | None) -> None:
        """Match the student's feature levels to the teacher's, if a loss needs them."""
        args, imgsz, channels = self.distillation, self._imgsz, self.data["channels"]
        if student is not None and args.uses_features and args.distill_alpha:
            levels = find_levels(student, imgsz, channels)
            teacher = levels if self.self_distillation else self.teacher.first.find_levels(imgsz, channels)
            self.levels = match_levels(levels, teacher, args.layers)

    def _log(self, notes: list[str]) -> None:
        """Log sentences about the distillation, once."""
        if RANK in {-1, 0}:
            for note in notes:
                LOGGER.info(f"{colorstr('distillation:')} {note}")

    def get_dataset(self) -> dict[str, Any]:
        """Return the dataset dictionary, read once although the teacher needs it before upstream does."""
        if self.data is None:
            self.data = super().get_dataset()
            self._resolved_data = self.args.data
            if not self.data["names"]:
                raise FileNotFoundError(
                    f"'data={self.args.data}' has no class folders in 'train'. Put the images of each class in a "
                    f"folder of its name; without labels, 'distill_beta=0', all of them in one, i.e. 'train/all'."
                )
            if self.data.get(self.args.split) is None:
                raise FileNotFoundError(
                    f"'data={self.args.data}' has no folder '{self.args.split}' to validate on. Move some of its "
                    f"training images there, in folders of the same names."
                )
        self.args.data = self._resolved_data
        return self.data

    def get_validator(self):
        """Return upstream's validator, given only the arguments that it knows."""
        args = self.args
        self.args = IterableSimpleNamespace(**{k: v for k, v in vars(args).items() if k not in DISTILLATION_KEYS})
        try:
            return super().get_validator()
        finally:
            self.args = args

    def setup_model(self):
        """Build the student, match its feature levels to the teacher's, and give it the adapters.

        Returns:
            (dict | None): The checkpoint, if the run is resumed or the student starts from one.
        """
        ckpt = super().setup_model()
        self.args.imgsz = self._imgsz
        args, student, teacher = self.distillation, self.model, self.teacher
        if args.distill_alpha == 0:
            return ckpt
        self._beside = self._open_beside()
        self._match_levels(student)
        with torch.random.fork_rng(devices=[]):  # the student's random stream stays that of plain training
            self.distillation_loss = DistillationLoss(
                [student_level.channels for student_level, _ in self.levels],
                [teacher_level.channels for _, teacher_level in self.levels],
                temperature=args.temperature,
                response_distill=args.response_distill,
                feature_distill=args.feature_distill,
                attention_distill=args.attention_distill,
                feature_weight=args.feature_weight,
                attention_weight=args.attention_weight,
                response_method=args.response_method,
                feature_method=args.feature_method,
                balanced=args.distill_balance is not None,
                classify=self._teachers_head(),
            )
        if RANK in {-1, 0}:
            self._log_setup()
        self._balance = GradientBalance() if args.distill_balance else None
        if self.distillation_loss.adapters:
            student.distill_adapters = self.distillation_loss.adapters
            if self.resume:
                stored = ckpt["ema"].distill_adapters
                shapes, fitting = (
                    [tuple(w.shape[:2]) for w in x.state_dict().values() if w.ndim == 4]
                    for x in (stored, student.distill_adapters)
                )
                if shapes != fitting:
                    raise ValueError(
                        f"'teacher={teacher.source}' does not fit the adapters of this run: they have (teacher, "
                        f"student) channels {shapes}, and it needs {fitting}. Give the same teacher, or start a new "
                        f"run."
                    )
                student.distill_adapters.load_state_dict(stored.state_dict())
        return ckpt

    def _open_beside(self) -> Callable[[Callable[[], Answer], Tensor], Callable[[], Answer]]:
        """Return where the teacher answers."""
        args, device = self.distillation, self.device.type
        compiled = self.args.compile or args.teacher_compile
        obstacle = {
            "cpu": "where a network is compiled on a CPU" if compiled else None,  # tracing reaches into other threads
            "cuda": "with 'teacher_cache' on CUDA" if args.teacher_cache else None,  # the host waits to read it
        }.get(device, f"on '{device}'")
        if obstacle:
            if args.teacher_overlap:
                LOGGER.warning(f"'teacher_overlap=True' has no effect {obstacle}.")
            return at_once
        wanted = args.teacher_overlap
        if wanted is None:
            wanted = device == "cpu" and usable_cores() > 1
        if not wanted:
            return at_once
        return SideThread() if device == "cpu" else SideStream(self.device)

    def _teachers_head(self) -> Callable[[Tensor], Tensor] | None:
        """Return the teacher's head as a function of its last level, if that is what the head is given."""
        network = self.teacher.first.model
        if not self.levels or self.self_distillation or not isinstance(network, ClassificationModel):
            return None
        head = f"model.{len(network.model) - 1}"
        if self.levels[-1][1].name != f"model.{len(network.model) - 2}":
            return None
        return lambda x: network.get_submodule(head)(x)[1]

    def _setup_ddp(self) -> None:
        """Join the other processes."""
        if self.device.type in {"cpu", "mps"}:
            raise ValueError(
                f"{self.world_size} processes cannot train on 'device={self.args.device}'. Give a GPU to each, i.e. "
                f"'device=0,1', or start one process."
            )
        super()._setup_ddp()

    def _setup_train(self):
        """Prepare training, then attach distillation: after the EMA was copied from the student, never before."""
        super()._setup_train()
        if RANK in {-1, 0} and not self.resume:
            remove_report(self.save_dir)  # of an earlier run in this folder
        if not any(p.requires_grad for p in unwrap_model(self.model).model.parameters()):
            raise RuntimeError(f"'freeze={self.args.freeze}' froze the entire student. Reduce 'freeze'.")
        self._attach()
        if self.distillation.teacher_cache and self.distillation_loss is not None:
            self._cached = open_cache(self)
            for event in ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"):
                self.add_callback(event, lambda trainer, event=event: trainer._cached.lap(event))
        if self.distillation.teacher_check and RANK in {-1, 0}:
            self._check_teacher()

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Restore the training state; upstream copies the student into a new EMA here, so it must be bare."""
        self._detach()
        super()._load_checkpoint_state(ckpt)
        self._attach()

    def final_eval(self):
        """Leave a plain student and plain checkpoints behind, then evaluate the best one."""
        if self._cached is not None:
            self._log([self._cached.report])
        self._detach()
        reported = self.distillation_loss is not None and self.args.plots and RANK in {-1, 0} and self.best.exists()
        pull = {}
        if self.distillation_loss is not None:  # also of a run of which only this is left
            self._place_teacher()
            self._schedule()
            if self._balance is not None and self._resumed is not None:
                self._balance.load_state_dict(self._resumed["balance"])
        if reported and RANK == -1:
            with self._surviving("measure the losses' gradients"):
                pull = self._measure_pull()
        student = unwrap_model(self.model)
        if hasattr(student, "distill_adapters"):
            del student.distill_adapters, self.ema.ema.distill_adapters
        super().final_eval()
        if reported:
            with self._surviving("write its report"):
                self._log([f"What the teacher did is in {write_report(self, pull)}"])

    def _precision(self) -> AbstractContextManager:
        """Return the autocast of upstream's training loop."""
        return autocast(torch.bfloat16 if self.args.amp == "bf16" else self.amp, device=self.device.type)

    def _measure_pull(self, batches: int = 4) -> dict[str, float]:
        """Return the share of each weighted loss in the gradient where all of them meet, over some training batches."""
        student, loss = copy.deepcopy((unwrap_model(self.model), self.distillation_loss))
        taps = FeatureTaps(student.train(), [level for level, _ in self.levels])
        norms: Counter[str] = Counter()
        for batch in islice(self.train_loader, batches):
            measured = GradientBalance()
            criterion = replace(self._criterion(student, taps), loss=loss, balance=measured)
            with self._precision():
                batch = self.preprocess_batch(batch)
                criterion(student(batch["img"]), {**batch, "teacher": self._ask(batch)})
            norms.update({k: float(norm) for k, norm in measured.norms.items()})
        taps.remove()
        args = self.distillation
        factors = self._balance.factors if self._balance else {}
        weights = {k: args.distill_alpha * w * factors.get(k, 1.0) for k, w in loss.weights.items()}
        pull = {k: float(norm * {"loss": args.distill_beta, **weights}[k]) for k, norm in norms.items()}
        total = sum(pull.values())
        return {k: value / total for k, value in pull.items()} if total else {}

    def _strip(self, ckpt: dict[str, Any]) -> None:
        """Take the adapters out of a checkpoint."""
        if hasattr(ckpt["ema"], "distill_adapters"):
            del ckpt["ema"].distill_adapters

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add what gives the teacher's answer, which is asked for before the student's forward pass."""
        labels = batch["cls"]
        batch = self._mix(super().preprocess_batch(batch))
        if self._partial:
            known = torch.isin(labels, torch.tensor(self.teacher.classes))
            if "mixed_cls" in batch:
                known &= known.roll(1)  # each is mixed with the one before it
            # Found on the host, as on a GPU the question which they are would wait
            batch["known"] = known.nonzero()[:, 0].to(self.device, non_blocking=True)
        if self._taps is not None and self.distillation_loss is not None and not self._silent:
            batch["teacher"] = self._answer = self._ask(batch)
        return batch

    @property
    def _silent(self) -> bool:
        """Whether the teacher says nothing in this epoch."""
        return self._share == 0 or (self.self_distillation and self.epoch < self.distillation.self_distill_start)

    def _ask(self, batch: dict[str, Any]) -> Callable[[], Answer]:
        """Return what gives the teacher's answer to a batch, kept from before if it is."""
        images = batch["img"]
        if self._cached is not None:
            ask = partial(self._cached, images, batch["index"], batch["view"])
        else:
            ask = partial(self.teacher, images, logits=self.distillation.response_distill)
        return self._beside(ask, images)

    def _mix(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Mix the images of a batch in pairs, as often as `mixup` and `cutmix` say; upstream's classifiers ignore them.

        Teacher and student see the same mixed images, as in Beyer et al. 2022.
        """
        if (self.args.mixup or self.args.cutmix) and self.data["nc"] > 1:
            drawn = torch.rand(1).item()
            if drawn < self.args.mixup + self.args.cutmix:
                mix = v2.MixUp if drawn < self.args.mixup else v2.CutMix
                batch["img"], batch["mixed_cls"] = mix(num_classes=self.data["nc"])(batch["img"], batch["cls"])
                batch["cls"] = batch["mixed_cls"].argmax(1)  # for what knows one class only
        return batch

    def build_dataset(self, img_path: str, mode: str = "train", batch: Any = None):
        """Build a dataset, for training with views that repeat if the teacher's answers are kept."""
        dataset = super().build_dataset(img_path, mode, batch)
        args = self.distillation
        if not self._labelled:
            classes = {name: i for i, name in self.data["names"].items()}
            dataset.samples = [
                [file, classes.get(Path(file).relative_to(img_path).parts[0], 0), *rest]
                for file, _, *rest in dataset.samples
            ]
        dataset = ReadableDataset(dataset)
        return RepeatableViews(dataset, args.teacher_views) if mode == "train" and args.teacher_cache else dataset

    def _model_train(self) -> None:
        """Begin an epoch, with its views."""
        super()._model_train()
        args = self.distillation
        self._schedule()
        if self.distillation_loss is not None:
            unwrap_model(self.model).criterion.alpha = args.distill_alpha * self._share
        if self._taps is not None and args.teacher_compile:
            self.teacher.compile(
                args.teacher_compile, (self.train_loader.batch_size, self.data["channels"], self._imgsz, self._imgsz)
            )
        loader = self.train_loader
        if isinstance(loader.dataset, RepeatableViews):
            loader.dataset.epoch.fill_(self.epoch)
            if loader.num_workers:  # they have drawn ahead, in the views of the epoch before
                if RANK != -1:
                    loader.sampler.set_epoch(self.epoch)
                loader.reset()

    def _schedule(self) -> None:
        """Set the share of `distill_alpha` and the temperature of the epoch."""
        args = self.distillation
        schedule = args.distill_schedule
        self._share = scheduled_share(self.epoch, self.epochs, schedule, args.distill_warmup, args.close_distill)
        if self.distillation_loss is not None:
            self.distillation_loss.temperature = scheduled_temperature(
                self.epoch, self.epochs, args.temperature, args.temperature_end, schedule
            )
            if self._cached is None:  # which keeps the average that it was told first
                self.teacher.temperature = self.distillation_loss.temperature

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Write a row of results.csv, with the weight, the temperature and the balance that were in force."""
        if self.distillation_loss is not None:
            alpha = 0.0 if self._silent else self.distillation.distill_alpha * self._share
            metrics = {**metrics, "distill/alpha": alpha, "distill/temperature": self.distillation_loss.temperature}
            if self._balance is not None:
                factors = self._balance.factors
                metrics |= {f"distill/{k}_factor": float(factors.get(k, 0.0)) for k in self.distillation_loss.weights}
        super().save_metrics(metrics)

    def _state(self) -> dict[str, Any]:
        """Return what upstream's checkpoint leaves out, the balance of the losses among it."""
        return {**super()._state(), **({"balance": self._balance.state_dict()} if self._balance else {})}

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from where the run was stopped."""
        if self._balance is not None:
            self._balance.load_state_dict(state["balance"])
        super()._restore(state)

    def _cause(self, name: str) -> str:
        """Return "teacher" for a loss that its answer made NaN or infinite."""
        if self._answer is not None and self.distillation_loss is not None and name in self.distillation_loss.weights:
            logits, features = self._answer()
            if not all(x.isfinite().all() for x in (logits, *features)):
                return "teacher"
        return super()._cause(name)

    def _describe(self, cause: str) -> str:
        """Return a sentence that says what was not finite, and what can be done."""
        if cause == "teacher":
            return (
                f"the answer of 'teacher={self.teacher.source}' is NaN or infinite. Train with 'amp=bf16' or "
                f"'amp=False' if that helps it, or give another checkpoint."
            )
        if cause.startswith(("feature_", "attention_")):
            argument = (
                cause.replace("_loss", "_weight") if cause in {"feature_loss", "attention_loss"} else "feature_method"
            )
            return super()._describe(cause).removesuffix(".") + f", or lower '{argument}'."
        return super()._describe(cause)

    def label_loss_items(self, loss_items: dict[str, Any] | None = None, prefix: str = "train"):
        """Label the loss items; validation has the student's own only, as the teacher is not asked there."""
        items = super().label_loss_items(loss_items, prefix)
        if prefix == "train" or self.distillation_loss is None:
            return items
        shown = [k for k in items if k.removeprefix(f"{prefix}/") not in self.distillation_loss.weights]
        return shown if loss_items is None else {k: items[k] for k in shown}

    def progress_string(self) -> str:
        """Return the header of the progress bar, the names short enough for upstream's columns."""
        names = self.loss_names
        self.loss_names = tuple(name.removesuffix("_loss") for name in names)
        try:
            return super().progress_string()
        finally:
            self.loss_names = names

    def _attach(self) -> None:
        """Read the student's feature maps and make its criterion ask the teacher."""
        self._detach()
        student = unwrap_model(self.model)
        self._taps = FeatureTaps(student, [level for level, _ in self.levels])
        if self.self_distillation:
            self.teacher.first.model = self.ema.ema
        self._place_teacher()
        student.criterion = self._criterion(student, self._taps)

    def _place_teacher(self) -> None:
        """Move the teacher to the device, to answer with the levels that the losses use."""
        if self.distillation_loss is not None:
            self.teacher.to(self.device).first.levels = [level for _, level in self.levels]

    def _criterion(self, student: torch.nn.Module, taps: FeatureTaps) -> DistillationCriterion:
        """Return the criterion for a student and what reads its feature maps."""
        return DistillationCriterion(
            student.init_criterion(),
            taps,
            self.distillation_loss,
            self.distillation.distill_alpha,
            self.distillation.distill_beta,
            torch.tensor(self.teacher.classes, device=self.device) if self._partial else None,
            self._labelled,
            self._balance,
        )

    @property
    def _partial(self) -> bool:
        """Whether the teacher knows some of the classes only."""
        return self.teacher.classes is not None and len(self.teacher.classes) < len(self.data["names"])

    def _check_teacher(self) -> None:
        """Measure each teacher on validation images, as one that is not better than guessing has nothing to teach."""
        if self.teacher.classes is None or self.self_distillation or self.distillation_loss is None:
            return
        # Without a loader, as its workers would draw from the random stream of plain training
        logits, labels = self.teacher.judge(self.test_loader.dataset, CHECKED_IMAGES, min(self.batch_size, 64))
        count = len(labels)
        if not count:
            return
        most = labels.bincount().max().item()
        for member, answer in zip(self.teacher.members, logits, strict=True):
            right = (answer.argmax(1) == labels).sum().item()
            said = f"'teacher={member.source}' names {right / count:.1%} of {count} validation images correctly"
            if len(answer) > 1 and torch.allclose(answer, answer[:1].expand_as(answer), rtol=1e-4, atol=1e-5):
                LOGGER.warning(f"{said}, as it answers every image alike: it has nothing to teach. {CHECK_ADVICE}")
            elif right <= most < count:
                LOGGER.warning(
                    f"{said}, and always naming the most frequent class {most / count:.1%}: it has nothing to "
                    f"teach. {CHECK_ADVICE}"
                )
            else:
                self._log([f"{said}."])

    def _detach(self) -> None:
        """Make the student bare: nothing that a copy or a checkpoint should not carry, but the adapters."""
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
            unwrap_model(self.model).criterion = None

    def _clear_memory(self, threshold: float | None = None) -> None:
        """Let go of the maps of a failed step too, when upstream frees memory to try a smaller batch."""
        self._answer = None
        if self._taps is not None:
            self._taps.clear()
        super()._clear_memory(threshold)

    def auto_batch(self, *args, **kwargs) -> int:
        """Return the batch size that fits the memory, the teacher and the losses counted."""
        if self.distillation_loss is None:
            return super().auto_batch(*args, **kwargs)
        student = self.model
        if self.self_distillation:
            self.teacher.first.model = copy.deepcopy(student).eval()
        self.model = TrainingStep(student, self.distillation_loss, self)
        try:
            return super().auto_batch(*args, **kwargs)
        finally:
            self.model = student

    def _log_setup(self) -> None:
        """Log both networks, the matched levels and the weights in force."""
        args = self.distillation
        rows = [("", "model", "parameters", "GFLOPs")]
        networks = [("student", self.args.model, self.model, self.args.imgsz)]
        if not self.self_distillation:
            networks = [
                ("teacher", member.source, member.model, member.imgsz or self.args.imgsz)
                for member in self.teacher.members
            ] + networks
        for who, name, model, imgsz in networks:
            rows.append((who, without_folders(name), f"{get_num_params(model):,}", f"{get_flops(model, imgsz):.3f}"))
        lines = [f"{who:>9}  {name:<28}{parameters:>12}{gflops:>10}" for who, name, parameters, gflops in rows]
        lines += [f"{f'stride {s.stride}':>9}  student {s!s:<20} teacher {t!s}" for s, t in self.levels]
        balanced = ", balanced" if args.distill_balance else ""
        losses = []
        for name, weight in self.distillation_loss.weights.items():
            what, temperature = name.removesuffix("_loss"), self.distillation_loss.temperature_of(name)
            what += f" (temperature {temperature:g})" if temperature else ""
            losses.append(what if weight == 1 else f"{weight:g} x {what}")
        lines.append(
            f"{'loss':>9}  {args.distill_beta:g} x label + {args.distill_alpha:g} x ({' + '.join(losses)}{balanced})"
        )
        LOGGER.info("\n".join([colorstr("distillation:"), *lines]))
