"""Assisted decoding, with drafts from prompt lookup, an assistant model, a `Drafter` or an early exit."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxgen.base import Model, Source, row_shards
from jaxgen.buckets import row_bucket
from jaxgen.decoding.assistant import Assistant, Translation
from jaxgen.decoding.assisted import Assisted
from jaxgen.decoding.drafters import Drafter, PromptLookup
from jaxgen.generation.config.fields import FIELDS
from jaxgen.generation.config.validators import integer, number, positive
from jaxgen.generation.modes.base import Parts
from jaxgen.generation.modes.sampling import SamplingMode
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.translation import translation
from jaxgen.generation.user_warnings import warn_once

if TYPE_CHECKING:
    from jaxgen.lazy import GenerationConfig

MOST_DRAFTED = 64  # a longer draft is hardly ever right to its end, and each of its tokens costs time
_COMPARED = 4  # n-gram sizes are rounded up to a multiple of this, so that they share programs
_SCHEDULES = ("constant", "heuristic", "heuristic_transient")


class AssistedMode(SamplingMode):
    @classmethod
    def applies(cls, fields: "GenerationConfig", assistant_model: object = None) -> bool:
        return bool(_asked(fields, assistant_model))

    @classmethod
    def check(cls, fields: "GenerationConfig", assistant_model: object = None) -> None:
        for name, least in (("prompt_lookup_num_tokens", 1), ("max_matching_ngram_size", 0)):
            _in_range(name, getattr(fields, name), least)
        positive("assistant_early_exit", fields.assistant_early_exit)
        if not (drafters := _asked(fields, assistant_model)):
            return
        asked = drafters[0]
        for name in ("assistant_ensemble_weight", "speculation_type"):
            if (value := getattr(fields, name, None)) is not None:
                raise ValueError(f"`{name}`={value!r} is not supported. Leave it out.")
        for name, off in (("num_beams", 1), ("penalty_alpha", 0)):
            if (value := getattr(fields, name, None)) not in (None, off):
                raise ValueError(
                    f"`{asked}` is for greedy decoding and sampling, and cannot be combined with `{name}`={value}. "
                    "Leave out one of them."
                )
        if fields.use_cache is False:
            raise ValueError(f"`{asked}` needs a cache, as in transformers. Leave out `use_cache`=False.")

    def recorded(self, intermediates: tuple[str, ...], logprobs: bool) -> tuple[str, ...]:
        if intermediates:
            raise ValueError(
                f"`output_{intermediates[0]}`=True cannot be combined with assisted decoding, which reads several "
                "tokens per step. Leave out one of them."
            )
        return super().recorded(intermediates, logprobs)

    def check_inputs(self, inputs: Inputs) -> None:
        if self.config.cache_backend == "fp8":
            raise ValueError(
                "Assisted decoding requires a cache that can be cropped to restore the states after draft "
                "verification, which a cache in fp8 is not in transformers. Use the backend 'int8'."
            )
        super().check_inputs(inputs)

    def build(self, parts: Parts) -> Assisted:
        return Assisted(
            eos=parts.eos,
            max_length=parts.max_length,
            pad_token_id=self.pad_token_id(parts),
            drafter=self._drafter(parts),
            key=parts.key,
            processors=parts.processors,
            stopping_criteria=parts.stopping_criteria,
            num_return_sequences=self.config.num_return_sequences,
            outputs=parts.recorded,
            vocab_shards=parts.vocab_shards,
            whole_cache=self.config.return_dict_in_generate and self.config.use_cache,
        )

    def _drafter(self, parts: Parts) -> Drafter[Any]:
        """The drafter of the call. If several are asked for, the first one is used, as in transformers 5.24."""
        fields, assistant = self.config.merged, parts.request.assistant_model
        asked, *others = _asked(fields, assistant)
        for name in others:
            warn_once(f"`{asked}` drafts the tokens of this call, and `{name}` has no effect, as in transformers.")
        if asked == "prompt_lookup_num_tokens":
            drafted, compared = int(fields.prompt_lookup_num_tokens), int(fields.max_matching_ngram_size or 2)
            return prompt_lookup(drafted, compared)
        if asked == "assistant_model" and isinstance(assistant, Drafter):
            return _checked_drafter(assistant)
        if not parts.inputs.input_ids.size:
            raise ValueError(
                f"`{asked}` needs the token ids of the prompt, which `inputs_embeds` lacks. Pass `input_ids` too, or "
                "use `prompt_lookup_num_tokens`."
            )
        if asked == "assistant_early_exit":
            try:
                return _assistant(parts.model.first_layers(int(fields.assistant_early_exit)), parts)
            except ValueError as error:
                raise ValueError(f"`assistant_early_exit`={fields.assistant_early_exit}: {error}") from error
        assistant = _checked(assistant, parts.model)
        drafter = replace(_assistant(assistant, parts), translation=_translation(assistant, parts))
        return drafter if parts.inputs.source is None else replace(drafter, source=_source(parts))

    def note(self, state: Any) -> str:
        rounds, drafted, accepted = (int(each[0]) for each in (state.rounds, state.drafted, state.accepted))
        return f"{accepted:,} of {drafted:,} drafted tokens were accepted, in {rounds:,} forward passes"

    def texts(self, fetched: Mapping[str, np.ndarray], rows: int, prompt_length: int) -> dict[str, np.ndarray]:
        texts = super().texts(fetched, rows, prompt_length)
        count = rows * self.sequences_per_prompt
        return texts | {name: fetched[name][:count].copy() for name in ("rounds", "drafted", "accepted")}


def _asked(fields: "GenerationConfig", assistant_model: object) -> list[str]:
    """The arguments that ask for drafts. The first one is used."""
    given = {
        "assistant_early_exit": fields.assistant_early_exit,
        "prompt_lookup_num_tokens": fields.prompt_lookup_num_tokens,
        "assistant_model": assistant_model,
    }
    return [name for name, value in given.items() if value is not None]


def _in_range(name: str, value: Any, least: int) -> int | None:
    count = integer(name, value)
    if count is not None and not least <= count <= MOST_DRAFTED:
        raise ValueError(f"`{name}`={count} must be from {least} to {MOST_DRAFTED}.")
    return count


def prompt_lookup(drafted: int, compared: int = 2) -> PromptLookup:
    """Drafts so many tokens; some numbers of them share a program, and some of those to compare."""
    return PromptLookup(drafted, compared, _most_tokens(drafted), -(-compared // _COMPARED) * _COMPARED)


def _most_tokens(drafted: int) -> int:
    """Rounds the length of a draft up. A pass reads one token more, so it has 2, 3, 4, 8, 12, 16, ... columns."""
    return drafted if drafted < 4 else -(-(drafted + 1) // 4) * 4 - 1


def _checked(assistant: Any, model: Model[Any]) -> Model[Any]:
    """The assistant, if it can draft for the model."""
    if isinstance(assistant, type) or not callable(getattr(assistant, "make_cache", None)):
        raise ValueError(
            f"`assistant_model`={assistant!r:.100} must be a jaxgen model, such as `jaxgen.load` returns, or a "
            "`jaxgen.Drafter`. Load it first."
        )
    if assistant.is_encoder_decoder != model.is_encoder_decoder:
        kinds = {True: "an encoder-decoder model", False: "a model without an encoder"}
        raise ValueError(
            f"`assistant_model` is {kinds[assistant.is_encoder_decoder]}, but the model is "
            f"{kinds[model.is_encoder_decoder]}. Pass an assistant of the model's kind."
        )
    if assistant.mesh != model.mesh:
        raise ValueError(
            f"`assistant_model` is on {assistant.mesh or 'one device'}, but the model is on "
            f"{model.mesh or 'one device'}. Load both with the same `mesh`."
        )
    return assistant


def _checked_drafter(drafter: Drafter[Any]) -> Drafter[Any]:
    """The caller's drafter, if the compiled loop can carry it."""
    if _in_range("most_tokens", getattr(drafter, "most_tokens", None), 1) is None:
        raise ValueError(
            f"`assistant_model`={drafter!r:.100} needs `most_tokens`, an integer from 1 to {MOST_DRAFTED}."
        )
    if any(leaf is drafter for leaf in jax.tree.leaves(drafter)):
        raise ValueError(
            f"`assistant_model`={drafter!r:.100} is not a pytree. Make it a dataclass, and register it with "
            "`jax.tree_util.register_dataclass`, with `most_tokens` as a meta field."
        )
    return drafter


def _source(parts: Parts) -> Source:
    """The source for the encoder of the assistant, which reads it by itself."""
    assert parts.inputs.source is not None
    if parts.request.assistant_tokenizer is not None:
        raise ValueError(
            "`assistant_tokenizer` cannot be combined with an encoder-decoder model: the source would need tokens of "
            "its own. Pass an assistant with the model's tokenizer."
        )
    if parts.inputs.source.input_ids is None:
        raise ValueError(
            "`assistant_model` has an encoder of its own, but the call has no tokens for it. Pass `input_ids` too."
        )
    tokens = replace(parts.inputs.source, inputs=parts.inputs.source.input_ids, encoded=False)
    return tokens.padded(row_bucket(row_shards(parts.model.mesh), len(parts.inputs.input_ids)))[0]


def differ_by_padding(sizes: tuple[int, int]) -> bool:
    """Whether two models may have one tokenizer, whose vocabulary they often pad to slightly different sizes."""
    return max(sizes) - min(sizes) <= max(max(sizes) // 100, 16)


def _translation(assistant: Model[Any], parts: Parts) -> Translation | None:
    """The tables for an assistant with another tokenizer; None if it has the model's."""
    request, model = parts.request, parts.model
    sizes = model.vocab_size, assistant.vocab_size
    if request.assistant_tokenizer is None:
        if not differ_by_padding(sizes):
            raise ValueError(
                f"`assistant_model` has a vocabulary of {assistant.vocab_size} tokens, but the model has "
                f"{model.vocab_size}, so their tokenizers differ. Pass `tokenizer` and `assistant_tokenizer`."
            )
        return None
    if request.tokenizer is None:
        raise ValueError("`assistant_tokenizer` needs the tokenizer of the model too. Pass `tokenizer`.")
    for name in ("tokenizer", "assistant_tokenizer"):
        if not callable(getattr(given := getattr(request, name), "get_vocab", None)):
            raise ValueError(f"`{name}`={given!r:.100} must be a transformers tokenizer. Load it first.")
    if request.assistant_tokenizer.get_vocab() == request.tokenizer.get_vocab():
        if not differ_by_padding(sizes):
            return None
        raise ValueError(
            "`assistant_tokenizer` is for an assistant with another tokenizer, but it has the same vocabulary as "
            "`tokenizer`. Leave it out."
        )
    rows = row_bucket(row_shards(model.mesh), len(parts.inputs.input_ids))
    return translation(request.tokenizer, request.assistant_tokenizer, *sizes, parts.inputs, rows)


def _assistant(model: Model[Any], parts: Parts) -> Assistant:
    """A drafter with this assistant. Its settings come from the call, else from the assistant's generation config."""
    request = parts.request

    def setting(name: str) -> Any:
        given = (
            request.keywords.get(name),
            *(getattr(config, name, None) for config in (request.generation_config, model.generation_config)),
        )
        return next((value for value in given if value is not None), FIELDS[name][1].default)

    num_tokens = _in_range("num_assistant_tokens", setting("num_assistant_tokens"), 1) or 1
    threshold = number("assistant_confidence_threshold", setting("assistant_confidence_threshold"), 0.0)
    if not 0 <= threshold <= 1:
        raise ValueError(f"`assistant_confidence_threshold`={threshold} must be from 0 to 1.")
    if (schedule := setting("num_assistant_tokens_schedule")) not in _SCHEDULES:
        raise ValueError(f"`num_assistant_tokens_schedule`={schedule!r} must be one of {[*_SCHEDULES]}.")
    adapts = schedule != "constant"
    most = _most_tokens(min(2 * num_tokens, MOST_DRAFTED) if adapts else num_tokens)
    return Assistant(model, num_tokens, threshold, adapts, most)
