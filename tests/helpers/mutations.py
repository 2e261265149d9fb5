"""Broken checkpoints: valid ones with a header, an index or a config that was changed at random.

    python tests/helpers/mutations.py COUNT SEED

tries so many, and prints how many of them still load. Each must load or be refused by a `CheckpointError`, soon
and in the memory that its files explain, without opening a file of any other folder.
"""

import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import CONFIG, random_tensors, write_checkpoint

from jaxgen import CheckpointError
from jaxgen.checkpoint.source import open_checkpoint

SECONDS, MEGABYTES = 60.0, 256  # of the processor; each takes milliseconds, or would never end
_NUMBERS = [0, -1, 1, 2, 3, 31, 33, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320]
_VALUES = [None, True, False, "", "a", "../x", "/etc/passwd", "\0", "\ud800", "ä" * 300, [], {}, [[]], [{}], {"a": {}}]
_WORDS = ["weight", "data_offsets", "dtype", "shape", "F32", "BF16", "F8_E4M3", "I4", "__metadata__", "lm_head.weight"]
_WORDS += [
    "sliding_attention",
    "full_attention",
    "gptq",
    "fp8",
    "yarn",
    "longrope",
    "dynamic",
    "mistral",
    "qwen2",
    "qwen3",
]
_KEYS = [
    "rope_scaling",
    "rope_parameters",
    "quantization_config",
    "sliding_window",
    "layer_types",
    "auto_map",
    "head_dim",
]
_KEYS += [
    "max_window_layers",
    "use_sliding_window",
    "attention_bias",
    "dtype",
    "architectures",
    "pad_token_id",
    "rope_type",
]
_KEYS += ["factor", "weight_map", "metadata", "do_sample", "temperature", "eos_token_id", "type", "quant_method"]


def mutated_json(rng: random.Random, content: Any) -> Any:
    """The same with one value, key or entry changed somewhere."""
    if isinstance(content, dict) and content and rng.random() < 0.8:
        key = rng.choice(list(content))
        choice = rng.random()
        if choice < 0.6:
            return content | {key: mutated_json(rng, content[key])}
        if choice < 0.7:
            return {name: value for name, value in content.items() if name != key}
        if choice < 0.8:
            return {(rng.choice(_WORDS) if name == key else name): value for name, value in content.items()}
        return content | {rng.choice([*_KEYS, *_WORDS]): random_value(rng)}
    if isinstance(content, list) and content and rng.random() < 0.7:
        place = rng.randrange(len(content))
        return [mutated_json(rng, value) if number == place else value for number, value in enumerate(content)]
    if isinstance(content, int) and rng.random() < 0.5:
        return content + rng.choice([-1, 1, 4, -4, 2**32])
    return random_value(rng)


def random_value(rng: random.Random) -> Any:
    choice = rng.random()
    if choice < 0.4:
        return rng.choice(_NUMBERS)
    if choice < 0.6:
        return rng.choice(_VALUES)
    if choice < 0.8:
        return rng.choice([*_WORDS, *_KEYS])
    if choice < 0.9:
        return [random_value(rng) for _ in range(rng.randrange(4))]
    return {rng.choice([*_KEYS, *_WORDS]): random_value(rng) for _ in range(rng.randrange(4))}


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """The same with a few bytes changed, added, doubled or cut."""
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(changed) + 1)
        choice = rng.random()
        if choice < 0.4 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif choice < 0.6:
            changed[place:place] = bytes(rng.choice(b'[]{},:"\\0129-eE. \x00\xff') for _ in range(rng.randrange(1, 5)))
        elif choice < 0.8:
            del changed[place : place + rng.randrange(1, 20)]
        elif choice < 0.9:
            changed[place:place] = changed[place : place + rng.randrange(1, 200)]
        else:
            del changed[place:]
    return bytes(changed)


def dumped(content: Any) -> bytes:
    return json.dumps(content).encode("utf-8", "surrogatepass")


class Folder:
    """A checkpoint of two files, one of whose parts is broken at a time and then mended."""

    def __init__(self, path: Path):
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 32}
        config = CONFIG | {"num_hidden_layers": 1, "rope_scaling": rope, "hidden_act": "silu", "dtype": "float32"}
        generation = {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
        self.path = write_checkpoint(path, config, random_tensors(config), shards=2, generation_config=generation)
        self.files = {file.name: file.read_bytes() for file in path.iterdir()}

    def broken(self, rng: random.Random) -> str:
        """Breaks a file, and returns its name."""
        name = rng.choice(sorted(self.files))
        content = self.files[name]
        if name.endswith(".safetensors"):
            length = struct.unpack("<Q", content[:8])[0]
            header, data = content[8 : 8 + length], content[8 + length :]
            choice = rng.random()
            if choice < 0.6:
                header = dumped(mutated_json(rng, json.loads(header)))
            elif choice < 0.9:
                header = mutated_bytes(rng, header)
            length = (
                len(header) if rng.random() < 0.95 else rng.choice([0, 1, len(header) - 1, 2**24, 2**40, 2**64 - 1])
            )
            data = data if rng.random() < 0.9 else data[: rng.randrange(len(data))]
            content = struct.pack("<Q", length) + header + data
        elif rng.random() < 0.7:
            content = dumped(mutated_json(rng, json.loads(content)))
        else:
            content = mutated_bytes(rng, content)
        (self.path / name).write_bytes(content)
        return name

    def mend(self, name: str) -> None:
        (self.path / name).write_bytes(self.files[name])


def watched(folder: Path) -> Callable[[], list[str]]:
    """From now on every file that is opened is noted; the result gives those outside the folder and Python's own."""
    opened: list[str] = []
    own = (str(folder.resolve()), sys.prefix, sys.base_prefix, "/proc/", "/dev/null", str(Path(__file__).parents[2]))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
            if not path.startswith(own):
                opened.append(path)

    sys.addaudithook(hook)
    return lambda: opened


def attempt(folder: Path) -> bool:
    """Whether it loads; any other error than the one that is meant is let through."""
    start = time.process_time()
    try:
        open_checkpoint(folder)
        return True
    except CheckpointError as error:
        message = str(error)
        assert str(folder) in message, message
        assert len(message) < 5000, message[:5000]
        return False
    finally:
        assert time.process_time() - start < SECONDS


def main(count: int, seed: int) -> int:
    rng, loaded = random.Random(seed), 0
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name) / "model")
        assert attempt(folder.path)
        outside = watched(folder.path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            file = folder.broken(rng)
            try:
                loaded += attempt(folder.path)
            except BaseException:
                print(f"attempt {number}: {file}: {(folder.path / file).read_bytes()[:3000]!r}", file=sys.stderr)
                raise
            folder.mend(file)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < MEGABYTES, grown
        assert not outside(), outside()
    return loaded


if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2])))
