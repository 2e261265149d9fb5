"""A tokenizer whose words are `w3`, `w4`, ..., one for each id, and which ends every text with `</s>`, as T5's does."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def write_word_tokenizer(folder: Path, size: int) -> Any:
    """Writes it into a folder, for ids below `size`; `<pad>`, `<s>` and `</s>` are 0, 1 and 2, `<unk>` is the last."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, size - 1)), "<unk>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer
