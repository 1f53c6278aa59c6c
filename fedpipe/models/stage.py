"""One stage of the model: embeddings or encoder layers or both, and the head of its local loss."""

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

from fedpipe.config.schema import RunConfig
from fedpipe.distributed.device import same_draws
from fedpipe.families import FAMILIES
from fedpipe.families.family import Family, gather
from fedpipe.models.split import AUX_HEADS, StageSpec
from fedpipe.models.weights import initialise, load_pretrained


class MaskedTargets(NamedTuple):
    """Planes of the targets of a masked-LM head.

    They are numpy arrays when a batch is read, and tensors in the computation.
    """

    positions: Any
    """(B, M) int, positions of the masked tokens; with padding all positions. Further columns may
    say where documents begin, see ``same_document``."""
    labels: Any
    """(B, M) int, original tokens at these positions; -100 where nothing is predicted."""


class StageModule(nn.Module, ABC):
    """The modules of one pipeline stage, under the parameter names of the whole model.

    ``forward`` is the stage's part of the encoder, ``loss`` its local loss. They are two methods
    because the activations are sent before the loss is computed.

    The targets of a micro-batch are one int32 tensor (P, B, M), which is sent as it is. Its first
    plane holds masked positions (pre-training) or sequence lengths (fine-tuning), which every stage
    gets. The other planes hold labels, which may have to stay with the client. A NamedTuple of the
    subclass names the planes.
    """

    def __init__(self, spec: StageSpec, family: Family, *, activation_checkpointing: bool) -> None:
        """Create a stage without modules."""
        super().__init__()
        self.spec, self.activation_checkpointing = spec, activation_checkpointing
        self.family, self._run_layer = family, family.run_layer

    def run_layers(self, layers: Iterable[nn.Module], hidden_BTD: Tensor, around: Any) -> Tensor:
        """Run transformers layers one after the other.

        Args:
            layers: Layers of the stage.
            hidden_BTD: Input of the first layer.
            around: What layers need beside hidden states; see ``Family.surroundings``.
        """
        for layer in layers:
            hidden_BTD = self._checkpointed(partial(self._run_layer, layer), hidden_BTD, around)
        return hidden_BTD

    def _checkpointed(self, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(
                run,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,  # other threads draw from the generator, too
                context_fn=partial(same_draws, next(self.parameters()).device),
            )
        return run(*inputs)

    @abstractmethod
    def forward(self, inputs: Tensor, known_BM: Tensor | None = None) -> Tensor:
        """Run the stage's part of the encoder.

        Args:
            inputs: Tokens on the first stage, otherwise the output of the previous stage.
            known_BM: First plane of the targets.
        """

    @abstractmethod
    def head_inputs(self, hidden_BTD: Tensor, known_BM: Tensor) -> Tensor:
        """Return the hidden states (B, M, D) that the head reads, given the output of ``forward``.

        Args:
            hidden_BTD: Output of ``forward``.
            known_BM: First plane of the targets.
        """

    @property
    def copied(self) -> dict[str, nn.Parameter]:
        """Parameters, by full name, that start every turn as a copy of the word embedding."""
        return {}

    @abstractmethod
    def loss(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the stage's head, a scalar, from the output of ``forward``."""

    @abstractmethod
    def score(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Return one number per target for an evaluation, (B, M) float32."""


class Stage(StageModule):
    """A stage with a masked-LM head."""

    def __init__(
        self,
        spec: StageSpec,
        config: PretrainedConfig,
        *,
        activation_checkpointing: bool = False,
        padded_after: int = 0,
        start_words: int = 0,
        word_embedding: nn.Parameter | None = None,
    ) -> None:
        """Build the stage with uninitialised weights (see ``build_stage``)."""
        family = FAMILIES[config.model_type]
        super().__init__(spec, family, activation_checkpointing=activation_checkpointing)
        self.padded_after, self.start_words = padded_after, start_words
        self.hidden_size: int = config.hidden_size
        self._config = config
        if spec.is_first:
            place(self, self.family.embeddings, self.family.make_embeddings(config))
        # Lists, because a module set as an attribute would be registered under a second name.
        self._layers = [
            place(self, f"{self.family.layers}.{index}", self.family.make_layer(config, index))
            for index in range(spec.first_layer, spec.end_layer)
        ]
        self._head_layer: list[nn.Module] = []
        if spec.ends_encoder:
            self._head_layer.append(self._layers.pop())
        self._head: list[nn.Module] = []
        """Modules of the head, which are run one after the other."""
        self._build_head(config, word_embedding)
        self._run_layer_at, self._score = family.run_layer_at, _score

    @property
    def copied(self) -> dict[str, nn.Parameter]:
        """The final decoder (V, D), if it starts every turn as a copy of the word embedding."""
        name = self.family.decoder
        return {name: self.get_parameter(name)} if self.spec.decoder == "copied" else {}

    @property
    def word_embedding(self) -> nn.Parameter:
        """The word embedding (V, D); first stage only."""
        return self.get_parameter(self.family.word_embeddings)

    def compile_parts(self) -> None:
        """Compile layers and head with ``torch.compile`` at their first call.

        They are compiled one by one: layers of one shape share a graph, so compiling a deep stage
        takes no longer than a shallow one. Results differ by rounding only.
        """
        self._run_layer = torch.compile(self.family.run_layer)
        self._run_layer_at = torch.compile(self.family.run_layer_at)
        self._score = torch.compile(_score)

    def _build_head(self, config: PretrainedConfig, word_embedding: nn.Parameter | None) -> None:
        spec, family = self.spec, self.family
        if not spec.has_head:
            return
        for path, module in family.make_head(config).items():
            place(self, self._head_name(path), module)
            self._head.append(module)
        decoder_path = self._head_name(family.decoder.removesuffix(".weight"))
        decoder = self.get_submodule(decoder_path)
        if spec.decoder == "shared" and spec.is_first:
            decoder.weight = self.word_embedding
        elif spec.decoder == "shared":
            assert word_embedding is not None, "the first stage is built before its heads"
            shared = _SharedDecoder(word_embedding, decoder.bias)
            place(self, decoder_path, shared)
            self._head = [shared if module is decoder else module for module in self._head]
        if spec.head == "mlm+layer" and not spec.is_last:
            path = f"{AUX_HEADS}.{spec.stage_id}.layer"
            layer = family.make_layer(config, spec.end_layer)  # like the one that comes next
            self._head_layer.append(place(self, path, layer))

    def _head_name(self, name: str) -> str:
        """Return the name that a module of the final head has in the head of this stage."""
        if self.spec.is_last:
            return name
        own = f"{AUX_HEADS}.{self.spec.scores}.head"
        rest = name.removeprefix(self.family.head).removeprefix(".")
        return f"{own}.{rest}" if rest else own

    def forward(self, inputs: Tensor, known_BM: Tensor | None = None) -> Tensor:
        """Run the stage's part of the encoder.

        Args:
            inputs: Token ids (B, T) int64 on the first stage, otherwise hidden states (B, T, D). A
                head at the client gets those of the masked positions, (B, M, D), and returns them
                unchanged.
            known_BM: Masked positions, and the words that say where documents begin, if any.

        Returns:
            Hidden states (B, T, D). The model's last layer is not run here but in ``head_inputs``.
        """
        hidden_BTD = inputs
        if self.spec.is_first:
            hidden_BTD = self.get_submodule(self.family.embeddings)(input_ids=inputs)
        return self._run_layers(self._layers, hidden_BTD, known_BM)

    def scored(self, plane_BM: Tensor) -> Tensor:
        """Return the columns of a plane of the targets that belong to scored positions."""
        return plane_BM[:, : plane_BM.shape[1] - self.start_words]

    def _run_layers(
        self, layers: Iterable[nn.Module], hidden_BTD: Tensor, known_BM: Tensor | None
    ) -> Tensor:
        return self.run_layers(layers, hidden_BTD, self._around(hidden_BTD, known_BM))

    def _around(self, hidden_BTD: Tensor, known_BM: Tensor | None) -> Any:
        """Return what layers need beside hidden states."""
        length, device, visible = hidden_BTD.shape[1], hidden_BTD.device, None
        if self.padded_after:
            visible = torch.arange(length, device=device).view(1, 1, 1, -1) < self.padded_after
        if self.start_words:
            assert known_BM is not None, "where documents begin comes with the masked positions"
            visible = same_document(known_BM[:, -self.start_words :], length)
        return self.family.surroundings(self._config, length, visible, device)

    def head_inputs(self, hidden_BTD: Tensor, known_BM: Tensor) -> Tensor:
        """Return the hidden states (B, M, D) that the head reads.

        If there is a layer in front of the head, it is run here: the model's last layer, or the
        auxiliary layer of ``local_head: mlm+layer``.

        Args:
            hidden_BTD: Output of ``forward``.
            known_BM: As for ``forward``.
        """
        if self.spec.is_home_head:  # the server has gathered them
            return hidden_BTD
        if self.padded_after:  # every position is scored
            return self._run_layers(self._head_layer, hidden_BTD, known_BM)
        positions_BM = self.scored(known_BM)
        for layer in self._head_layer:
            run, around = partial(self._run_layer_at, layer), self._around(hidden_BTD, known_BM)
            return self._checkpointed(run, hidden_BTD, positions_BM, around)
        return gather(hidden_BTD, positions_BM)

    def loss(self, hidden_BTD: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Return the masked-LM loss of the stage's head.

        Args:
            hidden_BTD: Output of ``forward``.
            targets: (2, B, M) int, the planes of ``MaskedTargets``.
            reduction: "mean" over the masked tokens, or "none".

        Returns:
            Scalar in nats, or (B, M) losses.
        """
        assert self._head, "this stage has no head"
        known_BM, labels_BM = MaskedTargets(*targets)
        labels_BM = self.scored(labels_BM)
        hidden_BMD = self.head_inputs(hidden_BTD, known_BM)
        loss = self._score(self._head, hidden_BMD, labels_BM.long(), reduction=reduction)
        return loss if reduction == "mean" else loss.view_as(labels_BM)

    def score(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Return the losses (B, M) of the masked tokens in nats."""
        return self.loss(hidden_BTD, targets, reduction="none")

    def logits(self, hidden_BTD: Tensor, known_BM: Tensor) -> Tensor:
        """Return the logits (B, M, V) of the stage's head at the given positions."""
        assert self._head, "this stage has no head"
        return _logits(self._head, self.head_inputs(hidden_BTD, known_BM))


class _SharedDecoder(nn.Module):
    """The decoder of a head whose matrix belongs to the first stage, which trains and saves it."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self._weight = [weight]  # in a list, so that it is not registered here as a parameter
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._weight[0], self.bias)


def _logits(head: Iterable[nn.Module], hidden_BMD: Tensor) -> Tensor:
    for module in head:
        hidden_BMD = module(hidden_BMD)
    return hidden_BMD


def _score(
    head: Iterable[nn.Module], hidden_BMD: Tensor, labels_BM: Tensor, *, reduction: str
) -> Tensor:
    logits_BMV = _logits(head, hidden_BMD)
    return functional.cross_entropy(
        logits_BMV.flatten(0, 1).float(), labels_BM.flatten(), reduction=reduction
    )


def same_document(starts_BW: Tensor, length: int) -> Tensor:
    """Return the mask (B, 1, T, T) of positions in one document.

    Args:
        starts_BW: int32, a bit per token that begins a document; see
            ``fedpipe.data.masking.document_starts``.
        length: T.
    """
    bits = starts_BW.unsqueeze(-1) >> torch.arange(32, device=starts_BW.device) & 1
    documents_BT = bits.flatten(1)[:, :length].cumsum(1)
    return documents_BT[:, None, :, None] == documents_BT[:, None, None, :]


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
    start_words: int = 0,
    word_embedding: nn.Parameter | None = None,
) -> tuple[Stage, list[str]]:
    """Build a stage with its first weights.

    Args:
        spec: Description of the stage.
        config: Configuration of the whole model.
        seed: Seed of the first weights.
        path: Hugging Face folder to continue from, or "".
        activation_checkpointing: Recompute layers in the backward pass.
        sinusoidal_positions: Start position embeddings as sinusoids (see ``initialise``).
        compiled: Compile layers and head (see ``Stage.compile_parts``).
        padded_after: Number of tokens in front of the padding, which attention ignores; the head
            then gets every position. 0 means no padding; the head gets masked positions only.
        start_words: Columns of the targets that say where documents begin, beyond which no token
            attends (see ``same_document``). 0 means that it attends to its whole block.
        word_embedding: Word embedding (V, D) of the first stage, for a head at the client that is
            tied to it.

    Returns:
        The stage, and the names of its parameters that ``path`` does not hold.
    """
    stage = Stage(
        spec,
        config,
        activation_checkpointing=activation_checkpointing,
        padded_after=padded_after,
        start_words=start_words,
        word_embedding=word_embedding,
    )
    initialise(
        stage,
        family=stage.family,
        config=config,
        seed=seed,
        sinusoidal_positions=sinusoidal_positions,
    )
    missing = load_pretrained(stage, family=stage.family, path=path) if path else []
    if compiled:
        stage.compile_parts()
    return stage, missing


def build_stages(
    specs: Iterable[StageSpec], config: PretrainedConfig, run: RunConfig
) -> list[Stage]:
    """Build all stages of a pre-training with their first weights, in one process.

    Args:
        specs: All stages.
        config: Configuration of the whole model.
        run: Says what the first weights are.
    """
    stages: list[Stage] = []
    for spec in specs:
        stage, _ = build_stage(
            spec,
            config,
            seed=run.seed,
            path=run.model.path,
            sinusoidal_positions=run.model.position_init == "sinusoidal",
            word_embedding=stages[0].word_embedding if stages else None,
        )
        stages.append(stage)
    return stages


def place(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Register a module under a dotted path below another module; return it."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(leaf, module)
    return module


def trainable(module: nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return trainable parameters by full name, a tied one only under its first name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
