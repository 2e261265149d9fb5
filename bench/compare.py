"""Whole calls of jaxgen and its peers side by side on the same machine, as a table.

    python bench/compare.py --shape 2-layer 135m --batch 1 4 16 --decode greedy sampling beams
    python bench/compare.py --model FOLDER --batch 1 4
    JAX_PLATFORMS=cuda python bench/compare.py --shape 8b --dtype bfloat16 --peers transformers

All start from the same weights, random ones or those of a Hugging Face folder, and the same prompts, and produce the
same number of tokens, without an eos, on the CPU, or on the GPU that `JAX_PLATFORMS` names. The calls alternate, so
that a machine that slows down slows all; figures are medians. A ratio is printed for equal work only: greedy and beam
tokens must be those of jaxgen. Greedy tokens may differ where two tie within the rounding of the dtype. Beams in
bfloat16, where rounding decides between texts, and samples, which come from different random generators, must have the
same shape. Where greedy tokens differ, both are compared with a forward pass without a cache, and the run stops if
those of jaxgen are wrong. The records also have the most memory that each process has had.

The first call of a case includes compiling. A call with a new prompt length then shows whether that recompiles. Peers
besides transformers are measured if they are installed:

    pip install torch transformers keras-hub llama-cpp-python gguf
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

# As the peers are, here and in their processes, which share a GPU's memory.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
from common import DECODES, positive, random_prompts, record, varied
from peers import PEERS, Case, Missing, Peer, Worker, installed
from reference import Reference, Verdict

import jaxgen
from jaxgen.planning.shapes import SHAPES

Judge = Callable[[Case, np.ndarray], Verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["2-layer", "135m"])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, instead of shapes with random weights")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--decode", nargs="+", choices=DECODES, default=[*DECODES])
    parser.add_argument("--peers", nargs="+", choices=[*PEERS][1:], help="beside jaxgen (default: all installed)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all of them")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    if (platform := os.environ["JAX_PLATFORMS"]) not in ("cpu", "cuda"):
        parser.error(f"JAX_PLATFORMS={platform!r} is not a platform that all of them run on. Set it to cpu or cuda.")
    if missing := [name for name in arguments.peers or () if not installed(name)]:
        parser.error(f"--peers {missing} need {[PEERS[name].packages for name in missing]}, which are not installed.")
    names = ["jaxgen", *(arguments.peers or filter(installed, [*PEERS][1:]))]
    print(f"ms/token of a whole call, its ratio to jaxgen's, seconds of the first call; {arguments.dtype}")
    print(f"{'shape':8} {'batch':>5} {'decode':8}" + "".join(f"{name:>27}" for name in names))
    notes: set[str] = set()
    for shape in [arguments.model.name] if arguments.model else arguments.shape:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.model:
                shutil.copytree(arguments.model, folder, dirs_exist_ok=True)  # a peer may write its own file there
            else:
                jaxgen.save(jaxgen.from_config(varied(shape), dtype=arguments.dtype), folder)
            vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
            peers = {name: started(name, folder, arguments.dtype) for name in names}

            @functools.cache
            def reference(folder: str = folder) -> Reference:
                return Reference(jaxgen.load(folder))

            def judge(case: Case, tokens: np.ndarray, reference: Callable[[], Reference] = reference) -> Verdict:
                return reference().judge(case.decode, case.prompts, tokens)

            for batch, decode in itertools.product(arguments.batch, arguments.decode):
                prompts = random_prompts(vocab_size, batch, arguments.prompt_tokens)
                case = Case(decode, prompts, arguments.new_tokens)
                figures = compare(peers, judge, case, arguments.dtype, arguments.repeats)
                print(f"{shape:8} {batch:5} {decode:8}" + "".join(map(cell, figures.values())), flush=True)
                notes |= {f"{name}: {each['skipped']}" for name, each in figures.items() if "skipped" in each}
                record(arguments.json, {"shape": shape, "dtype": arguments.dtype} | summary(case, figures))
            for peer in peers.values():
                peer.close()
    print("\n".join(sorted(notes)))


def started(name: str, folder: str, dtype: str) -> Peer:
    """The peer in its process, or one that tells of every case why there is none."""
    try:
        return Worker(name, folder, dtype)
    except RuntimeError as error:
        if name == "jaxgen":
            raise
        return Missing(str(error))


def compare(peers: Mapping[str, Peer], judge: Judge, case: Case, dtype: str, repeats: int) -> dict[str, dict[str, Any]]:
    """{peer: its figures}; in place of a ratio the figures may hold "skipped", the reason why there is none."""
    figures: dict[str, dict[str, Any]] = {}
    tokens: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {}
    new_lengths: dict[str, list[float]] = {}
    for name, peer in peers.items():
        try:
            reason = peer.refuses(case)
            if reason is None:
                cold, tokens[name] = peer.first(case)
                reason = difference(case, tokens["jaxgen"], tokens[name], judge, dtype)
                figures[name] = {"first_call_s": cold}
        except RuntimeError as error:
            if name == "jaxgen":
                raise
            reason = str(error)
        if reason is not None:
            figures[name] = {"skipped": reason}
        else:
            times[name], new_lengths[name] = [], []
    for repeat in range(repeats):
        for name in [*times]:
            try:
                times[name].append(peers[name].timed(case))
                if case.decode == "greedy" and repeat < 3:
                    shorter = replace(case, prompts=case.prompts[:, repeat + 1 :])
                    new_lengths[name].append(peers[name].first(shorter)[0])
            except RuntimeError as error:
                if name == "jaxgen":
                    raise
                figures[name] = {"skipped": str(error)}
                del times[name]
    for name, taken in times.items():
        per_token = [each / case.new_tokens * 1e3 for each in taken]
        median = statistics.median(per_token)
        figures[name] |= {"ms": median, "ms_range": [min(per_token), max(per_token)]}
        figures[name]["ratio"] = median / figures["jaxgen"]["ms"]
        figures[name]["memory_mb"] = round(peers[name].memory(case))
        if new_lengths[name]:
            figures[name]["new_length_ratio"] = statistics.median(new_lengths[name]) / statistics.median(taken)
    return figures


def difference(case: Case, ours: np.ndarray, theirs: np.ndarray, judge: Judge, dtype: str) -> str | None:
    """What keeps int [B, T] tokens from being the same work as ours, if anything does."""
    if theirs.shape != ours.shape:
        return f"tokens of shape {theirs.shape} instead of {ours.shape}"
    if case.decode == "sampling" or np.array_equal(theirs, ours):
        return None
    if case.decode == "beams" and dtype != "float32":
        return None
    if case.decode == "greedy":
        if judge(case, ours).wrong:
            raise SystemExit("jaxgen's tokens differ from those of a forward pass, so its times are not valid.")
        if not judge(case, theirs).wrong:
            return None
    return "other tokens"


def cell(figures: Mapping[str, Any]) -> str:
    if "skipped" in figures:
        return f"{'other tokens' if figures['skipped'] == 'other tokens' else '-':>27}"
    return f"{figures['ms']:12.3f}{figures['ratio']:6.2f}x{figures['first_call_s']:7.2f}s"


def summary(case: Case, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The record of a case; the times of jaxgen and eager transformers stand beside the peers, as in older records."""
    ours, theirs = figures["jaxgen"], figures.get("transformers", {})
    return {
        "decode": case.decode,
        "batch": len(case.prompts),
        "prompt_tokens": case.prompts.shape[1],
        "new_tokens": case.new_tokens,
        "jaxgen_ms": ours["ms"],
        "transformers_ms": theirs.get("ms"),
        "ratio": theirs.get("ratio"),
        "first_call_s": ours["first_call_s"],
        "new_length_ratio": ours.get("new_length_ratio"),
        "peers": figures,
    }


if __name__ == "__main__":
    main()
