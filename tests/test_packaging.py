"""The overlay beside upstream's package, installed both ways into fresh virtual environments."""

import ast
import importlib.metadata
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


@pytest.mark.parametrize("how", ["editable", "wheel"])
def test_install_import_uninstall(how, python, wheel, tmp_path):
    target = ["-e", ROOT] if how == "editable" else [wheel]
    pip = sys.executable, "-m", "pip", "--python", python  # that of this environment
    run(*pip, "install", "--no-deps", *target)
    for folder in (tmp_path, ROOT, ROOT / "tests"):
        module, package = run(python, "-c", IMPORT, cwd=folder).stdout.split()[-2:]
        assert (Path(module) == ROOT / "ultralytics/utils/distillation/__init__.py") == (how == "editable")
        assert tmp_path in Path(package).parents
    run(*pip, "uninstall", "-y", "ultralytics-classify-distillation")
    assert "No module named" in run(python, "-c", IMPORT, cwd=tmp_path, check=False).stderr
    done = run(python, "-c", "from ultralytics.models.yolo.classify import ClassificationTrainer as C; print(C)")
    assert "ClassificationTrainer" in done.stdout
