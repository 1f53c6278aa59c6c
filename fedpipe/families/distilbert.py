"""DistilBERT, Sanh et al. 2019, https://arxiv.org/abs/1910.01108."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpipe.families.bert import FIXED, HARMLESS, Bert
from fedpipe.families.family import SIZES, Config, Field, gather, modeling, rows_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_MODULES = (
    "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm",
    "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip


class DistilBert(Bert):
    """BERT without token types, with names of its own."""

    model_type = "distilbert"
    fields = {
        "n_layers": Field(6),
        "dim": Field(768),
        "n_heads": Field(12),
        "hidden_dim": Field(3072),
        "vocab_size": Field(30522),
        "max_position_embeddings": Field(512),
        "activation": Field("gelu", "activation"),
        "dropout": Field(0.1, "share"),
        "attention_dropout": Field(0.1, "share"),
        "initializer_range": Field(0.02, "above zero"),
        "tie_word_embeddings": Field(True, "flag"),
        "qa_dropout": Field(0.1, "share", is_carried=True),
        "seq_classif_dropout": Field(0.2, "share", is_carried=True),
        "sinusoidal_pos_embds": Field(False, "flag", is_carried=True),
    }
    keys = {
        "num_hidden_layers": ("n_layers",),
        "hidden_size": ("dim",),
        "num_attention_heads": ("n_heads",),
        "intermediate_size": ("hidden_dim",),
        "vocab_size": ("vocab_size",),
        "max_position_embeddings": ("max_position_embeddings",),
        "hidden_act": ("activation",),
        "hidden_dropout_prob": ("dropout",),
        "attention_probs_dropout_prob": ("attention_dropout",),
        "initializer_range": ("initializer_range",),
        "tie_word_embeddings": ("tie_word_embeddings",),
    }
    fixed = FIXED
    harmless = HARMLESS | {"tie_weights_"}
    sizes = {
        size: {"n_layers": layers, "dim": hidden, "n_heads": heads, "hidden_dim": 4 * hidden}
        for size, (layers, hidden, heads) in SIZES.items()
    }
    prefix = "distilbert"
    embeddings = "distilbert.embeddings"
    word_embeddings = "distilbert.embeddings.word_embeddings.weight"
    layers = "distilbert.transformer.layer"
    head = ""
    decoder = "vocab_projector.weight"
    twins = {}
    layer_tensors = frozenset(f"{m}.{name}" for m in _MODULES for name in ("weight", "bias"))

    def embedding_parameters(self, config: Config) -> int:
        """See ``Family``: word and position embeddings and their LayerNorm."""
        return int((config["vocab_size"] + config["max_position_embeddings"] + 2) * config["dim"])

    def tensor_shapes(self, config: Config) -> Mapping[str, list[int]]:
        """See ``Family``."""
        hidden = config["dim"]
        return {
            "embeddings.word_embeddings.weight": [config["vocab_size"], hidden],
            "embeddings.position_embeddings.weight": [config["max_position_embeddings"], hidden],
            "attention.q_lin.weight": [hidden, hidden],
            "ffn.lin1.weight": [config["hidden_dim"], hidden],
        }

    def _modeling(self) -> Any:
        return modeling("models.distilbert.modeling_distilbert")

    def config_class(self) -> Any:
        """See ``Family``."""
        return self._modeling().DistilBertConfig

    def masked_lm_class(self) -> Any:
        """See ``Family``."""
        return self._modeling().DistilBertForMaskedLM

    def make_embeddings(self, config: Any) -> nn.Module:
        """See ``Family``."""
        result: nn.Module = self._modeling().Embeddings(config)
        return result

    def make_layer(self, config: Any, index: int) -> nn.Module:
        """See ``Family``."""
        result: nn.Module = self._modeling().TransformerBlock(config)
        return result

    def make_head(self, config: Any) -> Mapping[str, nn.Module]:
        """See ``Family``."""
        from torch import nn

        return {
            "vocab_transform": nn.Linear(config.dim, config.dim),
            "activation": modeling("activations").get_activation(config.activation),
            "vocab_layer_norm": nn.LayerNorm(config.dim, eps=1e-12),
            "vocab_projector": nn.Linear(config.dim, config.vocab_size),
        }

    def run_layer(self, layer: Any, hidden_BTD: Tensor, surroundings: Any) -> Tensor:
        """See ``Family``."""
        return _run(layer, hidden_BTD, hidden_BTD, surroundings)

    def run_layer_at(
        self, layer: Any, hidden_BTD: Tensor, positions_BM: Tensor, surroundings: Any
    ) -> Tensor:
        """See ``Family``."""
        rows_BMD = gather(hidden_BTD, positions_BM)
        return _run(layer, hidden_BTD, rows_BMD, rows_of(surroundings, positions_BM))


def _run(layer: Any, hidden_BTD: Tensor, rows_BMD: Tensor, visible: Tensor | None) -> Tensor:
    """Run a layer for some rows of its input; its own forward computes attention matrices."""
    from torch.nn import functional

    attention = layer.attention

    def heads(projection: Any, hidden: Tensor) -> Tensor:
        split: Tensor = projection(hidden).unflatten(-1, (attention.n_heads, -1))
        return split.transpose(1, 2)

    context_BHMd = functional.scaled_dot_product_attention(
        heads(attention.q_lin, rows_BMD),
        heads(attention.k_lin, hidden_BTD),
        heads(attention.v_lin, hidden_BTD),
        attn_mask=visible,
        dropout_p=attention.dropout.p if layer.training else 0.0,
    )
    attended_BMD = attention.out_lin(context_BHMd.transpose(1, 2).flatten(2))
    rows_BMD = layer.sa_layer_norm(attended_BMD + rows_BMD)
    result: Tensor = layer.output_layer_norm(layer.ffn(rows_BMD) + rows_BMD)
    return result
