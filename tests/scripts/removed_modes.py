"""Diverse beam search and contrastive search as transformers 4.41.2 had them: its answers on record.

transformers 5 has moved both out, so the oracle is an environment of its own:

    python -m venv old && old/bin/pip install transformers==4.41.2 torch==2.13.0 'numpy<2'
    PYTHONPATH=tests/helpers python tests/scripts/removed_modes.py --write models  # with jaxgen
    PYTHONPATH=tests/helpers old/bin/python tests/scripts/removed_modes.py models
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from random_calls import ROWS, small_model

RECORD = Path(__file__).parents[1] / "data" / "removed_modes.json"
CASES = 48


def diverse(case: int) -> dict[str, Any]:
    """A call of diverse beam search: a ragged batch, and few programs for all cases."""
    rng = np.random.default_rng(case)
    beams, groups = [(4, 2), (3, 3), (6, 3)][case % 3]
    columns = int(rng.integers(2, 11))
    padding = rng.integers(0, columns, ROWS) if case % 2 else np.zeros(ROWS, int)
    return _call(rng, columns, padding, case) | {
        "num_beams": beams,
        "num_beam_groups": groups,
        "num_return_sequences": int(rng.integers(1, beams + 1)),
        "diversity_penalty": float(rng.uniform(0.1, 4)),
        "length_penalty": float(rng.uniform(-1, 2)),
        "early_stopping": [True, False, "never"][int(rng.integers(3))],
    }


def contrastive(case: int) -> dict[str, Any]:
    """A call of contrastive search. In 4.41 it compares with padding too, so the batch is not ragged."""
    rng = np.random.default_rng(1000 + case)
    columns = int(rng.integers(2, 11))
    return _call(rng, columns, np.zeros(ROWS, int), case) | {
        "penalty_alpha": float(rng.uniform(0.1, 0.95)),
        "top_k": [2, 4, 7][case % 3],
    }


ENCODER_DECODERS = (4, 3)  # seeds of a UMT5 and an mBART
CASES_OF_SOURCES = 8  # in turn of each of them


def diverse_of_source(case: int) -> dict[str, Any]:
    """A call of diverse beam search with a ragged batch of sources."""
    rng = np.random.default_rng(2000 + case)
    columns = int(rng.integers(4, 11))
    mask = (np.arange(columns) < rng.integers(2, columns + 1, ROWS)[:, None]).astype(int)
    return {
        "input_ids": np.where(mask, rng.integers(3, 70, (ROWS, columns)), 1).tolist(),
        "attention_mask": mask.tolist(),
        "decoder_start_token_id": [0, 3][case % 2],
        "max_new_tokens": int(rng.integers(9, 13)),
        "eos_token_id": rng.choice(np.arange(3, 70), 3, replace=False).tolist(),
        "pad_token_id": 1,
        "forced_eos_token_id": None,
        "num_beams": 4,
        "num_beam_groups": 2,
        "num_return_sequences": int(rng.integers(1, 5)),
        "diversity_penalty": float(rng.uniform(0.1, 4)),
        "length_penalty": float(rng.uniform(-1, 2)),
        "early_stopping": [True, False, "never"][int(rng.integers(3))],
    }


PROGRAMS = 6  # a case of each remainder has programs of its own


def _call(rng: np.random.Generator, columns: int, padding: np.ndarray, case: int) -> dict[str, Any]:
    mask = (np.arange(columns) >= padding[:, None]).astype(int)
    processors: dict[str, Any] = {}
    eos: Any = [None, int(rng.integers(3, 97)), rng.choice(np.arange(3, 97), 3, replace=False).tolist()][case // 6 % 3]
    if case // 3 % 2:  # of the processors, some that the two versions have alike
        suppressed = rng.choice(np.arange(3, 97), 20, replace=False).tolist()
        processors = {"no_repeat_ngram_size": 2, "suppress_tokens": suppressed}
        eos = eos[0] if isinstance(eos, list) else eos
    return {
        "input_ids": np.where(mask, rng.integers(3, 20, (ROWS, columns)), 0).tolist(),
        "attention_mask": mask.tolist(),
        "max_new_tokens": int(rng.integers(9, 13)),
        "eos_token_id": eos,
        "pad_token_id": 0,
        **processors,
    }


def recorded() -> dict[str, list[dict[str, Any]]]:
    """By mode, of each case its `sequences`, and of diverse beam search its `sequences_scores`."""
    return json.loads(RECORD.read_text())


def _record(models: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file

    assert transformers.__version__ == "4.41.2"

    def loaded(folder: Path, kind: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
        tensors = load_file(folder / "model.safetensors")
        if "shared.weight" in tensors:  # else a tied head of this version has a scale
            config.tie_word_embeddings = False
            tensors.setdefault("lm_head.weight", tensors["shared.weight"])
        model = kind.from_config(config)
        # What is tied is not in the file.
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and all(name.endswith(("lm_head.weight", "embed_tokens.weight")) for name in missing)
        model.tie_weights()
        # The checkpoint's own settings stay out of it: every call says all that matters.
        model.generation_config = transformers.GenerationConfig()
        return model.eval()

    def answer(model: Any, call: dict[str, Any]) -> dict[str, Any]:
        call = dict(call)
        tensors = {name: torch.tensor(call.pop(name)) for name in ("input_ids", "attention_mask")}
        out = model.generate(**tensors, **call, return_dict_in_generate=True, output_scores=True)
        scores = getattr(out, "sequences_scores", None)
        return {"sequences": out.sequences.tolist()} | ({} if scores is None else {"sequences_scores": scores.tolist()})

    with tempfile.TemporaryDirectory() as name:
        llama = loaded(small_model(Path(name)), transformers.AutoModelForCausalLM)
    others = [loaded(models / str(seed), transformers.AutoModelForSeq2SeqLM) for seed in ENCODER_DECODERS]
    of_groups = ("num_beam_groups", "diversity_penalty")
    answers = {}
    for mode, count, switch, used in (
        (diverse, CASES, of_groups, [llama]),
        (contrastive, CASES, ("penalty_alpha",), [llama]),
        (diverse_of_source, CASES_OF_SOURCES, of_groups, others),
    ):
        answers[mode.__name__] = [answer(used[case % len(used)], mode(case)) for case in range(count)]
        # The cases can tell these modes from the usual ones.
        usual = [{name: value for name, value in mode(case).items() if name not in switch} for case in range(count)]
        plain = [answer(used[case % len(used)], call)["sequences"] for case, call in enumerate(usual)]
        differ = sum(a["sequences"] != b for a, b in zip(answers[mode.__name__], plain, strict=True))
        print(f"{mode.__name__}: {differ} of {count} differ from the usual mode")
        assert differ > 0.7 * count
    lines = (
        f"{json.dumps(mode)}: [\n" + ",\n".join(json.dumps(each, separators=(",", ":")) for each in cases) + "\n]"
        for mode, cases in answers.items()
    )
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _write(models: Path) -> None:
    from encoder_decoders import encoder_decoder

    for seed in ENCODER_DECODERS:
        encoder_decoder(seed).write(models / str(seed))


if __name__ == "__main__":
    (_write if sys.argv[1] == "--write" else _record)(Path(sys.argv[-1]))
