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
_LONG = 8
"""Reaches from which on local layers compute in chunks: half of what masking all others takes."""


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What layers need beside hidden states; [0] is for global layers, [1] for local ones."""

    rotations: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Cosines and signed sines (T, d) float32 of the rotary positions."""
    visible: Tensor | None
    """bool, broadcast to (B, H, T, T), without the distance; None for all."""
    reach: int
    """How far a token of a local layer sees to either side."""
    band: Tensor | None
    """bool (B or 1, n, 2 reach, 4 reach), what is attended to in every chunk of a long sequence by
    local layers; None for short sequences, whose local layers mask what is too far."""


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
        "local_rope_theta": Field(10000.0, "above zero"),
        "tie_word_embeddings": Field(True, "flag"),
        "classifier_dropout": Field(0.0, "share", is_carried=True),
        "classifier_pooling": Field("cls", "choice", choices=("cls", "mean"), is_carried=True),
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
        """See ``Family``. transformers 5.x writes a list of layers' kinds, and a base of each.

        A list that is not periodic, a rotation that is scaled, and what contradicts the fields of
        transformers 4.x stay in the result, which no field of that name accepts.
        """
        result = dict(content)
        kinds = content.get("layer_types")
        number = content.get("num_hidden_layers", self.fields["num_hidden_layers"].default)
        if isinstance(kinds, list) and type(number) is int and len(kinds) == number:
            given = content.get("global_attn_every_n_layers")
            default = self.fields["global_attn_every_n_layers"].default
            second = next((i for i in range(1, number) if kinds[i] == _KINDS[0]), number)
            for every in (default, second) if given is None else (given,):
                if type(every) is int and every > 0 and kinds == _kinds(number, every):
                    del result["layer_types"]
                    result["global_attn_every_n_layers"] = every
                    break
        rotary = content.get("rope_parameters")
        if isinstance(rotary, dict) and set(rotary) <= set(_KINDS):
            names = ("global_rope_theta", "local_rope_theta")
            found = [rotary.get(kind) or {} for kind in _KINDS]
            bases = {
                name: values["rope_theta"]
                for name, values in zip(names, found, strict=True)
                if isinstance(values, dict) and "rope_theta" in values
            }
            plain = ({"rope_theta", "rope_type"}, "default")
            if all(
                isinstance(f, dict) and (set(f) | plain[0], f.get("rope_type", "default")) == plain
                for f in found
            ) and all(content.get(name) in (None, base) for name, base in bases.items()):
                del result["rope_parameters"]
                result |= bases
        if "local_rope_theta" in result and result["local_rope_theta"] is None:
            # transformers 4.x takes the other base then, and 5.x fails.
            base = self.fields["global_rope_theta"].default
            result["local_rope_theta"] = result.get("global_rope_theta", base)
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

    def attention_pairs(self, config: Config, first: int, end: int, *, length: int) -> int:
        """See ``Family``. A chunk of a local layer is compared with one twice as long."""
        every, reach = config["global_attn_every_n_layers"], config["local_attention"] // 2
        num_global = -(-end // every) + first // -every
        local = length**2
        if _in_chunks_at(reach, length):
            local = -(-length // (2 * reach)) * 2 * reach * 4 * reach
        return int(num_global * length**2 + (end - first - num_global) * local)

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
        far, near = (
            _rotation(float(theta), size, length, device)
            for theta in (config.global_rope_theta, config.local_rope_theta)
        )
        reach = config.local_attention // 2
        band = None
        if _in_chunks_at(reach, length):
            band, beyond = _band(reach, length, device)
            if visible is not None:
                band = band & _cut_band(visible, reach) | beyond
        return _Surroundings((far, near), visible, reach, band)

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


def _in_chunks_at(reach: int, length: int) -> bool:
    """Whether local layers compute sequences of a length in chunks."""
    return 0 < _LONG * reach <= length


def _kinds(number: int, every: int) -> list[str]:
    """Return the kinds of layers of which every so-manieth is global, from the first one on."""
    return [_KINDS[bool(index % every)] for index in range(number)]


@cache
def _rotation(theta: float, size: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines, and sines with their signs, (T, d), of the angles of all positions."""
    import torch

    steps = torch.arange(0, size, 2, device=device).float() / size
    places = torch.arange(length, device=device).float()
    angles = torch.outer(places, 1.0 / theta**steps)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)


@cache
def _band(reach: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which neighbours a token of a chunk has, and which tokens are beyond the sequence.

    Chunk i holds positions ``2 reach i`` and on, its neighbours begin ``reach`` before. What is
    beyond the sequence has all neighbours: nobody reads it, and without one it would be nan.

    Returns:
        (1, n, 2 reach, 4 reach) and (1, n, 2 reach, 1).
    """
    import torch

    size = 2 * reach
    inside = torch.arange(size, device=device)
    around = torch.arange(2 * size, device=device) - reach
    near = (inside[:, None] - around).abs() <= reach
    starts = torch.arange(0, length, size, device=device)
    places = starts[:, None] + around
    exists = (places >= 0) & (places < length)
    beyond = (starts[:, None] + inside >= length)[None, :, :, None]
    return (near & exists[:, None, :])[None] | beyond, beyond


def _cut_band(visible: Tensor, reach: int) -> Tensor:
    """Return the part (B or 1, n, 2 reach or 1, 4 reach) of a mask that chunks see."""
    from torch.nn import functional

    size, (rows, length) = 2 * reach, visible.shape[-2:]
    short = -length % size
    padded = functional.pad(visible, (reach, short + reach, 0, short if rows > 1 else 0))
    chunks = padded[:, 0].unfold(-1, 2 * size, size)  # (B, rows, n, 4 reach)
    if rows == 1:
        return chunks.transpose(1, 2)
    chunks = chunks.unflatten(1, (-1, size))  # (B, n, 2 reach, n, 4 reach)
    return chunks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _near(reach: int, positions: Tensor, length: int) -> Tensor | None:
    """Return the mask (B or 1, 1, M, T) of neighbours; None if all positions are neighbours."""
    import torch

    if length <= reach + 1:
        return None
    places = torch.arange(length, device=positions.device)
    return ((positions.unsqueeze(-1) - places).abs() <= reach).unsqueeze(-3)


def _in_chunks(heads_BHTd: Tensor, reach: int, *, neighbours: bool) -> Tensor:
    """Return queries (B n, H, 2 reach, d), or keys or values (B n, H, 4 reach, d), by chunk."""
    from torch.nn import functional

    size = 2 * reach
    short = -heads_BHTd.shape[2] % size
    if not neighbours:
        chunks = functional.pad(heads_BHTd, (0, 0, 0, short)).unflatten(2, (-1, size))
        return chunks.transpose(1, 2).flatten(0, 1)
    padded = functional.pad(heads_BHTd, (0, 0, reach, short + reach))
    return padded.unfold(2, 2 * size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _run(layer: Any, hidden_BTD: Tensor, positions_BM: Tensor | None, around: Any) -> Tensor:
    """Run a layer for all positions, or for some."""
    import torch
    from torch.nn import functional

    attention, is_local = layer.attn, bool(layer.is_local)
    normed_BTD = layer.attn_norm(hidden_BTD)
    heads, (length, size) = attention.config.num_attention_heads, hidden_BTD.shape[1:]
    cos, sin = around.rotations[is_local]
    if positions_BM is None:
        rows, rows_cos, rows_sin, visible = hidden_BTD, cos, sin, around.visible
        query, key, value = attention.Wqkv(normed_BTD).chunk(3, -1)
    else:
        rows = gather(hidden_BTD, positions_BM)
        weight, bias = attention.Wqkv.weight, attention.Wqkv.bias
        biases = (None, None) if bias is None else (bias[:size], bias[size:])
        query = functional.linear(gather(normed_BTD, positions_BM), weight[:size], biases[0])
        key, value = functional.linear(normed_BTD, weight[size:], biases[1]).chunk(2, -1)
        rows_cos, rows_sin = cos[positions_BM][:, None], sin[positions_BM][:, None]
        visible = rows_of(around.visible, positions_BM)
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    query, key = _rotate(query, rows_cos, rows_sin), _rotate(key, cos, sin)
    in_chunks = is_local and positions_BM is None and around.band is not None
    if in_chunks:
        query = _in_chunks(query, around.reach, neighbours=False)
        key, value = (_in_chunks(part, around.reach, neighbours=True) for part in (key, value))
        visible = around.band.expand(len(hidden_BTD), -1, -1, -1).flatten(0, 1).unsqueeze(1)
    elif is_local:
        places = torch.arange(length, device=key.device)[None]
        near = _near(around.reach, places if positions_BM is None else positions_BM, length)
        if near is not None:
            visible = near if visible is None else near & visible
    context = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=attention.attention_dropout if layer.training else 0.0,
    )
    if in_chunks:
        context = context.unflatten(0, (len(hidden_BTD), -1)).transpose(1, 2)
        context = context.flatten(2, 3)[:, :, :length]
    rows = rows + attention.out_drop(attention.Wo(context.transpose(1, 2).flatten(2)))
    result: Tensor = rows + layer.mlp(layer.mlp_norm(rows))
    return result


def _rotate(heads_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys to their positions (Su et al. 2021), in float32."""
    import torch

    x = heads_BHTd.float()
    turned = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, turned, sin).to(heads_BHTd.dtype)
