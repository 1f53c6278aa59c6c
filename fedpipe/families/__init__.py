"""The model families that fedpipe pre-trains, each in a file of its own; see ``family``."""

from __future__ import annotations

import re
from typing import Literal

from fedpipe.families.bert import Bert
from fedpipe.families.camembert import Camembert
from fedpipe.families.distilbert import DistilBert
from fedpipe.families.family import Family
from fedpipe.families.modernbert import ModernBert
from fedpipe.families.roberta import Roberta
from fedpipe.families.xlm_roberta import XlmRoberta

FamilyName = Literal["roberta", "bert", "modernbert", "camembert", "xlm-roberta", "distilbert"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (Roberta(), Bert(), ModernBert(), Camembert(), XlmRoberta(), DistilBert())
}
"""By ``model_type``."""

REFUSED = {
    "albert": "all of its layers are one, which no stage can have alone",
    "deberta": "its layers share one table of relative positions",
    "deberta-v2": "its layers share one table of relative positions",
    "electra": "it learns to find replaced tokens, with two models at a time",
    "mpnet": "it learns from permuted tokens, and its layers share one table of positions",
    "neobert": "it is not part of transformers and needs code of its own",
}
"""Encoders that are not pre-trained, and why."""

LAYER = re.compile(rf"^(?:{'|'.join(re.escape(f.layers) for f in FAMILIES.values())})\.(\d+)\.")
"""What the names of a layer's parameters begin with, in any family; its group is the index."""
EMBEDDINGS = re.compile(r"^[^.]+\.(?:embeddings|invertible_adapters)\.")
"""What the names of the embeddings' parameters begin with, in any family."""
