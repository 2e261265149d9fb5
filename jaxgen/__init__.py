"""Hugging Face `generate()` for JAX: the same arguments, the same tokens, the whole decode one compiled program."""

import importlib
from typing import TYPE_CHECKING

from jaxgen.version import __version__

if TYPE_CHECKING:
    from jaxgen.base import Call, LogitsProcessor, Model, Prompt, Strategy
    from jaxgen.checkpoint.files import CheckpointError
    from jaxgen.checkpoint.load import BUNDLED_MODEL, BUNDLED_SPELLER, from_config, load, save, to_int4, to_int8
    from jaxgen.checkpoint.tokenizer import load_tokenizer
    from jaxgen.decoding.beam_search import BeamSearch
    from jaxgen.decoding.contrastive_search import ContrastiveSearch
    from jaxgen.decoding.drafters import Draft, Drafter
    from jaxgen.decoding.group_beam_search import GroupBeamSearch
    from jaxgen.decoding.loop import compile_counts, decode
    from jaxgen.decoding.sampling import Sample
    from jaxgen.generation.api import generate, prepare, stream
    from jaxgen.generation.outputs import compute_transition_scores
    from jaxgen.generation.prompt.past_key_values import PastKeyValues
    from jaxgen.generation.text_stream import stream_text
    from jaxgen.processors.stopping_criteria import EosToken, MaxLength
else:  # hidden from type checkers, so that they report misspelt names

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'jaxgen' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"jaxgen.{_HOMES[name]}"), name)
        return value


# The modules of the public names. Each is imported at first use, so that `jaxgen --help` answers at once.
_HOMES = {
    "BUNDLED_MODEL": "checkpoint.load",
    "BUNDLED_SPELLER": "checkpoint.load",
    "BeamSearch": "decoding.beam_search",
    "Call": "base",
    "CheckpointError": "checkpoint.files",
    "ContrastiveSearch": "decoding.contrastive_search",
    "Draft": "decoding.drafters",
    "Drafter": "decoding.drafters",
    "EosToken": "processors.stopping_criteria",
    "GroupBeamSearch": "decoding.group_beam_search",
    "LogitsProcessor": "base",
    "MaxLength": "processors.stopping_criteria",
    "Model": "base",
    "PastKeyValues": "generation.prompt.past_key_values",
    "Prompt": "base",
    "Sample": "decoding.sampling",
    "Strategy": "base",
    "compile_counts": "decoding.loop",
    "compute_transition_scores": "generation.outputs",
    "decode": "decoding.loop",
    "from_config": "checkpoint.load",
    "generate": "generation.api",
    "load": "checkpoint.load",
    "load_tokenizer": "checkpoint.tokenizer",
    "prepare": "generation.api",
    "save": "checkpoint.load",
    "stream": "generation.api",
    "stream_text": "generation.text_stream",
    "to_int4": "checkpoint.load",
    "to_int8": "checkpoint.load",
}

__all__ = [
    "__version__",
    "BUNDLED_MODEL",
    "BUNDLED_SPELLER",
    "BeamSearch",
    "Call",
    "CheckpointError",
    "ContrastiveSearch",
    "Draft",
    "Drafter",
    "EosToken",
    "GroupBeamSearch",
    "LogitsProcessor",
    "MaxLength",
    "Model",
    "PastKeyValues",
    "Prompt",
    "Sample",
    "Strategy",
    "compile_counts",
    "compute_transition_scores",
    "decode",
    "from_config",
    "generate",
    "load",
    "load_tokenizer",
    "prepare",
    "save",
    "stream",
    "stream_text",
    "to_int4",
    "to_int8",
]


def __dir__() -> list[str]:
    return __all__
