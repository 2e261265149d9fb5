"""How the compilers for TPUs and an H200 compile the two programs, without such a device.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python bench/compilers.py --target v5e v6e v5p    # with jax[tpu]
    JAX_PLATFORMS=cpu python bench/compilers.py --target h200                                # with jax[cuda12]

Lowers the real prefill and decode for models of 1B to 405B parameters on 1 to 256 devices and reports the compiler's
answer: bytes on each device, what the decode loop copies and sends, and whether it fits. No weight is allocated. `plan`
is the ratio of the bytes that `jaxgen plan` predicts to the compiler's. A TPU's "bytes accessed" count prefetched bytes
twice. The compiler for a GPU does not refuse programs that are too large; their size is compared with the memory here.

`step ms` is the TPU compiler's own estimate of a decode step: the cycles it expects of the loop's instructions, over
the clock. It is a cost model, not a measurement, but it ranks the forms of a program. `floor` is its ratio to the time
that the memory takes to deliver the weights and the filled cache, by the data sheet. `sends` are the collectives of a
step, their bytes, and the time that the links take for these bytes. Processes with other rows of a batch have programs
of their own, so an axis "data" over them sends nothing: `8b` on 32x8 devices is 32 times `8b` on 1x8.
"""

import argparse
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import cache_options, record
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.base import Call
from jaxgen.checkpoint.load import QUANTIZATIONS, abstract, quantised_model
from jaxgen.checkpoint.source import named_leaves
from jaxgen.decoding import loop
from jaxgen.generation.build import build_call, read_request
from jaxgen.generation.request import Request
from jaxgen.models import FAMILIES
from jaxgen.planning.plan import plan
from jaxgen.planning.shapes import SHAPES

# XLA's description of an H200, since there is no such device to query.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""
# The smallest topology with so many devices.
TOPOLOGIES = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"},
}
# Cycles per second.
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
# Bytes per second that a device can send to its neighbours, by the data sheets: half of ICI's and NVLink's figures for
# both directions.
LINKS = {"v5e": 200e9, "v5p": 600e9, "v6e": 400e9, "h200": 450e9}


@dataclass(frozen=True)
class Case:
    """One call on one mesh.

    Attributes:
        mesh: devices on the axes "data" and "tensor".
    """

    target: str
    shape: str
    mesh: tuple[int, int]
    batch: int
    prompt_tokens: int
    new_tokens: int
    num_beams: int = 1
    quantize: str | None = None
    cache_backend: str | None = None


CASES = [
    Case("v5e", "1b", (1, 1), 1, 1024, 1024),
    Case("v5e", "1b", (1, 1), 16, 1024, 1024),
    Case("v5e", "8b", (1, 1), 1, 128, 128),
    Case("v5e", "8b", (1, 1), 1, 128, 128, quantize="int8"),
    Case("v5e", "8b", (1, 1), 8, 128, 128, quantize="int8"),
    Case("v5e", "8b", (1, 1), 1, 128, 128, quantize="int4"),
    Case("v5e", "8b", (1, 1), 8, 128, 128, quantize="int4"),
    Case("v5e", "8b", (1, 1), 8, 1024, 1024, quantize="int8"),
    Case("v5e", "8b", (1, 1), 8, 1024, 1024, quantize="int8", cache_backend="int8"),
    Case("v5e", "8b", (1, 8), 16, 1024, 1024),
    Case("v5e", "8b", (32, 8), 512, 1024, 1024),
    Case("v6e", "8b", (1, 1), 1, 512, 512),
    Case("v6e", "8b", (1, 1), 16, 1024, 1024),
    Case("v6e", "8b", (1, 1), 64, 512, 512),
    Case("v6e", "8b", (1, 1), 64, 512, 512, cache_backend="int8"),
    Case("v6e", "8b", (1, 1), 64, 512, 512, cache_backend="fp8"),
    Case("v6e", "8b", (1, 1), 4, 1024, 256, num_beams=4),
    Case("v6e", "70b", (1, 8), 16, 512, 512),
    Case("v5p", "8b", (1, 1), 16, 1024, 1024),
    Case("v5p", "70b", (1, 4), 16, 512, 512),
    Case("v5p", "405b", (1, 8), 16, 512, 512),
    Case("v5p", "405b", (1, 16), 16, 512, 512),
    Case("v5p", "405b", (4, 16), 64, 512, 512),
    Case("v5p", "405b", (16, 16), 256, 512, 512),
    Case("h200", "1b", (1, 1), 16, 1024, 1024),
    Case("h200", "8b", (1, 1), 1, 1024, 1024),
    Case("h200", "8b", (1, 1), 16, 1024, 1024),
    Case("h200", "8b", (1, 1), 64, 512, 512),
    Case("h200", "8b", (1, 1), 64, 512, 512, cache_backend="int8"),
    Case("h200", "8b", (1, 1), 64, 512, 512, cache_backend="fp8"),
    Case("h200", "8b", (2, 4), 64, 1024, 1024),
    Case("h200", "70b", (1, 4), 16, 512, 512),
    Case("h200", "405b", (1, 8), 16, 512, 512),
    Case("h200", "405b", (1, 16), 16, 512, 512),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=(*TOPOLOGIES, "h200"), required=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--batch", type=int, nargs="+", help="of the cases, those with such a batch")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="of the cases, those that are quantised")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    print(
        f"{'target':6} {'shape':5} {'mesh':>5} {'batch':>5} {'columns':>11} {'compile s':>11} {'weights':>8} "
        f"{'cache GB':>8} {'temporaries MB':>15} {'plan':>5} {'moves':>5} {'sends':>21} {'tokens/s':>9} {'step ms':>8} "
        f"{'floor':>5}"
    )
    for case in CASES:
        if arguments.batch is not None and case.batch not in arguments.batch:
            continue
        if arguments.quantize not in (None, case.quantize):
            continue
        if case.target in arguments.target and case.shape in arguments.shape:
            figures = examine(case, devices(case.target, math.prod(case.mesh)))
            print(row(case, figures), flush=True)
            record(arguments.json, {**vars(case), **figures})


def devices(target: str, count: int) -> Any:
    """Descriptions of devices, which need not exist here."""
    if target == "h200":
        described = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=H200)
        return described.devices
    name = next(name for size, name in TOPOLOGIES[target].items() if size >= count)
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{name}").devices[:count]


def examine(case: Case, found: Any) -> dict[str, Any]:
    """The figures of a case, in bytes on each device; those of a program that the compiler refuses are missing."""
    planned = plan(
        case.shape,
        case.batch,
        case.prompt_tokens,
        case.new_tokens,
        num_beams=case.num_beams,
        dtype="bfloat16",
        device=case.target,
        mesh=case.mesh,
        quantize=case.quantize,
        cache_backend=case.cache_backend,
    )
    figures: dict[str, Any] = {
        "dtype": "bfloat16",
        "plan_bytes": planned.total,
        "plan_fits": planned.fits,
        "roofline_tokens_per_s": planned.tokens_per_s,
        "refused": None,
    }
    model, call, everywhere = programs(case, found)
    try:
        lowered = loop.prefill.lower(model, call, ())
        prefill, figures["prefill_compile_s"] = timed(lowered)
        shardings = prefill.output_shardings[0]
        state = jax.tree.map(placed, lowered.out_info[0], shardings)
        figures["prefill_temp_bytes"] = prefill.memory_analysis().temp_size_in_bytes
        cache = jax.tree.leaves(state.cache.layers)
        shares = [math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in cache]
        advance, figures["decode_compile_s"] = timed(
            loop.advance.lower(model, state, call.strategy, placed(np.int32(1), everywhere), ())
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        figures["refused"] = " ".join(str(error).split())[:300]
        return figures
    memory = advance.memory_analysis()
    weights = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(model)]
    weights_bytes = sum(size * leaf.dtype.itemsize for size, leaf in zip(weights, jax.tree.leaves(model), strict=True))
    figures |= {
        "weights_bytes": weights_bytes,
        "cache_bytes": sum(shares),
        "decode_temp_bytes": memory.temp_size_in_bytes,
    }
    figures["total_bytes"] = memory.argument_size_in_bytes + max(
        figures["prefill_temp_bytes"], figures["decode_temp_bytes"]
    )
    figures["plan_ratio"] = planned.total / figures["total_bytes"]
    figures["fits"] = figures["total_bytes"] <= planned.available
    body = loop_body(advance.as_text())
    matrices = [
        size
        for size, leaf in zip(weights, jax.tree.leaves(model), strict=True)
        if leaf.ndim == 2 and min(leaf.shape) > 16
    ]
    figures |= {
        "moves": moves(body, min(*matrices, shares[0] // 2)),
        "collectives": sum(each.operation.removesuffix("-start") in COLLECTIVES for each in body),
        "collective_bytes": sum(each.sent for each in body),
        "collective_ms": sum(each.sent_around(case.mesh[1]) for each in body) / LINKS[case.target] * 1e3,
    }
    cost = (advance.cost_analysis() or {}).get("bytes accessed")
    figures["bytes_accessed_of_floor"] = None if cost is None else cost / (weights_bytes + sum(shares))
    if cycles := sum(each.cycles for each in body):  # a GPU's compiler gives none
        figures["estimated_step_ms"] = cycles / CLOCKS[case.target] * 1e3
        figures["estimated_of_floor"] = figures["estimated_step_ms"] / planned.step_ms
    return figures


def programs(case: Case, found: Any) -> tuple[Any, Call, NamedSharding]:
    """The arguments of the programs, as shapes with shardings; and the sharding of replicated arrays."""
    grid = Mesh(np.array(found).reshape(case.mesh), ("data", "tensor"))
    everywhere = NamedSharding(grid, PartitionSpec())
    config = SHAPES[case.shape]
    model = abstract(config, grid if grid.size > 1 else None)
    spec = FAMILIES[config["model_type"]].partition(model.config, grid)
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=NamedSharding(grid, spec(path)))
        for path, leaf in named_leaves(model)
    ]
    model = jax.tree.unflatten(jax.tree.structure(model), leaves)
    if case.quantize is not None:  # on one device
        small = jax.eval_shape(lambda model: quantised_model(model, case.quantize), model)
        model = jax.tree.map(lambda leaf: placed(leaf, everywhere), small)
    options = {"max_new_tokens": case.new_tokens, "num_beams": case.num_beams, **cache_options(case.cache_backend)}
    calls = []

    def lowered(model: Any) -> None:
        prompt = np.ones((case.batch, case.prompt_tokens), np.int32)
        request = Request(inputs=prompt, keywords=options)
        calls.append(build_call(model, request, *read_request(model, request)).call)

    jax.eval_shape(lowered, model)
    (call,) = calls
    return model, jax.tree.map(lambda leaf: placed(leaf, everywhere), call), everywhere


def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def timed(lowered: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_MOVING = ("copy", "copy-start", "transpose", "concatenate", "gather", "pad", "scatter", "select")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}


@dataclass(frozen=True)
class Instruction:
    """Of an HLO text.

    Attributes:
        operation: such as "copy-start".
        arrays: of the result, each with its shape and whether it is in the memory that is not on the chip.
        cycles: that a TPU's compiler expects it to take; 0 if it does not say.
    """

    operation: str
    arrays: tuple[tuple[str, bool], ...]
    cycles: int = 0

    @property
    def sent(self) -> int:
        """Bytes of a collective's result on a device; what starts one has its operands beside it."""
        name = self.operation.removesuffix("-start")
        if name not in COLLECTIVES:
            return 0
        sizes = [elements(shape) * _BYTES.get(shape[: shape.index("[")], 8) for shape, _ in self.arrays]
        return sum(sizes) if name == "all-reduce" else max(sizes)

    def sent_around(self, devices: int) -> float:
        """Bytes that a device of a ring sends: an all-reduce is a reduce-scatter and an all-gather."""
        if self.operation.startswith("collective-permute"):
            return self.sent
        rounds = 2 if self.operation.removesuffix("-start") == "all-reduce" else 1
        return rounds * self.sent * (devices - 1) / devices


def loop_body(text: str) -> list[Instruction]:
    """Everything that the body of the program's loop runs, fusions included, and what inner loops repeat, repeated.

    A compiler for TPUs may turn a product and its collective into an inner loop, which multiplies while it sends.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations.setdefault(header[1], [])
        else:
            lines.append(line.strip())
    inner = {
        name for each in computations.values() for line in each for name in re.findall(r"calls=%?([\w.\-]+)", line)
    }
    loops = {
        body: (name, condition)
        for name, each in computations.items()
        if name not in inner
        for line in each
        for condition, body in re.findall(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    }
    bodies = [body for body, (name, _) in loops.items() if name not in loops]
    if len(bodies) != 1:
        raise ValueError(f"the decode is one loop, but the program has {len(bodies)}")
    pending, reached = [(bodies[0], 1)], {}  # each computation, and how often it runs in a step
    while pending:
        name, times = pending.pop()
        if name not in reached:
            reached[name] = times
            for called in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", "\n".join(computations[name])):
                again = rounds(computations[loops[called][1]], computations[called]) if called in loops else 1
                pending.append((called, times * again))
    # A fusion in a fusion, such as one that reads a weight in another layout, has no memory of its own.
    nested = {
        name for each in inner for name in re.findall(r"calls=%?([\w.\-]+)", "\n".join(computations.get(each, [])))
    }
    found = []
    for place, line in ((name, line) for name in reached for line in computations[name]):
        if match := re.match(r"(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(%?[\w.\-]*", line):
            arrays = re.findall(r"(\w+\[[\d,]*\])(\{[^}]*\})?", match[1])
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            instruction = Instruction(
                match[2],
                tuple((shape, "S(" not in layout and place not in nested) for shape, layout in arrays),
                int(cycles[1]) if cycles else 0,
            )
            found += [instruction] * reached[place]
    return found


def rounds(condition: list[str], body: list[str]) -> int:
    """How often a loop runs that counts from 0 to a constant by steps of a constant; 1 for loops of other kinds.

    ```
    condition   %n = constant(8)   %i = get-tuple-element(%state), index=4   ROOT %more = compare(%i, %n), direction=LT
    body        %step = constant(2)   %next = add(%i, %step)   ROOT %state = tuple(%a, %b, %c, %d, %next)
    ```
    """

    def values(lines: list[str]) -> dict[str, str]:
        """What each name stands for, as "add(%i, %step), ..."."""
        matches = (re.match(r"(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*\(.*)", line) for line in lines)
        return {match[1]: match[2] for match in matches if match}

    def constant(name: str, known: dict[str, str]) -> int | None:
        match = re.match(r"constant\((\d+)\)", known.get(name, ""))
        return int(match[1]) if match else None

    def operands(value: str) -> list[str]:
        return re.findall(r"%([\w.\-]+)", value[: value.index(")")])

    outside, inside = values(condition), values(body)
    compared = next((value for value in outside.values() if value.startswith("compare(") and "LT" in value), None)
    result = next((value for value in inside.values() if value.startswith("tuple(")), None)
    if compared is None or result is None:
        return 1
    counter, end = operands(compared)
    index = re.search(r"index=(\d+)", outside.get(counter, ""))
    limit = constant(end, outside)
    if index is None or limit is None:
        return 1
    following = inside.get(operands(result)[int(index[1])], "")
    steps = [constant(name, inside) for name in operands(following)] if following.startswith("add(") else []
    return next((limit // step for step in steps if step), 1)


def moves(body: list[Instruction], smallest: int) -> list[str]:
    """What rewrites in the device's memory so many elements or more, such as a layer's cache or a weight."""
    return [
        f"{each.operation} {each.arrays[0][0]}"
        for each in body
        if each.operation in _MOVING and each.arrays and each.arrays[0][1] and elements(each.arrays[0][0]) >= smallest
    ]


def elements(shape: str) -> int:
    """Of "f32[2,3]"."""
    return math.prod(int(size) for size in shape[shape.index("[") + 1 : -1].split(",") if size)


def row(case: Case, figures: dict[str, Any]) -> str:
    name = (
        f"{case.target:6} {case.shape:5} {case.mesh[0]:>3}x{case.mesh[1]} {case.batch:5} "
        f"{case.prompt_tokens:>5}+{case.new_tokens:<5}"
    )
    if figures["refused"]:
        said = "fits" if figures["plan_fits"] else "does not fit, either"
        return f"{name} refused for lack of memory; plan: {said}: {figures['plan_bytes'] / 1e9:.1f} GB"
    sends = f"{figures['collectives']}, {figures['collective_bytes'] / 1e6:.1f} MB, {figures['collective_ms']:.2f} ms"
    return (
        f"{name} {figures['prefill_compile_s']:5.1f} {figures['decode_compile_s']:5.1f} "
        f"{figures['weights_bytes'] / 1e9:8.2f} {figures['cache_bytes'] / 1e9:8.2f} "
        f"{figures['prefill_temp_bytes'] / 1e6:8.0f} {figures['decode_temp_bytes'] / 1e6:6.0f} "
        f"{figures['plan_ratio']:5.2f} {len(figures['moves']):5} {sends:>21} {figures['roofline_tokens_per_s']:9,.0f}"
        + (
            f" {figures['estimated_step_ms']:8.2f} {figures['estimated_of_floor']:5.2f}"
            if "estimated_step_ms" in figures
            else ""
        )
    )


if __name__ == "__main__":
    main()
