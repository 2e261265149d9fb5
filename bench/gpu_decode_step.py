"""Where the time of a decode step goes on a GPU, and which options of its compiler pay: one run of about ten minutes.

    PYTHONPATH=. XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 python bench/gpu_decode_step.py OUT --seconds 300
    PYTHONPATH=. python bench/gpu_decode_step.py OUT --shape 2-layer --steps 4 --columns 128 --slots 256   # rehearsal

Makes the weights on the device, and states as after a prompt of `--columns` tokens, so that no prefill is compiled.
First it times attention of a prompt. Then it times `advance` itself, with the compiler options of each variant, the
most telling variants first; among them whole calls of `generate`, one with a `max_time`; and at the end calls of
transformers on torch, if both are installed.
Each figure is appended to OUT/figures.jsonl at once: a variant that fails, or a run cut short, costs nothing else.
Shares are those of the bandwidth measured in the same run; `dispatch_share` is how much of the time of a chunk passes
before its dispatch returns; `same_tokens` compares with the first variant of that batch (random weights in bfloat16: a
few may differ).
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import statistics
import subprocess
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from common import bandwidth, cache_options, continued, random_prompts, record, varied

import jaxgen
from jaxgen.decoding import loop
from jaxgen.generation.build import build_call, read_request
from jaxgen.generation.request import Request
from jaxgen.models import int4, int8, layers
from jaxgen.planning.shapes import SHAPES

# Beside those that `advance` has.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention of XLA": {},
    "no split": {"xla_gpu_experimental_force_split_k": 1},
    "graph of the body": {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN"},
    "cublas": {"xla_gpu_enable_triton_gemm": False},
    "no graph": {"xla_gpu_enable_command_buffer": ""},
    "cache in int8": {},
    "cache in fp8": {},
}
CACHE_BACKENDS = {"cache in int8": "int8", "cache in fp8": "fp8"}
# Weights, batch, options: the most telling first, and quantised weights last, since there is not always room for two
# kinds. `whole_calls` come after the first few, so that a short run has them too.
VARIANTS_BEFORE_CALLS = 8
VARIANTS = [
    ("bfloat16", 64, "default"),
    ("bfloat16", 64, "no split"),
    ("bfloat16", 1, "default"),
    ("bfloat16", 1, "no split"),
    ("bfloat16", 8, "default"),
    ("bfloat16", 8, "no split"),
    ("bfloat16", 64, "cache in int8"),
    ("bfloat16", 64, "cache in fp8"),
    ("int8", 1, "default"),
    ("int8", 64, "default"),
    ("int4", 1, "default"),
    ("int4", 64, "default"),
    ("bfloat16", 64, "attention of XLA"),
    ("bfloat16", 1, "attention of XLA"),
    ("bfloat16", 8, "attention of XLA"),
    ("bfloat16", 64, "cublas"),
    ("bfloat16", 1, "graph of the body"),
    ("bfloat16", 1, "cublas"),
    ("bfloat16", 1, "no graph"),
]
PROFILED = {
    *(("bfloat16", 1, "default"), ("bfloat16", 64, "cache in int8")),
    *(("int8", 1, "default"), ("int4", 1, "default")),
}
QUANTISED = {"int8": int8.quantised, "int4": int4.quantised}
PROFILED_STEPS = 4
# Rows and columns of prompts whose attention is timed, with the heads of the shape.
PROMPTS = [(1, 2048), (16, 512), (1, 8192)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the figures")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--seconds", type=float, default=300, help="after which no variant is begun (default: 300)")
    parser.add_argument("--steps", type=int, default=64, help="of a timed chunk (default: 64)")
    parser.add_argument("--columns", type=int, default=512, help="in the cache at first (default: 512)")
    parser.add_argument("--slots", type=int, default=1024, help="of the cache (default: 1024)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + arguments.seconds
    read = bandwidth()
    say(arguments, what="machine", bandwidth=read, driver=driver())
    attention_of_prompts(arguments)
    weights, model = "", None
    first_tokens: dict[int, np.ndarray] = {}
    for number, (kind, batch, options) in enumerate(VARIANTS):
        if number == VARIANTS_BEFORE_CALLS:
            whole_calls(arguments, model, until)
        if time.monotonic() > until:
            say(arguments, what="out of time", weights=kind, batch=batch, options=options)
            break
        if kind != weights:
            model = None  # there may not be room for both
            weights, model = kind, made(arguments.shape, kind)
        figures = {"shape": arguments.shape, "weights": kind, "batch": batch, "options": options}
        try:
            step = timed_step(arguments, model, batch, options, (kind, batch, options) in PROFILED)
        except Exception as error:  # of XLA, which does not take every option in every version
            say(arguments, what="failed", **figures, error=f"{type(error).__name__}: {str(error)[:400]}")
            continue
        tokens = step.pop("tokens")
        floor_ms = (step_bytes(model) + step["cache_bytes"]) / read * 1e3
        say(
            arguments,
            what="step",
            **figures,
            **step,
            tokens_per_s=batch / step["step_ms"] * 1e3,
            share_of_bandwidth=floor_ms / step["step_ms"],
            same_tokens=float((tokens == first_tokens.setdefault(batch, tokens)).mean()),
        )
    transformers_calls(arguments, until)


def made(shape: str, weights: str) -> Any:
    model = jaxgen.from_config(varied(shape), dtype="bfloat16")
    return jax.tree.map(jax.jit(QUANTISED[weights], donate_argnums=0), model) if weights in QUANTISED else model


def say(arguments: argparse.Namespace, **figures: Any) -> None:
    record(arguments.out / "figures.jsonl", figures)
    print(json.dumps({name: value for name, value in figures.items() if name != "kernels"}), flush=True)


def driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return None


def step_bytes(model: Any) -> int:
    """Of the weights that a step reads: all but a table of embeddings that is not the head too."""
    table = 0 if model.lm_head is None else sum(leaf.nbytes for leaf in jax.tree.leaves(model.embed_tokens))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - table


def timed_step(arguments: argparse.Namespace, model: Any, batch: int, options: str, profiled: bool) -> dict[str, Any]:
    """The figures of one program; chunks are timed four times, after two short ones that warm it up."""
    on_gpu = jax.default_backend() == "gpu"
    strategy, state = started(model, batch, arguments, CACHE_BACKENDS.get(options))
    step = jax.jit(
        lambda model, state, strategy, steps: loop._advance(model, state, strategy, steps),
        donate_argnums=1,
        compiler_options={**(loop.COMPILER_OPTIONS or {}), **(OPTIONS[options] if on_gpu else {})},
    )
    began = time.perf_counter()
    with contextlib.ExitStack() as without:
        if options == "attention of XLA":
            jax.clear_caches()  # or layers that are traced already would be used
            without.enter_context(mock.patch.object(layers, "fits", lambda *sizes: False))
            without.callback(jax.clear_caches)
        compiled = step.lower(model, state, strategy, np.int32(1)).compile()
    compile_s = time.perf_counter() - began

    def run(steps: int) -> None:
        nonlocal state
        state = compiled(model, state, strategy, np.int32(steps))

    for _ in range(2):
        run(max(arguments.steps // 8, 1))
        jax.block_until_ready(state)
    times, shares = [], []
    for _ in range(4):
        start = time.perf_counter()
        run(arguments.steps)
        returned = time.perf_counter()
        jax.block_until_ready(state)
        taken = time.perf_counter() - start
        times.append(taken / arguments.steps * 1e3)
        shares.append((returned - start) / taken)
    inner = state.inner
    figures = {
        "step_ms": statistics.median(times),
        "range_ms": [min(times), max(times)],
        "dispatch_share": statistics.median(shares),
        "compile_s": compile_s,
        "cache_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers)),
        "tokens": np.asarray(inner.sequences[:, arguments.columns : arguments.columns + 16]),
    }
    if profiled:

        def work() -> None:
            run(PROFILED_STEPS)
            jax.block_until_ready(state)

        figures["kernels"] = kernels(work)
    return figures


def attention_of_prompts(arguments: argparse.Namespace, in_turn: int = 4) -> None:
    """Milliseconds of a layer: by XLA, by the kernel, and by cuDNN, which is faster only without a mask."""
    config = varied(arguments.shape)
    heads, kv_heads, dtype = config["num_attention_heads"], config["num_key_value_heads"], jnp.dtype("bfloat16")
    head_dim = config.get("head_dim", config["hidden_size"] // heads)

    def by_cudnn(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None) -> jax.Array:
        flat, *pair = (each.swapaxes(1, 2) for each in (queries.reshape(len(keys), heads, -1, head_dim), keys, values))
        mask = None if mask is None else mask[:, None]
        attended = jax.nn.dot_product_attention(flat, *pair, mask=mask, is_causal=True, implementation="cudnn")
        return attended.swapaxes(1, 2).reshape(queries.shape)

    ways: dict[str, Any] = {
        "xla": lambda *arrays: layers.attend(*arrays)[0],
        "kernel": lambda *arrays: layers.attend(*arrays, kernel=True)[0],
    }
    if jax.default_backend() == "gpu":
        ways |= {"cudnn": lambda *arrays: by_cudnn(*arrays[:3], None), "cudnn with a mask": by_cudnn}
    for rows, columns in PROMPTS:
        columns = min(columns, 8 * arguments.slots)
        queries = random_array(np.uint32(0), (rows, kv_heads, heads // kv_heads, columns, head_dim), dtype)
        pair = [random_array(np.uint32(seed), (rows, kv_heads, columns, head_dim), dtype) for seed in (1, 2)]
        mask = jnp.broadcast_to(jnp.tri(columns, dtype=bool), (rows, columns, columns))
        for name, way in ways.items():

            @jax.jit
            def several(queries: jax.Array, *others: jax.Array, way: Any = way) -> jax.Array:
                for _ in range(in_turn):
                    queries = way(queries, *others)
                return queries

            def call(arrays: Any = (queries, *pair, mask), several: Any = several) -> float:
                start = time.perf_counter()
                jax.block_until_ready(several(*arrays))
                return (time.perf_counter() - start) / in_turn * 1e3

            call()
            figures = {"shape": arguments.shape, "batch": rows, "columns": columns, "by": name}
            layer_ms = statistics.median(call() for _ in range(5))
            say(arguments, what="attention of a prompt", **figures, layer_ms=layer_ms)


def started(model: Any, batch: int, arguments: argparse.Namespace, backend: str | None) -> tuple[Any, Any]:
    """The strategy of a greedy call, and its state as after a prompt, whose keys and values are random numbers."""
    prompts = random_prompts(model.vocab_size, batch, arguments.columns)
    options = {"max_new_tokens": arguments.slots - arguments.columns, "eos_token_id": None, **cache_options(backend)}
    request = Request(inputs=prompts, keywords={**options, "attention_mask": np.ones_like(prompts)})
    call = build_call(model, request, *read_request(model, request)).call
    shapes = jax.eval_shape(lambda model: loop._prefill(model, call, cache_slots=arguments.slots), model)

    def leaf(path: Any, shape: Any) -> jax.Array:
        return random_array(np.uint32(zlib.crc32(jax.tree_util.keystr(path).encode())), shape.shape, shape.dtype)

    state = jax.tree_util.tree_map_with_path(leaf, shapes)
    cache = dataclasses.replace(
        state.cache,
        length=jnp.int32(arguments.columns),
        position=jnp.full_like(state.cache.position, arguments.columns),
        valid=jnp.zeros_like(state.cache.valid).at[:, : arguments.columns].set(True),
    )
    inner = dataclasses.replace(
        state.inner,
        cur_len=jnp.int32(arguments.columns),
        prompt_length=jnp.int32(arguments.columns),
        tokens=jnp.arange(len(state.inner.tokens), dtype=jnp.int32) + 5,
    )
    return call.strategy, dataclasses.replace(state, cache=cache, inner=inner)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def random_array(seed: np.uint32, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros unless it is of a cache; compiled once for all layers."""
    key = jax.random.key(seed, impl="rbg")
    if dtype == jnp.int8:  # whose scales are about 1
        return jax.random.randint(key, shape, -2, 3, dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return jax.random.normal(key, shape, jnp.float32 if dtype.itemsize == 1 else dtype).astype(dtype)


def kernels(work: Any) -> dict[str, list[float]]:
    """Of a step, by kernel: launches and microseconds, the dearest first. XLA uses no graphs while it is profiled."""
    work()
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines if "GPU" in plane.name else ():
                    for event in line.events if line.name.startswith("Stream") else ():
                        figures = found[event.name.split("(")[0][:60]]
                        figures[0] += 1 / PROFILED_STEPS
                        figures[1] += event.duration_ns / 1e3 / PROFILED_STEPS
    total = [sum(figures[column] for figures in found.values()) for column in (0, 1)]
    return {"all": total} | dict(sorted(found.items(), key=lambda item: -item[1][1])[:25])


def whole_calls(arguments: argparse.Namespace, model: Any, until: float) -> None:
    """Seconds of calls as users make them, after one that compiles; and whether a `max_time` ends one."""
    new_tokens = arguments.slots - arguments.columns
    for batch in (1, 64):
        if time.monotonic() > until:
            return
        prompts = random_prompts(model.vocab_size, batch, arguments.columns)
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            continued(model, prompts, new_tokens)
            taken.append(time.perf_counter() - start)
        limit = min(taken) / 3
        start = time.perf_counter()
        ended = continued(model, prompts, new_tokens, max_time=limit)
        say(
            arguments,
            what="call",
            shape=arguments.shape,
            batch=batch,
            columns=arguments.columns,
            new_tokens=new_tokens,
            first_call_s=taken[0],
            call_s=min(taken[1:]),
            tokens_per_s=batch * new_tokens / min(taken[1:]),
            max_time=limit,
            max_time_took_s=time.perf_counter() - start,
            max_time_new_tokens=ended.shape[1] - arguments.columns,
        )


def transformers_calls(arguments: argparse.Namespace, until: float, new_tokens: int = 128) -> None:
    """Seconds of greedy calls of transformers on torch, with random weights of the same shape and dtype.

    It computes step by step, so a call shorter than ours tells its time per token.
    """
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return
    if time.monotonic() > until:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**varied(arguments.shape))).eval()
    torch.set_default_dtype(before)
    for batch in (1, 8, 64):
        prompts = torch.tensor(random_prompts(model.config.vocab_size, batch, arguments.columns), device=device)

        def call(length: int, model: Any = model, prompts: Any = prompts) -> float:
            start = time.perf_counter()
            options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, -1].cpu()
            return time.perf_counter() - start

        call(2)
        prefill_s, call_s = call(1), call(new_tokens)
        say(
            arguments,
            what="call of transformers",
            shape=arguments.shape,
            batch=batch,
            columns=arguments.columns,
            new_tokens=new_tokens,
            prefill_s=prefill_s,
            call_s=call_s,
            step_ms=(call_s - prefill_s) / (new_tokens - 1) * 1e3,
            tokens_per_s=batch * new_tokens / call_s,
        )
        if time.monotonic() > until:
            return


if __name__ == "__main__":
    main()
