"""The options of decoding on the command line: the fields of GenerationConfig under their names, and short ones.

Read before JAX is imported, so that help answers at once.
"""

import argparse
import json
from typing import Any

# The options by what they are about: name, type and help; `flag` for yes or no, `json` for what has brackets.
GROUPS: dict[str, list[tuple[str, str, str]]] = {
    "length": [
        ("max_new_tokens", "int", "new tokens at most; also --max-tokens"),
        ("max_length", "int", "columns at most, prompt included"),
        ("min_length", "int", "columns before the text may end, prompt included"),
        ("min_new_tokens", "int", "new tokens before the text may end"),
        ("max_time", "float", "seconds at most, looked at between chunks"),
        ("stop_strings", "list", "a text that ends it; may be given several times; also --stop"),
        ("eos_token_id", "json", "ids that end it: 2 or [2,3]"),
        ("pad_token_id", "int", "id that fills finished rows"),
        ("bos_token_id", "int", "id that starts a text without a prompt"),
    ],
    "sampling": [
        ("do_sample", "flag", "draw tokens instead of taking the likeliest; any option below implies it"),
        ("temperature", "float", "below 1 sharper, above 1 flatter, 0 greedy; also --temp"),
        ("top_k", "int", "draw among the so many likeliest"),
        ("top_p", "float", "draw among the likeliest that have this probability together"),
        ("min_p", "float", "draw among those with this share of the highest probability"),
        ("top_h", "float", "draw among those with this share of the entropy"),
        ("typical_p", "float", "draw among the typical ones, of this probability together"),
        ("epsilon_cutoff", "float", "draw among those of at least this probability"),
        ("eta_cutoff", "float", "as epsilon_cutoff, but by entropy"),
    ],
    "repetition": [
        ("repetition_penalty", "float", "above 1 makes tokens less likely that are in the text"),
        ("encoder_repetition_penalty", "float", "above 1 makes tokens of the prompt likelier"),
        ("no_repeat_ngram_size", "int", "forbid repeated sequences of so many tokens"),
        ("encoder_no_repeat_ngram_size", "int", "forbid the prompt's sequences of so many tokens"),
    ],
    "beams": [
        ("num_beams", "int", "texts that are kept on the way"),
        ("num_return_sequences", "int", "texts per prompt"),
        ("early_stopping", "json", "true, false or never"),
        ("length_penalty", "float", "above 0 prefers long beams, below 0 short ones"),
        ("num_beam_groups", "int", "groups of beams that differ"),
        ("diversity_penalty", "float", "how much groups differ"),
        ("penalty_alpha", "float", "contrastive search, with --top-k"),
    ],
    "other rules": [
        ("bad_words_ids", "json", "forbidden sequences: [[5,6],[7]]"),
        ("sequence_bias", "json", "added to scores: [[[5,6],-2.0]]"),
        ("suppress_tokens", "json", "forbidden ids: [5,6]"),
        ("begin_suppress_tokens", "json", "ids forbidden as the first new token"),
        ("forced_bos_token_id", "int", "the first new token"),
        ("forced_eos_token_id", "json", "the last token at the maximum length"),
        ("exponential_decay_length_penalty", "json", "start and factor that make an end likelier: [10,1.1]"),
        ("guidance_scale", "float", "above 1 follows the prompt more closely"),
        ("renormalize_logits", "flag", "normalise scores after the rules"),
        ("remove_invalid_values", "flag", "replace NaN and infinity in scores"),
        ("watermarking_config", "json", 'a watermark: {"greenlist_ratio":0.25}'),
        ("token_healing", "flag", "choose the prompt's last token anew"),
        ("prefill_chunk_size", "int", "columns of the prompt to read at a time"),
        ("use_cache", "flag", "has no effect: the cache is always used"),
    ],
}
_SHORT = {"max_new_tokens": "max-tokens", "temperature": "temp", "stop_strings": "stop"}
_IMPLY_SAMPLING = {name for name, kind, _ in GROUPS["sampling"] if kind != "flag"} | {"key"}
_METAVARS = {"int": "N", "float": "X", "json": "JSON", "list": "TEXT"}


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """All of them, under names with hyphens or underscores; what is not given is absent from the result."""
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, kind, text in options:
            names = [f"--{name.replace('_', '-')}", *([f"--{_SHORT[name]}"] if name in _SHORT else [])]
            hidden = [f"--{each[2:].replace('-', '_')}" for each in names if "-" in each[2:]]
            common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
            if kind == "flag":
                common["action"] = argparse.BooleanOptionalAction
            elif kind == "list":
                common |= {"action": "append", "metavar": _METAVARS[kind]}
            else:
                common |= {"type": {"int": int, "float": float, "json": _json}[kind], "metavar": _METAVARS[kind]}
            group.add_argument(*names, help=text, **common)
            if hidden:
                parser.add_argument(*hidden, help=argparse.SUPPRESS, **common)
    parser.add_argument(
        "--seed",
        dest="key",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="key of the draws, which it implies",
    )


def _json(text: str) -> Any:
    """JSON, or a bare word such as `never`."""
    if text.isalpha() and text not in ("true", "false", "null"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from error


def decoding_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given, as keywords of `generate`."""
    names = {name for options in GROUPS.values() for name, _, _ in options} | {"key"}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if given.get("temperature") == 0:
        if given.get("do_sample"):
            raise ValueError("--temp 0 takes the likeliest token, and --do-sample draws one. Leave out one of them.")
        del given["temperature"]
        return {**given, "do_sample": False}
    if given.keys() & _IMPLY_SAMPLING and "penalty_alpha" not in given:
        return {"do_sample": True, **given}
    return given
