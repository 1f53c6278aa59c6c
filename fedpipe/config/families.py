"""The model families of pre-training: what their config.json may say, and what its silence means.

The layers of ``fedpipe.models`` are exact for the fields of ``ModelShape`` and for the values in
``fixed``. Every other field must be known to change nothing, or a folder is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FamilyName = Literal["roberta", "bert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One ``model_type`` of transformers."""

    positions_after_padding: bool
    """The first token has position ``pad_token_id + 1``; otherwise it has position 0."""
    new: Mapping[str, Any]
    """Sizes of a model that starts anew, where they are not the same in every family."""
    defaults: Mapping[str, Any]
    """What transformers takes for a field of ``ModelShape`` that config.json leaves out."""
    pad_token_id: int
    """What transformers takes where config.json leaves it out."""
    fixed: Mapping[str, tuple[object, str]]
    """Fields that the stages honour with one value only, with what to do about another one."""
    harmless: frozenset[str]
    """Fields that neither the encoder nor the masked-LM head depends on."""
    layer_tensors: frozenset[str]
    """What a folder's encoder layer may hold."""

    def first_position(self, pad_id: int) -> int:
        """Return the row of the position table that the first token of a sequence reads."""
        return pad_id + 1 if self.positions_after_padding else 0


_DEFAULTS = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02, "layer_norm_eps": 1e-12, "tie_word_embeddings": True,
    "classifier_dropout": None,
}  # fmt: skip
_ENCODER = "Use the folder of an encoder, which reads text in both directions."
_FIXED: dict[str, tuple[object, str]] = {
    "position_embedding_type": ("absolute", "Use the folder of a model with absolute positions."),
    "is_decoder": (False, _ENCODER),
    "is_encoder_decoder": (False, _ENCODER),
    "add_cross_attention": (False, _ENCODER),
    "pruned_heads": ({}, "Use the folder of the whole model."),
    "chunk_size_feed_forward": (0, "Set it to 0 there: no result depends on it."),
    "quantization_config": (None, "Use the folder of the model in float32, float16 or bfloat16."),
    "auto_map": (None, "Use a model that is part of transformers and needs no code of its own."),
}
_HARMLESS = frozenset(
    # Where the file comes from, and in which precision; weights are read as float32.
    "_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset architectures"
    " model_type transformers_version dtype torch_dtype use_bfloat16 tokenizer_class name prefix"
    # How transformers runs the model and returns its outputs.
    " gradient_checkpointing output_attentions output_hidden_states output_past return_dict"
    " return_dict_in_generate tf_legacy_loss torchscript use_cache"
    # Heads of other tasks.
    " _num_labels directionality finetuning_task id2label label2id num_labels pooler_fc_size"
    " pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"
    " problem_type task_specific_params"
    # Special tokens: those of data.tokenizer are used.
    " bos_token_id cls_token_id decoder_start_token_id eos_token_id forced_bos_token_id"
    " forced_eos_token_id mask_token_id sep_token_id unk_token_id"
    # Text generation, and decoders.
    " bad_words_ids begin_suppress_tokens cross_attention_hidden_size diversity_penalty do_sample"
    " early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty"
    " max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences"
    " output_scores remove_invalid_values repetition_penalty suppress_tokens temperature"
    " tie_encoder_decoder top_k top_p typical_p".split()
)

_MODULES = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
    "output.LayerNorm",
)  # fmt: skip
_LAYER_TENSORS = frozenset(
    f"{module}.{name}"
    for module in _MODULES
    for name in ("weight", "bias", *(("gamma", "beta") if module.endswith("Norm") else ()))
)
"""gamma and beta are what the original BERT calls a LayerNorm's weight and bias."""

FAMILIES: dict[FamilyName, Family] = {
    "roberta": Family(
        positions_after_padding=True,
        new={"type_vocab_size": 1, "layer_norm_eps": 1e-5},
        defaults=_DEFAULTS | {"vocab_size": 50265},
        pad_token_id=1,
        fixed=_FIXED,
        harmless=_HARMLESS,
        layer_tensors=_LAYER_TENSORS,
    ),
    "bert": Family(
        positions_after_padding=False,
        new={"type_vocab_size": 2, "layer_norm_eps": 1e-12},
        defaults=_DEFAULTS | {"vocab_size": 30522},
        pad_token_id=0,
        fixed=_FIXED,
        harmless=_HARMLESS,
        layer_tensors=_LAYER_TENSORS,
    ),
}
"""By ``model_type``."""
