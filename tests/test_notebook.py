"""The notebook: its cells, run in a kernel as a user runs them, and what it holds as it lies in the repository."""

import json
import re

import nbformat
import pytest
import torch
from helpers import ROOT, anchors, links, resolve
from nbclient import NotebookClient
from ultralytics import YOLO

NOTEBOOK = "examples/distill.ipynb"
BRIEF = {"images": 200, "batch": 16, "teacher_epochs": 1, "epochs": 4}  # in place of the settings of the same names
ASKED = "import json\nprint(json.dumps([figures, [{**row, 'file': str(row['file'])} for row in files], cost]))"


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.mark.slow
def test_the_cells_run(notebook, tmp_path, monkeypatch):
    """In a folder of their own, whose name holds a space, with fewer images and epochs."""
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in BRIEF.items():
        settings.source, count = re.subn(rf"^{name} = \d+", f"{name} = {value}", settings.source, flags=re.MULTILINE)
        assert count == 1, name
    notebook.cells.append(nbformat.v4.new_code_cell(ASKED))
    own, place = tmp_path / "jupyter", tmp_path / "a place"
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(own / name.lower()))
    own.mkdir()
    place.mkdir()
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert "image/png" in outputs["show-data"][0].data
    assert [x.name for x in place.iterdir()] == ["distillation"]
    assert len(list(place.rglob("digits-200/*/*/*.png"))) == BRIEF["images"]
    (page,) = place.rglob("distillation.html")
    (shown,) = [x.data["text/html"] for x in outputs["show-report"]]
    assert shown.startswith("<div><iframe srcdoc=")
    assert shown.count("<") == 4  # all of the page is quoted
    assert "Distillation: distilled&lt;/title&gt;" in shown
    assert len(shown) > page.stat().st_size

    figures, files, cost = json.loads(outputs[notebook.cells[-1].id][-1].text)
    assert figures.keys() == {"student", "teacher", "baseline"}
    (table,) = [x.data["text/markdown"] for x in outputs["show-figures"]]
    for row in figures.values():
        assert f"| {row['parameters']:,} | {row['top1']:.1%} |" in table
    checkpoint, exported = files
    assert checkpoint["file"].endswith("distilled/weights/best.pt")
    assert exported["file"].endswith("distilled/weights/best.onnx")
    assert checkpoint["top1"] == pytest.approx(figures["student"]["top1"], abs=0.026)  # one image of 40
    assert exported["top1"] == pytest.approx(checkpoint["top1"], abs=0.026)
    images = sorted(map(str, place.rglob("val/*/*.png")))  # which such a brief training hardly tells apart
    answers = [YOLO(row["file"], task="classify").predict(images, imgsz=32, device="cpu") for row in files]
    checkpoint, exported = (torch.stack([x.probs.data for x in answer]) for answer in answers)
    torch.testing.assert_close(exported, checkpoint, atol=1e-3, rtol=0)
    assert checkpoint.std(0).max() > 1e-2  # otherwise any two would be alike
    assert cost["epochs"] == BRIEF["epochs"]


def test_nothing_is_stored(notebook):
    """No outputs, and what tells a viewer how to open it."""
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.metadata.kernelspec.name) == (4, "python3")
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not any(re.fullmatch(r"[0-9a-f]{8}(-.*)?", cell.id) for cell in notebook.cells)  # given, not drawn
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, cell.id
            assert cell.execution_count is None, cell.id
            assert not cell.metadata.keys() - {"tags"}, cell.id


def test_links_lead_somewhere(notebook):
    found = [link for cell in notebook.cells if cell.cell_type == "markdown" for link in links(cell.source)]
    assert len(found) > 5
    for file, anchor in found:
        target = ROOT / resolve(NOTEBOOK, file)
        assert target.exists(), file
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{file}#{anchor}"
