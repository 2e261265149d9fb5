"""The one module that imports transformers: late, since that can take seconds, and without its advice about torch."""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.version import Version

if TYPE_CHECKING:  # for annotations in the whole package
    from transformers import GenerationConfig as GenerationConfig
    from transformers import PreTrainedConfig as PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase


def transformers() -> ModuleType:
    """The `transformers` package, for its configs and tokenizers, which do not need torch."""
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
    """The name of the cache in the installed transformers, as an argument of `generate` and in its output."""
    return "cache" if Version(transformers().__version__).release >= (5, 24) else "past_key_values"


def torch_class(name: str) -> type:
    """A class of `transformers` that needs torch. If torch is not imported, a class without instances.

    Asking transformers for it would import torch if it is installed, which delays the first token by seconds.
    """
    return getattr(transformers(), name) if "torch" in sys.modules else _NeedsTorch


class _NeedsTorch:
    pass


def generation_configs() -> ModuleType:
    """The module of the watermarking configs. `transformers` itself exports them only if torch is installed."""
    transformers()
    return importlib.import_module("transformers.generation.configuration_utils")


def dynamic_modules() -> ModuleType:
    """The module that imports code from folders and repositories."""
    transformers()
    return importlib.import_module("transformers.dynamic_module_utils")


def hub() -> ModuleType:
    """The module that finds files in folders and repositories."""
    transformers()
    return importlib.import_module("transformers.utils.hub")


def convert_gguf_tokenizer() -> Callable[[str, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """The function of transformers that makes a tokenizer from a GGUF file's metadata, without torch.

    Raises:
        ImportError: before transformers 5.18, where its tokenizers split texts differently than the model's.
    """
    version = transformers().__version__
    if Version(version).release < (5, 18):
        raise ImportError(f"transformers {version} cannot read the tokenizers of GGUF files. Install 5.18 or newer.")
    return importlib.import_module("transformers.integrations.gguf").convert_gguf_tokenizer


def byte_characters() -> dict[str, int]:
    """Maps each character of a byte-level token to its byte."""
    transformers()
    characters = importlib.import_module("transformers.convert_slow_tokenizer").bytes_to_unicode()
    return {character: byte for byte, character in characters.items()}


def as_numpy(array: Any) -> np.ndarray:
    """An array of any library as a NumPy array, including torch tensors that `np.asarray` refuses."""
    if isinstance(array, getattr(sys.modules.get("torch"), "Tensor", _NeedsTorch)):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return np.asarray(array)


def torch() -> ModuleType:
    """The `torch` that the caller has imported; jaxgen does not need it and never imports it."""
    return sys.modules["torch"]
