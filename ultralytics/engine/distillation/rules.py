# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What a run is refused for, and what it warns of: one rule for each, in the order in which they are asked.

A refusal returns the error to raise, a warning returns its sentence, and both None where there is nothing to say. They
read a Plan as far as it is made; how far that is stands over each group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ultralytics.cfg import TASK2DATA, get_save_dir
from ultralytics.cfg.distillation import as_list
from ultralytics.cfg.distillation.arguments import DENSE_LOSSES
from ultralytics.engine.distillation.plan import Plan
from ultralytics.nn.distillation.sources import CLASSIFIER
from ultralytics.nn.distillation.teacher import CUDA_GRAPH_MODES
from ultralytics.nn.distillation.teachers import SelfTeacher
from ultralytics.utils import RANK
from ultralytics.utils.distillation.registry import choose
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

__all__ = ("ARGUMENTS", "DATASET", "NOTABLE", "RESUMED", "TEACHER", "refuse")

Refusal = Callable[[Plan], Exception | None]
RESUMED = {"teacher", "teacher_hash", "baseline"}  # what may be given again to a run that is resumed


def refuse(plan: Plan, rules: Iterable[Refusal]) -> None:
    """Raise the first error that a rule finds."""
    for rule in rules:
        if error := rule(plan):
            raise error


# Of the arguments alone


def _no_dataset(plan: Plan) -> Exception | None:
    if plan.training.data:
        return None
    task = plan.training.task
    return ValueError(f"No dataset given. Set 'data' to one of the task '{task}', e.g. 'data={TASK2DATA[task]}'.")


def _teacher_is_always_silent(plan: Plan) -> Exception | None:
    start, close = plan.start, plan.args.close_distill
    if start + close < plan.training.epochs:
        return None
    return ValueError(
        f"The teacher would be silent in all of 'epochs={plan.training.epochs}', with 'self_distill_start={start}' "
        f"and 'close_distill={close}'. Lower these, or train longer."
    )


def _methods_leave_none(plan: Plan) -> Exception | None:
    for kind, on in (("response", plan.args.response_distill), ("feature", plan.args.uses_feature_method)):
        given = getattr(plan.args, f"{kind}_method")
        chosen = choose(f"{kind}_method", given)  # refuses what is not known
        if on and not chosen:
            return ValueError(
                f"'{kind}_method={given}' leaves no method with a share above 0. Give one, or set "
                f"'{kind}_distill=False'."
            )
    return None


def _adapters_would_be_quantized(plan: Plan) -> Exception | None:
    chosen = plan.methods["feature_method"]
    if plan.training.quantize != 8 or not plan.teaches or not any(choice.method.adapter for choice in chosen):
        return None
    return ValueError(
        "'quantize=8' would quantize the adapters of the feature loss with the student. Set 'feature_distill=False', "
        "or train without 'quantize' and quantize on export."
    )


def _compiling_hides_gradients(plan: Plan) -> Exception | None:
    if not (plan.training.compile and plan.args.distill_balance):
        return None
    return ValueError(
        "'distill_balance=auto' measures gradients inside the student, which 'compile=True' hides. Give one of them."
    )


def _memory_is_not_shared(plan: Plan) -> Exception | None:
    if plan.args.teacher_cache != "ram" or (RANK == -1 and "," not in str(plan.training.device)):
        return None
    return ValueError("'teacher_cache=ram' would keep all answers in every process. Set 'teacher_cache=disk'.")


def _network_reaches_no_process(plan: Plan) -> Exception | None:
    if all(isinstance(x, str) for x in plan.args.teachers) or "," not in str(plan.training.device):
        return None
    return ValueError(
        f"'device={plan.training.device}' starts a process per device, which a teacher given as nn.Module cannot "
        f"reach. Save it to a file, or train on one device."
    )


def _method_reaches_no_process(plan: Plan) -> Exception | None:
    if RANK != -1 or "," not in str(plan.training.device):
        return None
    for argument, choices in plan.methods.items():
        for choice in choices:
            module = choice.method.function.__module__
            elsewhere = not module.startswith("ultralytics.") and plan.trainer_module.startswith("ultralytics.")
            if module == "__main__" or elsewhere:
                return ValueError(
                    f"'device={plan.training.device}' starts a process per device, in which '{argument}="
                    f"{choice.method.name}', registered in '{module}', is not known. Register it in a file with a "
                    f"trainer of your own, a subclass, and start that one; or train on one device."
                )
    return None


def _output_is_known(plan: Plan) -> Exception | None:
    if plan.args.teacher_output is None:
        return None
    if plan.training.task == CLASSIFIER.task and plan.args.teacher != SelfTeacher.source:
        return None
    return ValueError(
        f"'teacher_output={plan.args.teacher_output}' is for classifiers of others, and what the teacher of this run "
        f"says is known. Leave it out."
    )


def _weights_are_missing(plan: Plan) -> Exception | None:
    weights = plan.training.pretrained
    if plan.resumed or not isinstance(weights, (str, Path)):
        return None
    if Path(weights).is_file() or Path(weights).name in GITHUB_ASSETS_NAMES:  # which upstream downloads
        return None
    return FileNotFoundError(
        f"'pretrained={weights}' does not exist. Give a checkpoint whose weights the student begins with, or leave it "
        f"out."
    )


def _graphs_share_memory(plan: Plan) -> Exception | None:
    modes = plan.training.compile, plan.args.teacher_compile
    if not (plan.args.teacher_overlap and all(mode in CUDA_GRAPH_MODES for mode in modes)):
        return None
    return ValueError(
        f"'teacher_overlap=True' would replay the CUDA graphs of 'compile={modes[0]}' and 'teacher_compile={modes[1]}' "
        f"at the same time, which share their memory. Leave it out, or set one of these to True."
    )


ARGUMENTS: tuple[Refusal, ...] = (
    _no_dataset,
    _teacher_is_always_silent,
    _methods_leave_none,
    _adapters_would_be_quantized,
    _compiling_hides_gradients,
    _memory_is_not_shared,
    _network_reaches_no_process,
    _method_reaches_no_process,
    _output_is_known,
    _graphs_share_memory,
    _weights_are_missing,
)


# Of the arguments and the dataset


def _cache_cannot_be_written(plan: Plan) -> Exception | None:
    if plan.args.teacher_cache != "disk" or not plan.teaches:
        return None
    folder = plan.cache_folder
    place = folder if os.path.lexists(folder) else folder.parent
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return None
    return OSError(
        f"'teacher_cache=disk' keeps the answers in '{folder}', where nothing can be written. Make '{place}' a folder "
        f"that you may write to, or set 'teacher_cache=ram'."
    )


def _run_lies_among_images(plan: Plan) -> Exception | None:
    run = get_save_dir(plan.training).resolve()
    folders = [Path(x) for split in ("train", "val", "test") for x in as_list(plan.data.get(split))]
    given = Path(str(plan.training.data))
    if given.is_dir() and not any(x.resolve().is_relative_to(given.resolve()) for x in folders):
        folders.append(given)  # classes that upstream has split into folders beside it
    for folder in folders:
        linked = (x for x in folder.glob("*") if x.is_symlink() and x.is_dir())  # e.g. a class's
        if any(run.is_relative_to(x.resolve()) for x in (folder, *linked)):
            return ValueError(
                f"The run's folder '{run}' would lie among the images in '{folder}', and what it draws would be taken "
                f"for some of them. Give another one with 'project'."
            )
    return None


DATASET: tuple[Refusal, ...] = (_cache_cannot_be_written, _run_lies_among_images)


# Of these and the teacher


def _content_is_another(plan: Plan) -> Exception | None:
    found, expected = plan.teacher.content_hash, plan.args.teacher_hash
    if found is None or expected is None:
        return None
    # A run that fits heads has recorded what its teachers became: one without its head is told by its head's name
    known = [not member.backbone and plan.resumed and plan.args.teacher_probe for member in plan.teacher.members]
    hashes = as_list(found), [x.lower() for x in as_list(expected)]
    if len(hashes[1]) == len(known) and all(k or a == b for k, a, b in zip(known, *hashes, strict=True)):
        return None
    asked = "the run began with" if plan.resumed else "was asked for"
    return ValueError(
        f"'teacher={plan.teacher.source}' is not what {asked}: its SHA-256 is {found}, not {expected}. Give the right "
        f"one, or accept this one with 'teacher_hash={found}'."
    )


TEACHER: tuple[Refusal, ...] = (_content_is_another,)


# Of the whole plan: what is no mistake, but has another effect than one may think


def _temperature_has_no_effect(plan: Plan) -> str | None:
    if not plan.changes("temperature") or not plan.args.response_distill or plan.uses_temperature:
        return None
    return (
        f"'temperature={plan.args.temperature}' has no effect on 'response_method={plan.args.response_method}', which "
        f"has a temperature of its own, to be given among its hyper-parameters, or none."
    )


def _weight_of_nothing(plan: Plan) -> str | None:
    losses = ("feature", "attention", *DENSE_LOSSES)
    settings = ("feature_method", "feature"), *((f"{loss}_weight", loss) for loss in losses)
    idle = [
        f"'{name}={value}' has no effect, as '{loss}_distill' is False here."
        for name, loss in settings
        if plan.changes(name) and (value := getattr(plan.args, name)) and not getattr(plan.args, f"{loss}_distill")
    ]
    return " ".join(idle) or None


def _teacher_has_no_effect(plan: Plan) -> str | None:
    return None if plan.teaches else "'distill_alpha=0': the teacher has no effect on this run."


def _student_is_held_back(plan: Plan) -> str | None:
    if not (plan.teaches and plan.teacher.follows_student and plan.args.distill_alpha > plan.args.distill_beta):
        return None
    return (
        "'teacher=self' holds the student to what it knows already where 'distill_alpha' is above 'distill_beta'. Set "
        "e.g. 'distill_alpha=0.3 distill_beta=1'."
    )


NOTABLE: tuple[Callable[[Plan], str | None], ...] = (
    _temperature_has_no_effect,
    _weight_of_nothing,
    _teacher_has_no_effect,
    _student_is_held_back,
)
