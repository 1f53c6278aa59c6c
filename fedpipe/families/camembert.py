"""CamemBERT, Martin et al. 2019, https://arxiv.org/abs/1911.03894, and CamemBERT-bio, DrBERT."""

from __future__ import annotations

from typing import Any

from fedpipe.families.family import Field, modeling
from fedpipe.families.roberta import Roberta


class Camembert(Roberta):
    """RoBERTa under another name; its modules are RoBERTa's, copied."""

    model_type = "camembert"
    fields = {**Roberta.fields, "vocab_size": Field(30522)}

    def config_class(self) -> Any:
        """See ``Family``."""
        return modeling("models.camembert.modeling_camembert").CamembertConfig

    def masked_lm_class(self) -> Any:
        """See ``Family``."""
        return modeling("models.camembert.modeling_camembert").CamembertForMaskedLM
