# Ultralytics AGPL-3.0 License - https://ultralytics.com/license
"""The report of a distilled run: one page that needs no other file, its figures and its charts."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from ultralytics.engine.distillation.plan import Plan
from ultralytics.engine.distillation.report.charts import draw_losses
from ultralytics.engine.distillation.report.run import read_losses
from ultralytics.engine.distillation.run_files import whole_files
from ultralytics.engine.distillation.task import DistillationTask, FinishedRun

__all__ = ("COMPARISON", "embed", "read_pull", "remove_report", "render", "write_report")

COMPARISON = Path(__file__).with_name("compare.html")  # the page of a comparison
DPI = 160


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
    charts = {**part.charts, "losses": draw_losses(read_losses(run))}
    drawn = {name: embed(chart, name) for name, chart in charts.items()}
    with whole_files(run.folder) as folder:
        for name, (png, _) in drawn.items():
            (folder / f"distillation_{name}.png").write_bytes(png)
        (folder / "distillation.json").write_text(json.dumps(part.summary, indent=2) + "\n", encoding="utf-8")
        page = render(
            part.template,
            name=run.folder.name,
            summary=part.summary,
            pictures={name: shown for name, (_, shown) in drawn.items()},
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
    try:
        return json.loads((folder / "distillation.json").read_text(encoding="utf-8"))["pull"]
    except (OSError, ValueError, KeyError, TypeError):  # there was no report, or it is damaged
        return {}


def render(template: Path, **shown: Any) -> str:
    """Return a page, of a template that may extend those beside this module."""
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    environment.filters |= {"percent": lambda x: f"{100 * x:.1f}\N{NO-BREAK SPACE}%", "advice": _advice}
    return environment.get_template(template.name).render(**shown)


def embed(chart: Figure, name: str) -> tuple[bytes, Markup]:
    """Return a chart as PNG, and as a page holds it.

    That is a drawing in the colors of the page, with identifiers of its own; where it shows images a JPEG, a tenth of
    a PNG of photographs.
    """
    png, packed = io.BytesIO(), io.BytesIO()
    chart.savefig(png, format="png", dpi=DPI)
    if any(axes.images for axes in chart.axes):
        Image.open(png).convert("RGB").save(packed, format="jpeg", quality=85)
        return png.getvalue(), Markup("data:image/jpeg;base64,") + base64.b64encode(packed.getvalue()).decode()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        chart.savefig(packed, format="svg", transparent=True, metadata={"Date": None})
    svg = packed.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r'\1\2 aria-hidden="true"', svg, count=1)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", svg)
    return png.getvalue(), Markup(svg.replace("#000000", "currentColor").replace("#ffffff", "var(--card)"))


def _advice(finding: str) -> Markup:
    """Return an advice with what stands between backquotes as code."""
    parts = finding.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(x) if i % 2 else x for i, x in enumerate(parts))


def _arguments(plan: Plan) -> dict[str, Any]:
    """Return the run's own and the distillation arguments in force that are set, as they are shown."""
    training = {k: getattr(plan.training, k) for k in ("model", "data", "epochs", "imgsz", "batch", "seed")}
    arguments = {f.name: getattr(plan.args, f.name) for f in fields(plan.args)}
    arguments["teacher"] = ", ".join(x.title for x in plan.teacher.members) or plan.teacher.source
    return {**training, **{k: v for k, v in arguments.items() if v is not None}}
