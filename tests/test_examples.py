"""The examples run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxgen

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_training_script_makes_a_checkpoint_that_generates(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_stories.py"), "--output", str(tmp_path / "out"), "--steps", "2"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    model = jaxgen.load(tmp_path / "out")
    assert jaxgen.generate(model, [[1]], max_new_tokens=3, eos_token_id=None).shape == (1, 4)
    assert "Held-out loss" in (tmp_path / "out" / "README.md").read_text()


def test_the_grammar_tells_the_same_stories_from_the_same_seed() -> None:
    program = "from stories import stories; told = stories(7); print([next(told) for _ in range(20)])"
    runs = [
        subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 5000


def test_grpo_raises_the_reward_and_the_loss_agrees_with_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import grpo  # pyright: ignore

    reports = grpo.train(steps=25, seed=0)
    rewards = [report["reward"] for report in reports]
    assert reports[0]["ratio_error"] < 1e-4
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.5


def test_the_script_moved_from_flax_models_tells_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import from_flax  # pyright: ignore

    greedy, samples = from_flax.evaluate()
    for texts in (greedy, samples):
        assert [text.startswith(prompt) for text, prompt in zip(texts, from_flax.PROMPTS, strict=True)] == [True] * 3
    assert greedy != samples and all(len(text) > 100 for text in greedy + samples)
