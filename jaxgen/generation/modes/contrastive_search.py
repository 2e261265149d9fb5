"""Contrastive search, with the fields and checks of transformers 4.41."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxgen.decoding.contrastive_search import ContrastiveSearch
from jaxgen.generation.config.validators import integer, number, positive
from jaxgen.generation.modes.base import Mode, Parts
from jaxgen.generation.prompt.inputs import Inputs

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig


class ContrastiveSearchMode(Mode):
    """A step reads the C candidates of a row, in C neighbouring slots, and then chooses one of them.

    The chosen one moves to the first of these slots, and the next candidates are written right after it:

    ```
    slots after the prompt    a a a . .      step 0: 3 candidates of the first token
                              1 b b b .      step 1: the chosen one, and 3 candidates of the second token
    ```
    """

    @classmethod
    def applies(cls, fields: "GenerationConfig", assistant_model: object = None) -> bool:
        del assistant_model
        return bool(fields.penalty_alpha)

    @classmethod
    def check(cls, fields: "GenerationConfig", assistant_model: object = None) -> None:
        del assistant_model
        alpha = number("penalty_alpha", fields.penalty_alpha, 0.0)
        if not 0 <= alpha <= 1:
            raise ValueError(f"`penalty_alpha`={alpha} must be from 0 to 1.")
        if not alpha:
            return
        if fields.do_sample or (positive("num_beams", fields.num_beams) or 1) > 1:
            raise ValueError(
                f"`penalty_alpha`={alpha} asks for contrastive search, which neither samples nor has beams. Leave out "
                "`do_sample` and `num_beams`, or `penalty_alpha`."
            )
        if (top_k := integer("top_k", fields.top_k)) is None or top_k < 2:
            raise ValueError(
                f"`penalty_alpha`={alpha} chooses among the `top_k` most likely tokens, but `top_k`={top_k}. Pass at "
                "least 2."
            )

    @classmethod
    def unheeded(cls, fields: "GenerationConfig") -> dict[str, object]:
        alone = bool(fields.penalty_alpha) and fields.do_sample is not True and (fields.num_beams or 1) == 1
        return {} if alone and (integer("top_k", fields.top_k) or 0) > 1 else {"penalty_alpha": None}

    @classmethod
    def unchecked(cls, given: Callable[[str], object]) -> set[str]:
        return {"top_k"} if given("penalty_alpha") else set()

    def check_encoder_decoder(self) -> None:
        raise ValueError(
            "contrastive search (`penalty_alpha`) does not go with an encoder-decoder model. Leave it out, and decode "
            "greedily, by sampling or with beams."
        )

    def check_inputs(self, inputs: Inputs) -> None:
        chunk = self.config.prefill_chunk_size
        inputs.check_plain("`penalty_alpha`", "which compares the hidden states of the text", chunk)
        if not self.config.use_cache and self.config.intermediates:
            raise ValueError(
                "`use_cache`=False asks for the attentions and hidden states of the whole text at every step, which "
                "cannot be combined with `penalty_alpha`. Leave `use_cache` out to get those of each token once."
            )

    def recorded(self, intermediates: tuple[str, ...], logprobs: bool) -> tuple[str, ...]:
        return (*super().recorded(intermediates, logprobs), *(["chosen"] if intermediates else []))

    def build(self, parts: Parts) -> ContrastiveSearch:
        return ContrastiveSearch(
            eos=parts.eos,
            max_length=parts.max_length,
            pad_token_id=self.pad_token_id(parts),
            penalty_alpha=number("penalty_alpha", self.config.merged.penalty_alpha, 0.0),
            processors=parts.processors,
            stopping_criteria=parts.stopping_criteria,
            top_k=min(self.config.merged.top_k, parts.vocab_size),
            outputs=parts.recorded,
            vocab_shards=parts.vocab_shards,
        )

    def attended_steps(self, fetched: Mapping[str, np.ndarray], rows: int, steps: int) -> list[np.ndarray]:
        # Attention is recorded before the chosen candidate moves, so its own slot is still its place among the C.
        attended = super().attended_steps(fetched, rows, steps)
        own = [step + fetched["chosen"][step + 1][:rows, None, None] for step in range(steps)]
        return [np.concatenate([slots[..., :-1], last], axis=2) for slots, last in zip(attended, own, strict=True)]

    def branches_of_step(self, fetched: Mapping[str, np.ndarray], rows: int, step: int) -> np.ndarray:
        return fetched["chosen"][step + 1][:rows, None]
