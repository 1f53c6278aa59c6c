"""XLM-RoBERTa, Conneau et al. 2019, https://arxiv.org/abs/1911.02116."""

from __future__ import annotations

from typing import Any

from fedpipe.families.family import Field, modeling
from fedpipe.families.roberta import Roberta


class XlmRoberta(Roberta):
    """RoBERTa over a hundred languages; its modules are RoBERTa's, copied."""

    model_type = "xlm-roberta"
    fields = {**Roberta.fields, "vocab_size": Field(30522)}

    def config_class(self) -> Any:
        """See ``Family``."""
        return modeling("models.xlm_roberta.modeling_xlm_roberta").XLMRobertaConfig

    def masked_lm_class(self) -> Any:
        """See ``Family``."""
        return modeling("models.xlm_roberta.modeling_xlm_roberta").XLMRobertaForMaskedLM
