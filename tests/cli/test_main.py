"""The command, as a person would run it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import architecture

from jaxgen.checkpoint.safetensors_file import DTYPES
from jaxgen.cli.main import _DTYPES, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jaxgen", *arguments], capture_output=True, text=True)


def test_without_a_model_the_bundled_one_tells_a_story_and_says_how_long_it_took() -> None:
    ended = run("generate", "Once upon a time", "--max-new-tokens", "20")
    assert ended.returncode == 0
    assert ended.stdout.startswith("Once upon a time") and len(ended.stdout) > 40
    for said in (
        "no --model given",
        "programs for this length are compiled first\n",
        "s after loading",
        "2 programs ready in",
    ):
        assert said in ended.stderr
    assert "PyTorch" not in ended.stderr and "Warning" not in ended.stderr


def test_a_folder_of_ones_own_is_used_and_the_bundled_one_not_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--model", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "config.json is missing" in said and "no --model" not in said


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--model", str(architecture(0).write(tmp_path))]) == 1
    assert "has neither tokenizer.json nor tokenizer.model" in capsys.readouterr().err


def test_convert_is_reached_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = architecture(0).write(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "native")]) == 0
    assert (tmp_path / "native" / "jaxgen.json").exists()
    assert main(["convert", str(source), str(tmp_path / "native")]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["nonsense"], ["generate", "x", "--dtype", "int3"], ["convert", "x"], ["verify"]]
)
def test_wrong_arguments_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: jaxgen" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], *([command, "--help"] for command in ("generate", "chat", "convert", "verify"))],
)
def test_help_answers_at_once_since_nothing_heavy_is_imported(arguments: list[str]) -> None:
    ended = run(*arguments)
    assert ended.returncode == 0 and "jaxgen" in ended.stdout
    program = f"import sys; from jaxgen.cli.main import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    heavy = "print('heavy:', sorted({'jax', 'numpy', 'flax', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program + heavy], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("heavy: []\n")


def test_the_dtypes_to_choose_from_are_those_that_weights_may_have() -> None:
    assert {*_DTYPES} == {str(dtype) for dtype in DTYPES.values()}


@pytest.mark.parametrize("moment", ["while it loads", "while it writes"])
def test_an_interrupt_ends_the_process_without_a_traceback(moment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "jaxgen",
        "generate",
        "Once upon a time",
        "--max-tokens=90000",
        "--eos-token-id=999",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    if moment == "while it loads":
        assert b"no --model given" in process.stderr.readline()
    else:
        assert process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == -signal.SIGINT
    assert b"Traceback" not in said
    process.stdout.close()
    process.stderr.close()


def test_nobody_reading_on_ends_it_quietly_and_a_closed_output_does_not_pass_for_success(
    one_layer: Path,
) -> None:
    command = f"{sys.executable} -m jaxgen generate 'Once upon a time' --model '{one_layer}' --max-tokens"
    bash = ["bash", "-c", f"{command} 9000 --eos-token-id=999 | head -c 5; echo ${{PIPESTATUS[0]}}"]
    ended = subprocess.run(bash, capture_output=True, text=True)
    assert ended.stdout == "Once 141\n" and "Traceback" not in ended.stderr and "Errno" not in ended.stderr
    closed = subprocess.run(["bash", "-c", f"{command} 5 >&-"], capture_output=True, text=True)
    assert closed.returncode == 1 and "standard output is closed" in closed.stderr
