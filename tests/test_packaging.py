"""What is shipped: the package with its story model and the converter, whole, and nothing of the tests."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
