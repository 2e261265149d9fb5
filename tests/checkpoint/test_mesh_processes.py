"""Processes whose devices are one mesh read, make and write a model together, each its own share."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors, write_checkpoint
from gguf_models import sentencepiece, write_gguf

from jaxgen import convert

HELPERS = Path(__file__).parents[1] / "helpers"
SPREAD = CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
SPREAD |= {"attention_bias": True, "num_hidden_layers": 1}
LARGE = SPREAD | {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1024, "mlp_bias": True}


def write_formats(folder: Path) -> Path:
    """Checkpoints of one model, by format."""
    tensors = random_tensors(SPREAD)
    write_checkpoint(folder / "file", SPREAD, tensors)
    write_checkpoint(folder / "files", SPREAD, tensors, shards=3)
    convert.convert_checkpoint(folder / "file", folder / "converted")
    convert.convert_checkpoint(write_checkpoint(folder / "large" / "file", LARGE), folder / "large" / "converted")
    vocabulary = SPREAD | {"vocab_size": 320, "intermediate_size": 64, "attention_bias": False}
    write_gguf(folder / "model.gguf", vocabulary, kind=lambda name: "Q8_0", metadata=sentencepiece())
    projections = [name for name in tensors if name.endswith("_proj.weight")]
    eights = {name: (100 * tensors[name]).astype(ml_dtypes.float8_e4m3fn) for name in projections}
    scales = {f"{name}_scale": np.float32([[0.01]]) * np.ones((len(tensors[name]), 1)) for name in projections}
    scales = {name: scale.astype(np.float32) for name, scale in scales.items()}
    fp8 = SPREAD | {"quantization_config": {"quant_method": "fbgemm_fp8"}, "dtype": "float32"}
    write_checkpoint(folder / "float8", fp8, tensors | eights | scales)
    for name in ("full", "taken"):
        (folder / name).mkdir()
    (folder / "full" / "model-00002-of-00002.safetensors").symlink_to("/dev/full")
    (folder / "taken" / "jaxgen.json").write_text("{}")
    return folder


def run(folder: Path, processes: int, devices: int, *checks: str) -> list[dict[str, Any]]:
    """What each process found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)]),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(HELPERS / "mesh_processes.py"), str(folder), str(port)]
    started = [
        subprocess.Popen(
            [*command, str(number), str(processes), str(devices), *checks],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, err.decode()[-5000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By two processes of two devices."""
    folder = write_formats(tmp_path_factory.mktemp("formats"))
    return run(folder, 2, 2, "formats", "reads", "meshes", "computed", "random", "save", "refusals")


def test_a_model_of_every_format_is_right_on_a_mesh_of_several_processes(found: list[dict[str, Any]]) -> None:
    assert [each["formats"] for each in found] == [{"file": True, "files": True, "converted": True}] * 2


def test_a_process_reads_what_its_devices_hold_and_hardly_more(found: list[dict[str, Any]]) -> None:
    for each in found:
        for name, ratio in each["reads"].items():
            assert 1 <= ratio <= 1.05, (name, ratio)


def test_the_order_and_the_kind_of_axes_do_not_matter(found: list[dict[str, Any]]) -> None:
    assert [each["meshes"] for each in found] == [[True] * 4] * 2


def test_tensors_that_are_computed_cast_or_quantised_are_right_too(found: list[dict[str, Any]]) -> None:
    assert [set(each["computed"].values()) for each in found] == [{True}] * 2


def test_random_weights_on_a_mesh_are_those_of_one_device(found: list[dict[str, Any]]) -> None:
    assert [each["random"] for each in found] == [[True] * 2] * 2


def test_each_process_writes_a_file_with_its_share_and_the_first_one_the_index(found: list[dict[str, Any]]) -> None:
    files = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors"]
    files += ["model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert [each["save"] for each in found] == [{"files": files, "even": True, "same": True}] * 2


def test_if_one_process_cannot_write_all_say_so_and_which_one(found: list[dict[str, Any]]) -> None:
    first, second = (each["refusals"] for each in found)
    assert first["full"].startswith("OSError: process 1 failed, and so do all others: OSError: ")
    assert "No space left on device" in first["full"] and second["full"].startswith("OSError: [Errno 28]")


def test_a_folder_that_holds_another_layout_is_refused_by_all(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "holds a checkpoint in another layout (['jaxgen.json'])" in each["refusals"]["taken"]
        assert "holds a checkpoint in another layout (['model.safetensors'])" in each["refusals"]["file"]


def test_a_mesh_without_a_device_of_the_process_is_refused(found: list[dict[str, Any]]) -> None:
    for number, each in enumerate(found):
        assert each["refusals"]["mesh"].startswith(f"`mesh` has none of the devices of process {number}, [")


@pytest.mark.sweep
def test_four_processes_of_one_device_do_as_two_of_two(tmp_path: Path) -> None:
    checks = ("formats", "reads", "meshes", "computed", "random", "random_int8", "save")
    for each in run(write_formats(tmp_path), 4, 1, *checks):
        assert all(each["formats"].values()) and all(each["meshes"]) and all(each["computed"].values())
        assert all(1 <= ratio <= 1.05 for ratio in each["reads"].values()), each["reads"]
        assert all(each["random"] + each["random_int8"]) and each["save"]["same"] and len(each["save"]["files"]) == 7
