"""`jaxgen plan`: whether a call fits a device or a mesh, and what would."""

import argparse
import dataclasses
import json
import re
from typing import Any

from jaxgen.cli.terminal import byte_count, counted
from jaxgen.planning.plan import Plan, fraction_variable, plan


def run(arguments: argparse.Namespace) -> int:
    mesh = re.fullmatch(r"(\d+)x(\d+)", arguments.mesh)
    if mesh is None:
        raise ValueError(f"--mesh {arguments.mesh} must be two numbers of devices, such as 1x8.")
    found = plan(
        arguments.model,
        arguments.batch,
        arguments.prompt_tokens,
        arguments.new_tokens,
        num_beams=arguments.num_beams,
        num_return_sequences=arguments.num_return_sequences,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        device=arguments.device,
        mesh=(int(mesh[1]), int(mesh[2])),
        follow_links=arguments.follow_links,
    )
    if arguments.json:
        print(json.dumps(_record(found) | {"suggestions": [_record(each) for each in found.suggestions]}))
    else:
        for name, value in _lines(found).items():
            print(f"{name:<12}{value}")
        for each in found.suggestions:
            print(f"{'would fit':<12}{_changes(found, each)}: {byte_count(each.total)} of each {each.device}")
        if not found.fits and not found.suggestions:
            print(f"{'would fit':<12}nothing that plan knows of")
    return 0 if found.fits else 1


def _record(found: Plan) -> dict[str, Any]:
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    del fields["suggestions"]
    return fields | {"fits": found.fits}


def _lines(found: Plan) -> dict[str, str]:
    """Lines by what they are about."""
    data, tensor = found.mesh
    each = " of each device" if data * tensor > 1 else ""
    floor = "unknown: so is the bandwidth of this device"
    if found.step_ms is not None:
        floor = f"at least {found.step_ms:,.2f} ms; at most {found.tokens_per_s:,.0f} tokens/s for all rows"
    return {
        "model": f"{found.model}, {found.parameters:,} parameters in "
        + (f"{found.quantize}, the rest in {found.dtype}" if found.quantize else found.dtype),
        "call": f"{found.batch} x {found.prompt_tokens:,} + {counted(found.new_tokens, 'token')}: "
        f"{counted(found.rows, 'row')}, {counted(found.slots, 'slot')} in the cache",
        "device": f"{data * tensor} x {found.device}, rows over {data} and heads over {tensor}"
        if each
        else found.device,
        "weights": byte_count(found.weights) + each,
        "cache": byte_count(found.cache) + each,
        "temporaries": f"{byte_count(found.prefill_temporaries)} for the prompt, "
        f"{byte_count(found.decode_temporaries)} for a step",
        "total": f"{byte_count(found.total)} of {byte_count(found.available)}: "
        + ("fits" if found.fits else "does not fit"),
        **_share(found),
        "step": floor,
    }


def _share(found: Plan) -> dict[str, str]:
    """What JAX leaves of a GPU's memory, and how it takes more."""
    if found.memory_share == 1:
        return {}
    whole = byte_count(found.available / found.memory_share)
    return {
        "memory": f"JAX takes {found.memory_share:.0%} of the {whole} that the device has; "
        f"{fraction_variable()}=0.9 in the environment makes it 90%"
    }


def _changes(given: Plan, other: Plan) -> str:
    """The options that differ, as they would be typed."""
    changes = {
        "batch": other.batch if other.batch != given.batch else None,
        "quantize": other.quantize if other.quantize != given.quantize else None,
        "mesh": f"{other.mesh[0]}x{other.mesh[1]}" if other.mesh != given.mesh else None,
        "device": other.device if other.device != given.device else None,
    }
    return " ".join(f"--{name} {value}" for name, value in changes.items() if value is not None)
