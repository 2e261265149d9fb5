"""Assisted decoding beside the plain call: prompt lookup where a text repeats its prompt and where not, and assistants.

    python bench/assisted.py
    python bench/assisted.py --model FOLDER_OR_FILE --num-tokens 3 7 --batch 1 8
    python bench/assisted.py --shape 1b --assistant 135m --right 0.6 0.8 0.9 --num-tokens 3
    python bench/assisted.py --model FOLDER_OR_FILE --question "How old is the oldest tree?" --passage FILE

The calls alternate, so that a machine that slows down slows both; figures are medians. Tokens must be equal.
The random weights of the shapes write no text, so a rule makes them copy: of a loop of words only the next one is
allowed. For the same reason their assistants do the work of a draft and then propose the tokens of the plain call, a
share of them right.
"""

import argparse
import functools
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import positive, record

import jaxgen
from jaxgen.checkpoint.load import QUANTIZATIONS, quantised_model
from jaxgen.decoding.assistant import Assistant, AssistantMemory
from jaxgen.decoding.drafters import Choose, Chosen, Draft, Texts
from jaxgen.planning.shapes import SHAPES
from jaxgen.pytree import Int32, pytree

LOOP = 40  # tokens of the text that is copied


def copies(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    """Allows only the token that came `LOOP` tokens before."""
    token = jax.lax.dynamic_slice_in_dim(input_ids, cur_len - LOOP, 1, axis=1)
    return jnp.where(jnp.arange(scores.shape[1])[None] == token, scores, -jnp.inf)


@pytree
@dataclass(frozen=True)
class Told(Assistant):
    """Does the work of an assistant and proposes the next token of int32 [N, S] texts instead of the one it chose."""

    texts: Int32 = field(kw_only=True)

    def draft(self, texts: Texts, limits: jax.Array, choose: Choose, memory: AssistantMemory) -> Draft[AssistantMemory]:
        def told(texts: Texts, logits: jax.Array) -> Chosen:
            chosen = choose(texts, logits)
            column = jnp.minimum(texts.lengths, self.texts.shape[1] - 1)[:, None]
            tokens = jnp.take_along_axis(jnp.asarray(self.texts), column, axis=1)[:, 0]
            # Which depends on the logits, so that they are computed.
            return chosen._replace(tokens=jnp.where(chosen.tokens >= 0, tokens, -1))

        return super().draft(texts, limits, told, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="with random weights (default: 135m)")
    parser.add_argument("--model", help="a folder, a GGUF file or a name on the hub, instead of a shape")
    parser.add_argument(
        "--assistant", help="a shape, with --model a model, int8 or int4: drafts instead of prompt lookup"
    )
    parser.add_argument("--right", nargs="+", type=float, help="shares of the drafted tokens that are right")
    parser.add_argument("--question", help="with --model, asked about a passage, and answered with prompt lookup")
    parser.add_argument("--passage", type=Path, help="a file with the passage")
    parser.add_argument("--num-tokens", nargs="+", type=positive, default=[3, 7])
    parser.add_argument("--batch", nargs="+", type=positive, default=[1])
    parser.add_argument("--new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    name = arguments.model or arguments.shape
    model = jaxgen.load(name) if arguments.model else jaxgen.from_config(SHAPES[name])
    measure = functools.partial(measured, model, repeats=arguments.repeats)
    for batch in arguments.batch:
        ids = np.random.default_rng(0).integers(3, 1000, (batch, LOOP))
        call = {"max_new_tokens": arguments.new_tokens, "eos_token_id": None}
        for num_tokens in arguments.num_tokens:
            tasks: dict[str, tuple[np.ndarray, dict[str, Any], dict[str, Any]]] = {}
            lookup = {"prompt_lookup_num_tokens": num_tokens}
            if arguments.question:
                ids = asked(name, arguments.question, arguments.passage.read_text(), batch)
                tasks["answer"] = ids, {"max_new_tokens": arguments.new_tokens}, lookup
            elif arguments.right:
                drafts = told(model, arguments.assistant, ids, call, num_tokens, arguments.right)
                tasks |= {f"{share:.0%} right": (ids, call, {"assistant_model": each}) for share, each in drafts}
            elif arguments.assistant:
                kind = arguments.assistant
                other = quantised_model(model, kind) if kind in QUANTIZATIONS else jaxgen.load(kind)
                assistant = {"assistant_model": other, "num_assistant_tokens": num_tokens}
                tasks["assistant"] = ids, call, assistant
            else:
                tasks["copy"] = ids, {**call, "logits_processor": [copies]}, lookup
                tasks["no copy"] = ids, call, lookup
            for task, (prompts, plain, assisted) in tasks.items():
                row = {"model": name, "assistant": arguments.assistant, "task": task, "batch": batch}
                row |= {"num_tokens": num_tokens, **measure(prompts, plain, assisted)}
                print(row, flush=True)
                record(arguments.json, row)


def told(
    model: Any, shape: str, ids: np.ndarray, call: dict[str, Any], num_tokens: int, shares: list[float]
) -> list[tuple[float, Told]]:
    """Assistants of a shape whose tokens are right with these probabilities."""
    texts = jaxgen.generate(model, ids, attention_mask=np.ones_like(ids), **call)
    assistant, rng = jaxgen.from_config(SHAPES[shape]), np.random.default_rng(0)
    # A wrong token is another one than the right one.
    drafts = {share: np.where(rng.random(texts.shape) < share, texts, 2) for share in shares}
    return [(share, Told(assistant, num_tokens, 0.0, False, num_tokens, texts=each)) for share, each in drafts.items()]


def asked(name: str, question: str, passage: str, batch: int) -> np.ndarray:
    """A question about a passage in the model's chat template, int [batch, P]."""
    tokenizer = jaxgen.load_tokenizer(name)
    message = {"role": "user", "content": f"{passage}\n\n{question}"}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="np", return_dict=True)
    return np.repeat(np.asarray(ids["input_ids"]), batch, axis=0)


def measured(
    model: Any, ids: np.ndarray, call: dict[str, Any], assisted: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Milliseconds per token of the plain and of the assisted call, and the median of their ratios."""
    mask = np.ones_like(ids)

    def timed(**more: Any) -> tuple[float, np.ndarray]:
        begun = time.perf_counter()
        tokens = jaxgen.generate(model, ids, attention_mask=mask, **call, **more)
        return (time.perf_counter() - begun) / (tokens.shape[1] - ids.shape[1]) * 1e3, tokens

    times: list[tuple[float, float]] = []
    for number in range(repeats + 1):
        (plain, expected), (sooner, tokens) = timed(), timed(**assisted)
        np.testing.assert_array_equal(tokens, expected)
        if number:  # the first calls compile
            times.append((plain, sooner))
    plains, others = zip(*times, strict=True)
    output: Any = jaxgen.generate(model, ids, attention_mask=mask, return_dict_in_generate=True, **call, **assisted)
    return {
        "plain_ms_per_token": round(statistics.median(plains), 3),
        "assisted_ms_per_token": round(statistics.median(others), 3),
        "speed": round(statistics.median(plain / sooner for plain, sooner in times), 3),
        "rounds": int(output.rounds.max()),
        "drafted": int(output.drafted.sum()),
        "accepted": int(output.accepted.sum()),
    }


if __name__ == "__main__":
    main()
