"""Whole calls of jaxgen and of transformers on an encoder-decoder model, and what each keeps of the source.

    python bench/encoder_decoder.py --shape t5-base --batch 1 4 --beams 4 --source 512

Both start from the same random weights and the same sources. The calls alternate, figures are medians, and the tokens
must be equal. A step is the difference between a long call and one for a single token, so the encoder does not count.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
from common import positive, record, step_times
from transformers import AutoModelForSeq2SeqLM

import jaxgen

SHAPES: dict[str, dict[str, Any]] = {
    "t5-tiny": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="t5-base")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 4])
    parser.add_argument("--beams", type=positive, default=4)
    parser.add_argument("--source", type=positive, default=512, help="tokens of each source (default: 512)")
    parser.add_argument("--new-tokens", type=positive, default=40)
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    config = {"model_type": "t5", "decoder_start_token_id": 0, "pad_token_id": 0, **SHAPES[arguments.shape]}
    with tempfile.TemporaryDirectory() as folder:
        ours = jaxgen.from_config(config)
        jaxgen.save(ours, folder)
        theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    print(f"{arguments.shape}, {arguments.beams} beams, {arguments.source} source tokens; medians")
    print(f"{'batch':>5} {'jaxgen':>9} {'transformers':>13} {'ratio':>6}  ms/step; source in the cache, MB")
    for batch in arguments.batch:
        figures = compare(ours, theirs, batch, arguments)
        print(
            f"{batch:5} {figures['jaxgen_ms']:9.2f} {figures['transformers_ms']:13.2f} {figures['ratio']:6.2f}  "
            f"{figures['jaxgen_source_mb']:.1f} {figures['transformers_source_mb']:.1f}"
            + ("" if figures["same_tokens"] else "; other tokens"),
            flush=True,
        )
        record(arguments.json, {"shape": arguments.shape, "batch": batch, "beams": arguments.beams} | figures)


def compare(ours: Any, theirs: Any, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    source = rng.integers(3, ours.vocab_size, (batch, arguments.source))
    fields: dict[str, Any] = {"num_beams": arguments.beams, "eos_token_id": None, "pad_token_id": 0}

    def jaxgen_call(tokens: int) -> np.ndarray:
        return jaxgen.generate(ours, source, max_new_tokens=tokens, **fields)

    def transformers_call(tokens: int) -> np.ndarray:
        return theirs.generate(torch.tensor(source), max_new_tokens=tokens, **fields).numpy()

    calls = {"jaxgen": jaxgen_call, "transformers": transformers_call}
    same = np.array_equal(*(call(arguments.new_tokens) for call in calls.values()))
    times = step_times(calls, arguments.new_tokens - 1, arguments.repeats)
    ms = {name: statistics.median(each) for name, each in times.items()}
    output = {"return_dict_in_generate": True, "max_new_tokens": 2, **fields}
    memory = jaxgen.generate(ours, source, **output).cache.memory
    cross = theirs.generate(torch.tensor(source), **output).cache.cross_attention_cache
    return {
        "source_tokens": arguments.source,
        "new_tokens": arguments.new_tokens,
        "same_tokens": bool(same),
        "jaxgen_ms": ms["jaxgen"],
        "transformers_ms": ms["transformers"],
        "ratio": ms["transformers"] / ms["jaxgen"],
        "jaxgen_source_mb": sum(leaf.nbytes for leaf in jax.tree.leaves(memory)) / 1e6,
        "transformers_source_mb": sum(layer.keys.nbytes + layer.values.nbytes for layer in cross.layers) / 1e6,
    }


if __name__ == "__main__":
    main()
