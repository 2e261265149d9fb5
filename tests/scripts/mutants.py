"""Paths that only some sizes reach, each broken once in a copy of the tree: the test beside it must fail.

    python tests/scripts/mutants.py [WORD ...]

runs those whose file, place or test holds a word, all without one. It prints a table, and exits with 1 if a test passed
or a line to break is there no more. `mutations.py` is about broken checkpoints, and this is about broken code.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """A piece of a file, what takes its place, and the test that notices.

    Attributes:
        where: the function, and when its path is taken.
    """

    file: str
    where: str
    old: str
    new: str
    test: str


LAYERS, TOP_K, CHOICE = "jaxgen/models/layers.py", "jaxgen/processors/top_k.py", "jaxgen/decoding/choice.py"
RULES, DRIVER, CACHE = (
    "jaxgen/processors/logits_process.py",
    "jaxgen/generation/running/driver.py",
    "jaxgen/kv_cache.py",
)
QUANTIZED = "jaxgen/quantized_array.py"
TENSORS, WRITING = "jaxgen/checkpoint/safetensors_file.py", "convert/writing.py"
ON_TPU, OF_TPUS = "jaxgen/models/prompt_attention_tpu.py", "tests/models/test_prompt_attention_tpu.py::test_"
PROMPTS, OF_PROMPTS = "jaxgen/models/prompt_attention.py", "tests/models/test_prompt_attention.py::test_"
KERNEL, KERNELS = "jaxgen/models/decode_attention.py", "tests/models/test_decode_attention.py::test_"
REAL = "tests/test_real_sizes.py::test_"
DRAWN = f"{REAL}draws_from_fifty_thousand_tokens_equal_transformers_with_the_same_noise"
GREEDY = f"{REAL}greedy_tokens_after_long_prompts_equal_transformers"
ATTENTION = "tests/models/test_layers.py::test_attention_over_any_number_of_columns_is_that_of_the_formula"
PARTS = "tests/models/test_layers.py::test_a_long_prompt_reads_only_the_parts_of_the_slots_that_its_columns_attend_to"
PRODUCT = "tests/models/test_layers.py::test_a_product_is_the_plain_one_rounded_once_for_any_number_of_rows"
GROUPED = "tests/models/test_layers.py::test_the_rows_of_a_group_are_multiplied_one_by_one_or_together_with_one_result"
KEEPS = "tests/processors/test_logits_process.py::test_large_vocabularies_keep_what_transformers_keeps"
HIGHEST = "tests/processors/test_top_k.py::test_the_highest_scores_are_found_in_blocks_as_in_the_whole"
STAGES = "tests/generation/running/test_streaming.py::test_"
RESERVED = f"{STAGES}slots_that_are_little_beside_the_weights_are_reserved_at_once"
LARGER = "tests/checkpoint/test_safetensors_file.py::"
LARGER += "test_a_tensor_larger_than_a_block_arrives_whole_in_any_dtype_and_from_any_row"
CONVERTED = "tests/convert/test_convert.py::test_what_is_larger_than_a_block_is_converted_to_the_byte_and_back"
SCALED = "tests/checkpoint/test_float8.py::test_weights_larger_than_a_block_have_the_scales_of_their_own_rows"
MERGED = "tests/convert/test_lora.py::test_a_weight_larger_than_a_block_gets_the_product_of_its_own_rows"
META = "tests/convert/test_pickles.py::test_what_meta_does_not_say_follows_from_the_sizes_of_the_model"
SOURCES, FAMILY = "tests/generation/test_encoder_decoder.py::test_", "jaxgen/models/encoder_decoder/"
EXCHANGED = "tests/test_mesh.py::test_a_step_exchanges_neither_a_vocabulary_nor_a_cache"
COPIES = "tests/test_kv_cache.py::test_heads_that_are_there_several_times_are_written_and_read_once"
LONG = "test_logits_of_a_long_source_and_a_long_text_equal_those_of_torch"

MUTANTS = [
    # ---- Attention and products ----
    Mutant(
        LAYERS,
        "attend, over 256 columns",
        "return lax.fori_loop(0, columns // block, replaced, queries)",
        "return lax.fori_loop(0, columns // block, replaced, 0 * queries)",
        f"{GREEDY}[1000 ids, 300 columns]",
    ),
    Mutant(
        LAYERS,
        "attend, over 256 columns on a kept cache",
        "replaced, queries)",
        "replaced, queries if keys.shape[-2] == columns else 0 * queries)",
        f"{REAL}four_hundred_columns_on_a_kept_cache_of_three_hundred_give_the_tokens_of_the_whole",
    ),
    Mutant(
        LAYERS,
        "_block_on_cpu, few heads",
        "return 256 if columns % 256 == 0",
        "return 192 if columns % 256 == 0",
        f"{ATTENTION}[512-2]",
    ),
    Mutant(
        LAYERS,
        "attend, the mask of a block",
        "lax.dynamic_slice_in_dim(mask, start, block, axis=1)",
        "lax.dynamic_slice_in_dim(mask, 0, block, axis=1)",
        f"{ATTENTION}[384-2]",
    ),
    Mutant(
        LAYERS,
        "attend, the weights of over 256 columns",
        "return _attend_at_once(queries, keys, values, mask, factor, bias and bias(0, columns))[1]()",
        "return 0 * _attend_at_once(queries, keys, values, mask, factor, bias and bias(0, columns))[1]()",
        f"{REAL}attentions_and_hidden_states_of_a_long_prompt_equal_transformers",
    ),
    Mutant(
        LAYERS,
        "_attend_in_parts, parts that no column attends to",
        "lax.cond(used[part], with_part",
        "lax.cond(used[part] | True, with_part",
        f"{PARTS}[None]",
    ),
    Mutant(
        LAYERS,
        "_attend_in_parts, parts that a column attends to",
        "lax.cond(used[part], with_part",
        "lax.cond(used[part] & (part < 3), with_part",
        f"{PARTS}[None]",
    ),
    Mutant(
        LAYERS,
        "_attend_in_parts, the sums of the parts before",
        "total * before + more * now",
        "total + more * now",
        f"{PARTS}[300]",
    ),
    Mutant(
        LAYERS,
        "columns_at_once, no multiple of 128",
        "columns <= 256 or columns % 128",
        "columns <= 256",
        f"{ATTENTION}[300-2]",
    ),
    Mutant(
        LAYERS,
        "_product_on_cpu, 2 to 32 rows of float32",
        "weight, rows)).T",
        "weight, rows[::-1])).T",
        f"{PRODUCT}[2-float32]",
    ),
    Mutant(
        LAYERS,
        "_product_on_cpu, over 32 rows",
        "y = _wide(rows, weight)",
        "y = _wide(rows, weight) * (len(rows) < 33)",
        f"{PRODUCT}[33-float32]",
    ),
    Mutant(
        LAYERS,
        "_product_on_cpu, over 32 rows in a decode",
        "y = _wide(rows, weight)",
        "y = _wide(rows, weight) * (len(rows) != 48)",
        f"{REAL}one_row_and_forty_of_them_equal_transformers[40]",
    ),
    Mutant(
        LAYERS,
        "_product_on_cpu, a row of bfloat16",
        "(0, 0))), weight)[:1]",
        "(0, 0))), weight)[1:]",
        f"{PRODUCT}[1-bfloat16]",
    ),
    Mutant(LAYERS, "_grouped, up to 4 rows", "rows[..., m, :]", "rows[..., 0, :]", f"{GROUPED}[4-float32]"),
    Mutant(
        LAYERS,
        "_grouped, over 4 rows",
        "        return together(rows, shared)\n",
        "        return -together(rows, shared)\n",
        f"{GROUPED}[5-float32]",
    ),
    Mutant(
        "jaxgen/models/int8.py",
        "quantised, over 4096 rows",
        "array[start : start + size]",
        "array[0 : start + size]",
        "tests/models/test_int8.py::test_a_matrix_of_many_rows_is_quantised_as_a_whole",
    ),
    Mutant(
        "jaxgen/models/int8.py",
        "_find_outliers, over 4096 rows",
        "numpy.stack(sums).sum(axis=0)",
        "numpy.stack(sums)[0]",
        "tests/models/test_int8.py::test_a_matrix_of_many_rows_is_quantised_as_a_whole",
    ),
    Mutant(
        "jaxgen/models/rope.py",
        "Dynamic, beyond max_position_embeddings",
        "jnp.maximum(length, self.max_position_embeddings)",
        "jnp.maximum(0, self.max_position_embeddings)",
        "tests/test_parity.py::test_greedy_tokens_of_a_ragged_batch_equal_transformers[5-8q2kv-dynamic]",
    ),
    Mutant(
        "jaxgen/models/rope.py",
        "LongRope, beyond the original context",
        "jnp.where(length > self.original_max_position_embeddings, long, short)",
        "jnp.where(length > self.original_max_position_embeddings, short, short)",
        "tests/test_parity.py::test_greedy_tokens_of_a_ragged_batch_equal_transformers[10-4q2kv-longrope]",
    ),
    # ---- Large vocabularies ----
    Mutant(
        TOP_K,
        "blocked_top_k, over 2 * count blocks",
        "* _BLOCK + jnp.arange",
        "* _BLOCK + 1 + jnp.arange",
        f"{HIGHEST}[5000]",
    ),
    Mutant(
        TOP_K,
        "blocked_top_k, over 2 * count blocks, of beams",
        "* _BLOCK + jnp.arange",
        "* _BLOCK + 1 + jnp.arange",
        f"{REAL}beams_over_fifty_thousand_tokens_equal_transformers",
    ),
    Mutant(TOP_K, "blocked_argmax, over 128 blocks", "return block * _BLOCK +", "return block +", f"{HIGHEST}[20001]"),
    Mutant(
        TOP_K,
        "blocked_argmax, over 128 blocks, of a model",
        "return block * _BLOCK +",
        "return block +",
        f"{GREEDY}[50000 ids, 700 columns]",
    ),
    Mutant(TOP_K, "to_blocks, the last block", "constant_values=-jnp.inf", "constant_values=0.0", f"{HIGHEST}[20001]"),
    Mutant(
        CHOICE,
        "_candidates, top_k of up to 64",
        "jnp.where(limited & (values < last), -jnp.inf, values)",
        "values",
        f"{DRAWN}[the usual rules]",
    ),
    Mutant(
        CHOICE,
        "_candidates, a nucleus of more than 64",
        "(jnp.exp(rest - total) <= 1 - top_p)",
        "(top_p <= 1)",
        f"{DRAWN}[the usual rules]",
    ),
    Mutant(
        CHOICE,
        "_candidates, top_k of more than 64",
        "((top_k.top_k >= vocab_size) & (top_p < 1) &",
        "((top_p < 1) &",
        f"{DRAWN}[the usual rules]",
    ),
    Mutant(
        CHOICE,
        "_candidates, beside tokens that are left out",
        "return (scores >= edge).sum(axis=1, keepdims=True) <= window, rest",
        "return (scores >= edge).sum(axis=1, keepdims=True) <= window, rest - 9",
        f"{DRAWN}[the usual rules]",
    ),
    Mutant(
        CHOICE,
        "_candidates, equal scores beyond the window",
        "separate = (edge < last) | (last == -jnp.inf) | (window == scores.shape[1])",
        "separate = jnp.ones_like(edge, bool)",
        "tests/decoding/test_sampling.py::test_a_draw_from_few_candidates_is_the_draw_from_all",
    ),
    Mutant(
        CHOICE,
        "choose, where the candidates are not enough",
        "lambda: pick_from_all(scores)",
        "lambda: pick(scores)",
        f"{DRAWN}[typical_p too]",
    ),
    Mutant(
        RULES,
        "_cumulative_at_border, over 128 scores",
        "return jnp.where(equal, at_border, jnp.where(bits > border, jnp.inf, 0))",
        "return jnp.full_like(p, jnp.inf)",
        f"{KEEPS}[a wide nucleus-129]",
    ),
    Mutant(
        RULES,
        "_cumulative_at_border, in a draw",
        "return jnp.where(equal, at_border, jnp.where(bits > border, jnp.inf, 0))",
        "return jnp.full_like(p, jnp.inf)",
        f"{REAL}draws_from_a_thousand_tokens_equal_transformers_with_the_same_noise",
    ),
    Mutant(
        RULES,
        "_cumulative_at_border, equal scores",
        "jnp.cumsum(equal, axis=1).astype(p.dtype) * p",
        "equal.sum(axis=1, keepdims=True).astype(p.dtype) * p",
        "tests/processors/test_logits_process.py::test_of_many_equal_scores_top_p_removes_those_of_the_lower_columns",
    ),
    Mutant(RULES, "_bisect", "lax.fori_loop(0, 32,", "lax.fori_loop(0, 16,", f"{KEEPS}[the highest 300-20000]"),
    Mutant(
        RULES,
        "_kth_highest, more than one",
        "[0][:, -1:]",
        "[0][:, :1]",
        f"{KEEPS}[a nucleus of three at least-20000]",
    ),
    Mutant(
        RULES,
        "TopH, over 100 scores",
        "min(100, scores.shape[1])",
        "scores.shape[1]",
        f"{KEEPS}[most of the entropy-20000]",
    ),
    Mutant(
        "jaxgen/processors/watermarking.py",
        "_mersenne_twister, over 624 words",
        "length=-(-count // 227)",
        "length=min(-(-count // 227), 3)",
        "tests/processors/test_watermarking.py::test_the_generator_gives_the_words_of_numpys_mersenne_twister",
    ),
    Mutant(
        "jaxgen/processors/stopping_criteria.py",
        "EosToken, over 8 ids",
        "[*ids, *[-1] * (size - len(ids))]",
        "[*ids[:8], *[-1] * (size - len(ids[:8]))]",
        "tests/generation/test_continuing.py::"
        "test_other_turns_on_a_cache_equal_transformers[greedy with an eos-the whole text]",
    ),
    Mutant(
        "jaxgen/processors/stop_strings.py",
        "StopStrings.build, over 16 tokens",
        "window=bucket(max(_MIN_WINDOW, *map(len, wanted)))",
        "window=_MIN_WINDOW",
        "tests/processors/test_stop_strings.py::test_many_long_strings_and_those_of_one_character_stop_where_those_of_transformers_do",
    ),
    Mutant(
        "jaxgen/processors/stop_strings.py",
        "_table, over 6 numbers",
        "table[token, index, : len(numbers)] = numbers",
        "table[token, index, : len(numbers[:6])] = numbers[:6]",
        "tests/processors/test_stop_strings.py::test_many_long_strings_and_those_of_one_character_stop_where_those_of_transformers_do",
    ),
    # ---- Prompts and caches ----
    Mutant(
        "jaxgen/decoding/loop.py",
        "_read_chunks, several chunks",
        "columns, number * size, size, axis=1)",
        "columns, 0 * size, size, axis=1)",
        f"{REAL}a_long_prompt_in_chunks_gives_the_tokens_of_the_whole[256]",
    ),
    Mutant(
        "jaxgen/generation/prompt/prompts.py",
        "padded_prompt, a last chunk that is not full",
        "np.where(np.arange(num_new) < full * size, 0, padding)",
        "np.where(np.arange(num_new) < 0, 0, padding)",
        # Ropes that choose their frequencies by the positions of a pass see where chunks end.
        "tests/generation/test_continuing.py::test_chunks_are_cut_where_transformers_cuts_them[longrope]",
    ),
    Mutant(
        "jaxgen/generation/prompt/prompts.py",
        "padded_prompt, a chunk of over 256 columns",
        "full = (num_new - 1) // size",
        "full = min(num_new // size, 1) - 1 + (size < 257)",
        f"{REAL}chunks_of_more_columns_than_have_their_scores_in_memory_give_the_same_tokens",
    ),
    Mutant(
        "jaxgen/buckets.py",
        "bucket",
        "return power * 3 // 4 if size <= power * 3 // 4 else power",
        "return power",
        "tests/generation/test_api.py::test_a_bucket_is_at_most_half_as_much_again",
    ),
    Mutant(
        "jaxgen/generation/prompt/past_key_values.py",
        "to_cache, a row for all prompts",
        "np.arange(batch) if self.batch_size > 1 else 0",
        "np.arange(batch)",
        "tests/generation/test_continuing.py::test_one_prefix_serves_every_prompt_and_its_columns_are_read_once",
    ),
    Mutant(
        KERNEL,
        "decode_attention, the scale of fp8",
        "each.astype(jnp.float32) * factor[0]",
        "each.astype(jnp.float32)",
        f"{KERNELS}the_kernel_widens_eight_bits_in_place[(3, 2, 4, 1, 256, 64)-Float8Array]",
    ),
    Mutant(
        QUANTIZED,
        "Int8Array.mapped",
        "scales = function(*(each.scales[..., None] for each in arrays))[..., 0]",
        "scales = self.scales",
        "tests/test_quantized_array.py::test_moving_slots_moves_their_scales",
    ),
    Mutant(
        QUANTIZED,
        "Float8Array.of, padding",
        "(sizes if valid is None else jnp.where(valid, sizes, 0))",
        "sizes",
        "tests/test_quantized_array.py::test_only_columns_that_count_set_the_scale_of_fp8",
    ),
    Mutant(
        QUANTIZED,
        "Float8Array.quantized, numbers above the prompt's",
        "jnp.clip(array.astype(jnp.float32) / self.scales, -self.LARGEST, self.LARGEST)",
        "array.astype(jnp.float32) / self.scales",
        "tests/test_quantized_array.py::"
        "test_fp8_holds_the_numbers_of_transformers_also_where_new_columns_are_too_large",
    ),
    Mutant(
        CACHE,
        "update, columns after the prompt",
        "old.quantized(new) if isinstance(old, QuantizedArray) else new",
        "old.of(new) if isinstance(old, QuantizedArray) else new",
        "tests/test_kv_cache.py::test_a_quantised_cache_does_to_its_numbers_what_a_plain_one_does",
    ),
    Mutant(
        CACHE,
        "update, what the prompt attends to",
        "(all_keys, all_values) = tuple(map(first, olds, news)), map(squeezed, news)",
        "(all_keys, all_values) = tuple(map(first, olds, news)), map(dequantized, map(first, olds, news))",
        "tests/test_kv_cache.py::test_a_quantised_cache_does_to_its_numbers_what_a_plain_one_does",
    ),
    Mutant(
        "jaxgen/models/int8.py",
        "Int8._multiply, a single row on a GPU",
        "padding = (0, 7), (0, 0)",
        "padding = (0, 0), (0, 0)",
        "tests/models/test_int8.py::test_a_gpu_multiplies_a_single_row_as_eight[1-8]",
    ),
    Mutant(
        ON_TPU,
        "prompt_attention_tpu, the mask of a block",
        "pl.when(kind == _SOME)(lambda: add(True))",
        "pl.when(kind == _SOME)(lambda: add(False))",
        f"{OF_TPUS}the_kernel_computes_the_attention_of_other_devices[(2, 2, 4, 384, 384, 64)-causal]",
    ),
    Mutant(
        ON_TPU,
        "prompt_attention_tpu, whole blocks",
        "jnp.where(every.all(axis=3), _ALL",
        "jnp.where(some.all(axis=3), _ALL",
        f"{OF_TPUS}the_kernel_computes_the_attention_of_other_devices[(2, 1, 12, 384, 1024, 32)-ragged]",
    ),
    Mutant(
        ON_TPU,
        "prompt_attention_tpu, slots after the last",
        "allowed &= lax.broadcasted_iota(jnp.int32, (1, 1, part), 2) < left",
        "allowed &= left > 0",
        f"{OF_TPUS}the_kernel_computes_the_attention_of_other_devices[(3, 1, 1, 512, 700, 64)-causal]",
    ),
    Mutant(
        ON_TPU,
        "prompt_attention_tpu, earlier blocks relative to the highest score",
        "total[...] * before + weights",
        "total[...] + weights",
        f"{OF_TPUS}the_kernel_computes_the_attention_of_other_devices[(1, 2, 7, 384, 1100, 128)-causal]",
    ),
    Mutant(
        ON_TPU,
        "prompt_attention_tpu, blocks that are not needed",
        "return lax.cummax(numbers, axis=2)",
        "return numbers",
        f"{OF_TPUS}blocks_that_the_kernel_does_not_need_are_not_read",
    ),
    Mutant(
        "jaxgen/models/llama.py",
        "Layer, the MLP of many tokens",
        "if mesh is not None else by_tokens(with_mlp, x), cache",
        ", cache",
        "tests/models/test_layers.py::test_the_mlp_of_a_long_prompt_is_computed_in_blocks",
    ),
    Mutant(
        PROMPTS,
        "prompt_attention, masked tiles after the whole ones",
        "first + index, after_whole + index - before)",
        "first + index, after_whole + index)",
        f"{OF_PROMPTS}the_kernel_computes_the_attention_of_other_devices[(2, 2, 4, 64, 64, 32, 16, 16)-padded]",
    ),
    Mutant(
        PROMPTS,
        "prompt_attention, the column of a query",
        "query % tile.columns)[:, None]",
        "query // group)[:, None]",
        f"{OF_PROMPTS}the_kernel_computes_the_attention_of_other_devices[(2, 2, 4, 64, 64, 32, 16, 16)-causal]",
    ),
    Mutant(
        PROMPTS,
        "prompt_attention, whole tiles with holes behind them",
        "jnp.where(~all_ & (number >= whole[..., None]), number, count)",
        "jnp.where(~some & (number >= whole[..., None]), number, count)",
        f"{OF_PROMPTS}the_kernel_computes_the_attention_of_other_devices[(2, 2, 4, 64, 64, 32, 16, 16)-causal]",
    ),
    Mutant(
        PROMPTS,
        "prompt_attention, tiles that are excluded",
        "end = jnp.where(some, number + 1, 0).max(axis=2)",
        "end = jnp.full(some.shape[:2], count)",
        f"{OF_PROMPTS}tiles_that_no_column_attends_to_are_not_read[causal]",
    ),
    Mutant(
        PROMPTS,
        "prompt_attention, earlier tiles relative to the highest score",
        "jnp.exp2(highest - finite)",
        "jnp.exp2(0 * finite)",
        f"{OF_PROMPTS}the_kernel_computes_the_attention_of_other_devices[(2, 2, 4, 64, 64, 32, 16, 16)-causal]",
    ),
    Mutant(
        "jaxgen/models/layers.py",
        "attend, the derivative of a kernel",
        "    function = jax.custom_jvp(kernel)",
        "    return kernel\n    function = jax.custom_jvp(kernel)",
        f"{OF_PROMPTS}the_derivative_is_that_of_other_devices",
    ),
    Mutant(
        KERNEL,
        "decode_attention, the last block",
        "after_last - first, 0)",
        "after_last - first - 1, 0)",
        f"{KERNELS}the_kernel_computes_the_attention_of_other_devices[(3, 2, 4, 1, 256, 64)-ragged]",
    ),
    Mutant(
        KERNEL,
        "decode_attention, blocks before the first",
        "start = first[row] + share * each",
        "start = share * each",
        f"{KERNELS}the_kernel_computes_the_attention_of_other_devices[(3, 2, 4, 1, 256, 64)-window]",
    ),
    Mutant(
        KERNEL,
        "decode_attention, the mask of each column",
        "number % columns",
        "number // columns",
        f"{KERNELS}the_kernel_computes_the_attention_of_other_devices[(2, 1, 3, 5, 192, 32)-ragged]",
    ),
    Mutant(
        KERNEL,
        "decode_attention, shares relative to the highest score",
        "jnp.exp(highest[:, :, share] - top)",
        "jnp.exp(0 * top)",
        f"{KERNELS}the_kernel_computes_the_attention_of_other_devices[(3, 2, 4, 1, 256, 64)-ragged]",
    ),
    Mutant(
        "jaxgen/decoding/loop.py",
        "_read, room for a prompt's layers",
        "            cache = cache.reserve(slots)\n",
        "            pass\n",
        "tests/generation/running/test_memory.py::test_each_layer_of_a_prompt_is_written_where_it_will_stay",
    ),
    Mutant(
        CACHE,
        "grow, keys and values",
        "(*[(0, 0)] * (array.ndim - 2), (0, slots - array.shape[-2]), (0, 0))",
        "(*[(0, 0)] * (array.ndim - 2), (slots - array.shape[-2], 0), (0, 0))",
        f"{REAL}a_cache_that_grows_behind_a_long_prompt_gives_the_same_tokens",
    ),
    Mutant(
        CACHE,
        "grow, what is valid",
        "valid=jnp.pad(self.valid, (*[(0, 0)] * (self.valid.ndim - 1), (0, extra)))",
        "valid=jnp.pad(self.valid, (*[(0, 0)] * (self.valid.ndim - 1), (extra, 0)))",
        f"{REAL}a_cache_that_grows_behind_a_long_prompt_gives_the_same_tokens",
    ),
    Mutant(
        CACHE,
        "grow_by_parts, more than one layer",
        "grown = grow(replace(self, layers=(pair,), memory=None), slots)",
        "grown = grow(replace(self, layers=(grown.layers[0] if layers else pair,), memory=None), slots)",
        "tests/decoding/test_loop.py::test_growing_a_cache_frees_each_layer_of_the_old_one",
    ),
    Mutant(
        "jaxgen/encoder_memory.py",
        "without_ones",
        "tuple(size for size in sizes if size > 1)",
        "sizes",
        "tests/test_kv_cache.py::test_dimensions_of_size_one_are_left_out_of_the_arrays",
    ),
    Mutant(
        DRIVER,
        "cache_sizes, negligible slots",
        "negligible = weights // 64",
        "negligible = 0 * weights // 64",
        f"{RESERVED}[1-sizes0]",
    ),
    Mutant(
        DRIVER,
        "cache_sizes, negligible slots of several rows",
        "// (rows * prepared.cache",
        "// (prepared.cache",
        f"{RESERVED}[2-sizes1]",
    ),
    Mutant(
        DRIVER, "cache_sizes, the last size", "max_size <= size * 3 // 2", "max_size <= size", f"{RESERVED}[64-sizes2]"
    ),
    Mutant(
        DRIVER,
        "cache_sizes, over 2048 slots",
        "if needed > _LONG else",
        "if needed > 2 * _LONG else",
        f"{STAGES}a_cache_doubles_up_to_2048_slots_and_then_grows_by_less",
    ),
    Mutant(
        DRIVER,
        "cache_sizes, attentions",
        'never_grows = 0, "attentions" in prepared.intermediates',
        "never_grows = 0, False",
        f"{STAGES}a_cache_whose_attentions_are_asked_for_has_all_its_slots_from_the_start",
    ),
    Mutant(
        DRIVER,
        "cache_sizes, the passes of a size",
        "key=lambda new: strategy.cache_slots(prompt_slots, new + 1)) - 1",
        "key=lambda new: strategy.cache_slots(prompt_slots, new + 1))",
        f"{STAGES}a_cache_of_any_size_grows_until_the_call_is_done",
    ),
    Mutant(
        DRIVER,
        "Run.advance, a chunk up to where a size is full",
        "chunk = min(steps, self._size.steps_until_full - self._done)",
        "chunk = steps",
        f"{REAL}a_cache_that_grows_behind_a_long_prompt_gives_the_same_tokens",
    ),
    Mutant(
        DRIVER,
        "ChunkSchedule.first, few weights",
        "int(self.seconds * bandwidth / max(weights, 1))",
        "1",
        f"{STAGES}a_call_that_nobody_watches_is_one_chunk_if_it_is_short",
    ),
    Mutant(
        "jaxgen/models/llama_family.py",
        "activation_bytes, over 256 columns",
        "columns_at_once(columns) * columns",
        "columns * columns",
        "tests/planning/test_plan.py::test_the_whole_is_what_the_compiler_says_within_15_percent",
    ),
    # ---- Encoder-decoder models ----
    Mutant(
        "jaxgen/encoder_memory.py",
        "take, rows that share a source",
        "sources, batch = rows // (of // len(self.mask)), len(self.mask)",
        "sources, batch = rows, len(self.mask)",
        f"{SOURCES}the_samples_of_a_cache_go_on_with_their_sources",
    ),
    Mutant(
        CACHE,
        "grow_by_parts, with a source",
        "return replace(grown, layers=tuple(layers), memory=self.memory)",
        "return replace(grown, layers=tuple(layers), memory=jax.tree.map(jnp.zeros_like, self.memory))",
        f"{SOURCES}a_text_that_outgrows_its_cache_keeps_its_source",
    ),
    Mutant(
        "jaxgen/generation/build.py",
        "_source, a continued cache",
        "encoder_input_ids=encoder_input_ids), None if known else source",
        "encoder_input_ids=encoder_input_ids), source",
        f"{SOURCES}a_continued_cache_does_not_read_the_source_again",
    ),
    Mutant(
        f"{FAMILY}model.py",
        "CrossAttention, several rows of a source",
        "self.heads, self.head_dim).transpose(0, 3, 1, 2, 4)",
        "self.heads, self.head_dim)[:, ::-1].transpose(0, 3, 1, 2, 4)",
        f"{SOURCES}with_the_same_noise_every_sampled_token_equals_transformers",
    ),
    Mutant(
        f"{FAMILY}t5.py",
        "DistanceBias, blocks of columns",
        "jax.lax.dynamic_slice_in_dim(self.attending, start, count, axis=1)",
        "self.attending[:, :count]",
        f"tests/models/encoder_decoder/test_t5.py::{LONG}[in blocks]",
    ),
    Mutant(
        f"{FAMILY}t5.py",
        "T5Config, the scale by the older key",
        'unscaled = values.get("tie_word_embeddings", True) is False',
        "unscaled = False",
        "tests/models/encoder_decoder/test_t5.py::test_the_files_of_three_ages_say_whether_the_output_is_scaled",
    ),
    Mutant(
        f"{FAMILY}bart.py",
        "Bart._positions, padding",
        "number = jnp.cumsum(token, axis=1, dtype=jnp.int32) - 1 if counted else columns",
        "number = columns",
        "tests/models/encoder_decoder/test_bart.py::test_an_m2m100_does_not_count_padding_on_the_left",
    ),
    Mutant(
        "jaxgen/decoding/assistant.py",
        "_read, the source of an assistant",
        "cache, _ = cast(EncoderDecoderModel[Any], model).read(cache, self.source)",
        "source = replace(self.source, inputs=jnp.flip(self.source.inputs, axis=0))\n"
        "            cache, _ = cast(EncoderDecoderModel[Any], model).read(cache, source)",
        f"{SOURCES}an_assistant_with_an_encoder_reads_the_source_and_changes_no_token",
    ),
    # ---- Large files ----
    Mutant(TENSORS, "Tensor.blocks", "self.read_into(block, first)", "self.read_into(block, start)", LARGER),
    Mutant(
        TENSORS,
        "Tensor.read_into, a cast",
        "self.blocks(start, start + len(out))",
        "self.blocks(0, len(out))",
        LARGER,
    ),
    Mutant(
        "jaxgen/checkpoint/float8.py",
        "ScaledTensor.read, blocks",
        "np.arange(start + done,",
        "np.arange(done, -start +",
        f"{SCALED}[a scale per block]",
    ),
    Mutant(
        "jaxgen/checkpoint/float8.py",
        "ScaledTensor.read, channels",
        "[start + done : start + done + len(rows)]",
        "[done : done + len(rows)]",
        f"{SCALED}[a scale per channel]",
    ),
    Mutant(
        "jaxgen/checkpoint/source.py",
        "same_bytes, the last block",
        "for one, other in zip(first.blocks(), second.blocks(), strict=True)",
        "for one, other in [next(zip(first.blocks(), second.blocks(), strict=True))]",
        "tests/checkpoint/test_load.py::test_a_head_that_differs_in_its_last_value_only_is_another_head",
    ),
    Mutant(
        "jaxgen/checkpoint/source.py",
        "_check_layers, over 256 layers",
        "layers > min(tensors, MOST_LAYERS)",
        "layers > tensors",
        "tests/checkpoint/test_load.py::test_more_layers_than_any_model_has_are_refused_before_they_are_listed",
    ),
    Mutant(
        "jaxgen/checkpoint/files.py",
        "read_text, over 8 MB",
        "path.stat().st_size > LARGEST_JSON",
        "path.stat().st_size < 0",
        "tests/checkpoint/test_load.py::test_a_config_of_more_than_8_megabytes_is_refused_unread",
    ),
    Mutant(
        "convert/lora.py",
        "MergedTensor.read, the adapter",
        "_read(self.up, start, count)",
        "_read(self.up, 0, count)",
        MERGED,
    ),
    Mutant(
        "convert/lora.py",
        "MergedTensor.read, the weight",
        "self.weight.read_into(weight, start)",
        "self.weight.read_into(weight)",
        MERGED,
    ),
    Mutant(WRITING, "_piece, the second block", "offset += len(data)", "offset += 0", CONVERTED),
    Mutant(
        WRITING,
        "sha256_of, the second block",
        "while block := file.read(BLOCK):",
        "if block := file.read(BLOCK):",
        CONVERTED,
    ),
    Mutant(
        WRITING,
        "Partial._hash, the second block",
        "os.pread(descriptor, min(BLOCK, end - offset), offset)",
        "os.pread(descriptor, min(BLOCK, end - offset), piece.offset)",
        "tests/convert/test_writing.py::test_a_finished_tensor_larger_than_a_block_is_not_copied_again",
    ),
    Mutant(
        WRITING,
        "_largest_magnitude, over 65,536 values",
        "range(0, len(integers), len(scratch))",
        "range(0, len(scratch), len(scratch))",
        "tests/convert/test_convert.py::test_every_value_of_a_large_tensor_is_looked_at",
    ),
    Mutant(
        "convert/layout.py",
        "_files, more than a shard",
        "if shards[-1] and size > shard_bytes:",
        "if not shards:",
        "tests/convert/test_convert.py::test_parameters_are_spread_over_files_of_bounded_size",
    ),
    Mutant(
        TOP_K,
        "blocked_top_k, several shards",
        "jnp.arange(0, parts[0].size, size, dtype=indices.dtype)",
        "jnp.zeros(parts[0].size // size, indices.dtype)",
        "tests/processors/test_top_k.py::test_the_highest_of_all_shards_are_among_the_highest_of_each",
    ),
    Mutant(
        TOP_K,
        "blocked_top_k, several shards, what is exchanged",
        "_highest(parts, min(count, size), _sorted)",
        "_highest(parts, min(count, size), _top_k)",
        EXCHANGED,
    ),
    Mutant(
        "jaxgen/generation/modes/base.py",
        "Parts.vocab_shards, on a mesh",
        "return 1 if self.vocab_size % shards else shards",
        "return 1",
        EXCHANGED,
    ),
    Mutant(
        CACHE,
        "KVCache.layer, with copies of heads",
        "keys.reshape(shape)[:, :: self.copies]",
        "keys.reshape(shape)",
        COPIES,
    ),
    Mutant(CACHE, "KVCache.ragged, with copies of heads", "self.memory, copies=self.copies\n", "self.memory\n", COPIES),
    Mutant("convert/pickles.py", "_meta_config, 128,000 entries", "rows >= 128_000", "rows >= 32_000", META),
    Mutant("convert/pickles.py", "_meta_config, 16 or 28 layers", "in (16, 28)", "in (28,)", META),
]


def copied(folder: Path) -> Path:
    """A copy of the tree in which `jaxgen.convert` is the copy's too, wherever the package is installed from."""
    for name in ("jaxgen", "convert", "tests", "bench", "README.md", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, folder / name)
    (folder / "jaxgen" / "convert").symlink_to("../convert")
    return folder


def pass_in(folder: Path, tests: list[str], log: Path) -> bool:
    """Whether the tests pass in the folder; their output goes to the log."""
    child = os.fork()
    if not child:
        with log.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        import pytest

        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])
        sys.stdout.flush()
        os._exit(int(code))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):  # a name that is wrong, or a crash
        print(log.read_text()[-2000:], file=sys.stderr)
        raise SystemExit(f"{tests} ended with {code}")
    return code == 0


def main(words: list[str]) -> int:
    chosen = [each for each in MUTANTS if not words or any(word in str(each) for word in words)]
    with contextlib.suppress(ImportError):  # once, and not for every mutant
        import jax  # noqa: F401
        import torch  # noqa: F401
        import transformers.generation  # noqa: F401
    survived = 0
    print("| file | path | test | notices |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder, log = copied(Path(name).resolve() / "tree"), Path(name) / "log"
        if not pass_in(folder, [*{each.test: None for each in chosen}], log):
            print(log.read_text()[-2000:], file=sys.stderr)
            raise SystemExit("A test fails before anything is broken.")
        for each in chosen:
            path = folder / each.file
            whole = path.read_text()
            if whole.count(each.old) != 1:
                raise SystemExit(f"{each.file} holds {each.old!r} {whole.count(each.old)} times, and not once.")
            path.write_text(whole.replace(each.old, each.new))
            passed = pass_in(folder, [each.test], log)
            path.write_text(whole)
            survived += passed
            print(f"| {each.file} | {each.where} | {each.test} | {'**NO**' if passed else 'yes'} |", flush=True)
    return survived > 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
