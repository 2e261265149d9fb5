"""One of several processes of a program that `jax.distributed` joins; each generates by itself, on its own device.

python tests/helpers/processes.py FOLDER PORT NUMBER COUNT
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import jaxgen


def main(folder: Path, port: int, number: int, count: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", count, number)
    assert len(jax.devices()) == count and len(jax.local_devices()) == 1
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("tensor",))
    answers = []
    for model in (jaxgen.load(folder), jaxgen.load(folder, mesh=mesh)):
        for arguments in ({}, {"do_sample": True, "key": 3}):
            answers.append(jaxgen.generate(model, [[5, 6, 7]], max_new_tokens=6, **arguments).tolist())
    print(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
