"""Continues prompts in many processes, which hold a model together. Every process runs this script.

Each process has the whole model, spread over its own devices, and prompts of its own. With `--tensor`, a copy of the
model spans more devices, those of several processes, which then have the same prompts.

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
    parser.add_argument("--tensor", type=int, help="devices of a copy of the model (default: those of one process)")
    parser.add_argument("--new-tokens", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.distributed:
        jax.distributed.initialize()  # before anything else of JAX

    tensor = arguments.tensor or jax.local_device_count()
    # In the order of the processes, so that a copy is on as few of them as possible.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.reshape(devices, (-1, tensor)), ("data", "tensor"))
    model = jaxgen.load(arguments.model, mesh=mesh)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")

    span = max(1, tensor // jax.local_device_count())  # processes that share a copy
    copy, copies = jax.process_index() // span, jax.process_count() // span
    own = PROMPTS[copy::copies]
    batch = tokenizer(own, padding=True, return_tensors="np")
    key = jax.random.fold_in(jax.random.key(0), copy)
    output = jaxgen.generate(model, **batch, max_new_tokens=arguments.new_tokens, do_sample=True, key=key)
    if jax.process_index() % span == 0:
        for text in tokenizer.batch_decode(output, skip_special_tokens=True):
            print(f"process {jax.process_index()}: {text}", flush=True)


if __name__ == "__main__":
    main()
