"""What all tests share: exact float32 products, and small random Llamas with their transformers twins."""

import gc
import json
import os
import re
import shutil
import signal

from xla_flags import known

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell; the tests need it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "XLA_FLAGS" not in os.environ:  # which the workers of xdist get from the process that starts them
    # Two thirds of the suite's time would be code generation, for programs that run once or twice. XLA's own passes are
    # as always; `XLA_FLAGS= pytest` has the code that users run.
    os.environ["XLA_FLAGS"] = known(
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false",
    )
os.environ.setdefault("OMP_NUM_THREADS", "1")  # idle threads of torch spin, and the tests already run in parallel
os.environ["JAXGEN_COMPILE_CACHE"] = "off"  # of commands; what a test compiles is not to come from a test before it

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from oracle import HAS_TORCH, torch_model
from random_calls import small_model
from safetensors.numpy import load_file, save_file

import jaxgen

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "allow")
jax.config.update("jax_traceback_in_locations_limit", 0)  # which programs do not need; a few percent of the suite


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "oracle: compares with transformers on torch, which must be installed")


# Files that take more than half a minute. They come first, or the last one would keep one of two processes waiting.
LONG = """
test_encoder_decoder test_jax_settings test_assisted_mode test_mesh test_assisted test_assistant test_examples
test_custom test_beam_search test_many_processes test_sampling test_logits_process test_api test_parity test_t5
test_streaming test_continuing test_compile_cache test_chat_command test_generate_command test_pickles test_speller
test_bench test_real_sizes test_bart test_mesh_processes
""".split()


def pytest_collection_finish() -> None:
    """Looking for garbage among all that was imported, as often as by default, takes a twentieth of the time."""
    gc.set_threshold(10_000, 20, 20)
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not HAS_TORCH:
        for item in items:
            if item.get_closest_marker("oracle"):
                item.add_marker(pytest.mark.skip(reason="torch is not installed; the recorded answers run instead"))


@pytest.fixture(autouse=True, scope="session")
def processes_without_torch() -> None:
    """By `sitecustomize`. Here and not above, where the workers of xdist would be among them."""
    os.environ["TESTS_WITHOUT_TORCH"] = "1"
    helpers = Path(__file__).parent / "helpers"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(helpers), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture
def processes_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESTS_WITHOUT_TORCH")


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> None:
    """A program of XLA:CPU takes dozens of memory maps, and where Linux gives no more, 65530, compiling crashes."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one random layer."""
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return jaxgen.load(folder)


@pytest.fixture(scope="session")
def twin(folder: Path) -> Any:
    """The same model in torch."""
    return torch_model(folder)


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer of the story model that comes with the package: its programs compile in a third of the time."""
    copy = tmp_path_factory.mktemp("one layer") / "stories"
    shutil.copytree(jaxgen.BUNDLED_MODEL, copy)
    config = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 1}
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if not re.match(r"model\.layers\.[1-9]", name)}
    save_file(first, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture(scope="session")
def bundled(one_layer: Path) -> Any:
    return jaxgen.load(one_layer)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """That of the story model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL)


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def chat_folder(one_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template, as a model made for conversations has it."""
    copy = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(one_layer, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="session")
def renumbered_folder(bundled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `bundled` with 100 tokens more, which come before its own."""
    more, folder = 100, tmp_path_factory.mktemp("renumbered")
    config = bundled.config.to_json()
    renumbered = jaxgen.from_config({**config, "vocab_size": config["vocab_size"] + more})
    leaves = [
        leaf if leaf.shape == new.shape else jnp.pad(leaf, ((more, 0), (0, 0)))
        for leaf, new in zip(jax.tree.leaves(bundled), jax.tree.leaves(renumbered), strict=True)
    ]
    jaxgen.save(jax.tree.unflatten(jax.tree.structure(renumbered), leaves), folder)
    for file in Path(jaxgen.BUNDLED_MODEL).glob("tokenizer*"):
        shutil.copy(file, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = {text: more + number for text, number in content["model"]["vocab"].items()}
    content["model"]["vocab"] = vocab | {f"<{number}>": number for number in range(more)}
    for token in content["added_tokens"]:
        token["id"] += more
    for token in content["post_processor"]["special_tokens"].values():
        token["ids"] = [more + number for number in token["ids"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder
