"""The cost of sampling over greedy decoding: decode steps of jaxgen, as a table of ratios.

    python bench/sampling.py

A vocabulary of 128,256 on a small model (4 layers, hidden 512), eight rows: the share of sampling in a step is larger
here than in any model people use. The time of a step is the time of a call minus that of a call for one token, divided
by the number of further tokens. The calls alternate; figures are medians.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import continued, positive, random_prompts, record, step_times

import jaxgen

MODEL = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_k 50, top_p 0.9, temperature 0.7": {"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.7},
    "all tokens": {"do_sample": True, "top_k": 0},
}
ROWS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 33


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=9, help="timed calls of each (default: 9)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    parser.add_argument("--vocabulary", type=int, default=MODEL["vocab_size"], help="tokens (default: 128256)")
    arguments = parser.parse_args()
    model = jaxgen.from_config({**MODEL, "vocab_size": arguments.vocabulary})
    prompt = random_prompts(arguments.vocabulary, ROWS, PROMPT_TOKENS)

    def call(way: str) -> Callable[[int], Any]:
        key = {"key": 0} if "do_sample" in WAYS[way] else {}
        return lambda new_tokens: continued(model, prompt, new_tokens, **WAYS[way], **key)

    times = step_times({way: call(way) for way in WAYS}, NEW_TOKENS - 1, arguments.repeats)
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    print(f"{'':40}{'ms/step':>8}{'of greedy':>11}")
    for way, milliseconds in medians.items():
        ratio = milliseconds / medians["greedy"]
        print(f"{way:40}{milliseconds:8.2f}{ratio:11.3f}")
        figures = {"way": way, "vocabulary": arguments.vocabulary, "ms": milliseconds, "of_greedy": ratio}
        record(arguments.json, {**figures, "repeats": arguments.repeats})


if __name__ == "__main__":
    main()
