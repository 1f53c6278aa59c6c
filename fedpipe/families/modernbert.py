"""ModernBERT, Warner et al. 2024, https://arxiv.org/abs/2412.13663."""

# B = sequences, T = positions per sequence, M = scored positions per sequence, D = hidden size,
# H = attention heads, d = D / H, F = feed-forward width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fedpipe.families.bert import FIXED, HARMLESS
from fedpipe.families.family import SIZES, Config, Family, Field, gather, modeling, rows_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_KINDS = ("full_attention", "sliding_attention")
"""What transformers 5.x calls global and local layers."""


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What layers need beside hidden states; [0] is for global layers, [1] for local ones."""

    rotations: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Cosines and sines (T, d) float32 of the rotary positions."""
    visible: tuple[Tensor | None, Tensor | None]
    """bool, broadcast to (B, H, T, T); None where everything may be attended to."""


class ModernBert(Family):
    """Pre-normalisation, rotary positions, local and global attention, GeGLU, mostly no biases."""

    model_type = "modernbert"
    fields = {
        "num_hidden_layers": Field(22),
        "hidden_size": Field(768),
        "num_attention_heads": Field(12),
        "intermediate_size": Field(1152),
        "vocab_size": Field(50368),
        "max_position_embeddings": Field(8192),
        "hidden_activation": Field("gelu", "activation"),
        "classifier_activation": Field("gelu", "activation"),
        "embedding_dropout": Field(0.0, "share"),
        "mlp_dropout": Field(0.0, "share"),
        "attention_dropout": Field(0.0, "share"),
        "initializer_range": Field(0.02, "above zero"),
        "initializer_cutoff_factor": Field(2.0, "above zero", may_be_null=True),
        "norm_eps": Field(1e-5, "above zero"),
        "norm_bias": Field(False, "flag"),
        "attention_bias": Field(False, "flag"),
        "mlp_bias": Field(False, "flag"),
        "classifier_bias": Field(False, "flag"),
        "decoder_bias": Field(True, "flag"),
        "global_attn_every_n_layers": Field(3),
        "local_attention": Field(128),
        "global_rope_theta": Field(160000.0, "above zero"),
        "local_rope_theta": Field(10000.0, "above zero", may_be_null=True),
        "tie_word_embeddings": Field(True, "flag"),
        # Of no meaning to pre-training; an exported model keeps them.
        "classifier_dropout": Field(0.0, "share"),
        "classifier_pooling": Field("cls", "choice", choices=("cls", "mean")),
    }
    keys = {
        **{
            name: (name,)
            for name in (
                "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
                "vocab_size", "max_position_embeddings", "initializer_range", "tie_word_embeddings",
            )
        },
        "hidden_act": ("hidden_activation", "classifier_activation"),
        "hidden_dropout_prob": ("embedding_dropout", "mlp_dropout"),
        "attention_probs_dropout_prob": ("attention_dropout",),
        "layer_norm_eps": ("norm_eps",),
    }  # fmt: skip
    fixed = {
        **FIXED,
        "rope_scaling": (None, "Use the folder of a model whose positions are not scaled."),
    }
    harmless = HARMLESS | frozenset(
        # Kernels that compute the same.
        "deterministic_flash_attn reference_compile repad_logits_with_grad sparse_prediction"
        " sparse_pred_ignore_index"
        # Of models that other programs have trained.
        " position_embedding_type layer_norm_eps".split()
    )
    pad_token_id = 50283
    special_tokens = {
        **Family.special_tokens,
        "cls_token_id": "cls",
        "sep_token_id": "sep",
    }
    positions = "rotary"
    sizes = {
        **{
            size: {
                "num_hidden_layers": layers,
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "intermediate_size": hidden * 3 // 2,
            }
            for size, (layers, hidden, heads) in SIZES.items()
        },
        "ettin-32m": {
            "num_hidden_layers": 10,
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 576,
        },
        "modernbert-base": {},
    }
    prefix = "model"
    embeddings = "model.embeddings"
    word_embeddings = "model.embeddings.tok_embeddings.weight"
    layers = "model.layers"
    head = ""
    decoder = "decoder.weight"
    layer_tensors = frozenset(
        f"{module}.{name}"
        for module in ("attn_norm", "attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo")
        for name in ("weight", "bias")
    )

    def read(self, content: Config) -> Config:
        """See ``Family``. transformers 5.x writes a list of layers' kinds, and a base of each."""
        result = dict(content)
        every = content.get("global_attn_every_n_layers", 3)
        number = content.get("num_hidden_layers", 22)
        if type(every) is int and every > 0 and type(number) is int:
            kinds = [_KINDS[bool(index % every)] for index in range(number)]
            if content.get("layer_types") == kinds:
                del result["layer_types"]
        rotary = content.get("rope_parameters")
        if isinstance(rotary, dict) and set(rotary) <= set(_KINDS):
            found = [rotary.get(kind) or {} for kind in _KINDS]
            plain = ({"rope_theta", "rope_type"}, "default")
            if all((set(f) | plain[0], f.get("rope_type", "default")) == plain for f in found):
                del result["rope_parameters"]
                for name, values in zip(("global", "local"), found, strict=True):
                    if "rope_theta" in values:
                        result[f"{name}_rope_theta"] = values["rope_theta"]
        return result

    def _norm(self, config: Config) -> int:
        return int(config["hidden_size"]) * (2 if config["norm_bias"] else 1)

    def embedding_parameters(self, config: Config) -> int:
        """See ``Family``: the word embedding and its norm."""
        return int(config["vocab_size"] * config["hidden_size"]) + self._norm(config)

    def layer_parameters(self, config: Config, index: int) -> int:
        """See ``Family``. The embeddings' norm is all that layer 0 has before its attention."""
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        matrices = 4 * hidden * hidden + 3 * hidden * inner
        biases = 4 * hidden * config["attention_bias"] + (2 * inner + hidden) * config["mlp_bias"]
        return int(matrices + biases) + self._norm(config) * (2 if index else 1)

    def head_parameters(self, config: Config) -> int:
        """See ``Family``: the norm behind the last layer, a dense layer, a norm, and biases."""
        hidden = config["hidden_size"]
        biases = hidden * config["classifier_bias"] + config["vocab_size"] * config["decoder_bias"]
        return int(hidden * hidden + biases) + 2 * self._norm(config)

    def linear_flops(self, config: Config) -> tuple[int, int]:
        """See ``Family``: ``2 D^2``, and ``2 D^2 + 3 D F``."""
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        return 2 * hidden * hidden, 2 * hidden * hidden + 3 * hidden * inner

    def tensor_shapes(self, config: Config) -> Mapping[str, list[int]]:
        """See ``Family``."""
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        return {
            "embeddings.tok_embeddings.weight": [config["vocab_size"], hidden],
            "attn.Wqkv.weight": [3 * hidden, hidden],
            "mlp.Wi.weight": [2 * inner, hidden],
        }

    def _modeling(self) -> Any:
        return modeling("models.modernbert.modeling_modernbert")

    def config_class(self) -> Any:
        """See ``Family``."""
        return self._modeling().ModernBertConfig

    def masked_lm_class(self) -> Any:
        """See ``Family``."""
        return self._modeling().ModernBertForMaskedLM

    def make_embeddings(self, config: Any) -> nn.Module:
        """See ``Family``."""
        config.reference_compile = False
        result: nn.Module = self._modeling().ModernBertEmbeddings(config)
        return result

    def make_layer(self, config: Any, index: int) -> nn.Module:
        """See ``Family``."""
        result: nn.Module = self._modeling().ModernBertEncoderLayer(config, index)
        if hasattr(result.attn, "rotary_emb"):  # transformers 4.x; ours are in ``surroundings``
            del result.attn.rotary_emb
        result.is_local = bool(index % config.global_attn_every_n_layers)
        return result

    def make_head(self, config: Any) -> Mapping[str, nn.Module]:
        """See ``Family``."""
        from torch import nn

        size = config.hidden_size
        return {
            "model.final_norm": nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias),
            "head": self._modeling().ModernBertPredictionHead(config),
            "decoder": nn.Linear(size, config.vocab_size, bias=config.decoder_bias),
        }

    def surroundings(
        self, config: Any, length: int, visible: Tensor | None, device: torch.device
    ) -> Any:
        """See ``Family``."""
        size = config.hidden_size // config.num_attention_heads
        everywhere = config.global_rope_theta
        far, near = (
            _rotation(theta, size, length, device)
            for theta in (everywhere, config.local_rope_theta or everywhere)
        )
        window = _window(config.local_attention // 2, length, device)
        if window is None or visible is None:
            return _Surroundings((far, near), (visible, visible if window is None else window))
        return _Surroundings((far, near), (visible, window & visible))

    def run_layer(self, layer: Any, hidden_BTD: Tensor, surroundings: Any) -> Tensor:
        """See ``Family``."""
        return _run(layer, hidden_BTD, None, surroundings)

    def run_layer_at(
        self, layer: Any, hidden_BTD: Tensor, positions_BM: Tensor, surroundings: Any
    ) -> Tensor:
        """See ``Family``."""
        return _run(layer, hidden_BTD, positions_BM.long(), surroundings)

    def deviation(self, config: Any, name: str) -> float:
        """See ``Family``: what adds to the residual stream starts smaller."""
        narrow = name.endswith(("Wo.weight", "head.dense.weight"))
        return float(config.initializer_range) / (
            (2.0 * config.num_hidden_layers) ** 0.5 if narrow else 1.0
        )

    def cutoff(self, config: Any) -> float | None:
        """See ``Family``."""
        return float(config.initializer_cutoff_factor or 3)


@cache
def _rotation(theta: float, size: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, d) of the angles of all positions."""
    import torch

    steps = torch.arange(0, size, 2, device=device).float() / size
    places = torch.arange(length, device=device).float()
    angles = torch.outer(places, 1.0 / theta**steps).repeat(1, 2)
    return angles.cos(), angles.sin()


@cache
def _window(reach: int, length: int, device: torch.device) -> Tensor | None:
    """Return the mask (1, 1, T, T) of neighbours; None if all positions are neighbours."""
    import torch

    if length <= reach + 1:
        return None
    places = torch.arange(length, device=device)
    return ((places[:, None] - places).abs() <= reach)[None, None]


def _run(layer: Any, hidden_BTD: Tensor, positions_BM: Tensor | None, around: Any) -> Tensor:
    """Run a layer for all positions, or for some."""
    from torch.nn import functional

    attention, kind = layer.attn, int(layer.is_local)
    normed_BTD = layer.attn_norm(hidden_BTD)
    heads, size = attention.config.num_attention_heads, hidden_BTD.shape[-1]
    cos, sin = around.rotations[kind]
    visible = around.visible[kind]
    rows_cos, rows_sin = cos, sin
    if positions_BM is None:
        rows = hidden_BTD
        query, key, value = attention.Wqkv(normed_BTD).chunk(3, -1)
    else:
        rows = gather(hidden_BTD, positions_BM)
        weight, bias = attention.Wqkv.weight, attention.Wqkv.bias
        biases = (None, None) if bias is None else (bias[:size], bias[size:])
        query = functional.linear(gather(normed_BTD, positions_BM), weight[:size], biases[0])
        key, value = functional.linear(normed_BTD, weight[size:], biases[1]).chunk(2, -1)
        rows_cos, rows_sin = cos[positions_BM][:, None], sin[positions_BM][:, None]
        visible = rows_of(visible, positions_BM)
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    context = functional.scaled_dot_product_attention(
        _rotate(query, rows_cos, rows_sin),
        _rotate(key, cos, sin),
        value,
        attn_mask=visible,
        dropout_p=attention.attention_dropout if layer.training else 0.0,
    )
    rows = rows + attention.out_drop(attention.Wo(context.transpose(1, 2).flatten(2)))
    result: Tensor = rows + layer.mlp(layer.mlp_norm(rows))
    return result


def _rotate(heads_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys to their positions (Su et al. 2021), in float32."""
    import torch

    x = heads_BHTd.float()
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x * cos + turned * sin).to(heads_BHTd.dtype)
