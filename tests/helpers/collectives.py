"""Prints the largest arrays that eight virtual devices exchange in a step, as JSON: {call: elements}.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/helpers/collectives.py CONFIG CALLS

CONFIG is that of a model, and CALLS are arguments by the names of calls, both in JSON.
"""

import json
import math
import re
import sys
from typing import Any

import jax
import numpy as np

import jaxgen
from jaxgen.decoding import loop

COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def largest(model: Any, arguments: dict[str, Any]) -> int:
    """Elements of the largest result of a collective in the program of the steps.

    Branches that a step takes only if the candidates of a sample are not enough are left out.
    """
    call = jaxgen.prepare(model, np.full((2, 9), 5), max_new_tokens=12, **arguments)
    state, _ = loop.prefill(model, call)
    text = loop.advance.lower(model, state, call.strategy, np.int32(1)).compile().as_text()
    lines = [line for line in text.splitlines() if "/cond/branch" not in line]
    results = [match[1] for line in lines if (match := COLLECTIVE.search(line))]
    shapes = [shape for result in results for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    return max(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


def main(config: dict[str, Any], calls: dict[str, dict[str, Any]]) -> None:
    model = jaxgen.from_config(config, mesh=jax.make_mesh((1, 8), ("data", "tensor")))
    print(json.dumps({name: largest(model, arguments) for name, arguments in calls.items()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
