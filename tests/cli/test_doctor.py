"""`jaxgen doctor` says what is installed and names what is known to go wrong."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from jaxgen.cli import doctor
from jaxgen.cli.doctor import hazards
from jaxgen.cli.main import main

GOOD = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "transformers": "5.23.0"}


def test_a_sound_installation_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--compile-cache", str(tmp_path / "programs")]) == 0
    out = capsys.readouterr().out
    for said in ("jaxgen 0.", "Python 3.", "jax 0.", "cpu", f"kept in {tmp_path / 'programs'}", "none known"):
        assert said in out
    assert main(["doctor", "--compile-cache", "off"]) == 0
    assert "not kept" in capsys.readouterr().out


def test_a_cache_that_others_may_write_to_is_a_trouble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o777)
    assert main(["doctor", "--compile-cache", str(tmp_path)]) == 1
    assert "can be written by other users" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flax": "0.12.11"}, "flax 0.12.11 is broken"),
        ({"jax": "0.11.2", "jaxlib": "0.11.2"}, "flax 0.12.8 does not work with jax 0.11.2"),
        ({"jaxlib": "0.9.1"}, "do not match"),
        ({"transformers": "4.57.0"}, "transformers 4.57.0 is untested"),
        ({"transformers": "6.0.0.dev0"}, "is untested"),
        ({"jax": "0.9.1", "jaxlib": "0.9.1"}, "jax 0.9.1 is untested. Install: pip install 'jax>=0.10'"),
    ],
)
def test_pairs_of_versions_that_do_not_work_are_named(changed: dict[str, str], message: str) -> None:
    (found,) = hazards({**GOOD, **changed}, "cpu", nvidia=False)
    assert message in found


def test_versions_before_their_release_are_taken_for_it() -> None:
    assert not hazards({**GOOD, "jax": "0.10.3.dev20260101+cpu", "transformers": "5.25.0.dev0"}, "cpu", nvidia=False)


def test_without_an_installation_of_its_own_no_bounds_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    assert not hazards({**GOOD, "transformers": "4.57.0"}, "cpu", nvidia=False)


def test_a_gpu_that_jax_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "Unset it" in hazards(GOOD, "cpu", nvidia=True)[0]
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "jaxgen[cuda" in hazards(GOOD, "cpu", nvidia=True)[0]
    assert hazards(GOOD, "gpu", nvidia=True) == hazards(GOOD, "cpu", nvidia=False) == []


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_a_trouble(platform: str) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    command = [sys.executable, "-m", "jaxgen", "doctor"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1 and f"JAX_PLATFORMS={platform} names a platform that is not available" in ended.stdout
    assert "packages" in ended.stdout and "Traceback" not in ended.stderr
