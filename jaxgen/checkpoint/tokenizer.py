"""The tokenizer of a checkpoint, from the files of a folder or the metadata of a GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgen import lazy
from jaxgen.checkpoint import gguf_file
from jaxgen.checkpoint.files import CheckpointError
from jaxgen.checkpoint.hub import local_path

if TYPE_CHECKING:
    from jaxgen.lazy import PreTrainedTokenizerBase

# tokenizer.* in the file -> what transformers' converter takes.
_FIELDS = {
    "ggml.model": "tokenizer_type",
    "ggml.pre": "pre_tokenizer_type",
    "ggml.tokens": "tokens",
    "ggml.scores": "scores",
    "ggml.token_type": "token_type",
    "ggml.merges": "merges",
    "ggml.add_space_prefix": "add_prefix_space",
}
# Any of them is enough; those after the second belong to encoder-decoder models.
_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "vocab.json")
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def load_tokenizer(path: str | Path, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, as transformers' `AutoTokenizer` reads it. A GGUF file's is read without torch.

    Args:
        path, revision: see `load`. For a model on the hub, the weights are not downloaded.

    Raises:
        CheckpointError: if there is no tokenizer, or it cannot be read.
    """
    path = local_path(path, revision, weights=False)
    from_gguf = gguf_file.is_gguf(path)
    if not from_gguf and not any((path / file).exists() for file in _FILES):
        raise CheckpointError(
            f"{path} has neither tokenizer.json nor tokenizer.model. Copy the tokenizer's files there."
        )
    try:
        return _from_gguf(path) if from_gguf else lazy.transformers().AutoTokenizer.from_pretrained(path)
    except CheckpointError:
        raise
    except Exception as error:  # parsers raise many kinds for a broken file
        raise CheckpointError(f"the tokenizer in {path} cannot be read ({error!r}). Copy its files again.") from error


def _from_gguf(path: Path) -> "PreTrainedTokenizerBase":
    metadata = gguf_file.read_metadata(path)
    given = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
    template = given.get("chat_template")
    if not given.get("ggml.tokens") or not isinstance(template, str | None):
        raise CheckpointError(f"{path} holds no tokenizer. Load the original model's tokenizer with transformers.")
    fields = {name: given[key] for key, name in _FIELDS.items() if key in given}
    backend, _ = lazy.convert_gguf_tokenizer()(metadata["general.architecture"], fields)
    # With a SentencePiece vocabulary, llama.cpp begins texts with bos unless the file says otherwise.
    options: dict[str, Any] = {"add_bos_token": given.get("ggml.add_bos_token", given.get("ggml.model") == "llama")}
    options |= {"add_eos_token": given.get("ggml.add_eos_token", False)}
    for key, name in _SPECIAL.items():
        token_id = given.get(f"ggml.{key}_token_id")
        options[name] = None if token_id is None else given["ggml.tokens"][token_id]
    tokenizer = lazy.transformers().PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = template
    return tokenizer
