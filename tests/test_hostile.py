"""Checkpoints that were broken by hand or made to do harm: one sentence, at once, and nothing outside is opened."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIG, write_checkpoint, write_json, write_safetensors
from mutations import attempt, dumped, watched

from jaxgen import CheckpointError, convert
from jaxgen.checkpoint.source import open_checkpoint

INDEX, SHARD, NORM = "model.safetensors.index.json", "model-00002-of-00002.safetensors", "model.norm.weight"
HELPERS = Path(__file__).parent / "helpers"


def text(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: _replace(folder / file, content)


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "config.json", CONFIG | changes)


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        (folder / INDEX).write_bytes(dumped(change(json.loads((folder / INDEX).read_text()))))

    return break_it


def header(change: Callable[[dict[str, Any]], Any], *, pad: bytes = b"") -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        encoded = dumped(change(json.loads(content[8 : 8 + length]))) + pad
        (folder / SHARD).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return break_it


def entry(**changes: Any) -> Callable[[Path], None]:
    """One tensor's entry in the header."""

    def change(entries: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in entries if name != "__metadata__")
        return entries | {name: entries[name] | changes}

    return header(change)


def length(value: int) -> Callable[[Path], None]:
    return lambda folder: (folder / SHARD).write_bytes(struct.pack("<Q", value) + (folder / SHARD).read_bytes()[8:])


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size)


def special(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return break_it


def _many_layers(folder: Path, count: int) -> None:
    config(num_hidden_layers=count)(folder)
    names = {f"t{number}": np.empty(0, np.float32) for number in range(count)}
    write_safetensors(folder / SHARD, names)
    (folder / INDEX).write_bytes(dumped({"weight_map": dict.fromkeys(names, SHARD)}))


def _first_file(content: dict[str, Any], name: Any) -> dict[str, Any]:
    weight_map = content["weight_map"]
    return content | {"weight_map": weight_map | {next(iter(weight_map)): name}}


DEEP, LONG = b'{"a":' * 50_000, b'{"' + b"a" * (9 << 20) + b'": 1}'
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

BROKEN: dict[str, Callable[[Path], None]] = {
    **{
        f"{file} {what}": text(file, content)
        for file in ("config.json", "generation_config.json", INDEX)
        for what, content in {
            "of zero bytes": b"",
            "of zeros": bytes(300),
            "that is a web page": b"<!DOCTYPE html><html>404</html>",
            "that is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "that is a list": b"[]",
            "nested deeply": DEEP,
            "that is too long": LONG,
            "with a key twice": b'{"model_type": "llama", "model_type": "llama"}',
            "that is not UTF-8": b'{"a": "\xff\xfe"}',
        }.items()
    },
    "config with NaN": text("config.json", b'{"rms_norm_eps": NaN}'),
    "config with an endless number": config(rms_norm_eps=10**400),
    "infinite epsilon": text("config.json", json.dumps(CONFIG).replace("1e-05", "1e400").encode()),
    "a thousand million layers": config(num_hidden_layers=10**9),
    "as many layers as empty tensors": lambda folder: _many_layers(folder, 600),
    "layers of text": config(num_hidden_layers="2"),
    "no layers": config(num_hidden_layers=0),
    "endless hidden size": config(hidden_size=10**30),
    "endless vocabulary": config(vocab_size=2**63),
    "heads that divide nothing": config(num_attention_heads=7),
    "odd head size": config(head_dim=5),
    "unknown activation": config(hidden_act="os.system"),
    "unknown rope": config(rope_scaling={"rope_type": "magic"}),
    "rope of two minds": config(
        rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"}
    ),
    "infinite rope": config(rope_scaling=ROPE | {"factor": 10**400}),
    "rope for each kind of layer": config(rope_scaling={"full_attention": {"rope_type": "default"}}),
    "text that looks ahead": config(is_causal=False),
    "window of a family without one": config(sliding_window=0),
    "weights by another name": config(transformers_weights="/etc/passwd"),
    "names for other names": config(attribute_map={"vocab_size": "bos_token_id"}),
    "a model in the model": config(text_config={"vocab_size": 10**9}),
    "a million kinds of layers": config(layer_types=["full_attention"] * 10**6),
    "rope of lists": config(rope_scaling=[1, 2]),
    "another family": config(model_type="gpt2"),
    "another architecture": config(architectures=["LlamaForSequenceClassification"]),
    "architectures that are a number": config(architectures=3),
    "quantised by GPTQ": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "generation config that makes no sense": text(
        "generation_config.json", b'{"eos_token_id": {"a": []}, "watermarking_config": 3}'
    ),
    "index without a map": index(lambda content: {"metadata": {}}),
    "index with a map that is a list": index(lambda content: {"weight_map": ["a"]}),
    "index of numbers": index(lambda content: _first_file(content, 7)),
    "index of nothing": index(lambda content: {"weight_map": {}}),
    "index with a tensor too many": index(lambda content: _first_file(content, SHARD)),
    "index of a file that is missing": index(lambda content: _first_file(content, "model-00003-of-00002.safetensors")),
    "file missing": lambda folder: (folder / SHARD).unlink(),
    "file of zero bytes": cut(SHARD, 0),
    "file cut in its length": cut(SHARD, 5),
    "file cut in its header": cut(SHARD, 50),
    "file cut in its data": cut(SHARD, 3000),
    "file of zeros": text(SHARD, bytes(5000)),
    "file that is a web page": text(SHARD, b"<!DOCTYPE html><html>404 not found</html>"),
    "file that is a pointer of Git LFS": text(SHARD, b"version https://git-lfs.github.com/spec/v1\n"),
    "file that is a zip": text(SHARD, b"PK\x03\x04" + bytes(3000)),
    "header of no length": length(0),
    "header of one byte": length(1),
    "header of 100 MB": length(100_000_000),
    "header of the largest length": length(2**64 - 1),
    "header that is a list": header(lambda entries: [entries]),
    "header of nothing": header(lambda entries: {}),
    "header nested deeply": text(SHARD, struct.pack("<Q", len(DEEP)) + DEEP),
    "header with text behind": header(lambda entries: entries, pad=b"{}"),
    "metadata of numbers": header(lambda entries: entries | {"__metadata__": {"format": 1}}),
    "tensor that is a number": header(lambda entries: entries | {"model.extra": 3}),
    "tensor of an unknown dtype": entry(dtype="F128"),
    "tensor of 4-bit floats": entry(dtype="F4"),
    "tensor of a dtype that is a list": entry(dtype=["F32"]),
    "tensor of a negative shape": entry(shape=[-32, 32]),
    "tensor of a fractional shape": entry(shape=[32.5, 32]),
    "tensor of an endless shape": entry(shape=[2**63, 2**63]),
    "tensor of too many dimensions": entry(shape=[1] * 5000),
    "tensor whose end comes first": entry(data_offsets=[64, 0]),
    "tensor beyond the file": entry(data_offsets=[0, 2**40]),
    "tensor with an offset too few": entry(data_offsets=[0]),
    "tensor of negative offsets": entry(data_offsets=[-64, 0]),
    "folder in place of the config": special("config.json", Path.mkdir),
    "pipe in place of the config": special("config.json", os.mkfifo),
    "pipe in place of the weights": special(SHARD, os.mkfifo),
    "endless device in place of the config": special("config.json", lambda path: path.symlink_to("/dev/zero")),
    "terminal in place of the weights": special(SHARD, lambda path: path.symlink_to("/dev/tty")),
    "link to itself": special(SHARD, lambda path: path.symlink_to(path.name)),
    "link to nothing": special(SHARD, lambda path: path.symlink_to("nothing")),
    "link to a file of somebody else": special("config.json", lambda path: path.symlink_to("/etc/passwd")),
}


def write(folder: Path) -> Path:
    return write_checkpoint(folder, shards=2, generation_config={"do_sample": False})


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_refused_at_once_in_one_sentence(how: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    BROKEN[how](folder)
    assert not attempt(folder)
    with pytest.raises(CheckpointError):
        convert.convert_checkpoint(folder, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_there_are_sixty_of_them() -> None:
    assert len(BROKEN) >= 60


OUTSIDE = [
    "../outside.safetensors",
    "../../outside.safetensors",
    "inner/../../outside.safetensors",
    "./../outside.safetensors",
    "{above}/outside.safetensors",
    "//{above}/outside.safetensors",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "~/outside.safetensors",
    "..\\outside.safetensors",
    "C:\\outside.safetensors",
    "C:outside.safetensors",
    "\\\\server\\share\\outside.safetensors",
    "file:///etc/passwd",
    "http://localhost/outside.safetensors",
    "",
    ".",
    "..",
    "inner",
    "outside\0.safetensors",
    "outside\n.safetensors",
    "\ud800.safetensors",
    "a" * 300 + ".safetensors",
    "a/" * 3000 + "outside.safetensors",
    "link-to-outside.safetensors",
    "link-to-above/outside.safetensors",
    "link-to-zero.safetensors",
    "pipe.safetensors",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: repr(name[:40]))
def test_no_name_in_an_index_opens_a_file_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "above" / "model")
    outside = tmp_path / "above" / "outside.safetensors"
    (folder / "inner").mkdir()
    for copy in (outside, tmp_path / "outside.safetensors"):
        copy.write_bytes((folder / SHARD).read_bytes())
    (folder / "link-to-outside.safetensors").symlink_to(outside)
    (folder / "link-to-above").symlink_to(tmp_path / "above")
    (folder / "link-to-zero.safetensors").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.safetensors")
    name = name.replace("{above}", str(tmp_path / "above"))
    content = json.loads((folder / INDEX).read_text())
    owners = {key: name if file == SHARD else file for key, file in content["weight_map"].items()}
    (folder / INDEX).write_bytes(dumped({"weight_map": owners}))
    opened = watched(folder)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert opened() == []


@pytest.mark.parametrize("file", ["config.json", SHARD])
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("x")]
)
def test_links_that_are_followed_still_lead_to_files_only(
    file: str, make: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / "model")
    special(file, make)(folder)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder, follow_links=True)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "{above}/outside.safetensors"])
def test_names_in_an_index_stay_in_the_folder_whatever_its_links_may_do(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes((folder / SHARD).read_bytes())
    index(lambda content: _first_file(content, name.replace("{above}", str(tmp_path))))(folder)
    with pytest.raises(CheckpointError, match=r"names .* as a file"):
        open_checkpoint(folder, follow_links=True)


def test_the_watch_notices_what_is_opened_outside(tmp_path: Path) -> None:
    opened = watched(tmp_path / "model")
    (tmp_path / "file").write_text("text")
    assert opened() == [str(tmp_path / "file")]


def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    canary = f"import pathlib; pathlib.Path({str(tmp_path / 'canary')!r}).touch()"
    write_json(folder / "config.json", CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    for name in (
        "modeling.py",
        "configuration.py",
        "conftest.py",
        "torch.py",
        "jaxgen.py",
        "sitecustomize.py",
        "setup.py",
    ):
        (folder / name).write_text(canary)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling.Tokenizer", null]}}')
    program = "import jaxgen.convert, sys; jaxgen.load('.'); jaxgen.convert.convert_checkpoint('.', '../converted')"
    environment = os.environ | {"PYTHONPATH": str(HELPERS.parents[1]), "PYTHONSAFEPATH": "1"}
    ended = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "`auto_map`: code that comes with a checkpoint is never run" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "model"]


@pytest.mark.parametrize("count", [1500, pytest.param(100_000, marks=pytest.mark.sweep)])
def test_what_was_changed_at_random_loads_or_is_refused(count: int) -> None:
    command = [sys.executable, str(HELPERS / "mutations.py"), str(count), "1"]
    paths = os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])
    environment = os.environ | {"PYTHONPATH": paths, "TRANSFORMERS_VERBOSITY": "critical"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert 0 < int(ended.stdout) < count / 2
