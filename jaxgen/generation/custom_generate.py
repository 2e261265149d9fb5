"""`custom_generate`: the caller's own way to choose tokens, with everything that `generate` prepares.

Same as transformers 5.24 `GenerationMixin.generate`: a function gets the prepared call, a folder or a repository with
`custom_generate/generate.py` gets the arguments of `generate` as they are.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgen import lazy
from jaxgen.base import LogitsProcessor, Model, Prompt
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.inputs import counted_positions
from jaxgen.generation.request import Request
from jaxgen.processors.logits_process import process
from jaxgen.processors.stopping_criteria import any_of

# What every such function may take; whatever else is in its signature are arguments of its own.
_PREPARED = frozenset(
    "model input_ids logits_processor stopping_criteria generation_config attention_mask position_ids inputs_embeds "
    "cache past_key_values use_cache logits_to_keep".split()
)


# The keywords that say which version of a repository to take, and from where.
_OF_THE_HUB = frozenset("revision proxies token local_files_only cache_dir repo_type".split())


class LogitsProcessorList(list[LogitsProcessor]):
    """The processors of a call in transformers' order: `processors(input_ids, scores)`, once per token."""

    def __init__(self, processors: Any, prompt: Prompt, vocab_size: int):
        super().__init__(processors)
        self._prompt, self._vocab_size = prompt, vocab_size
        self._states = self.init()

    def init(self) -> tuple[Any, ...]:
        """The states before the first token, a pytree; for `step`."""
        return tuple(processor.init(self._prompt, self._vocab_size) for processor in self)

    def step(self, input_ids: Any, scores: Any, cur_len: Any, states: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        """The pure form, for your own `jit` and loops: new scores and the next states.

        Args:
            input_ids: int32 [N, S], of which the first `cur_len` columns are valid.
            scores: float32 [N, V].
            cur_len: int32 [].
            states: from `init`, then from the step before.
        """
        return process(self, jnp.asarray(input_ids), jnp.asarray(scores, jnp.float32), jnp.asarray(cur_len), states)

    def __call__(self, input_ids: Any, scores: Any, cur_len: Any = None) -> jax.Array:
        """float32 [N, V]; by default all columns of `input_ids` are valid. Some rules remember the calls before."""
        cur_len = input_ids.shape[1] if cur_len is None else cur_len
        scores, states = self.step(input_ids, scores, cur_len, self._states)
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(states)):
            self._states = states
        elif jax.tree.leaves(states):
            raise ValueError(
                "some processors of this call remember the tokens so far, which they cannot do inside jit. Use "
                "`states = logits_processor.init()` and `logits_processor.step(input_ids, scores, cur_len, states)`."
            )
        return scores


class StoppingCriteriaList(list[Any]):
    """The criteria of a call: `criteria(input_ids, scores)` is bool [N], the rows that are finished."""

    def __call__(self, input_ids: Any, scores: Any, cur_len: Any = None) -> jax.Array:
        """By default all columns of int32 [N, S] `input_ids` are valid. A pure function."""
        return any_of(
            self, jnp.asarray(input_ids), scores, jnp.asarray(input_ids.shape[1] if cur_len is None else cur_len)
        )


def own_arguments(function: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the keywords of `generate`, those that a function has in its signature for itself.

    Raises:
        ValueError: if it is no function, or cannot take the `key`.
    """
    if function is None or isinstance(function, str):
        return {}
    if not callable(function):
        raise ValueError(f"`custom_generate`={function!r} must be a function, or the name of a folder or repository.")
    parameters = inspect.signature(function).parameters.values()
    names = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    if given["key"] is not None and "key" not in names:
        raise ValueError(
            "the function in `custom_generate` has no argument `key`, but one was passed. Add it, or leave out `key`."
        )
    return {name: value for name, value in given.items() if name in names - _PREPARED}


def check_custom_generate(prepared: PreparedCall, request: Request) -> None:
    """Refuses what only the loops of jaxgen could do."""
    unheeded = {
        "streamer": request.streamer is not None,
        "output_logprobs": request.output_logprobs,
        "max_time": prepared.config.max_time is not None,
        "guidance_scale": prepared.config.merged.guidance_scale not in (None, 1),
    }
    for name, given in unheeded.items():
        if given:
            raise ValueError(
                f"`{name}` does not go with `custom_generate`, whose function chooses the tokens by itself. Leave it "
                "out, or do it in your function."
            )


def call_custom(function: Callable[..., Any], model: Model, prepared: PreparedCall, own: Mapping[str, Any]) -> Any:
    """What the function returns for a call.

    It gets the model, int32 [N, P] `input_ids`, both lists, the complete GenerationConfig, and as keywords
    `attention_mask` (bool [N, M]), `position_ids` (int32 [N, T] of the T columns to be read), a `cache` with room for
    the longest text, `use_cache`, and its own arguments. N are the prompts, repeated for their beams or sequences.
    """
    config, read, strategy = prepared.config, prepared.inputs, prepared.call.strategy
    copies = prepared.mode.sequences_per_prompt

    def repeated(array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.repeat(array, copies, axis=0))

    rows = len(read.input_ids) * copies
    columns = read.input_ids.shape[1]
    seen = 0 if read.past is None else read.past.get_seq_length()
    slots = read.attention_mask.shape[1] + int(strategy.max_length.max_length) - columns
    if read.past is None:
        cache = model.make_cache(rows, slots)
    else:
        prompts = read.past.to_cache(model, len(read.input_ids), seen, read.attention_mask[:, :seen])
        cache = prompts.take(jnp.repeat(jnp.arange(len(read.input_ids)), copies)).grow(slots)
    positions = read.position_ids
    if positions is None:
        positions = counted_positions(read.attention_mask)[:, seen:]
    merged = copy.copy(config.merged)
    merged.max_length = int(strategy.max_length.max_length)
    merged.pad_token_id = config.fill_token_id
    input_ids = repeated(read.input_ids)
    prompt = Prompt(input_ids, repeated(read.text_mask), jnp.int32(columns), jnp.int32(rows))
    arguments = {
        "attention_mask": repeated(read.attention_mask),
        "position_ids": repeated(positions),
        "cache": cache,
        "use_cache": config.use_cache,
    }
    if read.embeddings is not None:
        arguments["inputs_embeds"] = repeated(read.embeddings)
    ends = [strategy.eos] if (np.asarray(strategy.eos.eos_token_id) >= 0).any() else []
    return function(
        model,
        input_ids,
        logits_processor=LogitsProcessorList(strategy.processors, prompt, model.vocab_size),
        stopping_criteria=StoppingCriteriaList([strategy.max_length, *ends, *strategy.stopping_criteria]),
        generation_config=merged,
        **arguments,
        **own,
    )


def call_repository(place: str, trust_remote_code: Any = None, **given: Any) -> Any:
    """What the function `generate` of `custom_generate/generate.py` returns, in a folder or a repository on the hub.

    It gets the arguments of `generate` as they are. Same as transformers 5.24, but nothing is looked up and nobody is
    asked before `trust_remote_code=True` allows it.

    Raises:
        ValueError: without this permission.
        OSError: if there is no such file.
        ImportError: if its `requirements.txt` asks for packages that are not here.
    """
    del given["custom_generate"]
    unset = {"key": None, "tokenizer": None, "output_logprobs": False}
    given = {name: value for name, value in given.items() if name not in unset or value is not unset[name]}
    modules = lazy.dynamic_modules()
    message = (
        f"The repository `{place}` contains custom generation code that will override the default `generate` method."
    )
    modules.resolve_trust_remote_code(bool(trust_remote_code), place, False, True, error_message=message)
    of_hub = {name: given[name] for name in _OF_THE_HUB & given.keys()}
    if not lazy.hub().has_file(place, "custom_generate/generate.py", **of_hub):
        raise OSError(
            f"`{place}` does not contain a `custom_generate` subdirectory with a `generate.py` file, can't load the "
            "custom generate function."
        )
    module = modules.get_cached_module_file(place, module_file="custom_generate/generate.py", **of_hub)
    modules.check_python_requirements(place, requirements_file="custom_generate/requirements.txt", **of_hub)
    return modules.get_class_in_module("generate", module)(**given)
