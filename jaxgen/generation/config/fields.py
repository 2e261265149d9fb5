"""The table of generation fields: all public fields of transformers' GenerationConfig, with their meaning in jaxgen.

The configuration, the command line, docs/arguments.md and the keyword types of `generate` are made from it. It must not
import JAX or transformers, because `jaxgen --help` reads it and should be fast.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict, get_args, get_type_hints

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
else:
    ArrayLike = object


class Field(NamedTuple):
    """The description of a keyword of `generate`, for users. It follows the type in `Annotated`.

    Attributes:
        group: its heading in docs/arguments.md. Fields under "refused" and "no effect" are not supported; the type of a
            refused field lists the values that switch it off, which are accepted.
        help: its effect and range, also for the command line. For a refused field, its effect in transformers. For a
            field without effect, the reason.
        default: transformers' default, which applies if neither the call nor the checkpoint sets the field.
        note: more details, and differences from transformers.
        alias: its short name on the command line.
    """

    group: str
    help: str
    default: object = None
    note: str = ""
    alias: str = ""


_ASSISTANT = "is about re-encoding texts for an `assistant_tokenizer`; jaxgen translates tokens by tables instead"
_DRAFTS = "is refused in assisted decoding, where jaxgen does not support it; transformers ignores it elsewhere too"


class GenerationFields(TypedDict, total=False):
    """The fields of GenerationConfig, which are also keywords of `generate`. None switches a field off."""

    max_new_tokens: Annotated[
        int | None,
        Field(
            "length",
            "maximum number of new tokens; takes precedence over `max_length`",
            note="If no length is set, 20 new tokens are generated, with a warning.",
            alias="max-tokens",
        ),
    ]
    max_length: Annotated[
        int | None,
        Field(
            "length",
            "maximum length in tokens, prompt included",
            20,
            "The default counts new tokens only. An explicit None means the default; transformers fails on it.",
        ),
    ]
    min_length: Annotated[
        int | None, Field("length", "minimum length in tokens, prompt included: no `eos_token_id` before it", 0)
    ]
    min_new_tokens: Annotated[
        int | None, Field("length", "minimum number of new tokens; takes precedence over `min_length`")
    ]
    max_time: Annotated[
        float | None,
        Field(
            "length",
            "maximum time in seconds, compilation excluded",
            note="Checked after each chunk of about a quarter of a second, in transformers after each token. Beam "
            "search runs one extra step.",
        ),
    ]
    stop_strings: Annotated[
        str | Sequence[str] | None,
        Field(
            "length",
            "text that ends a sequence once a new token completes it",
            note="Needs the `tokenizer`. A string may have up to 1,000 characters.",
            alias="stop",
        ),
    ]
    eos_token_id: Annotated[
        int | Sequence[int] | None, Field("length", "token id or ids that end a sequence: `2` or `[2,3]`")
    ]
    pad_token_id: Annotated[
        int | None,
        Field(
            "length",
            "token id that fills up sequences that have ended",
            note="The first `eos_token_id` if not set. Without an `attention_mask`, it marks the padding of prompts, "
            "unless it is also an `eos_token_id`. It may be outside the vocabulary, like -1 in Llama 1.",
        ),
    ]
    bos_token_id: Annotated[int | None, Field("length", "token id to start from if there is no prompt")]

    do_sample: Annotated[
        bool | None,
        Field(
            "sampling",
            "sample the next token instead of taking the most likely one",
            False,
            "Pass a `key` for samples that can be repeated. The distribution is that of transformers; a torch seed "
            "gives different samples.",
        ),
    ]
    temperature: Annotated[
        float | None,
        Field(
            "sampling",
            "below 1 makes likely tokens more likely, above 1 less; on the command line 0 means greedy decoding",
            1.0,
            "Scores are divided by it, so it must be above 0. In Python, `do_sample=False` is greedy decoding.",
            "temp",
        ),
    ]
    top_k: Annotated[
        int | None,
        Field(
            "sampling",
            "sample from the k most likely tokens; 0 for all",
            50,
            "Contrastive search chooses among these too, see `penalty_alpha`.",
        ),
    ]
    top_p: Annotated[
        float | None,
        Field(
            "sampling",
            "sample from the most likely tokens whose probabilities add up to p, from 0 to 1",
            1.0,
            "Among tokens that tie at the border, those with higher ids are kept; the order of torch is arbitrary.",
        ),
    ]
    min_p: Annotated[
        float | None,
        Field("sampling", "sample from tokens at least p times as likely as the most likely one, from 0 to 1"),
    ]
    top_h: Annotated[
        float | None,
        Field(
            "sampling",
            "sample from the most likely tokens that hold this share of the entropy, above 0 and up to 1",
            note="Considers only the 100 most likely tokens, as in transformers.",
        ),
    ]
    typical_p: Annotated[
        float | None,
        Field(
            "sampling",
            "sample from the most typical tokens whose probabilities add up to p, above 0 and up to 1",
            1.0,
            "A token is typical if its log-probability is close to the expected one.",
        ),
    ]
    epsilon_cutoff: Annotated[
        float | None,
        Field("sampling", "sample from tokens of at least this probability, from 0 to 1; 0 switches it off", 0.0),
    ]
    eta_cutoff: Annotated[
        float | None,
        Field(
            "sampling",
            "like `epsilon_cutoff`, but lower where many tokens are possible; 0 switches it off",
            0.0,
            "The cutoff is `min(eta, sqrt(eta) * exp(-entropy))`.",
        ),
    ]

    repetition_penalty: Annotated[
        float | None,
        Field(
            "repetition",
            "above 1 makes tokens that are in the prompt or the new text less likely, below 1 more likely",
            1.0,
            "Padding of the prompt does not count. If the mask is longer than the ids, as with a `cache`, its last "
            "columns are used; transformers uses its first.",
        ),
    ]
    encoder_repetition_penalty: Annotated[
        float | None,
        Field("repetition", "above 1 makes tokens of the prompt more likely, below 1 less likely", 1.0),
    ]
    no_repeat_ngram_size: Annotated[
        int | None, Field("repetition", "no n-gram of this size is repeated; 0 switches it off", 0)
    ]
    encoder_no_repeat_ngram_size: Annotated[
        int | None, Field("repetition", "no n-gram of this size is copied from the prompt; 0 switches it off", 0)
    ]

    num_beams: Annotated[
        int | None,
        Field(
            "beams",
            "number of beams; 1 for no beam search",
            1,
            "Beams with the same score keep the order of their columns; the order of torch is arbitrary.",
        ),
    ]
    num_return_sequences: Annotated[
        int | None,
        Field(
            "beams",
            "number of sequences to return for each prompt",
            1,
            "More than 1 needs `do_sample` or at least as many beams. Negative prompts are repeated too; transformers "
            "leaves that to the caller.",
        ),
    ]
    early_stopping: Annotated[
        bool | Literal["never"] | None,
        Field(
            "beams",
            "stop as soon as `num_beams` beams have ended (`true`), when better ones are unlikely (`false`) or when "
            "they are impossible (`never`)",
            False,
        ),
    ]
    length_penalty: Annotated[
        float | None,
        Field(
            "beams",
            "above 0 prefers longer beams, below 0 shorter ones",
            1.0,
            "The score of a finished beam is divided by its number of new tokens to this power.",
        ),
    ]
    num_beam_groups: Annotated[
        int | None,
        Field(
            "beams",
            "diverse beam search: number of groups that `num_beams` are divided into",
            1,
            "The sequences are those of transformers 4.41; transformers 5 downloads this mode from the Hub. Needs "
            "`diversity_penalty`, and cannot be combined with `do_sample`.",
        ),
    ]
    diversity_penalty: Annotated[
        float | None,
        Field(
            "beams",
            "diverse beam search: subtracted from a token's score for each beam of another group that just chose it",
            0.0,
            "Must be above 0 with `num_beam_groups`. Without groups it is refused; transformers ignores it.",
        ),
    ]
    penalty_alpha: Annotated[
        float | None,
        Field(
            "beams",
            "contrastive search: weight of the penalty on tokens that resemble the text so far, from 0 to 1; needs "
            "`top_k` of 2 or more",
            note="The tokens are those of transformers 4.41, except that padding is ignored and a forbidden token is "
            "never chosen; transformers 5 downloads this mode from the Hub. With sampling, beams or a "
            "smaller `top_k` it is refused; transformers ignores it then.",
        ),
    ]

    bad_words_ids: Annotated[
        list[list[int]] | None, Field("other rules", "sequences of token ids that are never generated: `[[5,6],[7]]`")
    ]
    sequence_bias: Annotated[
        dict[tuple[int, ...], float] | Sequence[Sequence[list[int] | float]] | None,
        Field(
            "other rules",
            "bias added to the score of the token that completes a sequence: `[[[5,6],-2.0]]`",
            note="In Python also a dict: `{(5, 6): -2.0}`.",
        ),
    ]
    suppress_tokens: Annotated[
        Sequence[int] | None, Field("other rules", "token ids that are never generated: `[5,6]`")
    ]
    begin_suppress_tokens: Annotated[
        Sequence[int] | None, Field("other rules", "token ids that are not generated as the first new token: `[5,6]`")
    ]
    forced_bos_token_id: Annotated[
        int | None, Field("other rules", "token id to generate first, after a prompt of one token")
    ]
    forced_eos_token_id: Annotated[
        int | Sequence[int] | None,
        Field("other rules", "token id or ids to end with when the maximum length is reached: `2` or `[2,3]`"),
    ]
    exponential_decay_length_penalty: Annotated[
        tuple[int, float] | list[float] | None,
        Field(
            "other rules",
            "make `eos_token_id` more likely with each token after a number of new tokens, by a factor: `[10,1.1]`",
        ),
    ]
    guidance_scale: Annotated[
        float | None,
        Field(
            "other rules",
            "classifier-free guidance: above 1 follows the prompt more closely",
            note="The negative prompts run in the batch of the prompts. With beams their cache is reordered as well; "
            "transformers does not reorder it, so it scores other texts.",
        ),
    ]
    renormalize_logits: Annotated[bool | None, Field("other rules", "normalise the scores after all other rules")]
    remove_invalid_values: Annotated[
        bool | None,
        Field(
            "other rules",
            "replace NaN and infinite scores with finite ones",
            False,
            "Without it, rows with such scores are reported in a warning and the others continue; transformers raises "
            "an error when it samples, and otherwise says nothing.",
        ),
    ]
    watermarking_config: Annotated[
        dict[str, Any] | object,
        Field(
            "other rules",
            'put a watermark into the text: `{"greenlist_ratio":0.25,"bias":3.0}`',
            note="A dict, a `WatermarkingConfig` or a `SynthIDTextWatermarkingConfig`. Until there are `context_width` "
            "tokens no watermark is applied; transformers warns at each step. `sampling_table_size` must be a power of "
            "two.",
        ),
    ]
    token_healing: Annotated[
        bool | None,
        Field(
            "other rules",
            "choose the last token of the prompt again, among the tokens that begin with its text",
            note="Needs the `tokenizer`. Cannot be combined with `cache`, `inputs_embeds` or `position_ids`.",
        ),
    ]
    prefill_chunk_size: Annotated[
        int | None,
        Field(
            "other rules",
            "number of prompt tokens to prefill at a time, which saves memory; at least 1",
            note="Changes no token. Cannot be combined with `guidance_scale` or `penalty_alpha`.",
        ),
    ]
    use_cache: Annotated[
        bool | None,
        Field(
            "other rules",
            "return the cache with the other outputs; it is used for decoding either way",
            True,
            "With False the attentions and hidden states of each step are those of the whole text, as in "
            "transformers. With `dynamic` and `longrope`, earlier tokens keep their rotation; transformers computes "
            "it again at every step.",
        ),
    ]
    cache_implementation: Annotated[
        Literal[None, "dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window", "quantized"],
        Field(
            "other rules",
            'with "quantized", the cache has 8 bits per number; see `cache_config`',
            note="All other values mean the same cache, in the model's dtype and on its device. Cannot be combined "
            "with `prefill_chunk_size`, `custom_generate` or an encoder.",
        ),
    ]
    cache_config: Annotated[
        Mapping[str, object] | None,
        Field(
            "other rules",
            'for a quantised cache: `{"backend": "int8"}`, or `{"backend": "fp8"}` as in transformers',
            note='"int8" is jaxgen\'s own and more exact: a scale for each column of a head. "fp8" has one scale for '
            "the keys of a layer and one for its values, which the tokens of the prompts set; in transformers, padding "
            "sets it too. It cannot be combined with assisted decoding, as in transformers, or with `guidance_scale`.",
        ),
    ]

    return_dict_in_generate: Annotated[
        bool | None,
        Field(
            "outputs",
            "return a `GenerateDecoderOnlyOutput`, or with beams a `GenerateBeamDecoderOnlyOutput`",
            False,
            "The other fields of this group are ignored without it, as in transformers.",
        ),
    ]
    output_scores: Annotated[
        bool | None,
        Field(
            "outputs",
            "return the scores of each step, after all rules",
            False,
            "One array, float32 [steps, rows, vocabulary]; a tuple of steps in transformers.",
        ),
    ]
    output_logits: Annotated[
        bool | None,
        Field(
            "outputs",
            "return the logits of each step, before all rules",
            note="One array, float32 [steps, rows, vocabulary]; a tuple of steps in transformers.",
        ),
    ]
    output_attentions: Annotated[
        bool | None,
        Field(
            "outputs",
            "return the attention weights of each step and layer",
            note="The rows of masked tokens are zeros; in transformers their values are not meaningful.",
        ),
    ]
    output_hidden_states: Annotated[bool | None, Field("outputs", "return the hidden states of each step and layer")]

    prompt_lookup_num_tokens: Annotated[
        int | None,
        Field(
            "assisted decoding",
            "prompt lookup: draft n tokens that followed an earlier occurrence of the last tokens, and check them in "
            "one step",
            note="From 1 to 64. Faster where texts repeat parts of their prompts, as in summaries and edits.",
        ),
    ]
    max_matching_ngram_size: Annotated[
        int | None,
        Field(
            "assisted decoding",
            "prompt lookup: compare up to n last tokens; 2 by default",
            note="0 means 2, as in transformers. If the longest match occurs several times, the last occurrence is "
            "used; transformers uses the first.",
        ),
    ]

    num_assistant_tokens: Annotated[
        int | None,
        Field(
            "assisted decoding",
            "draft up to n tokens with the `assistant_model`, and check them in one step",
            20,
            "From 1 to 64. If not set in the call, the assistant's generation config applies; transformers reads only "
            "that.",
        ),
    ]
    num_assistant_tokens_schedule: Annotated[
        str | None,
        Field(
            "assisted decoding",
            "`constant`, or `heuristic`: the next draft is 2 tokens longer after one that was accepted in full, "
            "otherwise 1 shorter",
            "constant",
            "`heuristic_transient` is the same, since the assistant's own config is never changed. Each row adapts "
            "its own number, up to about twice `num_assistant_tokens`. If not set in the call, the assistant's "
            "generation config applies.",
        ),
    ]
    assistant_confidence_threshold: Annotated[
        float | None,
        Field(
            "assisted decoding",
            "end a draft after a token whose probability is below this",
            0.4,
            "0 never ends a draft. If not set in the call, the assistant's generation config applies.",
        ),
    ]
    assistant_early_exit: Annotated[
        int | None,
        Field(
            "assisted decoding",
            "draft with the first n layers of the model itself",
            note="From 1 to the model's number of layers minus 1; transformers takes any number. Faster only with "
            "models that were trained for it.",
        ),
    ]

    decoder_start_token_id: Annotated[
        int | Sequence[int] | None,
        Field(
            "encoder-decoder models",
            "token id that the decoder's text begins with, or one for each prompt",
            note="`bos_token_id` if not set. Models without an encoder ignore it, as in transformers.",
        ),
    ]

    use_mtp: Annotated[
        Literal[None, False], Field("refused", "drafts tokens with extra heads of the model (multi-token prediction)")
    ]
    is_assistant: Annotated[Literal[None, False], Field("refused", "marks the assistant of assisted decoding")]
    dola_layers: Annotated[
        Literal[None], Field("refused", "contrasts the logits of layers (DoLa); transformers 5 moved it to the Hub")
    ]
    constraints: Annotated[
        Literal[None], Field("refused", "is for constrained beam search, which transformers 5 moved to the Hub")
    ]
    force_words_ids: Annotated[
        Literal[None], Field("refused", "is for constrained beam search, which transformers 5 moved to the Hub")
    ]

    compile_config: Annotated[object, Field("no effect", "is about torch.compile; jaxgen compiles every call")]
    disable_compile: Annotated[bool | None, Field("no effect", "is about torch.compile; jaxgen compiles every call")]
    max_cache_len: Annotated[int | None, Field("no effect", "sizes a static cache; jaxgen's cache grows with the text")]
    continuous_batching_config: Annotated[
        object, Field("no effect", "is about `generate_batch`; transformers' `generate` ignores it too")
    ]
    low_memory: Annotated[
        bool | None,
        Field("no effect", "was about the memory of contrastive search in transformers 4, not about its tokens"),
    ]
    assistant_lookbehind: Annotated[int | None, Field("no effect", _ASSISTANT)]
    target_lookbehind: Annotated[int | None, Field("no effect", _ASSISTANT)]
    assistant_ensemble_weight: Annotated[float | None, Field("no effect", _DRAFTS)]
    speculation_type: Annotated[str | None, Field("no effect", _DRAFTS)]
    transformers_version: Annotated[str | None, Field("no effect", "says which transformers wrote the config")]


class ModelInputs(TypedDict, total=False):
    """The keywords of `generate` that are inputs of the model: B prompts of P tokens, with embeddings of size D."""

    input_ids: Annotated[ArrayLike | None, Field("model inputs", "the prompts, another name of `inputs`")]
    attention_mask: Annotated[
        ArrayLike | None,
        Field(
            "model inputs",
            "[B, P], 1 for tokens and 0 for padding",
            note="If not set, `pad_token_id` is padding, unless it is also an `eos_token_id`. With a `cache`, it also "
            "has a column for each cached token.",
        ),
    ]
    position_ids: Annotated[
        ArrayLike | None,
        Field(
            "model inputs",
            "integers [B, P] or [1, P], the position of each prompt token",
            note="If not set, unmasked tokens are counted from 0. Cannot be combined with `guidance_scale` or "
            "`penalty_alpha`.",
        ),
    ]
    cache: Annotated[
        object,
        Field(
            "model inputs",
            "the `cache` of an earlier output, or a `DynamicCache` or `StaticCache` of torch",
            note="It is not changed; transformers changes it. The ids are those of the whole text, or only the new "
            "ones. A cache of one row is shared by all prompts. A cache with one row per prompt is shared by the "
            "prompt's beams or samples. Cannot be combined with `guidance_scale` or `penalty_alpha`.",
        ),
    ]
    past_key_values: Annotated[object, Field("model inputs", "the older name of `cache`")]
    inputs_embeds: Annotated[
        ArrayLike | None,
        Field(
            "model inputs",
            "floats [B, P, hidden_size], embeddings in place of the tokens of the prompt",
            note="If no ids are passed with them, only the new tokens are returned. Cannot be combined with "
            "`guidance_scale` or `penalty_alpha`.",
        ),
    ]
    logits_to_keep: Annotated[
        int | None,
        Field("model inputs", "accepted without effect: only the logits of the last token are computed"),
    ]
    decoder_input_ids: Annotated[
        ArrayLike | None,
        Field(
            "encoder-decoder models",
            "integers [B, P], the decoder's first tokens",
            note="If no row begins with the `decoder_start_token_id`, it is put before all rows. With a `cache`, the "
            "whole text or its new tokens.",
        ),
    ]
    decoder_attention_mask: Annotated[
        ArrayLike | None,
        Field(
            "encoder-decoder models",
            "[B, P], 1 for tokens of `decoder_input_ids` and 0 for padding",
            note="If not set, all of them are tokens.",
        ),
    ]
    encoder_outputs: Annotated[
        object,
        Field(
            "encoder-decoder models",
            "the output of the encoder, in place of its input",
            note="An array [B, X, hidden_size] as from `model.encode`, or an output or tuple of transformers. It is "
            "never changed; transformers repeats it in place for beams. Pass the `attention_mask` too.",
        ),
    ]


class GenerateKeywords(GenerationFields, ModelInputs, total=False):
    """All keywords of `generate` that are not among its parameters."""

    trust_remote_code: Annotated[
        bool | None, Field("model inputs", "allows `custom_generate` to run the code of a folder or a repository")
    ]


def described(keywords: type) -> dict[str, tuple[object, Field]]:
    """The type and the description of each keyword in a table of this module."""
    return {name: get_args(hint) for name, hint in get_type_hints(keywords, include_extras=True).items()}


FIELDS = described(GenerationFields)
REFUSED: dict[str, tuple[object, ...]] = {
    name: get_args(values) for name, (values, field) in FIELDS.items() if field.group == "refused"
}
NO_EFFECT = {name: field.help for name, (_, field) in FIELDS.items() if field.group == "no effect"}
SUPPORTED = frozenset(FIELDS.keys() - REFUSED.keys() - NO_EFFECT.keys())
FLAGS = tuple(name for name, (kind, _) in FIELDS.items() if kind == bool | None and name in SUPPORTED)
INPUTS = described(ModelInputs)
MODEL_INPUTS = frozenset(INPUTS)
