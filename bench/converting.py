"""How fast a checkpoint is converted, there and back, as a share of the disk's speed in copying its files.

    python bench/converting.py

A Llama of random weights in bfloat16. Copying reads a file from beginning to end, writes it, and waits until it is on
the disk. Converting does the same, and also hashes every tensor and checks for NaN. The three take turns. Memory is the
maximum of a fresh process, minus its memory after it has converted a tiny model.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from common import positive, record
from safetensors.numpy import save_file

import jaxgen
from jaxgen import convert
from jaxgen.planning.shapes import SHAPES

MEASURE = """
import sys
from jaxgen.convert import convert_checkpoint

def bytes_of(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field + ":"))

convert_checkpoint(*sys.argv[1:3])
before = bytes_of("VmRSS")
convert_checkpoint(*sys.argv[3:5])
print(bytes_of("VmHWM") - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of 44 MB each (default: 32)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        size, largest = write_checkpoint(folder / "source", arguments.layers)
        rates = {what: size / seconds / 1e6 for what, seconds in times(folder, arguments.repeats).items()}
        memory = peak_memory(folder)
    print(f"{size / 1e6:,.0f} MB, the largest tensor {largest / 1e6:.1f} MB; memory {memory / 1e6:.1f} MB")
    for what, rate in rates.items():
        print(f"{what:12} {rate:8.0f} MB/s {rate / rates['copy']:6.2f} of copying")
    figures = {f"{what}_mb_per_s": rate for what, rate in rates.items()}
    figures |= {"share": rates["convert"] / rates["copy"], "share_back": rates["back"] / rates["copy"]}
    sizes = {"bytes": size, "largest_bytes": largest, "memory_bytes": memory}
    record(arguments.json, {**sizes, **figures, "repeats": arguments.repeats})


def write_checkpoint(folder: Path, layers: int) -> tuple[int, int]:
    """Writes the checkpoint, and returns the bytes of its tensors and of the largest of them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = SHAPES["2-layer"] | sizes | {"vocab_size": 8192, "num_hidden_layers": layers, "head_dim": 64}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(layers):
        parts = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
        parts |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (hidden // 2, hidden))
        parts |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden)) | {"mlp.down_proj": (hidden, inner)}
        parts |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values()), max(tensor.nbytes for tensor in tensors.values())


def times(folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    source, native = folder / "source", folder / "native"
    convert.convert_checkpoint(source, native)
    work: dict[str, Callable[[Path], Any]] = {
        "copy": lambda target: copy(source, target),
        "convert": lambda target: convert.convert_checkpoint(source, target),
        "back": lambda target: convert.convert_to_hugging_face(native, target),
    }
    seconds: dict[str, list[float]] = {what: [] for what in work}
    for _ in range(repeats):
        for what, function in work.items():
            os.sync()
            start = time.perf_counter()
            function(folder / "target")
            seconds[what].append(time.perf_counter() - start)
            if what == "back":
                same = (folder / "target" / "model.safetensors").read_bytes() == (
                    source / "model.safetensors"
                ).read_bytes()
                if not same:
                    raise SystemExit("the way back changed the file")
            shutil.rmtree(folder / "target")
    return {what: statistics.median(each) for what, each in seconds.items()}


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())


def peak_memory(folder: Path) -> int:
    arguments = [jaxgen.BUNDLED_MODEL, folder / "tiny", folder / "source", folder / "large"]
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
