"""Where code lies: no circle of imports, no arrow that leads up, no file that is too long to be read at once."""

import ast
import fnmatch
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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


def rooms():
    """Return the rooms that CONTRIBUTING.md lists, from the top down, each with the patterns of its files."""
    table = re.search(r"\| room \|.*?\n\n", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    for row in table.strip().splitlines()[2:]:
        names = re.findall(r"`([^`]+)`", row.split("|")[1])
        folder = re.sub(r"<\w+>", "*", names[0]).replace("...", "ultralytics/engine/distillation")
        folder = folder.rstrip("/") + "/*" * names[0].endswith("/")
        yield [folder, *(f"{folder.rpartition('/')[0]}/{name}" for name in names[1:])]


def floor(file):
    """Return how far down the table a file lies; a package's own docstring lies nowhere."""
    path = str(file.relative_to(ROOT))
    found = [i for i, patterns in enumerate(rooms()) if any(fnmatch.fnmatch(path, p) for p in patterns)]
    return found[0] if found else None


GRAPH = {name: imports(file) for name, file in MODULES.items()}


def test_no_circle():
    assert sum(map(len, GRAPH.values())) > 100
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError
    assert order.index("ultralytics.nn.distillation.teacher") < order.index("ultralytics.engine.distillation.trainer")


@pytest.mark.parametrize("name", MODULES)
def test_imports_lead_down_the_table(name):
    """Of CONTRIBUTING.md, which lists every file."""
    own = floor(MODULES[name])
    if own is None:
        assert MODULES[name].name == "__init__.py"
    else:
        assert [other for other in GRAPH[name] if (floor(MODULES[other]) or own) < own] == []


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
