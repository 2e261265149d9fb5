"""The one place that imports transformers: late, since it takes up to seconds, and without its advice to get torch."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.version import Version

if TYPE_CHECKING:
    from transformers import GenerationConfig as GenerationConfig
    from transformers import PreTrainedConfig as PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase


def transformers() -> Any:
    """The `transformers` package: configs and tokenizers, which need no torch."""
    before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before


def cache_name() -> str:
    """What the installed transformers calls the cache, as an argument of `generate` and in its output."""
    return "cache" if Version(transformers().__version__).release >= (5, 24) else "past_key_values"


def torch_class(name: str) -> type:
    """A class of `transformers` that needs torch; without torch imported nothing is an instance of what this gives.

    To ask transformers for it would import torch, where it is installed: seconds before the first token.
    """
    return getattr(transformers(), name) if "torch" in sys.modules else _NeedsTorch


class _NeedsTorch:
    pass


def generation_configs() -> Any:
    """The module of GenerationConfig and the watermarking configs, which the package shows only if torch is there."""
    transformers()
    return importlib.import_module("transformers.generation.configuration_utils")


def dynamic_modules() -> Any:
    """The module that finds and imports code of folders and repositories."""
    transformers()
    return importlib.import_module("transformers.dynamic_module_utils")


def hub() -> Any:
    """The module that finds their files."""
    transformers()
    return importlib.import_module("transformers.utils.hub")


def byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for."""
    transformers()
    characters = importlib.import_module("transformers.convert_slow_tokenizer").bytes_to_unicode()
    return {character: byte for byte, character in characters.items()}


def as_numpy(array: Any) -> np.ndarray:
    """An array of any library, also a tensor that NumPy would not take."""
    if isinstance(array, getattr(sys.modules.get("torch"), "Tensor", _NeedsTorch)):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return np.asarray(array)


def torch() -> Any:
    """The `torch` that the caller has imported already; jaxgen itself needs none and never imports it."""
    return sys.modules["torch"]
