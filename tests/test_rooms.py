"""Where code lies: no circle of imports, no arrow that leads up, no file that is too long to be read at once."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cfg", "utils", "data", "nn", "engine", "models")  # from the bottom up
FILES = sorted((ROOT / "ultralytics").rglob("*.py"))
LONGEST = 400  # lines


def module(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file): file for file in FILES}


def imports(file):
    """Return the modules of ours that a file imports, for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found & MODULES.keys()


GRAPH = {name: imports(file) for name, file in MODULES.items()}


def test_no_circle():
    assert sum(map(len, GRAPH.values())) > 100
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError
    assert order.index("ultralytics.nn.distillation.teacher") < order.index("ultralytics.engine.distillation.trainer")


@pytest.mark.parametrize("name", MODULES)
def test_arrows_lead_down(name):
    room = {name: ROOMS.index(name.split(".")[1]) for name in MODULES}
    assert [other for other in GRAPH[name] if room[other] > room[name]] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_can_be_read_at_once(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_machinery_names_no_task():
    """Nothing in the engine imports a task's trainer, network or teacher."""
    for name, file in MODULES.items():
        if name.startswith("ultralytics.engine.distillation"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
            assert not {
                x for x in named if x.startswith(("Classification", "Detection", "Segmentation", "Pose", "OBB"))
            }
