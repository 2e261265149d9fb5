"""`jaxgen plan`: whether a call fits in memory, and if it does not, what would."""

import argparse
import dataclasses
import json

from jaxgen.cli.devices import mesh_sizes
from jaxgen.cli.terminal import byte_count, counted
from jaxgen.planning.plan import Plan, fraction_variable, plan


def run(arguments: argparse.Namespace) -> int:
    planned = plan(
        arguments.model,
        arguments.batch,
        arguments.prompt_tokens,
        arguments.new_tokens,
        num_beams=arguments.num_beams,
        num_return_sequences=arguments.num_return_sequences,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        device=arguments.device,
        mesh=mesh_sizes(arguments.mesh),
        follow_links=arguments.follow_links,
        revision=arguments.revision,
        assistant_model=arguments.assistant,
        num_assistant_tokens=arguments.num_assistant_tokens,
        cache_backend=arguments.cache_backend,
    )
    if arguments.json:
        print(json.dumps(_record(planned) | {"suggestions": [_record(other) for other in planned.suggestions]}))
    else:
        for name, value in _lines(planned).items():
            print(f"{name:<12}{value}")
        for other in planned.suggestions:
            print(f"{'would fit':<12}{_changes(planned, other)}: {byte_count(other.total)} of each {other.device}")
        if not planned.fits and not planned.suggestions:
            print(f"{'would fit':<12}no smaller batch, mesh or device that plan knows")
    return 0 if planned.fits else 1


def _record(planned: Plan) -> dict[str, object]:
    fields: dict[str, object] = {field.name: getattr(planned, field.name) for field in dataclasses.fields(planned)}
    del fields["suggestions"]
    return fields | {"fits": planned.fits}


def _lines(planned: Plan) -> dict[str, str]:
    """The lines to print, {heading: text}."""
    data, tensor = planned.mesh
    each = " of each device" if data * tensor > 1 else ""
    floor = "unknown, like the bandwidth of this device"
    if planned.assistant_model is not None:
        floor = "unknown: it depends on how many drafted tokens are right"
    if planned.step_ms is not None:
        floor = f"at least {planned.step_ms:,.2f} ms; at most {planned.tokens_per_s:,.0f} tokens/s for all rows"
    return {
        "model": f"{planned.model}, {planned.parameters:,} parameters in "
        + (f"{planned.quantize}, the rest in {planned.dtype}" if planned.quantize else planned.dtype),
        "call": f"{planned.batch} x {planned.prompt_tokens:,}{' of the source' if planned.source else ''} + "
        f"{counted(planned.new_tokens, 'token')}: "
        f"{counted(planned.rows, 'row')}, {counted(planned.slots, 'slot')} in the cache",
        "device": f"{data * tensor} x {planned.device}, rows over {data} and heads over {tensor}"
        if each
        else planned.device,
        "weights": byte_count(planned.weights) + each,
        "cache": byte_count(planned.cache) + each + (f", in {planned.cache_backend}" if planned.cache_backend else ""),
        **({"source": byte_count(planned.source) + each} if planned.source else {}),
        **_assistant(planned, each),
        "temporaries": f"{byte_count(planned.prefill_temporaries)} for the prompt, "
        f"{byte_count(planned.decode_temporaries)} for a step",
        "total": f"{byte_count(planned.total)} of {byte_count(planned.available)}: "
        + ("fits" if planned.fits else "does not fit"),
        **_share(planned),
        "step": floor,
    }


def _assistant(planned: Plan, each: str) -> dict[str, str]:
    """The bytes of an assistant, if there is one."""
    if planned.assistant_model is None:
        return {}
    weights, cache = byte_count(planned.assistant_weights), byte_count(planned.assistant_cache)
    return {"assistant": f"{planned.assistant_model}, {weights} of weights and {cache} of cache{each}"}


def _share(planned: Plan) -> dict[str, str]:
    """The share of a GPU's memory that JAX takes, and how to raise it; nothing if it takes all."""
    if planned.memory_share == 1:
        return {}
    whole = byte_count(planned.available / planned.memory_share)
    return {
        "memory": f"JAX takes {planned.memory_share:.0%} of the {whole} that the device has; "
        f"{fraction_variable()}=0.9 in the environment makes it 90%"
    }


def _changes(given: Plan, other: Plan) -> str:
    """The options in which `other` differs from `given`, as they are typed on the command line."""
    changes = {
        "batch": other.batch if other.batch != given.batch else None,
        "quantize": other.quantize if other.quantize != given.quantize else None,
        "mesh": f"{other.mesh[0]}x{other.mesh[1]}" if other.mesh != given.mesh else None,
        "device": other.device if other.device != given.device else None,
    }
    return " ".join(f"--{name} {value}" for name, value in changes.items() if value is not None)
