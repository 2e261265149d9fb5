"""Continues many prompts with independent workers: Ray gives each of them batches, and its own devices.

The workers know nothing of each other, so there is no mesh over processes: one that is slow, or is started again, keeps
nobody waiting. This is for a model that the devices of one worker can hold.

    pip install "ray[data]"
    python examples/ray_data.py                        two workers on CPUs
    python examples/ray_data.py --workers 8 --gpus 1   eight workers with a GPU each, on any hosts of the Ray cluster
"""

import argparse

import numpy as np
import ray
from transformers import AutoTokenizer

import jaxgen

ANIMALS = ["fox", "bear", "rabbit", "cat", "dog", "mouse"]
OPENINGS = ["One day, a small", "Once upon a time, there was a", "Near a river lived a"]


def prompts() -> list[str]:
    return [f"{opening} {animal}" for opening in OPENINGS for animal in ANIMALS]


class Worker:
    """Holds a model, and continues the prompts of one batch after the other."""

    def __init__(self, model: str, new_tokens: int):
        self.model = jaxgen.load(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.new_tokens = new_tokens

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        inputs = self.tokenizer([*batch["prompt"]], padding=True, return_tensors="np")
        # A key per prompt: its text does not depend on the worker, nor on the batch.
        output = jaxgen.generate(
            self.model, **inputs, max_new_tokens=self.new_tokens, do_sample=True, key=batch["number"]
        )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return {**batch, "text": np.array(texts, dtype=object)}


def continued(texts: list[str], model: str, new_tokens: int, workers: int, gpus: int) -> list[str]:
    """The texts with their continuations, in the same order."""
    rows = ray.data.from_items([{"number": number, "prompt": text} for number, text in enumerate(texts)])
    results = rows.map_batches(
        Worker,
        fn_constructor_args=(model, new_tokens),
        batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
    )
    return [row["text"] for row in sorted(results.take_all(), key=lambda row: row["number"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=jaxgen.BUNDLED_MODEL, help="a folder or name that every worker can read")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0, help="of each worker (default: 0)")
    parser.add_argument("--new-tokens", type=int, default=20)
    arguments = parser.parse_args()
    for text in continued(prompts(), str(arguments.model), arguments.new_tokens, arguments.workers, arguments.gpus):
        print(text)


if __name__ == "__main__":
    main()
