"""One stage of the model: embeddings and/or encoder layers, and the head of its own loss."""

# B = sequences, T = positions per sequence, M = scored positions per sequence, D = hidden size,
# V = vocabulary, H = attention heads

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from fedpipe.distributed.device import same_draws
from fedpipe.models.families import FAMILIES, Family, initialise, load_pretrained
from fedpipe.models.split import AUX_HEADS, StageSpec


class MaskedTargets(NamedTuple):
    """What a masked-LM head predicts, by the planes of a micro-batch's targets.

    Arrays of numpy where a batch is read, tensors where it is computed with.
    """

    positions: Any
    """(B, M) int, of the masked tokens; of padded sequences all positions."""
    labels: Any
    """(B, M) int, the tokens there; -100 where nothing is predicted."""


def gather_masked(hidden_BTD: Tensor, positions_BM: Tensor) -> Tensor:
    """Hidden states (B, M, D) of the masked positions (B, M) int."""
    index = positions_BM.long().unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
    return hidden_BTD.gather(1, index)


def run_masked(layer: nn.Module, hidden_BTD: Tensor, positions_BM: Tensor) -> Tensor:
    """Run the layer that a head reads at the masked positions only.

    Nobody sees its other outputs. Every token is still attended to, so keys and values are computed
    everywhere; queries, attention, output projection and feed-forward where something is masked.
    With 15 % masked and a feed-forward of 4 D that leaves 29 % of the projections' FLOPs.

    Args:
        layer: A transformers ``BertLayer`` or ``RobertaLayer``.
        hidden_BTD: Its input.
        positions_BM: int.

    Returns:
        (B, M, D), the rows that ``gather_masked`` would take from the whole layer's output.
    """
    parts: Any = layer  # transformers' submodules have no static types
    attention = parts.attention.self
    rows_BMD = gather_masked(hidden_BTD, positions_BM)

    def heads(projection: nn.Module, hidden: Tensor) -> Tensor:
        return projection(hidden).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    context_BHMd = functional.scaled_dot_product_attention(
        heads(attention.query, rows_BMD),
        heads(attention.key, hidden_BTD),
        heads(attention.value, hidden_BTD),
        dropout_p=attention.dropout.p if layer.training else 0.0,
    )
    attended_BMD = parts.attention.output(context_BHMd.transpose(1, 2).flatten(2), rows_BMD)
    return parts.output(parts.intermediate(attended_BMD), attended_BMD)


class StageModule(nn.Module, ABC):
    """The modules of one pipeline stage, under the parameter names of the whole model.

    ``forward`` is the stage's part of the encoder; ``loss`` is its own loss. They are apart because
    the activations leave the stage before the loss is computed.

    A micro-batch's targets travel as one tensor, (P, B, M) int32. The first plane is what every
    stage may know, such as masked positions or lengths; the others are labels, which may have to
    stay with the client. A NamedTuple of the subclass names the planes.
    """

    def __init__(self, spec: StageSpec, *, activation_checkpointing: bool) -> None:
        """Hold nothing yet."""
        super().__init__()
        self.spec, self.activation_checkpointing = spec, activation_checkpointing

    def through(
        self, layers: Iterable[nn.Module], hidden_BTD: Tensor, visible: Tensor | None
    ) -> Tensor:
        """Run transformers layers one after the other.

        Args:
            layers: Of the stage.
            hidden_BTD: Input of the first.
            visible: Which positions are attended to, broadcast to (B, heads, T, T); None is all.
        """
        for layer in layers:
            hidden_BTD = self._checkpointed(partial(_run, layer), hidden_BTD, visible)
        return hidden_BTD

    def _checkpointed(self, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(
                run,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,  # which a thread beside this one could change meanwhile
                context_fn=partial(same_draws, next(self.parameters()).device),
            )
        return run(*inputs)

    @abstractmethod
    def forward(self, inputs: Tensor, known_BM: Tensor | None = None) -> Tensor:
        """Run the stage's part of the encoder.

        Args:
            inputs: Tokens on the first stage, else what the stage before it returned.
            known_BM: First plane of the targets.
        """

    @abstractmethod
    def masked(self, hidden_BTD: Tensor, known_BM: Tensor) -> Tensor:
        """Hidden states (B, M, D) that a head reads, of those that ``forward`` returned."""

    @property
    def lent(self) -> dict[str, nn.Parameter]:
        """Parameters, by full name, that begin every turn as the word embedding."""
        return {}

    @abstractmethod
    def loss(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the stage's head, a scalar, from what ``forward`` returned."""

    @abstractmethod
    def score(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Return what a scoring keeps of every target, (B, M) float32."""


class Stage(StageModule):
    """A stage with a masked-LM head."""

    def __init__(
        self,
        spec: StageSpec,
        config: PretrainedConfig,
        *,
        activation_checkpointing: bool = False,
        padded_after: int = 0,
        word_embedding: nn.Parameter | None = None,
    ) -> None:
        """Build the stage with uninitialised weights (see ``build_stage``)."""
        super().__init__(spec, activation_checkpointing=activation_checkpointing)
        self.family: Family = FAMILIES[config.model_type]
        self.padded_after = padded_after
        self.hidden_size: int = config.hidden_size
        if spec.is_first:
            embeddings = self.family.embeddings_class(config)
            place(self, f"{self.family.prefix}.embeddings", embeddings)
        for index in range(spec.first_layer, spec.end_layer):
            layer = self.family.layer_class(config)
            place(self, f"{self.family.prefix}.encoder.layer.{index}", layer)
        # Lists, because a module set as an attribute would be registered under a second name.
        self._layers = [
            self.get_submodule(f"{self.family.prefix}.encoder.layer.{index}")
            for index in range(spec.first_layer, spec.end_layer)
        ]
        self._head_layer: list[nn.Module] = []
        if spec.ends_encoder:
            self._head_layer.append(self._layers.pop())
        self._head: list[nn.Module] = []
        self._build_head(config, word_embedding)
        self._run_masked, self._score = run_masked, _score

    @property
    def lent(self) -> dict[str, nn.Parameter]:
        """The final decoder (V, D), where it begins every turn as the word embedding."""
        name = self.family.decoder
        return {name: self.get_parameter(name)} if self.spec.decoder == "lent" else {}

    @property
    def word_embedding(self) -> nn.Parameter:
        """(V, D); of the first stage."""
        return self.get_parameter(self.family.word_embeddings)

    def compile_parts(self) -> None:
        """Have torch compile layers and head at their first call.

        Part by part: layers of one shape share a graph, so a deep stage is compiled as fast as a
        shallow one, and what they compute stays what it was up to rounding.
        """
        for layer in (*self._layers, *self._head_layer):
            layer.compile()
        self._run_masked, self._score = torch.compile(run_masked), torch.compile(_score)

    def _build_head(self, config: PretrainedConfig, word_embedding: nn.Parameter | None) -> None:
        spec, family = self.spec, self.family
        if not spec.has_head:
            return
        path = family.head_path if spec.is_last else f"{AUX_HEADS}.{spec.scores}.head"
        head = place(self, path, family.head_class(config))
        decoder = head.get_submodule("decoder")
        decoder.bias = head.get_parameter("bias")  # transformers 4.x does so, 5.x leaves it to us
        self._head.append(head)
        if spec.decoder == "shared" and spec.is_first:
            decoder.weight = self.word_embedding
        elif spec.decoder == "shared":
            assert word_embedding is not None, "the first stage is built before a head at home"
            head.add_module("decoder", _SharedDecoder(word_embedding, decoder.bias))
        if spec.head == "mlm+layer" and not spec.is_last:
            path = f"{AUX_HEADS}.{spec.stage_id}.layer"
            self._head_layer.append(place(self, path, family.layer_class(config)))

    def forward(self, inputs: Tensor, known_BM: Tensor | None = None) -> Tensor:
        """Run the stage's part of the encoder, up to where the next stage or ``masked`` goes on.

        Args:
            inputs: Token ids (B, T) int64 on the first stage, else hidden states (B, T, D). A head
                at home gets those of the masked positions, (B, M, D), and hands them through.
            known_BM: Not used: every block is full.

        Returns:
            Hidden states (B, T, D); before the model's last layer, which is ``masked``'s.
        """
        hidden_BTD = inputs
        if self.spec.is_first:
            hidden_BTD = self.get_submodule(f"{self.family.prefix}.embeddings")(input_ids=inputs)
        return self._through(self._layers, hidden_BTD)

    def _through(self, layers: Iterable[nn.Module], hidden_BTD: Tensor) -> Tensor:
        visible = None
        if self.padded_after:
            visible = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
            visible = visible.view(1, 1, 1, -1) < self.padded_after
        return self.through(layers, hidden_BTD, visible)

    def masked(self, hidden_BTD: Tensor, positions_BM: Tensor) -> Tensor:
        """Hidden states (B, M, D) that a head reads: after its own layer, if it has one.

        That is the model's last layer, or the auxiliary one of ``local_head: mlm+layer``.

        Args:
            hidden_BTD: Output of ``forward``.
            positions_BM: int.
        """
        if self.spec.is_home_head:  # the server has gathered them
            return hidden_BTD
        if self.padded_after:  # every position is scored
            return self._through(self._head_layer, hidden_BTD)
        for layer in self._head_layer:
            return self._checkpointed(partial(self._run_masked, layer), hidden_BTD, positions_BM)
        return gather_masked(hidden_BTD, positions_BM)

    def loss(self, hidden_BTD: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Masked-LM loss of the stage's head. Masked positions are gathered before the head.

        Args:
            hidden_BTD: Output of ``forward``.
            targets: (2, B, M) int, the planes of ``MaskedTargets``.
            reduction: "mean" over the masked tokens, or "none".

        Returns:
            Scalar in nats, or (B, M) losses.
        """
        assert self._head, "this stage has no head"
        positions_BM, labels_BM = MaskedTargets(*targets)
        labels_BM = labels_BM.long()
        hidden_BMD = self.masked(hidden_BTD, positions_BM)
        loss = self._score(self._head[0], hidden_BMD, labels_BM, reduction=reduction)
        return loss if reduction == "mean" else loss.view_as(labels_BM)

    def score(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Losses (B, M) of the masked tokens in nats."""
        return self.loss(hidden_BTD, targets, reduction="none")

    def logits(self, hidden_BTD: Tensor, positions_BM: Tensor) -> Tensor:
        """Scores (B, M, V) of the stage's head at the given positions."""
        assert self._head, "this stage has no head"
        return self._head[0](self.masked(hidden_BTD, positions_BM))


class _SharedDecoder(nn.Module):
    """The decoder of a head whose matrix is another stage's: that stage trains and saves it."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self._weight = [weight]  # a list: as an attribute it would be registered here, too
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._weight[0], self.bias)


def _score(head: nn.Module, hidden_BMD: Tensor, labels_BM: Tensor, *, reduction: str) -> Tensor:
    logits_BMV: Tensor = head(hidden_BMD)
    return functional.cross_entropy(
        logits_BMV.flatten(0, 1).float(), labels_BM.flatten(), reduction=reduction
    )


def build_stage(
    spec: StageSpec,
    config: PretrainedConfig,
    *,
    seed: int,
    path: str = "",
    activation_checkpointing: bool = False,
    sinusoidal_positions: bool = False,
    compiled: bool = False,
    padded_after: int = 0,
    word_embedding: nn.Parameter | None = None,
) -> tuple[Stage, list[str]]:
    """Build a stage with its first weights.

    Args:
        spec: What it holds.
        config: Configuration of the whole model.
        seed: Of the weights.
        path: Hugging Face folder to continue from, or "".
        activation_checkpointing: Recompute layers in the backward pass.
        sinusoidal_positions: What the position embeddings start as (see ``initialise``).
        compiled: See ``Stage.compile_parts``.
        padded_after: Tokens of a sequence that padding follows: it is hidden from attention, and
            every position reaches the head. 0: no padding, only masked positions do.
        word_embedding: The first stage's, (V, D), for a head at home that is tied to it.

    Returns:
        The stage, and the names of its parameters that ``path`` does not hold.
    """
    stage = Stage(
        spec,
        config,
        activation_checkpointing=activation_checkpointing,
        padded_after=padded_after,
        word_embedding=word_embedding,
    )
    initialise(
        stage,
        family=stage.family,
        seed=seed,
        std=config.initializer_range,
        sinusoidal_positions=sinusoidal_positions,
    )
    missing = load_pretrained(stage, family=stage.family, path=path) if path else []
    if compiled:
        stage.compile_parts()
    return stage, missing


def _run(layer: nn.Module, hidden_BTD: Tensor, visible: Tensor | None) -> Tensor:
    output = layer(hidden_BTD, visible)
    return output[0] if isinstance(output, tuple) else output  # transformers 4.x, 5.x


def place(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Register a module below another under a dotted path; return it."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(leaf, module)
    return module


def masked_lm_class(config: PretrainedConfig) -> Any:
    """The transformers class that the exported folder is read with."""
    from transformers import BertForMaskedLM, RobertaForMaskedLM

    return {"bert": BertForMaskedLM, "roberta": RobertaForMaskedLM}[config.model_type]


def trainable(module: nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by full name, each once (a tied one under its first name)."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
