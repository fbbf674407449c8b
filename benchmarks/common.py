# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""What every benchmark does: reads its command line, times in turn, shows ratios, writes its results."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ultralytics.cfg.distillation import parse_arguments

RESULTS = Path(__file__).resolve().with_name("results")


def read_settings(arguments: list[str], usage: str, defaults: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a command line, or show how it is used and leave.

    Args:
        arguments (list[str]): The command line, as `key=value`.
        usage (str): What `--help` shows.
        defaults (dict[str, Any]): The benchmark's own settings.

    Returns:
        (tuple[dict[str, Any], dict[str, Any]]): The benchmark's own settings, and all other arguments that were given.
    """
    if {"-h", "--help"} & set(arguments):
        print(usage)
        raise SystemExit
    given = parse_arguments(arguments)
    return {k: given.pop(k, v) for k, v in defaults.items()}, given


def amp_unchecked() -> AbstractContextManager:
    """Let upstream train under autocast without its check, which loads a detector from the network and needs a GPU."""
    return patch("ultralytics.engine.trainer.check_amp", lambda model: True)


def write_results(output: Path | str, report: dict[str, Any]) -> None:
    """Write a report as JSON."""
    Path(output).write_text(json.dumps(report, indent=2) + "\n")


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes, the device's work included."""
    _wait_for(device)  # what came before is not timed
    start = time.perf_counter()
    run()
    _wait_for(device)  # CUDA calls return before the work is done
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    warmup: int = 0,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Time runs in turn, so that what else the machine does falls on all of them.

    Args:
        runs (dict[str, Callable]): What to time, by name.
        repeats (int): How often each is timed.
        device (torch.device): Where they compute.
        warmup (int): How often each runs first, untimed.
        before (Callable): Called before each timed run, and not timed.

    Returns:
        (dict[str, list[float]]): The seconds of every repeat, by name.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before()
            times[name].append(timed(run, device))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each run's seconds, in milliseconds."""
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def ratio(over: list[float], *under: list[float]) -> dict[str, Any]:
    """Return the ratio of the medians of some times to the sum of others', and the quartiles of each repeat's."""
    each = [a / sum(b) for a, *b in zip(over, *under, strict=True)]
    median = statistics.median(over) / sum(map(statistics.median, under))
    return {"median": median, "quartiles": np.quantile(each, (0.25, 0.75)).tolist()}


def table(results: list[dict[str, Any]], what: str) -> str:
    """Return a Markdown table of one thing that was measured, a row for each result."""
    names = list(results[0][what])
    of = [name for name in ("teacher", "student", "imgsz", "batch") if name in results[0]]
    lines = [f"| {' | '.join([*of, *names])} |", "|---" * len([*of, *names]) + "|"]
    for r in results:
        lines.append(f"| {' | '.join([*(str(r[k]) for k in of), *(show(r[what][name]) for name in names)])} |")
    return "\n".join(lines)


def show(figure: Any) -> str:
    """Return a figure, with its quartiles if it has them."""
    if not isinstance(figure, dict):
        return f"{figure:.2f}"
    low, high = figure["quartiles"]
    return f"{figure['median']:.3f} ({low:.3f} to {high:.3f})"


def gap_closed(measured: dict[str, dict[str, float]], teacher: float) -> dict[str, float]:
    """Return by variant what part of the way from plain students to the teacher its students went, in percent."""
    plain = measured.get("plain", {})
    shares = {}
    for variant, by_seed in measured.items():
        if variant != "plain" and (shared := by_seed.keys() & plain.keys()):
            before, after = (np.mean([x[seed] for seed in shared]) for x in (plain, by_seed))
            if teacher > before:  # or there is none
                shares[variant] = float(100 * (after - before) / (teacher - before))
    return shares
