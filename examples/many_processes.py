"""Continues prompts in many processes, each with prompts of its own. Every process runs this script.

The devices of a process hold the whole model. If that is too large, let the devices of several processes hold it, with
`--processes-per-copy`; these then have the same prompts.

    python examples/many_processes.py                                      one process
    srun python examples/many_processes.py --distributed                   see examples/slurm.sbatch
"""

import argparse

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import AutoTokenizer

import jaxgen

PROMPTS = ["Once upon a time", "One day, a small fox", "Near a quiet river", "Tom had a red car", "It was a cold day"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=jaxgen.BUNDLED_MODEL, help="a folder that every process can read")
    parser.add_argument("--distributed", action="store_true", help="find the other processes of the job")
    parser.add_argument("--processes-per-copy", type=int, default=1, help="that hold the model together (default: 1)")
    parser.add_argument("--new-tokens", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.distributed:
        jax.distributed.initialize()  # before anything else of JAX

    copy, copies = (number // arguments.processes_per_copy for number in (jax.process_index(), jax.process_count()))
    # In the order of the processes, so that each copy has all the devices of its own.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.reshape(devices, (copies, -1)), ("data", "tensor"))
    model = jaxgen.load(arguments.model, mesh=mesh)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")

    own = PROMPTS[copy::copies] or PROMPTS[:1]  # every process calls `generate`, so each has at least one
    batch = tokenizer(own, padding=True, return_tensors="np")
    key = jax.random.fold_in(jax.random.key(0), copy)  # equal prompts are to have different texts
    output = jaxgen.generate(model, **batch, max_new_tokens=arguments.new_tokens, do_sample=True, key=key)
    if jax.process_index() % arguments.processes_per_copy == 0:
        for text in tokenizer.batch_decode(output, skip_special_tokens=True):
            print(f"process {jax.process_index()}: {text}", flush=True)


if __name__ == "__main__":
    main()
