"""The overlay beside upstream's package, installed both ways into fresh virtual environments."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import ultralytics

ROOT = Path(__file__).resolve().parents[1]
IMPORT = (
    "from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer as D;"
    "import ultralytics, ultralytics.utils.distillation as m; print(m.__file__); print(ultralytics.__file__)"
)
SITE = Path(ultralytics.__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command, cwd=None, check=True):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture
def python(tmp_path):
    """The interpreter of a fresh environment with a copy of upstream's package, and torch and the rest by reference."""
    folder = tmp_path / "venv"
    venv.create(folder)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip())
    ours = {"__pycache__", *(str(p.relative_to(ROOT / "ultralytics")) for p in (ROOT / "ultralytics").rglob("*.py"))}
    shutil.copytree(
        SITE / "ultralytics",
        site / "ultralytics",
        ignore=lambda d, names: [n for n in names if str((Path(d) / n).relative_to(SITE / "ultralytics")) in ours],
    )
    (metadata,) = SITE.glob("ultralytics-*.dist-info")
    shutil.copytree(metadata, site / metadata.name)
    (site / "others.pth").write_text(f"{SITE}\n")  # the .pth files in there are not read: no editable install of ours
    assert "No module named" in run(python, "-c", IMPORT, cwd=tmp_path, check=False).stderr
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "*.egg-info", "build", "runs", "datasets"))
    run(sys.executable, "-m", "build", "--wheel", "--outdir", source / "dist", source)
    (file,) = (source / "dist").glob("*.whl")
    return file


def upstream_files():
    """Return upstream's files from its own record."""
    (record,) = SITE.glob("ultralytics-*.dist-info/RECORD")
    return {line.split(",")[0] for line in record.read_text().splitlines()}


def test_wheel_holds_our_modules_alone(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {str(p.relative_to(ROOT)) for kind in ("py", "html") for p in (ROOT / "ultralytics").rglob(f"*.{kind}")}
    assert files == ours
    assert not files & upstream_files()


def test_what_is_imported_is_installed():
    """Every library that is imported is a dependency of ours or of upstream's, or is imported only where it is used."""
    packages = ("ultralytics", "ultralytics-classify-distillation")
    required = [r for package in packages for r in importlib.metadata.requires(package) if "extra ==" not in r]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in required}
    distributions = importlib.metadata.packages_distributions()
    for file in (*(ROOT / "ultralytics").rglob("*.py"), ROOT / "train.py", ROOT / "distill_train_example.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {m.split(".")[0] for m in modules} - sys.stdlib_module_names - {"distill_train_example"}:
                assert {x.lower() for x in distributions[module]} & names, f"{file.name} imports {module}"


def test_source_tree_shadows_nothing():
    """A folder that upstream has too must not be a regular package here."""
    for file in (ROOT / "ultralytics").rglob("__init__.py"):
        assert not (SITE / file.parent.relative_to(ROOT)).exists()
    assert Path(
        run(sys.executable, "-c", "import ultralytics; print(ultralytics.__file__)", cwd=ROOT).stdout.strip()
    ) == (SITE / "ultralytics" / "__init__.py")


def test_all_extras_are_those_that_teachers_need():
    required = importlib.metadata.requires("ultralytics-classify-distillation")
    all_, *others = ({r.split(";")[0] for r in required if f'extra == "{x}"' in r} for x in ("all", "onnx", "timm"))
    assert all_ == set.union(*others) == {"onnxruntime", "timm"}


COMMANDS = """
import sys
from ultralytics.models.distillation.command import main
for line in sys.stdin.read().splitlines():
    status = main(line.split())
    print("ended", line.split()[0], status, flush=True)
"""


def run_every_command(python, digits, teacher, tmp_path):
    """In an empty folder, offline."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copytree(digits, folder / "digits", ignore=shutil.ignore_patterns("*.cache", "teacher_cache"))
    brief = "data=digits imgsz=32 batch=32 epochs=1 fraction=0.2 device=cpu"
    student, names = f"model=yolo11n-cls.yaml {brief}", "classify/plain classify/distilled"
    plain, distilled = (f"runs/{name}" for name in names.split())
    commands = (
        f"train use_distillation=False {student} plots=False name=plain",
        f"train teacher={teacher} {student} plots=False name=distilled",
        f"check teacher={teacher} {student}",
        f"compare teacher={teacher} {student} seeds=2 plots=False",
        f"compare model=[{plain}/weights/best.pt,{distilled}/weights/best.pt] data=digits imgsz=32 device=cpu",
        f"probe teacher={teacher} {brief}",
        f"report run={distilled} baseline={plain}",
        "methods",
        "nonsense",
    )
    environment = {**os.environ, "YOLO_CONFIG_DIR": str(tmp_path / "config")}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [python, "-c", COMMANDS], input="\n".join(commands), capture_output=True, text=True, cwd=folder, env=environment
    )
    ended = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == [[line.split()[0], "2" if line == "nonsense" else "0"] for line in commands], done.stderr[-3000:]
    assert json.loads((folder / distilled / "distillation.json").read_text())["networks"].keys() == {
        "student",
        "teacher",
        "baseline",
    }
    assert (folder / "runs/classify/compare/compare.html").exists()
    assert list((folder / "runs/classify/probe/weights").glob("probe-*.pt"))
    script = python.with_name("yolo-distill")
    assert "feature_method=" in run(script, "methods", cwd=folder).stdout


@pytest.mark.parametrize("how", ["editable", "wheel"])
def test_install_use_uninstall(how, python, wheel, digits, teacher, tmp_path):
    target = ["-e", ROOT] if how == "editable" else [wheel]
    pip = sys.executable, "-m", "pip", "--python", python  # that of this environment
    run(*pip, "install", "--no-deps", *target)
    for folder in (tmp_path, ROOT, ROOT / "tests"):
        module, package = run(python, "-c", IMPORT, cwd=folder).stdout.split()[-2:]
        assert (Path(module) == ROOT / "ultralytics/utils/distillation/__init__.py") == (how == "editable")
        assert tmp_path in Path(package).parents
    if how == "wheel":
        run_every_command(python, digits, teacher, tmp_path)
    run(*pip, "uninstall", "-y", "ultralytics-classify-distillation")
    assert "No module named" in run(python, "-c", IMPORT, cwd=tmp_path, check=False).stderr
    done = run(python, "-c", "from ultralytics.models.yolo.classify import ClassificationTrainer as C; print(C)")
    assert "ClassificationTrainer" in done.stdout
