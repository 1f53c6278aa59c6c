"""RoBERTa, Liu et al. 2019, https://arxiv.org/abs/1907.11692."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpipe.families.bert import Bert, tie_bias
from fedpipe.families.family import Field, modeling

if TYPE_CHECKING:
    from torch import nn


class Roberta(Bert):
    """BERT with positions after the padding token's id, one token type, and another head."""

    model_type = "roberta"
    fields = {**Bert.fields, "vocab_size": Field(50265)}
    pad_token_id = 1
    positions = "after padding"
    sizes = {
        size: {**values, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        for size, values in Bert.sizes.items()
    }
    prefix = "roberta"
    embeddings = "roberta.embeddings"
    word_embeddings = "roberta.embeddings.word_embeddings.weight"
    layers = "roberta.encoder.layer"
    head = "lm_head"
    decoder = "lm_head.decoder.weight"
    twins = {"lm_head.bias": "lm_head.decoder.bias"}

    def _modeling(self) -> Any:
        return modeling("models.roberta.modeling_roberta")

    def config_class(self) -> Any:
        """See ``Family``."""
        return self._modeling().RobertaConfig

    def masked_lm_class(self) -> Any:
        """See ``Family``."""
        return self._modeling().RobertaForMaskedLM

    def make_embeddings(self, config: Any) -> nn.Module:
        """See ``Family``."""
        result: nn.Module = self._modeling().RobertaEmbeddings(config)
        return result

    def make_layer(self, config: Any, index: int) -> nn.Module:
        """See ``Family``."""
        result: nn.Module = self._modeling().RobertaLayer(config)
        return result

    def make_head(self, config: Any) -> Mapping[str, nn.Module]:
        """See ``Family``."""
        return {self.head: tie_bias(self._modeling().RobertaLMHead(config))}
