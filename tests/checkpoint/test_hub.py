"""A name on the Hugging Face hub is a model: what is downloaded, what is found in the cache, and what is refused."""

import argparse
import errno
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import CONFIG, assert_same_bits, random_tensors, write_checkpoint
from hub_server import Files, Hub, serving
from huggingface_hub import constants, file_download
from jaxgen.convert import convert_checkpoint, convert_to_hugging_face, verify

import jaxgen
from jaxgen.checkpoint import hub as hub_module
from jaxgen.checkpoint.files import CheckpointError
from jaxgen.checkpoint.hub import local_path
from jaxgen.checkpoint.source import open_checkpoint
from jaxgen.cli.main import main
from jaxgen.cli.terminal import open_model

NAME = "org/tiny-1.5_B"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
# Files that a repository may hold besides the model, and that nobody may ask for.
UNWANTED = [
    *("pytorch_model.bin", "consolidated.00.pth", "training_args.bin", "modeling_tiny.py", "tf_model.h5", "tiny.gguf"),
    *("consolidated.safetensors", "original/params.json", "original/tokenizer.model", "onnx/model.onnx"),
    *("onnx/config.json", "checkpoint-5/model.safetensors", "checkpoint-5/optimizer.pth"),
]
WANTED = [*("LICENSE", "README.md", "config.json", "tokenizer.model"), "additional_chat_templates/rag.jinja"]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, empty, and with an empty cache."""
    server.__init__(endpoint=server.endpoint)
    online(monkeypatch, server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # between attempts
    monkeypatch.chdir(tmp_path)
    return server


def online(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch, "http://127.0.0.1:9")  # which nobody serves


def contents(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a model of two shards."""
    return contents(write_checkpoint(tmp_path_factory.mktemp("whole"), shards=2))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The same with other weights."""
    folder = tmp_path_factory.mktemp("other")
    return contents(write_checkpoint(folder, tensors=random_tensors(seed=1), shards=2))


def cached_model(cache: Path, files: Files, commit: str = "c" * 40) -> Path:
    """Writes a model to the hub's cache, as huggingface_hub does. Returns its snapshot."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for number, (file, content) in enumerate(files.items()):
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        (repository / "blobs" / str(number)).write_bytes(content)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / file).symlink_to(Path("../../blobs") / str(number))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


# ---- What is downloaded ----


def test_a_name_loads_the_same_bits_as_a_folder(hub: Hub, whole: Files, tmp_path: Path) -> None:
    commit = hub.add(NAME, whole)
    folder = write_checkpoint(tmp_path / "folder", shards=2)
    assert_same_bits(jaxgen.load(NAME), jaxgen.load(folder))
    assert local_path(NAME).name == commit


@pytest.mark.parametrize("pickles", [False, True])
def test_only_safetensors_the_config_and_the_tokenizer_are_ever_asked_for(
    pickles: bool, hub: Hub, whole: Files
) -> None:
    hub.add(NAME, {file: file.encode() for file in [*WANTED, *UNWANTED]} | whole)
    folder = local_path(NAME, pickles=pickles)
    on_request = ["consolidated.00.pth", "pytorch_model.bin", "training_args.bin"] if pickles else []
    assert hub.downloaded() == sorted([*WANTED, *whole.keys() - {*WANTED}, *on_request])
    assert [*contents(folder)] and {*contents(folder)} == {*hub.downloaded()}
    for path in (path for _, path, _ in hub.log):
        assert not path.endswith((".py", ".h5", ".gguf", ".onnx") if pickles else (".py", ".bin", ".pth", ".h5"))


def test_the_tokenizer_comes_with_the_model_in_one_round_of_requests(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add(NAME, contents(jaxgen.BUNDLED_MODEL))
    options = argparse.Namespace(model=NAME, revision=None, dtype=None, quantize=None, follow_links=False, mesh=None, distributed=False)
    options.compile_cache = "off"
    _, tokenizer = open_model(options)
    assert tokenizer("Once upon a time")["input_ids"]
    asked = Counter((method, path) for method, path, _ in hub.log if NAME in path)
    assert {*asked.values()} == {1}
    assert sum("/resolve/" not in path for _, path in asked) == 2  # the commit, and the list of files
    assert f"{NAME} at commit {commit}" in capsys.readouterr().err


def test_the_second_time_only_the_commit_of_the_branch_is_asked(hub: Hub, whole: Files) -> None:
    commit = hub.add(NAME, whole)
    first = local_path(NAME)
    hub.log.clear()
    assert local_path(NAME) == first == local_path(NAME, commit)
    assert [path for _, path, _ in hub.log] == [f"/api/models/{NAME}/revision/main"]


def test_without_weights_nothing_but_small_files_is_downloaded(hub: Hub, whole: Files) -> None:
    hub.add(NAME, whole)
    assert {*contents(local_path(NAME, weights=False))} == {"config.json", INDEX} == {*hub.downloaded()}
    local_path(NAME)
    assert hub.downloaded() == sorted(whole)


def test_a_branch_a_tag_and_a_commit_are_revisions(hub: Hub, whole: Files, other: Files) -> None:
    first, second = hub.add(NAME, whole), hub.add(NAME, other)
    hub.revisions[NAME, "v1.0"] = first
    for revision, commit in {None: second, "main": second, "v1.0": first, first: first, second: second}.items():
        assert local_path(NAME, revision).name == commit
    assert (local_path(NAME, "v1.0") / SHARDS[0]).read_bytes() == whole[SHARDS[0]]


def test_a_branch_that_moves_meanwhile_does_not_mix_two_commits(
    hub: Hub, whole: Files, other: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(model: str, folder: Path, pickles: bool) -> None:
        hub.add(NAME, other)

    commit = hub.add(NAME, whole)
    monkeypatch.setattr(hub_module, "_check_configs", move)
    folder = local_path(NAME)
    assert folder.name == commit and contents(folder) == whole


# ---- Downloads that end early ----


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: Hub, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, whole)
    hub.cut[SHARDS[1]] = 1000
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    open_checkpoint(local_path(NAME))
    assert [asked for method, path, asked in hub.log if method == "GET" and SHARDS[1] in path] == [None, "bytes=1000-"]


def test_a_download_that_failed_is_continued_by_the_next_call(hub: Hub, whole: Files) -> None:
    hub.add(NAME, whole)
    hub.failing = {SHARDS[1]}
    with pytest.raises(
        CheckpointError, match=f"{NAME} cannot be downloaded .*503.* Try again: files that are complete"
    ):
        jaxgen.load(NAME)
    complete = {*contents(Path(constants.HF_HUB_CACHE) / f"models--{NAME.replace('/', '--')}" / "snapshots")}
    complete = {path.split("/", 1)[1] for path in complete}
    assert complete >= {"config.json", INDEX} and SHARDS[1] not in complete
    hub.failing.clear()
    hub.log.clear()
    jaxgen.load(NAME)
    assert {*hub.downloaded()} == whole.keys() - complete


# ---- Without the hub ----


@pytest.mark.parametrize("gone", [offline, without_network])
def test_without_the_hub_the_cached_commit_is_used_even_if_the_branch_has_moved(
    gone: Any, hub: Hub, whole: Files, other: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.add(NAME, whole)
    local_path(NAME)
    second = hub.add(NAME, other)
    with monkeypatch.context() as patched:
        gone(patched)
        for revision in (None, "main", first):
            assert local_path(NAME, revision).name == first
        with pytest.raises(CheckpointError, match=f"`hf download {NAME} --revision {second}`"):
            local_path(NAME, second)
    assert local_path(NAME).name == second


@pytest.mark.parametrize(("gone", "said"), [(offline, "HF_HUB_OFFLINE is set"), (without_network, "cannot be reached")])
def test_without_the_hub_a_model_that_is_not_cached_is_refused_with_the_command_that_downloads_it(
    gone: Any, said: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone(monkeypatch)
    expected = (
        f"{NAME} is neither an existing path nor in the cache .*{said}.*`hf download {NAME} --revision v2` downloads"
    )
    with pytest.raises(CheckpointError, match=expected) as refused:
        jaxgen.load(NAME, revision="v2")
    assert refused.value.__cause__ is not None and "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["config.json", SHARDS[1]])
def test_without_the_hub_a_model_that_is_cached_in_part_is_refused_as_such(
    missing: str, hub: Hub, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, whole)
    (local_path(NAME) / missing).unlink()
    offline(monkeypatch)
    with pytest.raises(CheckpointError, match=f"{NAME} is only in part in the cache .*`hf download {NAME}` downloads"):
        jaxgen.load(NAME)


def test_releases_that_ask_for_a_commit_of_the_cache_do_no_harm(
    hub: Hub, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub 1.31 does, without a network too."""
    snapshot_download = huggingface_hub.snapshot_download

    def asking(*arguments: Any, **keywords: Any) -> str:
        if constants.HF_HUB_OFFLINE and len(keywords["revision"] or "") == 40 and "local_files_only" not in keywords:
            raise huggingface_hub.errors.OfflineModeIsEnabled("HF_HUB_OFFLINE")
        return snapshot_download(*arguments, **keywords)

    hub.add(NAME, whole)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asking)
    folder = local_path(NAME)
    offline(monkeypatch)
    assert local_path(NAME) == folder == local_path(NAME, folder.name)
    (folder / SHARDS[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{NAME} is only in part in the cache .*HF_HUB_OFFLINE is set"):
        local_path(NAME)


def test_a_cache_that_others_filled_is_read_offline(
    hub: Hub, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers caches single files, and no list of what the repository holds."""
    offline(monkeypatch)
    snapshot = cached_model(tmp_path / "cache", whole)
    for revision in (None, "main", snapshot.name):
        assert local_path(NAME, revision) == snapshot
    assert_same_bits(jaxgen.load(NAME), jaxgen.load(snapshot))
    for file in whole:
        if file != "config.json":
            (snapshot / file).unlink()
    with pytest.raises(CheckpointError, match=rf"has no model\.safetensors or {INDEX}.*`hf download {NAME}"):
        jaxgen.load(NAME)
    assert hub.log == []


def test_a_file_that_models_share_in_the_cache_is_read(
    hub: Hub, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    snapshot = cached_model(tmp_path / "cache", whole)
    blob = (snapshot / SHARDS[0]).readlink().name
    shared = tmp_path / "cache" / "blobs" / "ab" / "ab12"
    shared.parent.mkdir(parents=True)
    blob_path = snapshot.parents[1] / "blobs" / blob
    blob_path.rename(shared)
    blob_path.symlink_to(Path("../../blobs/ab/ab12"))
    jaxgen.load(NAME)
    shared.rename(tmp_path / "elsewhere")
    shared.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        jaxgen.load(NAME)


# ---- What is refused ----


def test_a_path_is_never_looked_for_on_the_hub(hub: Hub, whole: Files, tmp_path: Path) -> None:
    hub.add(NAME, whole)
    write_checkpoint(tmp_path / NAME)
    assert local_path(NAME) == Path(NAME)  # relative to the working directory
    (tmp_path / "org" / "file").write_text("")
    for path in ("org/file", tmp_path / NAME, Path("org/nothing")):
        assert local_path(path) == Path(path)
        with pytest.raises(ValueError, match=r"`revision`='v1' \(--revision\) is only for models on the hub"):
            local_path(path, "v1")
    assert main(["generate", "x", "--revision", "v1"]) == 1  # with the bundled model
    assert hub.log == []


@pytest.mark.parametrize(
    "name",
    "owner owner/ /model -a/b .a/b a/b/ ../model a/b/c a--b/c datasets/a/b https://huggingface.co/a/b".split()
    + ["a/b c", "a\nb/c", "ö/b", "a/" + "b" * 5000, ""],
)
def test_what_is_neither_a_path_nor_a_name_asks_nobody(name: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"is neither an existing path nor the name of a model .*owner/name"):
        jaxgen.load(name)
    with pytest.raises(ValueError, match="must be a branch, a tag or a commit"):
        local_path(NAME, " ")
    assert hub.log == []


def config(**changes: Any) -> bytes:
    return json.dumps(CONFIG | changes).encode()


REFUSED: dict[str, tuple[Files | None, str]] = {
    "nothing": (None, r"no public model of this name. It may be private. .*`hf auth login`"),
    "a dataset": (None, r"is a dataset on the hub, not a model\."),
    "gated": ({}, rf"is gated\. Accept its terms at http://127.*/{NAME}, then log in with `hf auth login`"),
    "no such revision": ({}, r"has no revision 'v9'\. Pass a branch, a tag or a commit"),
    "pickles": (
        {"pytorch_model.bin": b"", "a.gguf": b""},
        rf"no safetensors, but pickles: `pytorch_model.bin`.*`jaxgen convert --allow-pickle {NAME} DST`",
    ),
    "GGUF and a config": ({"b.gguf": b"", "a.gguf": b""}, rf"`hf download {NAME} a\.gguf`, and pass its path"),
    "GGUF alone": ({"config.json": b"", "a.gguf": b""}, rf"`hf download {NAME} a\.gguf`, and pass its path"),
    "an adapter": ({"adapter_config.json": b"{}"}, rf"is a LoRA adapter.*`hf download {NAME}`.*--merge-lora FOLDER"),
    "no config": ({"config.json": b"", "x.npz": b""}, r"has no config\.json, but `x\.npz`"),
    "no weights": ({"x.npz": b""}, rf"has no model\.safetensors or {INDEX}, but `config\.json`, `x\.npz`"),
    "another family": ({"config.json": config(model_type="mamba")}, rf"{NAME}: `model_type`='mamba' is not supported"),
    "quantised": (
        {"config.json": config(quantization_config={"quant_method": "gptq"})},
        rf"{NAME}: the checkpoint is quantised \(`quant_method`='gptq'\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_refused_before_any_weights_are_asked_for(case: str, hub: Hub) -> None:
    files, message = REFUSED[case]
    if files is not None:
        if case not in ("pickles", "GGUF and a config", "GGUF alone", "no config", "no weights"):
            files = {"model.safetensors": b"", "adapter_model.safetensors": b"", **files}
        # No content stands for no such file, except of weights.
        files = {"config.json": config(), **files}
        hub.add(NAME, {file: content for file, content in files.items() if content or file != "config.json"})
    hub.datasets = {NAME} if case == "a dataset" else set()
    hub.gated = {NAME} if case == "gated" else set()
    with pytest.raises(CheckpointError, match=message) as refused:
        jaxgen.load(NAME, revision="v9" if case == "no such revision" else None)
    assert "\n" not in str(refused.value) and not str(refused.value).startswith("/")
    if case in ("nothing", "a dataset", "gated", "no such revision"):
        assert refused.value.__cause__ is not None
    assert not hub.asked("safetensors")


def test_pickles_on_request_need_no_config(hub: Hub) -> None:
    hub.add(NAME, {"params.json": b"{}", "consolidated.00.pth": b"", "tokenizer.model": b"x"})
    assert {*contents(local_path(NAME, pickles=True))} == {"params.json", "consolidated.00.pth", "tokenizer.model"}
    with pytest.raises(CheckpointError, match=r"no safetensors, but pickles: `consolidated\.00\.pth`"):
        local_path(NAME)


def test_a_full_disk_is_said_with_the_way_out(hub: Hub, whole: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add(NAME, whole)
    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(CheckpointError, match=r"The disk of .*cache is full.* set HF_HOME"):
        jaxgen.load(NAME)


# ---- The other callers ----


def test_every_command_takes_a_name_and_inspect_says_the_commit(
    hub: Hub, whole: Files, other: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = hub.add(NAME, whole)
    hub.add(NAME, other)
    assert main(["inspect", NAME, "--revision", first]) == 0
    assert f"\ncommit      {first}\n" in capsys.readouterr().out
    assert main(["inspect", str(write_checkpoint(tmp_path / "folder"))]) == 0
    assert "\ncommit " not in capsys.readouterr().out
    assert main(["plan", NAME, "--revision", first]) == 0
    assert f"model       {NAME}" in capsys.readouterr().out
    assert main(["plan", "8b", "--revision", first]) == 1
    assert "8b is only a size" in capsys.readouterr().err
    assert main(["verify", NAME, "--revision", first]) == 0
    assert main(["convert", NAME, "native", "--revision", first]) == 0
    assert_same_bits(jaxgen.load("native"), jaxgen.load(NAME, revision=first))


def test_a_converted_folder_on_the_hub_converts_back(hub: Hub, whole: Files, tmp_path: Path) -> None:
    convert_checkpoint(write_checkpoint(tmp_path / "source", shards=2), tmp_path / "native")
    hub.add(NAME, contents(tmp_path / "native"))
    assert verify(NAME).tensors
    convert_to_hugging_face(NAME, tmp_path / "back")
    assert contents(tmp_path / "back") == whole
