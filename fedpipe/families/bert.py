"""BERT, Devlin et al. 2018, https://arxiv.org/abs/1810.04805."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from fedpipe.families.family import SIZES, Config, Family, Field, gather, modeling, rows_of

if TYPE_CHECKING:
    from torch import Tensor, nn

ENCODER = "Use the folder of an encoder, which reads text in both directions."
FIXED: Mapping[str, tuple[object, str]] = {
    "is_decoder": (False, ENCODER),
    "is_encoder_decoder": (False, ENCODER),
    "add_cross_attention": (False, ENCODER),
    "pruned_heads": ({}, "Use the folder of the whole model."),
    "chunk_size_feed_forward": (0, "Set it to 0 there: no result depends on it."),
    "quantization_config": (None, "Use the folder of the model in float32, float16 or bfloat16."),
    "auto_map": (None, "Use a model that is part of transformers and needs no code of its own."),
}
"""What is fixed in every family."""
HARMLESS = frozenset(
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
"""What is harmless in every family."""
_MODULES = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
    "output.LayerNorm",
)  # fmt: skip


class Bert(Family):
    """BERT; families that only differ in embeddings, names and special tokens inherit from it."""

    model_type = "bert"
    fields = {
        "num_hidden_layers": Field(12),
        "hidden_size": Field(768),
        "num_attention_heads": Field(12),
        "intermediate_size": Field(3072),
        "vocab_size": Field(30522),
        "max_position_embeddings": Field(512),
        "type_vocab_size": Field(2),
        "hidden_act": Field("gelu", "activation"),
        "hidden_dropout_prob": Field(0.1, "share"),
        "attention_probs_dropout_prob": Field(0.1, "share"),
        "initializer_range": Field(0.02, "above zero"),
        "layer_norm_eps": Field(1e-12, "above zero"),
        "tie_word_embeddings": Field(True, "flag"),
        "classifier_dropout": Field(None, "share", may_be_null=True, is_carried=True),
    }
    keys = {name: (name,) for name in fields if name != "classifier_dropout"}
    fixed: Mapping[str, tuple[object, str]] = {
        **FIXED,
        "position_embedding_type": (
            "absolute",
            "Use the folder of a model with absolute positions.",
        ),
    }
    harmless = HARMLESS
    pad_token_id = 0
    positions: Literal["from zero", "after padding", "rotary"] = "from zero"
    sizes = {
        size: {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
        }
        for size, (layers, hidden, heads) in SIZES.items()
    }
    prefix = "bert"
    embeddings = "bert.embeddings"
    word_embeddings = "bert.embeddings.word_embeddings.weight"
    layers = "bert.encoder.layer"
    head = "cls.predictions"
    decoder = "cls.predictions.decoder.weight"
    twins = {"cls.predictions.bias": "cls.predictions.decoder.bias"}
    layer_tensors = frozenset(
        f"{module}.{name}"
        for module in _MODULES
        # gamma and beta are what the original BERT calls a LayerNorm's weight and bias.
        for name in ("weight", "bias", *(("gamma", "beta") if module.endswith("Norm") else ()))
    )

    def embedding_parameters(self, config: Config) -> int:
        """See ``Family``: word, position and type embeddings and their LayerNorm."""
        rows = config["vocab_size"] + config["max_position_embeddings"] + config["type_vocab_size"]
        return int((rows + 2) * config["hidden_size"])

    def layer_parameters(self, config: Config, index: int) -> int:
        """See ``Family``."""
        hidden, inner = self.get(config, "hidden_size"), self.get(config, "intermediate_size")
        attention = 4 * (hidden * hidden + hidden)
        feed_forward = 2 * hidden * inner + inner + hidden
        return int(attention + feed_forward + 2 * 2 * hidden)

    def head_parameters(self, config: Config) -> int:
        """See ``Family``: a dense layer, a LayerNorm and the decoder's bias."""
        hidden = self.get(config, "hidden_size")
        return int(hidden * hidden + hidden + 2 * hidden + config["vocab_size"])

    def linear_flops(self, config: Config) -> tuple[int, int]:
        """See ``Family``: ``2 D^2``, and ``2 D^2 + 2 D F``."""
        hidden, inner = self.get(config, "hidden_size"), self.get(config, "intermediate_size")
        return 2 * hidden * hidden, 2 * hidden * hidden + 2 * hidden * inner

    def tensor_shapes(self, config: Config) -> Mapping[str, list[int]]:
        """See ``Family``."""
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        return {
            "embeddings.word_embeddings.weight": [config["vocab_size"], hidden],
            "embeddings.position_embeddings.weight": [config["max_position_embeddings"], hidden],
            "embeddings.token_type_embeddings.weight": [config["type_vocab_size"], hidden],
            "attention.self.query.weight": [hidden, hidden],
            "intermediate.dense.weight": [inner, hidden],
        }

    def _modeling(self) -> Any:
        return modeling("models.bert.modeling_bert")

    def config_class(self) -> Any:
        """See ``Family``; transformers 5.x imports scikit-learn when it is asked for one."""
        return self._modeling().BertConfig

    def masked_lm_class(self) -> Any:
        """See ``Family``."""
        return self._modeling().BertForMaskedLM

    def make_embeddings(self, config: Any) -> nn.Module:
        """See ``Family``."""
        result: nn.Module = self._modeling().BertEmbeddings(config)
        return result

    def make_layer(self, config: Any, index: int) -> nn.Module:
        """See ``Family``."""
        result: nn.Module = self._modeling().BertLayer(config)
        return result

    def make_head(self, config: Any) -> Mapping[str, nn.Module]:
        """See ``Family``."""
        return {self.head: tie_bias(self._modeling().BertLMPredictionHead(config))}

    def run_layer(self, layer: Any, hidden_BTD: Tensor, surroundings: Any) -> Tensor:
        """See ``Family``. transformers 4.x returns a tuple, 5.x a tensor."""
        output = layer(hidden_BTD, surroundings)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def run_layer_at(
        self, layer: Any, hidden_BTD: Tensor, positions_BM: Tensor, surroundings: Any
    ) -> Tensor:
        """See ``Family``."""
        from torch.nn import functional

        attention = layer.attention.self
        rows_BMD = gather(hidden_BTD, positions_BM)

        def heads(projection: Any, hidden: Tensor) -> Tensor:
            split: Tensor = projection(hidden).unflatten(-1, (attention.num_attention_heads, -1))
            return split.transpose(1, 2)

        context_BHMd = functional.scaled_dot_product_attention(
            heads(attention.query, rows_BMD),
            heads(attention.key, hidden_BTD),
            heads(attention.value, hidden_BTD),
            attn_mask=rows_of(surroundings, positions_BM),
            dropout_p=attention.dropout.p if layer.training else 0.0,
        )
        attended_BMD = layer.attention.output(context_BHMd.transpose(1, 2).flatten(2), rows_BMD)
        result: Tensor = layer.output(layer.intermediate(attended_BMD), attended_BMD)
        return result


def tie_bias(head: Any) -> nn.Module:
    """Make the two biases of a head one tensor, as transformers 4.x does and 5.x does not."""
    head.decoder.bias = head.bias
    result: nn.Module = head
    return result
