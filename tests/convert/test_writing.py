"""A folder appears whole or not at all, whatever happens, and an interrupted run is gone on with."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, assert_same_bits, hashes, random_tensors, write_checkpoint
from jaxgen.convert import writing

import jaxgen
from jaxgen import CheckpointError, convert
from jaxgen.checkpoint.safetensors_file import StoredTensor

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=2)


@pytest.fixture
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed conversion writes."""
    return hashes(convert.convert_checkpoint(source, tmp_path_factory.mktemp("expected") / "converted").folder)


def run_kills(tmp_path: Path, count: int, seed: int) -> int:
    """How many conversions were killed."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2048, "num_hidden_layers": 6}
    write_checkpoint(tmp_path / "source", config, shards=3)
    command = [sys.executable, str(HELPERS / "kills.py"), str(tmp_path), str(count), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(HELPERS)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_whenever_it_is_killed_nothing_partial_loads_and_resuming_completes_to_the_same_bytes(tmp_path: Path) -> None:
    assert run_kills(tmp_path, 10, 0) >= 4


@pytest.mark.sweep
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    assert run_kills(tmp_path, 100, 1) >= 40


def break_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, code: int) -> None:
    """The number-th call from now on, and all after it, fail as the operating system does."""
    original, calls = getattr(owner, name), []

    def call(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) >= number:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("number", [1, 2, 7, 20])
@pytest.mark.parametrize(
    ("owner", "name", "code"),
    [
        pytest.param(writing, "_write_at", errno.ENOSPC, id="full disk"),
        pytest.param(StoredTensor, "read", errno.EIO, id="read error"),
    ],
)
def test_a_disk_that_fails_leaves_what_can_be_gone_on_with(
    owner: Any,
    name: str,
    code: int,
    number: int,
    source: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, target = hashes(source), source.parent / "converted"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(code)):
        break_at(patch, owner, name, number, code)
        convert.convert_checkpoint(source, target, workers=1)
    assert not target.exists()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        jaxgen.load(source.parent / "converted.partial")
    with pytest.raises(CheckpointError, match=r"converted\.partial was left by an interrupted conversion.*--resume"):
        convert.convert_checkpoint(source, target)
    convert.convert_checkpoint(source, target, resume=True)
    assert hashes(target) == expected
    assert hashes(source) == before
    assert sorted(source.parent.iterdir()) == [target, source]


@pytest.mark.parametrize("number", range(1, 6))
def test_a_disk_that_is_full_at_the_end_leaves_what_can_be_gone_on_with(
    number: int, source: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.parent / "converted"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        break_at(patch, os, "fsync", number, errno.ENOSPC)
        convert.convert_checkpoint(source, target)
    assert not target.exists()
    convert.convert_checkpoint(source, target, resume=True)
    assert hashes(target) == expected


def test_resuming_copies_only_what_is_missing(
    source: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, half = source.parent / "converted", len(random_tensors()) // 2
    with monkeypatch.context() as patch, pytest.raises(OSError):
        break_at(patch, StoredTensor, "read", half + 1, errno.EIO)
        convert.convert_checkpoint(source, target, workers=1)
    read: list[str] = []
    original = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self, *rest: (read.append(self.name), original(self, *rest)))
    convert.convert_checkpoint(source, target, resume=True)
    assert len(read) == len(random_tensors()) - half
    assert hashes(target) == expected


def test_a_finished_tensor_larger_than_a_block_is_not_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG | {"vocab_size": 9000, "hidden_size": 64}
    source, target = write_checkpoint(tmp_path / "source", config, random_tensors(config)), tmp_path / "converted"
    with monkeypatch.context() as patch, pytest.raises(OSError):
        break_at(patch, os, "fsync", 1, errno.ENOSPC)  # when all tensors are written
        convert.convert_checkpoint(source, target)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a tensor is read again"))
    convert.convert_checkpoint(source, target, resume=True)
    monkeypatch.undo()
    assert_same_bits(jaxgen.load(target), jaxgen.load(source))


def test_what_an_interrupted_run_wrote_is_not_trusted_but_hashed(
    source: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.parent / "converted"
    with monkeypatch.context() as patch, pytest.raises(OSError):
        break_at(patch, StoredTensor, "read", 12, errno.EIO)
        convert.convert_checkpoint(source, target, workers=1)
    (file,) = (source.parent / "converted.partial").glob("*.safetensors")
    file.write_bytes(b"\xff" * file.stat().st_size)
    journal = source.parent / ".converted.journal"
    journal.write_text(journal.read_text()[:-9])  # its last line cut
    convert.convert_checkpoint(source, target, resume=True)
    assert hashes(target) == expected


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"shard_size": 12_000}, "source"])
def test_only_the_same_conversion_is_gone_on_with(
    other: Any, source: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.parent / "converted"
    with monkeypatch.context() as patch, pytest.raises(OSError):
        break_at(patch, StoredTensor, "read", 3, errno.EIO)
        convert.convert_checkpoint(source, target)
    if other == "source":
        write_checkpoint(source, tensors=random_tensors(seed=1), shards=2)
    with pytest.raises(CheckpointError, match="begun from another source, with other options"):
        convert.convert_checkpoint(source, target, resume=True, **({} if other == "source" else other))


def test_two_conversions_to_one_place_at_once_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.parent / "converted"
    entered, go_on = threading.Event(), threading.Event()
    original = StoredTensor.read

    def read(self: StoredTensor, *rest: Any) -> None:
        entered.set()
        assert go_on.wait(60)
        original(self, *rest)

    monkeypatch.setattr(StoredTensor, "read", read)
    first = threading.Thread(target=convert.convert_checkpoint, args=(source, target))
    first.start()
    assert entered.wait(60)
    with pytest.raises(CheckpointError, match="another process is converting"):
        convert.convert_checkpoint(source, target, resume=True)
    go_on.set()
    first.join()
    assert convert.verify(target).tensors == len(random_tensors())


def test_too_little_space_is_noticed_before_the_first_byte(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.parent / "converted"
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 9000}))
    with pytest.raises(CheckpointError, match=r"has 9,000 bytes left, and \d\d,\d\d\d are needed"):
        convert.convert_checkpoint(source, target)
    assert list(source.parent.iterdir()) == [source]


# Destinations


@pytest.mark.parametrize("occupied_by", ["a full folder", "a file", "a link"])
def test_a_destination_that_is_taken_is_refused_and_left_alone(occupied_by: str, source: Path) -> None:
    target = source.parent / "converted"
    if occupied_by == "a full folder":
        target.mkdir()
        (target / "file").write_text("mine")
    elif occupied_by == "a file":
        target.write_text("mine")
    else:
        (source.parent / "elsewhere").mkdir()
        target.symlink_to(source.parent / "elsewhere")
    before = hashes(source.parent)
    for overwrite in (False, True):  # what is no checkpoint is not overwritten either
        with pytest.raises(CheckpointError, match=f"{target} (exists already|is a link|is not just a checkpoint)"):
            convert.convert_checkpoint(source, target, overwrite=overwrite)
    assert hashes(source.parent) == before


def test_an_empty_folder_is_filled(source: Path, expected: dict[str, str]) -> None:
    (source.parent / "converted").mkdir()
    assert hashes(convert.convert_checkpoint(source, source.parent / "converted").folder) == expected


@pytest.mark.parametrize("place", [".", "converted", "a/b", "../source", ".."])
def test_the_source_and_what_holds_it_are_no_destination(place: str, source: Path) -> None:
    before = hashes(source)
    for overwrite in (False, True):
        with pytest.raises(
            CheckpointError,
            match=r"but the source is only read|contains the source|exists already|not just a checkpoint",
        ):
            convert.convert_checkpoint(source, source / place, overwrite=overwrite)
    assert hashes(source) == before


def test_a_checkpoint_is_overwritten_once_the_new_one_is_complete(
    source: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.parent / "converted"
    other = write_checkpoint(source.parent / "other", tensors=random_tensors(seed=1))
    old = hashes(convert.convert_checkpoint(other, target).folder)
    with pytest.raises(CheckpointError, match=r"not empty.*--overwrite"):
        convert.convert_checkpoint(source, target)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        break_at(patch, StoredTensor, "read", 9, errno.EIO)
        convert.convert_checkpoint(source, target, overwrite=True)
    assert hashes(target) == old
    convert.convert_checkpoint(source, target, overwrite=True, resume=True)
    assert hashes(target) == expected
    assert sorted(source.parent.iterdir()) == [target, other, source]


def test_folders_above_the_destination_are_made(source: Path, expected: dict[str, str]) -> None:
    assert hashes(convert.convert_checkpoint(source, source.parent / "new" / "folders" / "x").folder) == expected


# Names that a conversion takes for its own


@pytest.mark.parametrize("name", ["converted.partial", ".converted.replaced", ".converted.journal"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_source_with_a_name_that_a_conversion_uses_is_refused(name: str, resume: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / name)
    before = hashes(source)
    with pytest.raises(CheckpointError, match="but the source is only read"):
        convert.convert_checkpoint(source, tmp_path / "converted", resume=resume)
    assert hashes(source) == before


@pytest.mark.parametrize("name", ["converted.partial", ".converted.replaced", ".converted.unpickled"])
@pytest.mark.parametrize("link", [False, True])
def test_a_folder_of_somebody_else_is_left_alone_whatever_its_name(name: str, link: bool, source: Path) -> None:
    mine = write_checkpoint(source.parent / "mine")
    place = source.parent / name
    place.symlink_to(mine) if link else mine.rename(place)
    before = hashes(source.parent)
    for options in ({}, {"resume": True}, {"overwrite": True, "allow_pickle": True}):
        if "unpickled" in name:
            convert.convert_checkpoint(source, source.parent / f"converted{len(options)}", **options)
        else:
            with pytest.raises(CheckpointError, match=f"{name} is in the way, and it is not from a conversion"):
                convert.convert_checkpoint(source, source.parent / "converted", **options)
    assert before.items() <= hashes(source.parent).items()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_that_appears_meanwhile_is_not_replaced(
    overwrite: bool, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.parent / "converted"
    original = StoredTensor.read

    def read(self: StoredTensor, *rest: Any) -> None:
        target.mkdir(exist_ok=True)
        (target / "thesis.tex").write_text("mine")
        original(self, *rest)

    monkeypatch.setattr(StoredTensor, "read", read)
    with pytest.raises(CheckpointError, match=r"exists already|not just a checkpoint"):
        convert.convert_checkpoint(source, target, overwrite=overwrite)
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("other", [".git", "src"])
def test_a_project_that_has_a_config_is_not_overwritten(other: str, source: Path) -> None:
    project = source.parent / "project"
    write_checkpoint(project)
    (project / other).mkdir()
    before = hashes(project)
    with pytest.raises(CheckpointError, match="is not just a checkpoint folder"):
        convert.convert_checkpoint(source, project, overwrite=True)
    assert hashes(project) == before


def test_a_source_that_changes_while_it_is_converted_is_noticed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StoredTensor.read

    def read(self: StoredTensor, *rest: Any) -> None:
        os.utime(self.path, ns=(1, 1))
        original(self, *rest)

    monkeypatch.setattr(StoredTensor, "read", read)
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        convert.convert_checkpoint(source, source.parent / "converted")
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("dst", ["", "."])
def test_the_working_directory_is_no_destination(dst: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    with pytest.raises(ValueError, match=r"`dst` is empty|exists already"):
        convert.convert_checkpoint(source, dst)
    convert.convert_checkpoint(source, "./new/../other")
    assert convert.verify("other").tensors == len(random_tensors())
