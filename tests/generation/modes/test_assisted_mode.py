"""What does not go with prompt lookup is refused by name; its settings have the ranges of transformers."""

from typing import Any

import numpy as np
import pytest

import jaxgen

PROMPT = np.array([[5, 9, 17]])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"prompt_lookup_num_tokens": 0}, "`prompt_lookup_num_tokens`=0"),
        ({"prompt_lookup_num_tokens": 65}, "`prompt_lookup_num_tokens`=65 must be from 1 to 64"),
        ({"max_matching_ngram_size": -1}, "`max_matching_ngram_size`=-1 must be from 0 to 64"),
        ({"num_beams": 2}, "does not go with `num_beams`=2"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "does not go with `penalty_alpha`=0.6"),
        ({"use_cache": False}, "needs a cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "`output_attentions`=True does not go with"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [3, 4]}, "runs on the host"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_prompt_lookup_is_refused_by_name(
    keywords: dict[str, Any], message: str, model: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, PROMPT, **{"prompt_lookup_num_tokens": 3, "max_new_tokens": 4, **keywords})


def test_a_streamer_gets_the_prompts_and_then_every_token(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.taken: list[np.ndarray] = []

        def put(self, value: np.ndarray) -> None:
            self.taken.append(np.asarray(value))

        def end(self) -> None:
            self.taken.append(np.array([-1]))

    streamer = Streamer()
    keywords = {"max_new_tokens": 9, "eos_token_id": None}
    output = jaxgen.generate(model, PROMPT, streamer=streamer, prompt_lookup_num_tokens=3, **keywords)
    np.testing.assert_array_equal(output, jaxgen.generate(model, PROMPT, **keywords))
    np.testing.assert_array_equal(streamer.taken[0], PROMPT)
    assert [int(token[0]) for token in streamer.taken[1:]] == [*output[0, 3:].tolist(), -1]
