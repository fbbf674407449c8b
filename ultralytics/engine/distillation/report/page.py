# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The report of a distilled run: one page that needs no other file, its figures and its charts."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from ultralytics.engine.distillation.plan import Plan
from ultralytics.engine.distillation.report.charts import draw_losses
from ultralytics.engine.distillation.report.run import read_losses
from ultralytics.engine.distillation.run_files import whole_files
from ultralytics.engine.distillation.task import DistillationTask, FinishedRun

__all__ = ("read_pull", "remove_report", "write_report")


def write_report(task: DistillationTask, run: FinishedRun) -> Path:
    """Write `distillation.html`, its figures as `distillation.json` and its charts beside it.

    Args:
        task (DistillationTask): What is special about the run's task.
        run (FinishedRun): The run.

    Returns:
        (Path): The HTML file; it needs no other.

    Raises:
        OSError: If it cannot be written.
        ValueError: If the task finds nothing to measure.
    """
    part = task.report(run)
    charts = {**part.charts, "losses": draw_losses(*read_losses(run))}
    with whole_files(run.folder) as folder:
        pictures = {name: _save(chart, folder / f"distillation_{name}.png") for name, chart in charts.items()}
        (folder / "distillation.json").write_text(json.dumps(part.summary, indent=2) + "\n", encoding="utf-8")
        loader = jinja2.FileSystemLoader([part.template.parent, Path(__file__).parent])
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
        environment.filters["percent"] = lambda x: f"{100 * x:.1f} %"
        page = environment.get_template(part.template.name).render(
            name=run.folder.name,
            summary=part.summary,
            pictures=pictures,
            arguments=_arguments(run.plan),
            **part.shown,
        )
        (folder / "distillation.html").write_text(page, encoding="utf-8")
    return run.folder / "distillation.html"


def remove_report(task: DistillationTask, folder: Path) -> None:
    """Take away what `write_report` wrote in a run's folder, and nothing else."""
    charts = (f"distillation_{chart}.png" for chart in ("losses", *task.charts))
    for name in ("distillation.html", "distillation.json", *charts):
        (folder / name).unlink(missing_ok=True)


def read_pull(folder: Path) -> dict[str, float]:
    """Return how strongly each loss pulled, as an earlier report of a run says; empty where there is none."""
    file = folder / "distillation.json"
    return json.loads(file.read_text(encoding="utf-8"))["pull"] if file.exists() else {}


def _arguments(plan: Plan) -> dict[str, Any]:
    """Return the distillation arguments in force that are set, as they are shown."""
    arguments = {f.name: getattr(plan.args, f.name) for f in fields(plan.args)}
    arguments["teacher"] = ", ".join(x.title for x in plan.teacher.members) or plan.teacher.source
    return {k: v for k, v in arguments.items() if v is not None}


def _save(chart: Figure, file: Path) -> str:
    """Write a chart as PNG and return it as a URL that holds it."""
    buffer = io.BytesIO()
    chart.savefig(buffer, format="png", dpi=160)
    file.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
