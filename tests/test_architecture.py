"""The arrows of the house: who may import whom. Read from the source, so that no import has to happen."""

import ast
import dataclasses
import functools
import importlib
import io
import itertools
import pkgutil
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import jax
import pytest

import jaxgen
import jaxgen.base

ROOT = Path(__file__).parent.parent
STRATEGIES = {"sampling", "assisted", "beam_search", "group_beam_search", "contrastive_search"}
GROUND_FLOOR = {"base", "buckets", "exchange", "lazy", "pytree", "quantized_array", "version"}
# What each part of the package imports besides the ground floor. Nobody imports who stands below.
MAY_IMPORT: dict[str, set[str]] = {
    "base": {"pytree"},
    "buckets": set(),
    "exchange": set(),
    "lazy": set(),
    "pytree": set(),
    "quantized_array": {"pytree"},
    "version": set(),
    "encoder_memory": set(),
    "kv_cache": {"encoder_memory"},
    "models": {"encoder_memory", "kv_cache"},
    "checkpoint": {"models"},
    "processors": set(),
    "decoding": {"processors"},
    "generation": {"decoding", "processors"},
    "planning": {"checkpoint", "generation", "models"},
    "chat": {"generation"},
    "cli": {"chat", "checkpoint", "decoding", "generation", "planning"},
    "__main__": {"cli"},
    "__init__": {"checkpoint", "decoding", "generation", "processors"},  # the facade
    "convert": {"checkpoint"},
}
FILES = [*(ROOT / "jaxgen").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]


def imports(file: Path) -> set[str]:
    """The dotted names a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def parts_imported(file: Path) -> set[str]:
    """The parts of the package that a file imports."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("jaxgen.")} - {"__version__"}


def part(file: Path) -> str:
    return file.relative_to(ROOT / "jaxgen").parts[0].removesuffix(".py") if "convert" not in file.parts else "convert"


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_file_imports_torch_but_the_one_that_reads_pickles_on_request(file: Path) -> None:
    if relative(file) != "convert/pickles.py":
        assert not {name for name in imports(file) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_transformers_is_imported_late_and_in_one_place(file: Path) -> None:
    if relative(file) != "jaxgen/lazy.py":
        assert not {name for name in imports(file) if name.split(".")[0] == "transformers"}


def test_types_of_transformers_are_imported_by_type_checkers_alone() -> None:
    program = "import sys, jaxgen.lazy; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "False\n"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_only_models_and_checkpoint_know_flax(file: Path) -> None:
    knows = any(name.split(".")[0] == "flax" for name in imports(file))
    assert not knows or part(file) in {"models", "checkpoint"}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_every_part_imports_only_what_it_may(file: Path) -> None:
    ground = set() if part(file) in GROUND_FLOOR else GROUND_FLOOR
    assert parts_imported(file) <= {part(file)} | MAY_IMPORT[part(file)] | ground


def test_models_and_strategies_meet_in_generation_only() -> None:
    """Neither reaches the other, through whatever else it imports."""

    def reached(name: str) -> set[str]:
        return {name}.union(*(reached(other) for other in MAY_IMPORT[name]))

    assert not reached("checkpoint") & {"decoding", "processors", "generation"}
    assert not reached("decoding") & {"checkpoint", "models", "kv_cache", "encoder_memory", "generation"}
    assert {part(file) for file in FILES} - {"stories"} == {*MAY_IMPORT}


def names_of_a_family(file: Path) -> set[str]:
    """What a file reads of a config, or has in a text, that only some families have."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    tensors = {"embed_tokens", "lm_head", "self_attn"}
    sizes = {"rope", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
    return attributes & (tensors | sizes) | {name for name in tensors for text in texts - docstrings if name in text}


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in FILES
        if part(file) in ("checkpoint", "cli", "planning") or relative(file) == "convert/sources.py"
        if relative(file) != "jaxgen/planning/shapes.py"  # the configs of known models
    ],
    ids=relative,
)
def test_only_a_family_knows_the_names_of_its_tensors_and_sizes(file: Path) -> None:
    assert not names_of_a_family(file)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_strategies_know_neither_the_loop_nor_each_other(strategy: str) -> None:
    imported = imports(ROOT / "jaxgen" / "decoding" / f"{strategy}.py")
    assert not imported & {f"jaxgen.decoding.{other}" for other in (STRATEGIES | {"loop"}) - {strategy}}


# What tells one mode from another: its fields, and what its strategy records to sort the outputs.
FIELDS_OF_MODES = {
    *"num_beams num_beam_groups diversity_penalty length_penalty early_stopping penalty_alpha".split(),
    *"prompt_lookup_num_tokens max_matching_ngram_size".split(),
}
RECORDED_BY_MODES = {"parents", "chosen"}
ROOMS = {
    *(ROOT / "jaxgen" / "generation" / "modes").glob("*.py"),
    *(ROOT / "jaxgen" / "decoding" / f"{name}.py" for name in STRATEGIES),
    ROOT / "jaxgen" / "generation" / "config" / "fields.py",  # the table of all fields
}
# Callers of `generate`, which name its arguments as users do.
CALLERS = {"chat", "cli", "planning"}


@pytest.mark.parametrize(
    "file", [each for each in FILES if each not in ROOMS and part(each) not in CALLERS], ids=relative
)
def test_only_the_rooms_of_a_mode_know_it(file: Path) -> None:
    known = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            known |= {node.value} & (FIELDS_OF_MODES | RECORDED_BY_MODES)
        for name in ("attr", "arg", "id"):
            known |= {getattr(node, name, None)} & FIELDS_OF_MODES
    assert not known


def test_every_mode_has_a_room_in_each_wing() -> None:
    hosts = {file.stem for file in (ROOT / "jaxgen" / "generation" / "modes").glob("*.py")}
    assert hosts == STRATEGIES | {"__init__", "base", "beams"}


@pytest.mark.parametrize("file", [file for file in FILES if part(file) != "convert"], ids=relative)
def test_the_package_never_imports_the_converter(file: Path) -> None:
    assert not {name for name in imports(file) if name.startswith(("convert", "jaxgen.convert"))}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_flax_only_declares_parameters(file: Path) -> None:
    forbidden = {"jit", "scan", "vmap", "while_loop", "grad", "value_and_grad", "Cache", "remat", "cond", "switch"}
    used = {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx"
    }
    assert not used & forbidden


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_memory_is_left_uninitialised_on_the_device(file: Path) -> None:
    assert "jnp.empty" not in file.read_text().replace("`jnp.empty`", "")


def test_no_two_pytrees_of_the_package_have_the_same_structure() -> None:
    """Or jit would now and then run the program of the one for the other."""
    names = [each.name for each in pkgutil.walk_packages(jaxgen.__path__, "jaxgen.") if "__main__" not in each.name]
    modules = [importlib.import_module(name) for name in names]
    assert {"jaxgen.kv_cache", "jaxgen.models.int8"} < {*names}
    classes = {each for module in modules for each in vars(module).values() if isinstance(each, type)}
    structures = []
    ours = (each for each in classes if each.__module__.startswith("jaxgen.") and dataclasses.is_dataclass(each))
    for cls in sorted(ours, key=str):
        node = object.__new__(cls)
        vars(node).update(dict.fromkeys((field.name for field in dataclasses.fields(cls)), 0))
        if not jax.tree_util.all_leaves([node]):
            structures.append(jax.tree_util.tree_structure(node))
    assert len(structures) > 25
    assert all(one != other for one, other in itertools.combinations(structures, 2))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_pytrees_are_registered_in_one_way(file: Path) -> None:
    assert "register_dataclass" not in file.read_text().replace("`jax.tree_util.register_dataclass`", "")


def test_the_facade_says_three_times_the_same() -> None:
    """To type checkers, to the import that comes late, and to `import *`."""
    tree = ast.parse((ROOT / "jaxgen" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: each.module for each in block.body if isinstance(each, ast.ImportFrom) for alias in each.names}
    assert typed == {name: f"jaxgen.{home}" for name, home in jaxgen._HOMES.items()}
    assert {*typed, "__version__"} == {*jaxgen.__all__} == {*dir(jaxgen)}
    assert all(getattr(jaxgen, name) is not None for name in typed)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = jaxgen.nonsense  # type: ignore[attr-defined]


@pytest.mark.usefixtures("processes_with_torch")
def test_a_call_does_not_import_torch_where_it_is_installed(folder: Path) -> None:
    program = (
        f"import sys, jaxgen; model = jaxgen.load({str(folder)!r}); "
        "jaxgen.generate(model, [[5, 6]], max_new_tokens=2, do_sample=True, guidance_scale=2.0, num_beams=2); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "False\n"


@pytest.mark.usefixtures("processes_with_torch")
def test_importing_jaxgen_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'jax', 'flax', 'numpy'}"
    program = f"import sys, jaxgen; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "set()\n"


# Dimension letters: "    B  prompts of a call" in the docstring of `base`, [B, P] or [N * C, P'] everywhere else.
LEGEND = {*re.findall(r"\b([A-Z])  [a-z]", jaxgen.base.__doc__ or "")}


def letters(text: str) -> set[str]:
    """The letters in the shapes of a text. An index, as in `parents[n, c]`, is no shape."""
    shapes = re.findall(r"(?<![\w)\]`])\[([^\[\]]*)\]", text)
    return {letter for shape in shapes for letter in re.findall(r"(?<![\w\"'])[0-9]*([A-Za-z])(?!\w)", shape)}


@functools.cache
def letters_of_file(file: Path) -> set[str]:
    """The letters in the shapes of docstrings and comments."""
    source = file.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts += [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return set().union(*map(letters, texts))


def test_letters_of_shapes_are_found() -> None:
    assert letters("int32 [N, 2B] and [T * C, P', 64], [N, K, S, ...] or [V + 1, steps]") == set("NBTCPKSV")
    assert not letters("int32 [], `parents[n, c]`, [0, 1, 0] and (rows, [3])")


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_every_letter_of_a_shape_is_in_the_legend(file: Path) -> None:
    assert letters_of_file(file) <= LEGEND


def test_the_legend_has_no_letter_that_no_shape_uses() -> None:
    assert set().union(*map(letters_of_file, FILES)) == LEGEND
