"""Attach adapters of the ``adapters`` library to a transformers model, count, save and merge them.

Names and defaults are those of FATE-LLM 1.0, which took them from the same library: Houlsby and
Pfeiffer have a bottleneck of 1/16 of the hidden size and Parallel one of 1/2, LoRA has rank 8 on
query and value, and IA3 scales key, value and the feed-forward.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters.methods.lora import LoRALayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpipe.config.evaluation import Kind
from fedpipe.config.finetune import MethodConfig
from fedpipe.config.half_files import check_fetched, read_json_object
from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.models.tuned import head_names, is_head_of

ADAPTER = "federation"
"""Name of the adapter in the library, as in FATE-LLM."""

_CONFIGS: dict[str, type] = {
    "houlsby": adapters.DoubleSeqBnConfig,
    "pfeiffer": adapters.SeqBnConfig,
    "parallel": adapters.ParBnConfig,
    "houlsby_inv": adapters.DoubleSeqBnInvConfig,
    "pfeiffer_inv": adapters.SeqBnInvConfig,
    "compacter": adapters.CompacterConfig,
    "ia3": adapters.IA3Config,
}
METHODS = ("full", *_CONFIGS, "lora", "prefix_tuning")
"""Values of ``method.name``."""
MERGEABLE = ("full", "lora", "ia3")
"""Methods whose result can be merged into the model's own weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Number of parameters of a model, and of its trained parts."""

    model: int
    """Parameters without adapter and without the task's head."""
    adapter: int
    """Parameters of the adapter; with ``full`` all of the model."""
    head: int
    """Trained parameters of the task's head."""

    @property
    def trainable(self) -> int:
        """All trained parameters, which are also what a client sends."""
        return self.adapter + self.head

    @property
    def percent(self) -> float:
        """Adapter parameters in per cent of the model's."""
        return 100 * self.adapter / self.model


def adapter_config(method: MethodConfig, *, split: bool = False) -> Any:
    """Return the library's configuration of a method other than full.

    Args:
        method: The method and its sizes.
        split: The model is cut into stages, so no parameter may be shared between layers; each
            layer of Compacter then has a PHM rule of its own.
    """
    values: dict[str, Any] = {"leave_out": list(range(method.first_layer))}
    if method.name == "lora":
        return adapters.LoRAConfig(
            r=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            attn_matrices=list(method.matrices),
            **values,
        )
    if method.name == "prefix_tuning":
        return adapters.PrefixTuningConfig(
            prefix_length=method.prefix_length, dropout=method.dropout, **values
        )
    if method.reduction_factor is not None and method.name != "ia3":
        values["reduction_factor"] = method.reduction_factor
    if method.name == "compacter" and split:
        values["shared_phm_rule"] = False
    return _CONFIGS[method.name](**values)


def attach(
    model: PreTrainedModel, method: MethodConfig, *, causal: bool = False, split: bool = False
) -> Counts:
    """Add an adapter to a model, and freeze everything but the adapter and the task's head.

    The adapter's first values are drawn from torch's generator; seed it to get the same values in
    every process.

    Args:
        model: A plain transformers model with its head; changed in place.
        method: The kind of adapter and its sizes.
        causal: The model is a causal language model; an adapter then freezes its head, too.
        split: See ``adapter_config``.

    Returns:
        The number of parameters, and of trained ones.

    Raises:
        ConfigError: The family does not have the method, or the sizes do not fit it.
    """
    heads = head_names(model)
    size = sum(p.numel() for name, p in model.named_parameters() if name not in heads)
    if method.name == "full":
        model.requires_grad_(True)
        head = sum(p.numel() for name, p in model.named_parameters() if name in heads)
        return Counts(model=size, adapter=size, head=head)
    try:
        # On the model's own device, because the library fills large tensors and discards many.
        with _quiet(), next(model.parameters()).device:
            _init(model)
            model.add_adapter(ADAPTER, config=adapter_config(method, split=split))
            model.train_adapter(ADAPTER)
    except Exception as error:  # the library asserts, and can raise any exception
        raise ConfigError(
            f"method.name: expected a method that {model.config.model_type} has, got"
            f" {method.name!r} ({' '.join(str(error).split())[:160]}). Choose another method, or"
            " other sizes for it."
        ) from error
    if causal:
        for name, parameter in model.named_parameters():
            if name in heads:
                parameter.requires_grad_(False)
    trained = trainable(model)
    head = sum(p.numel() for name, p in trained.items() if name in heads)
    adapter = sum(p.numel() for p in trained.values()) - head
    return Counts(model=size, adapter=adapter, head=head)


def _init(model: PreTrainedModel) -> None:
    """Replace layers by the library's own; a layer without a bias has none afterwards.

    The library gives DeBERTa's joint projection a bias of uninitialised memory and uses it.
    """
    without = {n for n, m in model.named_modules() if getattr(m, "bias", 0) is None}
    adapters.init(model)
    for name, module in model.named_modules():
        if name in without and module.bias is not None:
            module.bias = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's warnings about an adapter that is not active yet."""
    logger = logging.getLogger("adapters")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by full name, in the order of the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class LoraUpdate:
    """A LoRA update and the frozen weight to which it is added."""

    def __init__(self, name: str, layer: Any) -> None:
        """Wrap a layer of the library.

        Args:
            name: Full name of the frozen weight.
            layer: The layer with the weight and with A and B of the adapter.
        """
        self.name, self._layer = name, layer
        self.weight: nn.Parameter = layer.weight
        """Frozen weight (out, in); for GPT-2 (in, out)."""
        lora = layer.loras[ADAPTER]
        self.factors: tuple[nn.Parameter, nn.Parameter] = (lora.lora_A, lora.lora_B)
        """A and B. If one matrix holds several projections, their factors are concatenated."""

    @torch.no_grad()
    def product(self) -> Tensor:
        """Return ``alpha / r B A`` in the shape of the weight."""
        return _laid_out(self._layer, _update(self._layer)) * self._layer.loras[ADAPTER].scaling


def lora_updates(model: nn.Module) -> list[LoraUpdate]:
    """Return the LoRA updates of a model, in the order of its modules."""
    return [
        LoraUpdate(f"{path}.weight", layer)
        for path, layer in _adapted(model)
        if layer.loras[ADAPTER].composition_mode == "add"
    ]


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, LoRALayer) and ADAPTER in layer.loras
    ]


def _update(layer: Any) -> Tensor:
    """Compute ``B A``, (rows, in), with a row for every adapted output."""
    lora = layer.loras[ADAPTER]
    if not hasattr(lora, "lora_ind"):
        return torch.as_tensor(lora.lora_B @ lora.lora_A)
    groups = sum(lora.enable_lora)  # of a matrix for query, key and value
    parts = zip(lora.lora_A.chunk(groups), lora.lora_B.chunk(groups), strict=True)
    return torch.cat([b @ a for a, b in parts])


def _laid_out(layer: Any, rows: Tensor) -> Tensor:
    """Move the rows of adapted outputs to their places in the weight; other rows are zero."""
    lora = layer.loras[ADAPTER]
    if hasattr(lora, "lora_ind"):
        full = rows.new_zeros(layer.out_features, rows.shape[1])
        full[lora.lora_ind.to(rows.device)] = rows
        rows = full
    return rows.t() if layer.fan_in_fan_out else rows


@torch.no_grad()
def _merge(layer: Any) -> None:
    """Merge an update into the weight.

    The library's own ``merge_adapter`` does not scale biases by IA3's factor, and scales the
    columns of DeBERTa's joint projection instead of its rows.
    """
    lora = layer.loras[ADAPTER]
    if lora.composition_mode == "add":
        layer.weight.add_(_laid_out(layer, _update(layer)) * lora.scaling)
        return
    factor = layer.weight.new_ones(layer.out_features)
    scale = lora.lora_B.flatten() * lora.scaling
    if hasattr(lora, "lora_ind"):
        factor[lora.lora_ind.to(factor.device)] = scale
    else:
        factor = scale
    layer.weight.mul_(factor if layer.fan_in_fan_out else factor[:, None])
    if layer.bias is not None:
        layer.bias.mul_(factor)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write adapter and task head in the library's format, which ``load_adapter`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_adapter(str(folder), ADAPTER)


def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    method: MethodConfig,
    *,
    kind: Kind,
    labels: Sequence[str] = (),
    split: bool = False,
) -> None:
    """Fill an attached adapter from a folder that ``save_adapter`` wrote.

    The task's head is filled too if the folder's head belongs to the same labels.

    Args:
        model: A model with the adapter attached; changed in place.
        folder: Folder of the adapter.
        method: Method of the run.
        kind: Kind of the task.
        labels: Labels of the task.
        split: See ``adapter_config``.

    Raises:
        CheckpointError: The folder is damaged, or holds another method or other sizes.
    """
    for file in sorted(folder.glob("*")):
        if file.is_file():
            check_fetched(file, key="method.path", error=CheckpointError)
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        found, wanted = dict(content["config"]), adapter_config(method, split=split)
        if _same(found, wanted):
            with_head = is_head_of(adapter_head(folder), kind, labels)
            _read_into(model, folder, with_head=with_head)
    except (OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"method.path: expected an adapter folder, got {folder}"
            f" ({' '.join(str(error).split())[:120]}). Name one that save_adapter wrote."
        ) from error
    if not _same(found, wanted):
        raise CheckpointError(
            f"method.path: expected an adapter of method.name={method.name} and its sizes, got"
            f" another in {folder}. Set method.* as when it was trained."
        )


def _same(found: dict[str, Any], wanted: Any) -> bool:
    return all(
        found.get(name) == value for name, value in json.loads(json.dumps(dict(wanted))).items()
    )


def adapter_head(folder: Path) -> dict[str, Any]:
    """Read head_config.json of an adapter folder; empty if there is none."""
    file = folder / "head_config.json"
    if not file.is_file():
        return {}
    return read_json_object(file, key="method.path", error=CheckpointError)


def _read_into(model: PreTrainedModel, folder: Path, *, with_head: bool) -> None:
    state: dict[str, Tensor] = {}
    for file in ("pytorch_adapter.bin", "pytorch_model_head.bin"):
        path = folder / file
        if path.is_file():
            state |= torch.load(path, map_location="cpu", weights_only=True)
    heads = set() if with_head else head_names(model)
    wanted = {name: p for name, p in trainable(model).items() if name not in heads}
    for name, parameter in wanted.items():
        if name not in state or state[name].shape != parameter.shape:
            found = list(state[name].shape) if name in state else "none"
            raise CheckpointError(
                f"method.path: expected {name} of shape {list(parameter.shape)}, got {found} in"
                f" {folder}. It is the adapter of another base model: set model.path to its own."
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


def plain_state(model: PreTrainedModel, method: MethodConfig) -> dict[str, Tensor]:
    """Return the weights of the plain model with the adapter merged in.

    Args:
        model: A model with its adapter; the merged weights are changed in place.
        method: One of ``MERGEABLE``.
    """
    assert method.name in MERGEABLE, method.name
    if method.name != "full":
        for _, layer in _adapted(model):
            _merge(layer)
    return frozen_state(model)


def frozen_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights other than the adapter's, under the plain model's names."""
    of_adapter = re.compile(
        r"\.loras\.|\.shared_parameters\.|\.adapters\.|prefix_tuning|prompt_tuning|invertible_adapters"
    )
    return {n: t for n, t in model.state_dict().items() if not of_adapter.search(n)}
