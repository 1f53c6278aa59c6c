"""transformers' BERT and RoBERTa, without packages that nobody here needs and that take seconds.

Where scikit-learn and scipy are installed, as they are for ``fedpipe evaluate``, transformers
imports them with every model, for assisted text generation and object detection: a fifth of the
time to the first local step. It is told that there are none while it imports these models.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest import mock


def _absent() -> bool:
    return False


with mock.patch.multiple(
    "transformers.utils", is_sklearn_available=_absent, is_scipy_available=_absent
):
    bert: Any = import_module("transformers.models.bert.modeling_bert")
    roberta: Any = import_module("transformers.models.roberta.modeling_roberta")
