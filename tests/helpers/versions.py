"""Model folders that one version of transformers writes and another one reads.

``python -m tests.helpers.versions write FOLDER`` writes models of every family, and
``python -m tests.helpers.versions read FOLDER`` compares their logits with those of the writer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import ModelConfig, PipelineConfig
from fedpipe.families import FAMILIES
from fedpipe.models.split import merge, stage_specs
from fedpipe.models.stage import Stage, build_stage
from fedpipe.models.weights import hf_config
from fedpipe.run.export import build_model, write_model

VOCAB, LENGTH = 53, 12
_SIZES = {
    "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": VOCAB, "max_position_embeddings": 20,
}  # fmt: skip
_ROTARY: dict[str, Any] = {
    "local_attention": 6, "global_attn_every_n_layers": 2, "global_rope_theta": 50.0,
    "local_rope_theta": 9.0,
}  # fmt: skip


def _write(root: Path) -> None:
    """For every family, write a model of transformers, its export by fedpipe, and its logits."""
    for name, family in FAMILIES.items():
        for tied in (True, False):
            folder = root / f"{name}-{tied}"
            own = {field: _SIZES[key] for key in _SIZES for field in family.keys[key]}
            fields = own | {"tie_word_embeddings": tied, "pad_token_id": 1}
            fields |= {key: _ROTARY[key] for key in _ROTARY if key in family.fields}
            torch.manual_seed(0)
            model = AutoModelForMaskedLM.from_config(family.config_class()(**fields)).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, 0.1, 0.3)
            model.save_pretrained(folder / "model")
            stages, config = _stages(folder / "model", name)
            state = merge(dict(stage.named_parameters()) for stage in stages)
            write_model(build_model(state, config), folder / "export")
            ids = torch.randint(4, VOCAB, (3, LENGTH))
            with torch.no_grad():
                save_file({"ids": ids, "logits": model(ids).logits}, folder / "logits.safetensors")


def _read(root: Path) -> None:
    """Write out the largest difference of logits: in stages, and in transformers with an export."""
    largest = 0.0
    for folder in root.iterdir():
        saved = load_file(folder / "logits.safetensors")
        ids, everywhere = saved["ids"], torch.arange(LENGTH).expand(3, -1)
        found = [AutoModelForMaskedLM.from_pretrained(folder / "export").eval()(ids).logits]
        for kind in ("model", "export"):
            stages, _ = _stages(folder / kind, folder.name.rpartition("-")[0])
            hidden = ids
            for stage in stages:
                hidden = stage(hidden)
            found.append(stages[-1].logits(hidden, everywhere))
        for logits in found:
            largest = max(largest, float((logits - saved["logits"]).abs().max()))
    found_here = {"transformers": transformers.__version__, "difference": largest}
    sys.stdout.write(json.dumps(found_here) + "\n")


def _stages(path: Path, name: str) -> tuple[list[Stage], Any]:
    """Read a model folder into two stages."""
    model = ModelConfig(family=name, path=str(path))  # type: ignore[arg-type]
    shape = resolve(model, vocab_size=VOCAB, sequence_length=LENGTH, pad_id=1)
    config = hf_config(shape, pad_id=1, cls_id=2, sep_id=3)
    specs = stage_specs(
        PipelineConfig(cut=(2,)), num_hidden_layers=4, tied=shape.tie_word_embeddings
    )
    return [build_stage(s, config, seed=1, path=str(path))[0].eval() for s in specs], config


if __name__ == "__main__":
    with torch.no_grad():
        {"write": _write, "read": _read}[sys.argv[1]](Path(sys.argv[2]))
