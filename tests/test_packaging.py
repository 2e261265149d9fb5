"""What is shipped: the package with its story model and the converter, whole, and nothing of the tests.

And what is installed beside it: everything that it imports.
"""

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# What is found without being installed.
OWN = {"jaxgen"} | {file.stem for folder in ("tests", "examples", "bench") for file in (ROOT / folder).rglob("*.py")}


def imported(node: ast.AST) -> set[str]:
    """The packages that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) and node.module and not node.level else set()


@pytest.mark.parametrize("folder", ["jaxgen", "convert", "tests", "examples"])
def test_what_is_imported_is_declared(folder: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"]
    if folder in ("tests", "examples"):
        lines = lines + project["optional-dependencies"]["test"]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    for file in (ROOT / folder).rglob("*.py"):
        names = {name for node in ast.walk(ast.parse(file.read_text())) for name in imported(node)}
        lacking = {canonicalize_name(name) for name in names - sys.stdlib_module_names - OWN} - declared
        if file == ROOT / "convert" / "pickles.py":  # which says so to who has none
            lacking -= {"torch"}
        if file == ROOT / "examples" / "ray_data.py":  # which says how to install it
            lacking -= {"ray"}
        assert not lacking, file


@pytest.mark.parametrize("folder", ["jaxgen", "convert"])
def test_no_file_needs_what_windows_lacks_to_be_imported(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        first = {name for node in ast.parse(file.read_text()).body for name in imported(node)}
        assert not first & {"fcntl", "grp", "pty", "pwd", "readline", "resource", "termios"}, file


def test_both_distributions_hold_the_package_and_no_tests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("jaxgen", "convert", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "sdist", "bdist_wheel"]
    built = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "is absent from the `packages` configuration" not in built.stdout + built.stderr

    files = {str(file.relative_to(source)) for name in ("jaxgen", "convert") for file in (source / name).rglob("*.*")}
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert files <= held and not [name for name in held if name.startswith("tests")]
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {file.replace("convert/", "jaxgen/convert/", file.startswith("convert/")) for file in files}
    assert "jaxgen/py.typed" in held  # or type checkers of users would not read the annotations
