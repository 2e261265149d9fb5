"""Whole greedy calls of jaxgen and transformers side by side on the same machine, as a table.

    python bench/compare.py --shape 2-layer 135m

Both start from the same random weights in float32 and the same 32-token prompt and produce 128 tokens without an end.
The calls alternate, so that a machine that slows down slows both; figures are medians. A jaxgen call with a prompt
length that was never seen before is timed too: within a bucket it must cost nothing more.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

import jaxgen

_COMMON = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "2-layer": _COMMON
    | {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "135m": _COMMON
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
PROMPT_TOKENS, NEW_TOKENS = 32, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each (default: 7)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    print(
        f"{'shape':8} {'jaxgen ms/token':>16} {'transformers':>13} {'ratio':>6} {'first call s':>13} {'new length':>11}"
    )
    for shape in arguments.shape:
        figures = compare(shape, arguments.repeats)
        print(
            f"{shape:8} {figures['jaxgen_ms']:16.3f} {figures['transformers_ms']:13.3f} {figures['ratio']:6.1f} "
            f"{figures['first_call_s']:13.2f} {figures['new_length_ratio']:11.2f}"
        )
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(figures) + "\n")


def compare(shape: str, repeats: int) -> dict[str, Any]:
    """Milliseconds per token of both, their ratio, and what the first call and a new prompt length cost."""
    model = jaxgen.from_config(SHAPES[shape])
    with tempfile.TemporaryDirectory() as folder:
        jaxgen.save(model, folder)
        twin = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)

    def ours(columns: int = PROMPT_TOKENS) -> None:
        prompt = rng.integers(3, SHAPES[shape]["vocab_size"], (1, columns))
        jaxgen.generate(model, prompt, max_new_tokens=NEW_TOKENS, eos_token_id=None)

    def theirs() -> None:
        prompt = torch.tensor(rng.integers(3, SHAPES[shape]["vocab_size"], (1, PROMPT_TOKENS)))
        twin.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, eos_token_id=None)

    first_call = seconds(ours)
    theirs()
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "new length": []}
    for repeat in range(repeats):
        # Each takes the machine over with an untimed call: the threads of the other are still spinning.
        theirs()
        times["theirs"].append(seconds(theirs))
        ours()
        times["ours"].append(seconds(ours))
        times["new length"].append(seconds(lambda columns=PROMPT_TOKENS - 1 - repeat % 7: ours(columns)))
    medians = {name: statistics.median(values) / NEW_TOKENS * 1e3 for name, values in times.items()}
    return {
        "shape": shape,
        "jaxgen_ms": medians["ours"],
        "transformers_ms": medians["theirs"],
        "ratio": medians["theirs"] / medians["ours"],
        "first_call_s": first_call,
        "new_length_ratio": medians["new length"] / medians["ours"],
        "repeats": repeats,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """What a figure needs to be compared with others."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jaxgen", "jax", "transformers", "torch")},
        "date": date.today().isoformat(),
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
