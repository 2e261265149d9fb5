"""The examples run."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import jaxgen

ROOT = Path(__file__).parent.parent
EXAMPLES, HELPERS = ROOT / "examples", ROOT / "tests" / "helpers"


def test_the_training_script_makes_a_checkpoint_that_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_stories  # pyright: ignore

    whole = train_stories.train_tokenizer
    monkeypatch.setattr(train_stories, "train_tokenizer", lambda texts: whole(itertools.islice(texts, 300)))
    monkeypatch.setattr(train_stories, "HELD_OUT_BATCHES", 2)
    monkeypatch.setitem(train_stories.CONFIG, "num_hidden_layers", 1)
    monkeypatch.setattr(sys, "argv", ["train_stories.py", "--output", str(tmp_path / "out"), "--steps", "2"])
    train_stories.main()
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


def test_grpo_raises_the_reward_and_the_loss_agrees_with_the_rollout(
    one_layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxgen, "BUNDLED_MODEL", one_layer)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import grpo  # pyright: ignore

    reports = grpo.train(steps=25, seed=0)
    rewards = [report["reward"] for report in reports]
    assert reports[0]["ratio_error"] < 1e-4
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.5


def test_the_script_moved_from_flax_models_tells_stories(one_layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxgen, "BUNDLED_MODEL", one_layer)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import from_flax  # pyright: ignore

    greedy, samples = from_flax.evaluate()
    for texts in (greedy, samples):
        assert [text.startswith(prompt) for text, prompt in zip(texts, from_flax.PROMPTS, strict=True)] == [True] * 3
    assert greedy != samples and all(len(text) > 100 for text in greedy + samples)


def in_a_job(tmp_path: Path, *command: str) -> list[str]:
    """Runs a command in a job of two processes, as Slurm would; the lines that it prints."""
    for name, program in {"srun": f"{sys.executable} {HELPERS}/srun.py", "python": sys.executable}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        (tmp_path / name).chmod(0o700)
    job = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_NTASKS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | job, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line and "[Gloo]" not in line]


def test_the_job_of_slurm_continues_all_prompts_each_in_one_of_the_processes(tmp_path: Path) -> None:
    lines = sorted(in_a_job(tmp_path, "bash", "examples/slurm.sbatch"))
    assert [line[: len("process 0")] for line in lines] == ["process 0"] * 3 + ["process 1"] * 2


@pytest.mark.sweep
def test_processes_that_hold_a_copy_together_have_the_same_prompts(tmp_path: Path) -> None:
    script = ("bash", "examples/slurm.sbatch", "python", "examples/many_processes.py")
    alone = in_a_job(tmp_path, "python", "examples/many_processes.py")
    together = in_a_job(tmp_path, *script, "--distributed", "--processes-per-copy", "2")
    assert len(alone) == 5 and together == alone


def test_the_job_of_kubernetes_has_what_jax_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.clusters.k8s_cluster import K8sCluster

    yaml = pytest.importorskip("yaml")
    objects = {each["kind"]: each for each in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())}
    spec = objects["Job"]["spec"]
    pod, service = spec["template"]["spec"], objects["Service"]
    metadata = SimpleNamespace(**objects["Job"]["metadata"])
    job = SimpleNamespace(metadata=metadata, spec=SimpleNamespace(parallelism=spec["parallelism"]))
    monkeypatch.setattr(K8sCluster, "_controller", lambda: SimpleNamespace(kind="Job"))
    monkeypatch.setattr(K8sCluster, "_job", lambda: job)
    monkeypatch.setattr(K8sCluster, "_pod", lambda: SimpleNamespace(spec=SimpleNamespace(**pod)))
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert K8sCluster.get_coordinator_address(None, None).startswith("jaxgen-0.jaxgen:")
    assert K8sCluster.get_process_count() == spec["completions"] == 2 and spec["completionMode"] == "Indexed"
    # The names that refer to each other.
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": metadata.name}
    assert pod["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"]
    assert objects["RoleBinding"]["subjects"][0]["name"] == pod["serviceAccountName"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_the_workers_of_ray_continue_every_prompt_as_one_alone_would(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.data", reason="needs ray[data]")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ray_data  # pyright: ignore

    command = [sys.executable, str(EXAMPLES / "ray_data.py"), "--new-tokens", "4"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout.splitlines()
    prompts = ray_data.prompts()
    assert [text[: len(prompt)] for prompt, text in zip(prompts, printed, strict=True)] == prompts
    alone = ray_data.Worker(str(jaxgen.BUNDLED_MODEL), new_tokens=4)
    assert [*alone({"number": np.arange(len(prompts)), "prompt": np.array(prompts)})["text"]] == printed
