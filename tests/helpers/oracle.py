"""The oracle: transformers on torch in float32, run live, and its answers on record for machines without torch.

`python tests/helpers/oracle.py` records the answers again.
"""

import importlib.util
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from architectures import ARCHITECTURES, FAMILY_MEMBERS, REAL_SIZES, USUAL_MEMBERS, Architecture

HAS_TORCH = importlib.util.find_spec("torch") is not None
DATA = Path(__file__).parents[1] / "data"
RECORDS = {
    "greedy.json": ARCHITECTURES,
    "families.json": [each for each in FAMILY_MEMBERS if each.seed < USUAL_MEMBERS],
    "real_sizes.json": REAL_SIZES,
}


def torch_model(folder: Path, dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # idle threads of torch spin, and the tests already run in parallel
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def torch_generate(model: Any, input_ids: Any, **kwargs: Any) -> np.ndarray:
    import torch

    mask = kwargs.pop("attention_mask", None)
    if mask is not None:
        kwargs["attention_mask"] = torch.tensor(np.asarray(mask))
    return model.generate(torch.tensor(np.asarray(input_ids)), **kwargs).numpy()


def torch_logits(model: Any, input_ids: Any, attention_mask: Any = None) -> np.ndarray:
    """float32 [B, T, V]."""
    import torch

    mask = None if attention_mask is None else torch.tensor(np.asarray(attention_mask))
    with torch.no_grad():
        return model(torch.tensor(np.asarray(input_ids)), attention_mask=mask).logits.float().numpy()


@cache
def recorded() -> dict[str, list[list[int]]]:
    """Sequences by the name of the architecture."""
    return {name: rows for file in RECORDS for name, rows in json.loads((DATA / file).read_text()).items()}


def live(architecture: Architecture, folder: Path) -> np.ndarray:
    """What transformers generates for the architecture's prompts."""
    ids, mask = architecture.prompts()
    return torch_generate(torch_model(folder), ids, attention_mask=mask, max_new_tokens=architecture.new_tokens)


def _record(file: str, architectures: list[Architecture]) -> None:
    answers = {}
    for architecture in architectures:
        with tempfile.TemporaryDirectory() as folder:
            answers[architecture.name] = live(architecture, architecture.write(Path(folder))).tolist()
    DATA.mkdir(exist_ok=True)
    lines = (f"{json.dumps(name)}: {json.dumps(rows, separators=(',', ':'))}" for name, rows in answers.items())
    (DATA / file).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    for file, architectures in RECORDS.items():
        _record(file, architectures)
