"""How fast jaxgen decodes on this device, as a share of what reading the weights and the cache once takes.

    python bench/throughput.py --model 135m --batch 1 8 --decode greedy sampling beams
    python bench/throughput.py --model 8b --dtype bfloat16 --batch 1 8 64 --prompt-tokens 512 --new-tokens 128
    srun python bench/throughput.py --model FOLDER --dtype bfloat16 --distributed       on all devices of a job

A named shape gets random weights. The first call of a case is cold: what it takes beyond a warm one is compiling. A
call for one token is the time to the first one, and the rest of a whole call, by the number of further tokens, is a
decode step; calls of both kinds alternate, figures are medians, and the range of the step stands beside it. Bytes are
the weights (without an embedding that is only looked up) and the keys and values that are valid, averaged over the
steps; MBU is their share of the bandwidth measured in the same run, and is not meaningful for a model that fits in a
cache.

The tokens that were timed are checked against logits computed without a cache (see `reference.py`): greedy ones must
be the highest, but for ties within the rounding of the dtype, which are counted; sampled ones among the `top_k`
highest, the same at every call, and in float32 those of the first prompt by itself; beams must have the probability
that they say. Anything else ends the run.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import DECODES, bandwidth, continued, positive, random_prompts, record, seconds, varied
from jax.sharding import Mesh
from reference import Reference, everywhere

import jaxgen
from jaxgen.checkpoint.load import QUANTIZATIONS
from jaxgen.planning.shapes import SHAPES

KEY = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="135m", help=f"a checkpoint folder, or one of {[*SHAPES]} (default: 135m)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[32])
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[128], help="at least 2 (default: 128)")
    parser.add_argument("--decode", nargs="+", choices=DECODES, default=["greedy"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="hold the weights in 8 or 4 bits")
    parser.add_argument("--mesh", metavar="DATAxTENSOR", help="spread the model over devices, such as 1x4")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run in all processes of a job, with the model over the devices of all of them; the first one writes",
    )
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    if min(arguments.new_tokens) < 2:
        parser.error("--new-tokens must be at least 2: a step is what a call takes beyond its first token.")
    if arguments.model not in SHAPES and not Path(arguments.model).is_dir():
        parser.error(f"--model {arguments.model} is neither a folder nor one of {[*SHAPES]}.")
    if arguments.distributed:
        jax.distributed.initialize()
    try:
        mesh = _mesh(arguments.mesh, arguments.distributed)
    except ValueError as error:
        parser.error(f"--mesh {arguments.mesh} is not a mesh of these {jax.device_count()} devices: {error}")
    first = jax.process_index() == 0
    rate = bandwidth(mesh)  # before there is a model, whose peak memory its array would count to
    model = make(arguments.model, arguments.dtype, arguments.quantize, mesh)
    reference = Reference(model)
    common = {
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "quantize": arguments.quantize,
        "mesh": None if mesh is None else dict(mesh.shape),
        "weight_bytes": sum(_bytes(leaf) for leaf in jax.tree.leaves(model)),
        "reference": reference.of,
    }
    say = print if first else lambda *_, **__: None
    say(
        f"{common['model']}, {arguments.dtype}{f', {arguments.quantize}' if arguments.quantize else ''}: "
        f"{common['weight_bytes'] / 1e9:.2f} GB of weights, {rate / 1e9:,.1f} GB/s, checked by {reference.of}"
    )
    say(
        f"{'batch':>5} {'prompt':>6} {'new':>5} {'decode':8} {'compile s':>9} {'warm s':>7} {'first ms':>9} "
        f"{'prefill/s':>10} {'ms/step':>9} {'(range)':>17} {'tokens/s':>9} {'MBU':>5} {'MB':>7} {'ties':>4}"
    )
    cases = itertools.product(arguments.decode, arguments.prompt_tokens, arguments.new_tokens, arguments.batch)
    for decode, prompt_tokens, new_tokens, batch in cases:
        if jax.default_backend() == "cpu":  # whose neighbours come and go
            rate = bandwidth(mesh)
        figures = measure(model, reference, decode, batch, prompt_tokens, new_tokens, arguments.repeats)
        bytes_per_step = step_bytes(model, decode, batch, prompt_tokens, new_tokens)
        figures |= {"bytes_per_step": bytes_per_step, "bandwidth": rate}
        figures["mbu"] = bytes_per_step / (figures["step_ms"] / 1e3) / rate
        megabytes = "-" if figures["memory_bytes"] is None else f"{figures['memory_bytes'] / 1e6:,.0f}"
        say(
            f"{batch:5} {prompt_tokens:6} {new_tokens:5} {decode:8} {figures['compile_s']:9.2f} "
            f"{figures['warm_s']:7.3f} {figures['first_token_ms']:9.2f} {figures['prefill_tokens_per_s']:10,.0f} "
            f"{figures['step_ms']:9.3f} {'({:.3f} - {:.3f})'.format(*figures['step_ms_range']):>17} "
            f"{figures['tokens_per_s']:9,.1f} {figures['mbu']:5.2f} {megabytes:>7} "
            f"{figures['ties']:4}",
            flush=True,
        )
        record(arguments.json if first else None, common | figures)


def _mesh(text: str | None, distributed: bool) -> Mesh | None:
    """The mesh of --mesh, and with --distributed of all devices.

    Raises:
        ValueError: if it does not fit the devices.
    """
    if text is None and not distributed:
        return None
    data, tensor = (1, jax.device_count()) if text is None else map(int, text.split("x"))
    if distributed and (data, tensor) != (1, jax.device_count()):
        raise ValueError(f"the processes time the same rows, so it must be 1x{jax.device_count()}.")
    return jax.make_mesh((data, tensor), ("data", "tensor"))


def make(name: str, dtype: str, quantize: str | None, mesh: Mesh | None) -> Any:
    """The model of a folder, or one of random weights; there is never a second copy of the weights."""
    if name not in SHAPES:
        return jaxgen.load(name, dtype=dtype, mesh=mesh, quantize=quantize)
    return jaxgen.from_config(varied(name), dtype=dtype, quantize=quantize, mesh=mesh)


def measure(
    model: Any, reference: Reference, decode: str, batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """The figures of one case, whose tokens are right.

    Raises:
        SystemExit: if they are not.
    """
    prompts = random_prompts(model.vocab_size, batch, prompt_tokens)
    arguments = DECODES[decode] | ({"key": KEY} if DECODES[decode].get("do_sample") else {})
    outputs: list[np.ndarray] = []

    def whole() -> None:
        outputs.append(continued(model, prompts, new_tokens, **arguments))

    def first() -> None:
        continued(model, prompts, 1, **arguments)

    cold = seconds(whole)
    first()
    times: dict[str, list[float]] = {"whole": [], "first": []}
    memory = memory_beside(model)
    for _ in range(repeats):
        times["whole"].append(seconds(whole))
        times["first"].append(seconds(first))
    memory_bytes = memory()
    ties = check(model, reference, decode, prompts, outputs)
    warm, first_token = (statistics.median(values) for values in times.values())
    steps = [
        (all_of_it - one) / (new_tokens - 1) * 1e3
        for all_of_it, one in zip(times["whole"], times["first"], strict=True)
    ]
    return {
        "decode": decode,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "cold_s": cold,
        "warm_s": warm,
        "compile_s": cold - warm,
        "first_token_ms": first_token * 1e3,
        "prefill_tokens_per_s": batch * prompt_tokens / first_token,
        "step_ms": (warm - first_token) / (new_tokens - 1) * 1e3,
        "step_ms_range": [min(steps), max(steps)],
        "tokens_per_s": batch * new_tokens / warm,
        "memory_bytes": memory_bytes,
        "ties": ties,
        "repeats": repeats,
    }


def check(model: Any, reference: Reference, decode: str, prompts: np.ndarray, outputs: list[np.ndarray]) -> int:
    """How many ties there are among the tokens of calls that are all alike and right.

    Args:
        prompts: int [B, P].
        outputs: int [B, P + T] of each call.

    Raises:
        SystemExit: if they are not.
    """
    columns = prompts.shape[1]
    sequences, *others = outputs
    if any(not np.array_equal(sequences, each) for each in others):
        raise SystemExit(
            f"{decode}: two calls with the same arguments gave different tokens, so their times are not valid."
        )
    verdict = reference.judge(decode, prompts, sequences[:, columns:])
    if verdict.wrong:
        raise SystemExit(
            f"{decode}: {verdict.wrong} of {sequences[:, columns:].size} tokens differ from those of "
            f"{reference.of} without a cache, whose logits are up to {verdict.furthest:.2g} higher; rounding explains "
            f"{verdict.tolerance:.2g}. Their times are not valid."
        )
    if decode == "beams":
        tokens = sequences.shape[1] - columns
        again, scores = scored_beams(model, prompts, tokens)
        if not np.array_equal(again, sequences):
            raise SystemExit("beams: `decode` and `generate` gave different tokens, so their times are not valid.")
        apart = np.abs(scores - verdict.log_p / tokens).max()
        if apart > verdict.tolerance:
            raise SystemExit(
                f"beams: a text's log-probability per token is {apart:.2g} from that of {reference.of} without a "
                f"cache, and rounding explains {verdict.tolerance:.2g}. Their times are not valid."
            )
    # In other dtypes a batch of another size rounds otherwise, and a draw goes with it.
    if decode == "sampling" and model.dtype == jnp.float32:
        alone = continued(model, prompts[:1], sequences.shape[1] - columns, key=KEY, **DECODES[decode])
        if not np.array_equal(alone[0], sequences[0]):
            raise SystemExit("sampling: the first prompt drew other tokens by itself than in its batch.")
    return verdict.ties


def scored_beams(model: Any, prompts: np.ndarray, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The best beams of int [B, P] prompts, int [B, P + T], and their scores, float [B].

    Not by `output_scores`, which records those of every beam, token and step.
    """
    call = jaxgen.prepare(
        model,
        prompts,
        attention_mask=np.ones_like(prompts),
        max_new_tokens=new_tokens,
        eos_token_id=None,
        **DECODES["beams"],
    )
    outputs = jax.jit(lambda model: jaxgen.decode(model, call), out_shardings=everywhere(model.mesh))(model)
    best, scores = (np.asarray(outputs[name])[: len(prompts), 0] for name in ("sequences", "sequences_scores"))
    return best[:, : prompts.shape[1] + new_tokens], scores


def step_bytes(model: Any, decode: str, batch: int, prompt_tokens: int, new_tokens: int) -> float:
    """What a step has to read, averaged over those of a call: of all devices together.

    The prompt's keys and values are there once, those of further tokens for each beam, its own column among them.
    """
    looked_up = 0 if model.lm_head is None else sum(_bytes(leaf) for leaf in jax.tree.leaves(model.embed_tokens))
    weights = sum(_bytes(leaf) for leaf in jax.tree.leaves(model)) - looked_up
    columns = prompt_tokens + DECODES[decode].get("num_beams", 1) * new_tokens / 2
    return weights + batch * columns * model.cache_bytes_per_token


def _bytes(leaf: jax.Array) -> int:
    """Of all devices together: an array on several of them is read by each."""
    return len(leaf.sharding.device_set) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def memory_beside(model: Any) -> Callable[[], int | None]:
    """Gives the most bytes beside the weights that the first device has needed from now on.

    On an accelerator, which cannot forget its peak, the most in the whole run, the making of the model included. On a
    CPU by how much the process grew; None where the system does not say.
    """
    device = jax.local_devices()[0]
    if device.memory_stats():
        leaves = jax.tree.leaves(model)
        weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        return lambda: device.memory_stats()["peak_bytes_in_use"] - weights
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not forget.exists():
        return lambda: None

    def resident(field: str) -> int:
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    forget.write_text("5")  # the peak is what there is now
    before = resident("VmRSS:")
    return lambda: resident("VmHWM:") - before


if __name__ == "__main__":
    main()
