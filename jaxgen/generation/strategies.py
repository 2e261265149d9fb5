"""Which strategy a configuration asks for, with its numbers: the one place where it is chosen."""

from dataclasses import dataclass
from typing import Any

from jaxgen.decoding.beam_search import BeamSearch
from jaxgen.decoding.contrastive_search import ContrastiveSearch
from jaxgen.decoding.group_beam_search import GroupBeamSearch
from jaxgen.decoding.sampling import Sample
from jaxgen.generation.config import Resolved
from jaxgen.processors.stopping_criteria import EosToken, MaxLength


@dataclass(frozen=True)
class Rules:
    """What every strategy takes: when texts end, and what changes the scores."""

    eos: EosToken
    max_length: MaxLength
    processors: tuple[Any, ...]
    stopping_criteria: tuple[Any, ...]


def strategy_for(
    config: Resolved,
    rules: Rules,
    key: Any,
    pad_token_id: int,
    pads: bool,
    longest: int,
    vocab_size: int,
    outputs: tuple[str, ...],
) -> Sample | BeamSearch | GroupBeamSearch | ContrastiveSearch:
    """The strategy of a call.

    Args:
        config: of the call.
        rules: for the strategy as they are.
        key: see `Sample.key`; None unless `do_sample`.
        pad_token_id: what finished rows receive.
        pads: whether they do; if not, one-beam rows go on until all are finished.
        longest: `max_length`, in columns, whatever criteria end a text before or after it.
        vocab_size: V.
        outputs: what to record of every step.

    Raises:
        ValueError: if beams would have no tokens to go on with.
    """
    common = vars(rules)
    if config.num_beams > 1:
        _check_candidates(config, vocab_size)
        scoring = {
            "length_penalty": config.length_penalty,
            "stop_when_full": config.early_stopping is True,
            "assume_longest": config.early_stopping == "never" and config.length_penalty > 0,
            "longest": longest,
            "num_beams": config.num_beams,
            "num_candidates": config.candidates_per_beam * (config.num_beams // config.num_beam_groups),
            "outputs": outputs,
        }
        eos = config.eos_token_id
        if config.num_beam_groups > 1:
            return GroupBeamSearch(
                pad_token_id=pad_token_id,
                last_token=eos[0] if eos else pad_token_id,
                diversity_penalty=config.diversity_penalty,
                num_beam_groups=config.num_beam_groups,
                **scoring,
                **common,
            )
        # Same as transformers 5.24, which takes a `pad_token_id` of 0 for a missing one.
        fill = (config.pad_token_id or eos[0]) if eos else -1
        return BeamSearch(fill=fill, key=key, **scoring, **common)
    padding = {"pad_token_id": pad_token_id if pads else None, "outputs": outputs}
    if config.penalty_alpha:
        top_k = min(config.merged.top_k, vocab_size)
        return ContrastiveSearch(penalty_alpha=config.penalty_alpha, top_k=top_k, **padding, **common)
    return Sample(key=key, num_return_sequences=config.num_return_sequences, **padding, **common)


def _check_candidates(config: Resolved, vocab_size: int) -> None:
    if config.candidates_per_beam > vocab_size:
        raise ValueError(
            f"`eos_token_id` holds {len(config.eos_token_id)} ids, but a model with {vocab_size} ids needs one that is "
            "none of them to go on. Pass fewer."
        )
