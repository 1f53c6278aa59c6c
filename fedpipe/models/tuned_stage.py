"""One stage of a model in fine-tuning: layers with their adapters, and the head of a task."""

# B = sequences, T = tokens per sequence, M = targets per sequence (T of tags, else 1), C = outputs,
# D = hidden size

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from fedpipe.config.evaluation import Kind
from fedpipe.errors import ConfigError
from fedpipe.families import FAMILIES
from fedpipe.families.family import modeling
from fedpipe.models.split import AUX_HEADS, StageSpec
from fedpipe.models.stage import StageModule, place

CUT_FAMILIES = ("roberta", "bert")
"""Families whose models with adapters can be cut into stages."""


class TaskTargets(NamedTuple):
    """Planes of the targets of a task's head, (B, M) int32 each.

    They are numpy arrays when a batch is read, and tensors in the computation.
    """

    lengths: Any
    """Length of the sequence in tokens, the same in all columns."""
    labels: Any
    """Class or tag, or the float32 bits of a number."""
    weights: Any
    """Float32 bits of the label's weight in the loss. The weight is 0 at a position without a
    label, and in a sequence that only fills up a short batch."""


def check_cut(config: PretrainedConfig, last_cut: int) -> None:
    """Check that a model can be cut into stages.

    Args:
        config: Configuration of the model.
        last_cut: Index of the first layer of the last stage.

    Raises:
        ConfigError: The family cannot be cut, or the model has too few layers.
    """
    if config.model_type not in CUT_FAMILIES:
        raise ConfigError(
            f"pipeline.cut: expected a model of {' or '.join(CUT_FAMILIES)}, got"
            f" {config.model_type}. Use another model.path, or pipeline.cut=[]."
        )
    if last_cut >= config.num_hidden_layers:
        raise ConfigError(
            f"pipeline.cut: expected layers below {config.num_hidden_layers}, got {last_cut}. Lower"
            " it: the last stage needs a layer."
        )
    fixed = {name: value for name, (value, _) in FAMILIES[config.model_type].fixed.items()}
    fixed["_attn_implementation"] = "sdpa"  # stages make the attention mask of this kernel
    for name, value in fixed.items():
        found = getattr(config, name, None)
        if found not in (None, value):
            raise ConfigError(
                f"pipeline.cut: expected a model with {name} {value!r}, got {found!r}. Use another"
                " model.path, or pipeline.cut=[]."
            )


class TunedStage(StageModule):
    """One stage of a model, and the head of its local loss.

    The targets are the planes of ``TaskTargets``.
    """

    def __init__(
        self,
        spec: StageSpec,
        model: PreTrainedModel,
        kind: Kind,
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        """Move the stage's modules out of a model, which cannot be used afterwards.

        The head of an earlier stage than the last is drawn from torch's generator.

        Args:
            spec: Description of the stage.
            model: BERT or RoBERTa with the task's head, and with adapters, if any.
            kind: Kind of the task.
            activation_checkpointing: Recompute layers in the backward pass.
        """
        family = FAMILIES[model.config.model_type]
        super().__init__(spec, family, activation_checkpointing=activation_checkpointing)
        self._kind = kind
        prefix, base = model.base_model_prefix, model.base_model
        self._embeddings: list[nn.Module] = []  # lists, so that nothing is registered a second time
        if spec.is_first:
            for name in ("embeddings", "invertible_adapters"):
                if hasattr(base, name):
                    place(self, f"{prefix}.{name}", getattr(base, name))
            self._embeddings.append(base.embeddings)
        self._layers = [
            place(self, f"{prefix}.encoder.layer.{index}", base.encoder.layer[index])
            for index in range(spec.first_layer, spec.end_layer)
        ]
        self._head: list[nn.Module] = []
        if spec.is_last:
            if base.pooler is not None:
                self._head.append(place(self, f"{prefix}.pooler", base.pooler))
            for name, child in model.named_children():
                if name != prefix:
                    self._head.append(place(self, name, child))
        elif spec.has_head:
            head = _local_head(model.config, kind)
            self._head.append(place(self, f"{AUX_HEADS}.{spec.scores}.head", head))
        base.encoder = base.pooler = None  # hooks of the embeddings refer to the model

    def forward(self, inputs: Tensor, known_BM: Tensor | None = None) -> Tensor:
        """Run the stage's part of the encoder.

        Args:
            inputs: Token ids and token types (2, B, T) int64 on the first stage, otherwise hidden
                states (B, T, D). A head at the client gets its own inputs, (B, M, D).
            known_BM: Length of every sequence in tokens, the same in all columns.

        Returns:
            Hidden states (B, T, D); a head at the client returns its inputs unchanged.
        """
        hidden_BTD = inputs
        for embed in self._embeddings:
            hidden_BTD = embed(input_ids=inputs[0], token_type_ids=inputs[1])
        if not self._layers:
            return hidden_BTD
        assert known_BM is not None
        steps_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        attended = (steps_T < known_BM[:, :1])[:, None, None, :]
        return self.run_layers(self._layers, hidden_BTD, attended)

    def head_inputs(self, hidden_BTD: Tensor, known_BM: Tensor) -> Tensor:
        """Return the hidden states (B, M, D) that the head reads: of all tokens or of the first."""
        return hidden_BTD if self._kind == "ner" else hidden_BTD[:, :1]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the outputs (B, M, C) of the stage's head."""
        outputs = self.head_inputs(hidden_BTD, hidden_BTD)
        for module in self._head:
            outputs = module(outputs)
        return outputs if self._kind == "ner" else outputs[:, None]

    def loss(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum over the labels of cross-entropies in nats or squared errors."""
        logits_BMC = self.logits(hidden_BTD).float()
        _, labels_BM, weights_BM = TaskTargets(*targets)
        if self._kind == "regression":
            errors_BM = (logits_BMC[..., 0] - labels_BM.view(torch.float32)).square()
        else:
            errors_BM = functional.cross_entropy(
                logits_BMC.transpose(1, 2), labels_BM.long(), reduction="none"
            )
        return (weights_BM.view(torch.float32) * errors_BM).sum()

    def score(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Return the predictions (B, M) float32: ids of classes or tags, or numbers."""
        logits_BMC = self.logits(hidden_BTD).float()
        return logits_BMC[..., 0] if self._kind == "regression" else logits_BMC.argmax(-1).float()


def _local_head(config: Any, kind: Kind) -> nn.Module:
    """Build the head of a stage that is not the last: RoBERTa's, for every family."""
    if kind != "ner":
        roberta = modeling("models.roberta.modeling_roberta")
        head: nn.Module = roberta.RobertaClassificationHead(config)
        linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    else:
        linears = [nn.Linear(config.hidden_size, config.num_labels)]
        head = nn.Sequential(nn.Dropout(config.hidden_dropout_prob), *linears)
    for linear in linears:
        nn.init.normal_(linear.weight, std=config.initializer_range)
        nn.init.zeros_(linear.bias)
    return head


def local_head_numel(config: Any, kind: Kind) -> int:
    """Count the parameters of the head of a stage that is not the last."""
    with torch.device("meta"):
        return sum(p.numel() for p in _local_head(config, kind).parameters())
