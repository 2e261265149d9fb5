"""Small random checkpoints of every layout, written byte by byte, so that a test can break whatever it wants."""

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from architectures import tensor_shapes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_DTYPE_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int32): "I32",
}

Tensors = dict[str, np.ndarray]


def random_tensors(config: Mapping[str, Any] = CONFIG, dtype: Any = np.float32, seed: int = 0) -> Tensors:
    """The tensors of a Hugging Face Llama by name."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.2 * rng.standard_normal(shape, np.float32)).astype(dtype)
        for name, shape in tensor_shapes(dict(config)).items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file of the format."""
    header, end = {}, 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for array in tensors.values():
            file.write(array.tobytes())


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] = CONFIG,
    tensors: Tensors | None = None,
    *,
    shards: int = 1,
    generation_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a Hugging Face folder of one file, or of several and their index.

    Args:
        tensors: random ones in float32 if left out.

    Returns:
        The folder.
    """
    tensors = random_tensors(config) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    if generation_config is not None:
        write_json(folder / "generation_config.json", generation_config)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    index = {name: files[position % shards] for position, name in enumerate(tensors)}
    for file in files:
        write_safetensors(folder / file, {name: tensors[name] for name, owner in index.items() if owner == file})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder and its folders."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same_bits(first: Any, second: Any) -> None:
    """Two pytrees have the same structure, and their leaves the same dtypes, shapes and bits."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    leaves = zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True)
    for (path, one), other in leaves:
        assert (one.dtype, one.shape) == (other.dtype, other.shape), jax.tree_util.keystr(path)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), jax.tree_util.keystr(path)


def write_large_checkpoint(folder: Path) -> tuple[Path, int]:
    """Writes 200 MB in many tensors, and returns the folder and the bytes of its largest tensor."""
    config = CONFIG | {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    tensors = random_tensors(config | {"tie_word_embeddings": True})
    return write_checkpoint(folder, config, tensors), max(tensor.nbytes for tensor in tensors.values())


_MEASURE = """
import ast, sys
import jaxgen, jaxgen.convert

def bytes_of(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field + ":"))

function = {"load": jaxgen.load, "convert": jaxgen.convert.convert_checkpoint}[sys.argv[1]]
small, large = map(ast.literal_eval, sys.argv[2:])
function(*small)  # whatever it imports
before = bytes_of("VmRSS")
result = function(*large)
print(bytes_of("VmHWM") - before)
"""


def peak_growth(function: str, small: tuple[Path, ...], large: tuple[Path, ...]) -> int:
    """Bytes by which the memory of a fresh process grows at most while it loads or converts, warm from a small one."""
    arguments = [repr([str(path) for path in paths]) for paths in (small, large)]
    command = [sys.executable, "-c", _MEASURE, function, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
