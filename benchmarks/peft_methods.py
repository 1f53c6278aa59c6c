"""Compare the methods of ``fedpipe finetune`` with those that the peft library has.

    pip install --target DIR --no-deps peft==0.21.2 accelerate==1.15.0
    PYTHONPATH=.:DIR python benchmarks/peft_methods.py

A method of adapters and one of peft are put on copies of a tiny random model, and get the same
parameters. Printed is a table of Markdown: ``same`` if both have the same logits, ``other`` if the
parameters do not fit or the logits differ, and ``none`` if peft has no such method or cannot run.
peft is set up as close to adapters as it can be: IA3, for one, scales what comes out of the first
matrix of the feed-forward, as in adapters, and not what goes into the second one.
"""

from __future__ import annotations

import copy
import re
import sys
from typing import Any

import peft
import torch

from fedpipe.config.finetune import MethodConfig
from fedpipe.models.peft import METHODS, attach, trainable
from fedpipe.models.tuned import TUNED_FAMILIES, head_names
from tests.helpers.tuned import small_model

PEERS = ("lora", "ia3", "prefix_tuning")
"""Methods that peft has, too. It has no bottleneck between layers, invertible or not."""
IDS = torch.tensor([[5, 6, 7, 8, 9, 2]])


def main() -> None:
    """Print a row per method."""
    families = list(TUNED_FAMILIES)
    sys.stdout.write(f"| `method.name` | {' | '.join(families)} |\n")
    sys.stdout.write(f"|---|{'---|' * len(families)}\n")
    for name in METHODS:
        if name != "full":
            sys.stdout.write(
                f"| `{name}` | {' | '.join(_compare(family, name) for family in families)} |\n"
            )


def _compare(family: str, name: str) -> str:
    if name not in PEERS:
        return "none"
    ours = small_model(family).eval()
    theirs = copy.deepcopy(ours)
    method = MethodConfig(name=name, dropout=0.0)  # type: ignore[arg-type]
    heads = head_names(ours)
    attach(ours, method)
    ours.eval()
    wanted = {n: p for n, p in trainable(ours).items() if n not in heads}
    torch.manual_seed(1)
    for parameter in wanted.values():
        torch.nn.init.normal_(parameter, 0.3, 0.4)
    try:
        theirs = peft.get_peft_model(theirs, _config(method, wanted)).eval()
        _logits(theirs)
    except Exception:  # of many kinds, where a model takes no such prefix
        return "none"
    found = {
        n: p for n, p in theirs.named_parameters() if re.search("lora_|ia3_l|prompt_encoder", n)
    }
    if [p.numel() for p in wanted.values()] != [p.numel() for p in found.values()]:
        return "other"
    with torch.no_grad():
        for source, target in zip(wanted.values(), found.values(), strict=True):
            target.copy_(source.reshape(target.shape))
    difference = (_logits(ours) - _logits(theirs)).abs().max()
    return "same" if difference < 1e-5 else "other"


def _config(method: MethodConfig, wanted: dict[str, Any]) -> Any:
    """Return the configuration of peft that is closest to a method."""
    paths = sorted({name.partition(".loras.")[0] for name in wanted})
    if method.name == "lora":
        return peft.LoraConfig(
            task_type="SEQ_CLS", r=method.rank, lora_alpha=method.alpha, target_modules=paths
        )
    if method.name == "ia3":
        return peft.IA3Config(task_type="SEQ_CLS", target_modules=paths, feedforward_modules=[])
    return peft.PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=method.prefix_length, prefix_projection=True,
        encoder_hidden_size=512,
    )  # fmt: skip


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits


if __name__ == "__main__":
    main()
