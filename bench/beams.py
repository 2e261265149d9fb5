"""Beam search of jaxgen and transformers side by side on the same machine, as a table.

    python bench/beams.py

Four beams, the same random weights in float32 on both sides, 64 new tokens without an eos; the tokens must be equal.
Calls alternate, so that a machine that slows down slows both; figures are medians. The time of a step is the time of a
whole call minus that of a call for one token, divided by the number of further tokens. It is compared with a step of
greedy decoding with as many rows, and the cache with one that holds every prompt once per beam.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import continued, positive, record, seconds, varied
from transformers import LlamaForCausalLM

import jaxgen
from jaxgen.planning.shapes import SHAPES

BEAMS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[32, 512])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    model = jaxgen.from_config(varied(arguments.shape))
    with tempfile.TemporaryDirectory() as folder:
        jaxgen.save(model, folder)
        twin = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(
        f"{'prompt':>6} {'batch':>5} {'jaxgen s':>9} {'transformers':>13} {'ratio':>6} "
        f"{'ms/step':>8} {'greedy':>8} {'ratio':>6} {'cache':>6}"
    )
    for prompt_tokens in arguments.prompt_tokens:
        for batch in arguments.batch:
            figures = compare(model, twin, prompt_tokens, batch, arguments.new_tokens, arguments.repeats)
            print(
                f"{prompt_tokens:6} {batch:5} {figures['jaxgen_s']:9.2f} {figures['transformers_s']:13.2f} "
                f"{figures['ratio']:6.2f} {figures['step_ms']:8.1f} {figures['greedy_step_ms']:8.1f} "
                f"{figures['of_greedy']:6.2f} {figures['of_unshared_cache']:6.2f}",
                flush=True,
            )
            record(arguments.json, {"shape": arguments.shape, **figures})


def compare(model: Any, twin: Any, prompt_tokens: int, batch: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of whole calls, milliseconds of steps, and their ratios."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, model.vocab_size, (batch, prompt_tokens))
    rows = rng.integers(3, model.vocab_size, (batch * BEAMS, prompt_tokens))

    def beams(tokens: int = new_tokens) -> np.ndarray:
        return continued(model, prompts, tokens, num_beams=BEAMS)

    def greedy(tokens: int = new_tokens) -> np.ndarray:
        return continued(model, rows, tokens)

    def theirs() -> np.ndarray:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        return twin.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, eos_token_id=None, num_beams=BEAMS
        ).numpy()

    if not np.array_equal(beams(), theirs()):
        raise SystemExit("jaxgen and transformers gave different tokens, so their times cannot be compared.")
    calls = {
        "beams": beams,
        "one": lambda: beams(1),
        "greedy": greedy,
        "greedy one": lambda: greedy(1),
        "theirs": theirs,
    }
    for name in ("one", "greedy", "greedy one"):
        calls[name]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        beams()  # untimed: the threads of torch are still spinning
        for name, call in calls.items():
            times[name].append(seconds(call))
    took = {name: statistics.median(values) for name, values in times.items()}
    step = (took["beams"] - took["one"]) / (new_tokens - 1)
    greedy_step = (took["greedy"] - took["greedy one"]) / (new_tokens - 1)
    return {
        "prompt_tokens": prompt_tokens,
        "batch": batch,
        "beams": BEAMS,
        "new_tokens": new_tokens,
        "jaxgen_s": took["beams"],
        "transformers_s": took["theirs"],
        "ratio": took["theirs"] / took["beams"],
        "step_ms": step * 1e3,
        "greedy_step_ms": greedy_step * 1e3,
        "of_greedy": step / greedy_step,
        "of_unshared_cache": _cache_slots(model, prompts, new_tokens, num_beams=BEAMS)
        / _cache_slots(model, rows, new_tokens),
        "repeats": repeats,
    }


def _cache_slots(model: Any, prompts: np.ndarray, new_tokens: int, **kwargs: Any) -> int:
    """Of all rows together."""
    call = jaxgen.prepare(
        model, prompts, attention_mask=np.ones_like(prompts), max_new_tokens=new_tokens, eos_token_id=None, **kwargs
    )
    rows, columns = call.prompt.input_ids.shape
    return rows * call.strategy.cache_slots(columns, call.slots - columns)


if __name__ == "__main__":
    main()
