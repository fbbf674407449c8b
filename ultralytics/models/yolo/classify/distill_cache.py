# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""Where a run keeps its teacher's answers, and all that they depend on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from ultralytics.nn.teacher_cache import CachedTeacher, cache_key
from ultralytics.utils.distillation.registry import choose

if TYPE_CHECKING:
    from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer

__all__ = ("check_cache_folder", "open_cache")


def cache_folder(trainer: DistillationClassificationTrainer) -> Path:
    """Where the teacher's answers are kept on disk."""
    return Path(trainer.data["train"]).parent / "teacher_cache"


def check_cache_folder(trainer: DistillationClassificationTrainer) -> None:
    """Refuse a cache on disk that cannot be written, before the run writes anything.

    Raises:
        OSError: If its folder cannot be made or written to.
    """
    folder = cache_folder(trainer)
    place = folder if os.path.lexists(folder) else folder.parent
    if (
        trainer.distillation.teacher_cache == "disk"
        and trainer.distillation.distill_alpha
        and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK))
    ):
        raise OSError(
            f"'teacher_cache=disk' keeps the answers in '{folder}', where nothing can be written. Make '{place}' a "
            f"folder that you may write to, or set 'teacher_cache=ram'."
        )


def open_cache(trainer: DistillationClassificationTrainer) -> CachedTeacher:
    """Open what keeps the teacher's answers; on disk, in a file named after all that they depend on.

    Raises:
        OSError: If the file cannot be written, or the disk has no room for it.
        MemoryError: If the memory has no room.
    """
    args, dataset = trainer.distillation, trainer.train_loader.dataset
    file = None
    # The top logits and the mass of the others are what `kl` needs, at the temperature that they were summed at
    methods = {choice.method.name for choice in choose("response_method", args.response_method)}
    compress = methods == {"kl"} and args.temperature_end in {None, args.temperature}
    shape = 1, trainer.data["channels"], trainer._imgsz, trainer._imgsz
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(trainer.device)
    if args.teacher_cache == "disk":
        root = Path(dataset.root)
        logits, features = trainer.teacher(images)
        key = cache_key(
            teacher=args.teacher_hash,
            # Two networks in Python may have the same weights and say different things
            answer=[f"{value:.2e}" for x in (logits, *features) for value in (x.float().norm(), x.float().mean())],
            source=trainer.teacher.source,
            arguments=[args.teacher_imgsz, args.teacher_mean, args.teacher_std, args.teacher_weights],
            temperature=args.temperature,
            classes=[member.names for member in trainer.teacher.members] + [trainer.teacher.classes],
            levels=[str(level) for _, level in trainer.levels],
            images=[
                (os.path.relpath(f, root), x.st_size, x.st_mtime_ns, x.st_ctime_ns)
                for f, x in ((f, os.stat(f)) for f, *_ in dataset.samples)
            ],
            transforms=str(dataset.torch_transforms),
            views=args.teacher_views,
            amp=str(trainer.args.amp if trainer.amp else False),
            compressed=compress,
        )
        file = cache_folder(trainer) / f"{root.name}-{key}.bin"
    try:
        if file is not None:
            file.parent.mkdir(exist_ok=True)
        example = images.expand(trainer.train_loader.batch_size, -1, -1, -1)
        with trainer._precision():
            cached = CachedTeacher(
                trainer.teacher, example, len(dataset), args.teacher_views, args.temperature, file, compress
            )
    except (OSError, MemoryError) as e:
        too_large = isinstance(e, MemoryError) or e.errno == errno.ENOSPC
        mend = "Set a smaller 'teacher_views', 'feature_distill=False attention_distill=False', or leave it out."
        raise type(e)(
            f"'teacher_cache={args.teacher_cache}' cannot keep {args.teacher_views} views of {len(dataset):,} "
            f"images{'' if too_large else f' in {file}'}: {getattr(e, 'strerror', None) or e}. "
            f"{mend if too_large else 'Let it be written to, or delete it.'}"
        ) from e
    trainer._log([f"The teacher's cache of {cached.cache.size / 1e6:,.1f} MB is in {file or 'memory'}."])
    if others := [x for x in file.parent.glob("*.bin") if x != file] if file else []:
        trainer._log([f"{len(others)} more are there. Delete those that no run needs."])
    return cached
