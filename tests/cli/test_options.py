"""Every decoding field of `generate` is an option of the command line, under its own name."""

import argparse
import re
import shlex
from typing import Any

import pytest

from jaxgen.cli.options import add_decoding_options, decoding_arguments
from jaxgen.generation.config.fields import FIELDS, SUPPORTED

# What shapes the object that `generate` returns has no place on a command line.
OUTPUTS = {name for name in SUPPORTED if name.startswith("output_")} | {"return_dict_in_generate"}


def parsed(line: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_decoding_options(parser)
    return decoding_arguments(parser.parse_args(shlex.split(line)))


@pytest.mark.parametrize("field", FIELDS)
def test_every_supported_field_has_an_option_and_no_other_field_has(field: str) -> None:
    parser = argparse.ArgumentParser()
    add_decoding_options(parser)
    named = f"--{field.replace('_', '-')}"
    assert (re.search(rf"^  {named}\b", parser.format_help(), re.MULTILINE) is not None) == (
        field in SUPPORTED - OUTPUTS
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    {
        "--max-tokens 5": {"max_new_tokens": 5},
        "--max_new_tokens 5": {"max_new_tokens": 5},
        "--temp 0.5": {"temperature": 0.5, "do_sample": True},
        "--temp 0": {"do_sample": False},
        "--temp 0 --top-k 5": {"do_sample": False, "top_k": 5},
        "--seed 3": {"key": 3, "do_sample": True},
        "--top-k 4 --penalty-alpha 0.6": {"top_k": 4, "penalty_alpha": 0.6},
        "--no-do-sample --top-p 0.5": {"do_sample": False, "top_p": 0.5},
        "--stop a --stop-strings 'b c'": {"stop_strings": ["a", "b c"]},
        "--early-stopping never --num-beams 2": {"early_stopping": "never", "num_beams": 2},
        "--early-stopping true": {"early_stopping": True},
        "--eos-token-id [2,3]": {"eos_token_id": [2, 3]},
        "--sequence-bias '[[[5,6],-2.0]]'": {"sequence_bias": [[[5, 6], -2.0]]},
        "--watermarking-config '{\"bias\": 3.0}'": {"watermarking_config": {"bias": 3.0}},
        "": {},
    }.items(),
)
def test_values_are_read_as_what_they_are(line: str, expected: dict[str, Any]) -> None:
    assert parsed(line) == expected


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(argparse.ArgumentError, match="is not valid JSON"):
        parsed("--bad-words-ids [[5")
