"""Families that are a Llama with a few flags: same tokens as transformers, and what their `config.json` may say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import FAMILY_MEMBERS, NEW_TOKENS, USUAL_MEMBERS, Architecture, family_member
from checkpoints import CONFIG
from oracle import HAS_TORCH, live, recorded, torch_logits, torch_model
from shared_noise import in_jaxgen, in_torch

import jaxgen
from jaxgen import lazy
from jaxgen.models import FAMILIES
from jaxgen.models.llama import FULL, SLIDING

OTHERS = ["mistral", "qwen2", "qwen3"]
families = pytest.mark.parametrize("model_type", OTHERS)


def members(usual: Any) -> Any:
    """All of them, but for sweeps only those that are not usual."""
    marks = {False: [pytest.mark.sweep], True: []}
    params = [pytest.param(each, id=each.name, marks=marks[usual(each)]) for each in FAMILY_MEMBERS]
    return pytest.mark.parametrize("member", params)


# ---- Tokens ----


@members(lambda member: member.seed < USUAL_MEMBERS)
def test_greedy_tokens_of_a_ragged_batch_equal_transformers(member: Architecture, tmp_path: Path) -> None:
    folder = member.write(tmp_path)
    ids, mask = member.prompts()
    ours = jaxgen.generate(jaxgen.load(folder), ids, attention_mask=mask, max_new_tokens=NEW_TOKENS)
    if member.seed < USUAL_MEMBERS:
        np.testing.assert_array_equal(ours, recorded()[member.name])
    if HAS_TORCH:
        np.testing.assert_array_equal(ours, live(member, folder))


@pytest.mark.oracle
@members(lambda member: member.name.startswith("qwen3-0-"))
def test_sampled_tokens_equal_transformers_with_the_same_noise(member: Architecture, tmp_path: Path) -> None:
    folder = member.write(tmp_path)
    ids, mask = member.prompts()
    arguments = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2}
    with in_jaxgen():
        ours = jaxgen.generate(jaxgen.load(folder), ids, attention_mask=mask, key=0, **arguments)
    with in_torch():
        theirs = torch_model(folder).generate(**tensors(input_ids=ids, attention_mask=mask), **arguments)
    np.testing.assert_array_equal(ours, theirs)


def test_no_answer_on_record_degenerates() -> None:
    for member in FAMILY_MEMBERS:
        if member.seed < USUAL_MEMBERS:
            assert len(np.unique(np.array(recorded()[member.name])[:, member.prompts()[0].shape[1] :])) >= 4


def tensors(**arrays: Any) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(each) for name, each in arrays.items()}


# ---- Windows, in every way to decode ----

NEW = 8
IDS, MASK = (each[:3, 2:] for each in family_member("qwen3", 0).prompts())
PLAIN = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [*range(20, 32)]}


@pytest.fixture(scope="module")
def windowed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer that attends three columns, and one that attends them all."""
    member = family_member("qwen3", 0)
    config = {**member.config, "sliding_window": 3, "layer_types": [SLIDING, FULL]}
    return replace(member, config=config).write(tmp_path_factory.mktemp("windowed"))


@pytest.fixture(scope="module")
def windowed(windowed_folder: Path) -> Any:
    return jaxgen.load(windowed_folder)


@pytest.fixture(scope="module")
def windowed_twin(windowed_folder: Path) -> Any:
    return torch_model(windowed_folder)


HOLES = np.array(
    [[1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
)
RIGHT = np.arange(11) < np.array([[11], [10], [5]])  # the last column of the third row attends nothing
WAYS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "right padding": (RIGHT.astype(int), {}),
    "holes": (HOLES, {}),
    "beams": (MASK, BEAMS),
    "beams with holes": (HOLES, BEAMS),
    "chunks": (MASK, {"prefill_chunk_size": 4}),
    "chunks with holes": (HOLES, {"prefill_chunk_size": 4}),
}


@pytest.mark.oracle
@pytest.mark.parametrize("way", WAYS)
def test_a_window_counts_columns_as_transformers_does(windowed: Any, windowed_twin: Any, way: str) -> None:
    mask, kwargs = WAYS[way]
    given = {"input_ids": np.where(IDS, IDS, 7), "attention_mask": mask}
    expected = windowed_twin.generate(**tensors(**given), **{**PLAIN, **kwargs})
    np.testing.assert_array_equal(jaxgen.generate(windowed, **given, **{**PLAIN, **kwargs}), expected)


@pytest.mark.oracle
@pytest.mark.parametrize("kwargs", [{}, BEAMS, {"prefill_chunk_size": 4}], ids=["greedy", "beams", "chunks"])
def test_a_call_that_goes_on_from_a_cache_looks_back_across_the_buckets(
    windowed: Any, windowed_twin: Any, kwargs: Any
) -> None:
    """Between the columns of the cache and the new ones is padding, which the window must not count."""
    start = jaxgen.generate(windowed, IDS, attention_mask=MASK, return_dict_in_generate=True, **PLAIN)
    said = np.random.default_rng(1).integers(3, 97, (3, 6))
    ids = np.concatenate([start.sequences, said], axis=1)
    mask = np.pad(MASK, ((0, 0), (0, NEW + 6)), constant_values=1)
    mask[1, -6:-2] = 0
    got = jaxgen.generate(windowed, ids, attention_mask=mask, cache=start.cache, **{**PLAIN, **kwargs})
    expected = windowed_twin.generate(**tensors(input_ids=ids, attention_mask=mask), **{**PLAIN, **kwargs})
    np.testing.assert_array_equal(got, expected)


@pytest.mark.oracle
def test_a_window_of_torch_goes_on_until_columns_have_left_it(windowed: Any, windowed_twin: Any) -> None:
    window = windowed.config.sliding_window
    ids = np.random.default_rng(2).integers(3, 97, (2, window + 4))

    def filled(columns: int) -> Any:
        given = tensors(input_ids=ids[:, :columns], attention_mask=np.ones((2, columns), int))
        flags = {"max_new_tokens": 1, "eos_token_id": None, "return_dict_in_generate": True}
        return windowed_twin.generate(**given, **flags).past_key_values

    expected = windowed_twin.generate(**tensors(input_ids=ids, attention_mask=np.ones_like(ids)), **PLAIN)
    got = jaxgen.generate(windowed, ids, attention_mask=np.ones_like(ids), cache=filled(window - 1), **PLAIN)
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match=rf"`cache` holds {window - 1} of {window + 2} tokens in layer \d, a Dynamic"):
        jaxgen.generate(windowed, ids, attention_mask=np.ones_like(ids), cache=filled(window + 2), **PLAIN)


@pytest.mark.sweep
def test_a_cache_of_beams_goes_on_within_the_window(windowed: Any) -> None:
    """Its columns lie three slots apart, and are side by side in what goes on."""
    flags = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True}
    start = jaxgen.generate(windowed, IDS, attention_mask=MASK, **flags, **PLAIN)
    mask = np.repeat(np.pad(MASK, ((0, 0), (0, NEW)), constant_values=1), 3, axis=0)
    past = start.cache
    got = jaxgen.generate(windowed, start.sequences, attention_mask=mask, cache=past, **PLAIN)
    np.testing.assert_array_equal(got, jaxgen.generate(windowed, start.sequences, attention_mask=mask, **PLAIN))


def test_states_of_contrastive_search_are_those_of_its_text_seen_at_once(windowed: Any) -> None:
    """Whose forward pass is compared with transformers above; candidates that are not chosen leave their slots."""
    ids = np.where(IDS, IDS, 7)
    out = jaxgen.generate(
        windowed, ids, attention_mask=MASK, penalty_alpha=0.6, top_k=4, output_hidden_states=True,
        return_dict_in_generate=True, **PLAIN,
    )  # fmt: skip
    mask = np.pad(MASK, ((0, 0), (0, NEW - 1)), constant_values=1).astype(bool)

    @jax.jit
    def states(text: jax.Array) -> Any:
        return windowed.extend(windowed.make_cache(*text.shape), text, jnp.asarray(mask), None, ("hidden_states",))[2]

    whole = states(out.sequences[:, :-1])
    for step in range(1, NEW):
        for layer, expected in zip(out.hidden_states[step], whole["hidden_states"], strict=True):
            np.testing.assert_allclose(layer[:, 0], expected[:, IDS.shape[1] - 1 + step], atol=1e-4)


@pytest.mark.oracle
def test_embeddings_at_their_own_positions_equal_transformers(windowed: Any, windowed_twin: Any) -> None:
    """Which go through buckets without a cache before them; positions that jump do not move a window."""
    embeddings = np.asarray(windowed.embed_tokens(IDS))
    positions = np.cumsum(MASK * 3, axis=1) - 1
    given = {"inputs_embeds": embeddings, "attention_mask": MASK, "position_ids": np.maximum(positions, 0)}
    expected = windowed_twin.generate(**tensors(**given), **PLAIN)
    np.testing.assert_array_equal(jaxgen.generate(windowed, **given, **PLAIN), expected)


def test_attentions_are_zero_outside_the_window(windowed: Any) -> None:
    out = jaxgen.generate(
        windowed, IDS, attention_mask=MASK, return_dict_in_generate=True, output_attentions=True, **PLAIN
    )
    assert len(out.attentions) == NEW
    for place, (slides, full) in enumerate(out.attentions[1:]):
        assert slides.shape == full.shape == (3, 4, 1, IDS.shape[1] + 1 + place)
        assert (slides[..., :-3] == 0).all() and (slides[0, ..., -3:] > 0).all() and (full[0] > 0).all()


def test_a_model_without_windows_carries_nothing_for_them(model: Any, windowed: Any) -> None:
    assert model.make_cache(1, 1).columns is None and windowed.make_cache(1, 1).columns is not None
    off = {"use_sliding_window": False, "layer_types": None}
    assert FAMILIES["qwen3"].config({**windowed.config.to_json(), **off}).sliding_window is None


# ---- Checkpoints ----


@families
def test_what_is_saved_is_read_by_both_libraries(model_type: str, tmp_path: Path) -> None:
    member = family_member(model_type, 2)  # whose layers all slide
    config = {**member.config, "num_hidden_layers": 1, "initializer_range": 0.4}
    model = jaxgen.from_config(config, key=3)
    jaxgen.save(model, tmp_path / "saved")
    jaxgen.save(jaxgen.load(tmp_path / "saved"), tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    if HAS_TORCH:
        ids, mask = member.prompts()
        ours = jax.jit(type(model).__call__)(model, jnp.asarray(ids), jnp.asarray(mask))
        difference = np.asarray(ours) - torch_logits(torch_model(tmp_path / "saved"), ids, mask)
        assert np.abs(difference[mask.astype(bool)]).max() < 1e-4


# ---- What a `config.json` may say ----

GENERATION_FIELDS = frozenset(lazy.transformers().GenerationConfig().to_dict())
BASE = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type")}
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]


def read(model_type: str, **changes: Any) -> Any:
    return FAMILIES[model_type].config({**BASE, "model_type": model_type, **changes}, GENERATION_FIELDS)


@families
@pytest.mark.parametrize("seed", range(12))
def test_transformers_reads_what_is_written_as_it_reads_the_original(
    model_type: str, seed: int, tmp_path: Path
) -> None:
    config = family_member(model_type, seed).config
    parsed = FAMILIES[model_type].config(config)
    written = parsed.to_json()
    assert FAMILIES[model_type].config(json.loads(json.dumps(written))) == parsed
    ours, theirs = (by_transformers(tmp_path, content) for content in (written, config))
    kinds = theirs.get("layer_types") or [FULL if theirs["sliding_window"] is None else SLIDING] * 2
    assert [*parsed.layer_types] == kinds
    assert parsed.sliding_window == (theirs["sliding_window"] if SLIDING in kinds else None)
    assert ours.get("layer_types") == theirs.get("layer_types")
    assert ours["sliding_window"] == parsed.sliding_window
    windows = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
    own = {"head_dim"} if model_type == "qwen2" else set()  # which has no key for it
    for key in written.keys() - windows - own - {"rope_scaling", "rope_theta", "rope_parameters"}:
        assert ours[key] == theirs[key], key
    rope = {key: value for key, value in theirs["rope_parameters"].items() if key != "type"}
    assert {key: ours["rope_parameters"][key] for key in rope} == rope


def by_transformers(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(content))
    config = lazy.transformers().AutoConfig.from_pretrained(folder)
    config.standardize_rope_params()  # as its models do
    return config.to_dict()


@families
def test_a_config_object_of_transformers_makes_the_model_of_its_file(model_type: str) -> None:
    for seed in range(4):
        config = family_member(model_type, seed).config
        theirs = lazy.transformers().AutoConfig.for_model(**config).to_dict()
        assert FAMILIES[model_type].config(theirs, GENERATION_FIELDS) == FAMILIES[model_type].config(config)


@families
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    raw = {key: CONFIG[key] for key in REQUIRED} | {"num_attention_heads": 32, "hidden_size": 64}
    ours = FAMILIES[model_type].config(raw).to_json()
    theirs = lazy.transformers().AutoConfig.for_model(model_type, **raw)
    ours = {key: value for key, value in ours.items() if key not in ("architectures", "rope_theta")}
    # Qwen2 has no key for the one; the others have no effect without the window that is off.
    unread = {"head_dim": ["qwen2"], "max_window_layers": ["qwen2", "qwen3"]}
    for key in (key for key in ours if model_type not in unread.get(key, [])):
        assert ours[key] == getattr(theirs, key), key


# As published: the keys of these files that say something, and the sliding window that they come to.
PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "Mistral 7B v0.1": (
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
        },
        4096,
    ),
    "Mistral Nemo": (
        {
            "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 5120,
            "intermediate_size": 14336, "max_position_embeddings": 1024000, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 131072,
        },
        None,
    ),
    "Qwen2.5 7B with yarn": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
            "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
            "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        None,
    ),
    "Qwen3 0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
            "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
            "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
        },
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    raw, window = PUBLISHED[name]
    config = FAMILIES[raw["model_type"]].config(raw, GENERATION_FIELDS)
    assert config.sliding_window == window
    assert set(config.layer_types) == {FULL if window is None else SLIDING}
    assert (config.attention_bias, config.o_proj_bias) == (raw["model_type"] == "qwen2", False)
    assert config.qk_norm == (raw["model_type"] == "qwen3")
    assert config.model_type == raw["model_type"]


def test_null_is_no_window_and_as_many_heads_as_there_are() -> None:
    config = read("mistral", sliding_window=None, num_key_value_heads=None)
    assert config.sliding_window is None and config.num_key_value_heads == 4
    left_out = FAMILIES["mistral"].config({key: BASE[key] for key in REQUIRED} | {"num_attention_heads": 8})
    assert left_out.sliding_window == 4096 and left_out.num_key_value_heads == 8
    assert read("qwen3", head_dim=None).head_dim == 128


def test_the_window_of_a_qwen_is_on_where_it_says_so() -> None:
    on = {"use_sliding_window": True, "sliding_window": 5}
    assert read("qwen2", sliding_window=5).layer_types == (FULL, FULL)
    assert read("qwen2", **on).layer_types == (FULL, FULL)  # of 28 layers that are full, there are 2
    assert read("qwen2", **on, max_window_layers=1).layer_types == (FULL, SLIDING)
    assert read("qwen2", **on, max_window_layers=1, layer_types=[SLIDING, FULL]).layer_types == (SLIDING, FULL)
    assert read("qwen2", **{**on, "sliding_window": None}, max_window_layers=0).layer_types == (FULL, FULL)
    assert read("qwen2", **on) == read("qwen2")  # what changes nothing compiles nothing
    assert read("qwen2", **on, max_window_layers=1) != read("qwen2", **{**on, "sliding_window": 6}, max_window_layers=1)


def test_what_is_fixed_in_a_family_may_be_said() -> None:
    assert read("qwen2", attention_bias=True, mlp_bias=False) == read("qwen2")
    assert read("mistral", attention_bias=False) == read("mistral")
    assert read("qwen3", qk_norm=True) == read("qwen3")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"layer_types": [SLIDING, FULL]}, "`layer_types`=.*turns a mistral into another architecture"),
    ("mistral", {"sliding_window": 0}, "`sliding_window`=0 in config.json must be positive"),
    ("mistral", {"sliding_window": -1}, "`sliding_window`=-1 in config.json must be positive"),
    ("mistral", {"sliding_window": 4.0}, "`sliding_window`=4.0 in config.json must be of type int"),
    ("mistral", {"sliding_window": True}, "`sliding_window`=True in config.json must be of type int"),
    ("mistral", {"architectures": ["LlamaForCausalLM"]}, r"\['LlamaForCausalLM'\] in config.json is not \['Mistral"),
    ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, r"is not \['Qwen2ForCausalLM'\]"),
    ("qwen2", {"use_sliding_window": 1}, "`use_sliding_window`=1 in config.json must be of type bool"),
    ("qwen2", {"max_window_layers": "all"}, "`max_window_layers`='all' in config.json must be of type int"),
    ("qwen2", {"layer_types": [FULL]}, "`layer_types`=.*has 1 entries for 2 layers"),
    ("qwen2", {"layer_types": []}, "`layer_types`=.*has 0 entries for 2 layers"),
    ("qwen2", {"layer_types": [FULL, "chunked_attention"]}, "`layer_types`=.*'chunked_attention'.*must be a list of"),
    ("qwen2", {"layer_types": FULL}, "`layer_types`='full_attention' in config.json must be a list"),
    ("qwen2", {"layer_types": [FULL, SLIDING]}, "`layer_types`=.*there is no `sliding_window`, or `use_sliding_wi"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None, "layer_types": [SLIDING, FULL]}, "`layer_types`="),
    ("qwen3", {"head_dim": 7}, "`head_dim`=7 must be even"),
    ("qwen3", {"num_key_value_heads": 3}, "`num_key_value_heads`=3"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_what_a_family_does_not_have_is_refused_by_name(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(model_type, **changes)
