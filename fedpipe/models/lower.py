"""The frozen layers below the first adapter: run once per example, then skipped."""

# B = sequences, T = tokens per sequence, D = hidden size

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedpipe.errors import ConfigError

NO_LAYER_STACK = {
    "albert": "all of its layers are one",
    "bart": "it has an encoder's layers and a decoder's",
}
"""Families without a stack of layers on the embeddings, and the reason."""


def check_first_layer(model_config: Any, first_layer: int) -> None:
    """Check that the model has the layer in which the adapters begin.

    Raises:
        ConfigError: The layers of the family form no stack, or the model has too few layers.
    """
    family, layers = model_config.model_type, model_config.num_hidden_layers
    if first_layer and family in NO_LAYER_STACK:
        raise ConfigError(
            f"method.first_layer: expected 0 with {family}, got {first_layer}:"
            f" {NO_LAYER_STACK[family]}. Leave it out."
        )
    if first_layer >= layers:
        raise ConfigError(
            f"method.first_layer: expected a layer below {layers}, got {first_layer}. Lower it: an"
            " adapter needs a layer."
        )


class LowerLayers:
    """The embeddings and frozen layers of a model below its first layer with an adapter.

    Their weights do not change, so their output for an example stays the same and can be kept.
    """

    def __init__(self, model: Any, first_layer: int) -> None:
        """Wrap a model.

        Args:
            model: A transformers model with an adapter of the adapters library.
            first_layer: Number of frozen lower layers, 1 or more.
        """
        self._model = model
        self._layers = [layer for index, layer in model.iter_layers() if index < first_layer]
        self._plain = [layer.forward for layer in self._layers]
        self._num_outputs = 0
        """Length of the tuple that a layer returns; 0 if it returns a tensor."""
        self.hidden_size: int = model.config.hidden_size

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Run the lower layers alone, without dropout.

        Args:
            inputs: Inputs of the model, (B, T) each.

        Returns:
            Hidden states (B, T, D), the input of the first trained layer.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            with self._forwards([*self._plain[:-1], self._stop]):
                self._model(**inputs)
        except _Reached as reached:
            return reached.hidden_BTD
        finally:
            self._model.train(was_training)
        raise AssertionError("the model did not run its layers")

    @contextlib.contextmanager
    def given(self, hidden_BTD: Tensor) -> Iterator[None]:
        """Use hidden states from ``run`` in place of the lower layers inside the context."""
        with self._forwards([partial(self._give, hidden_BTD)] * len(self._layers)):
            yield

    def _stop(self, *inputs: Any, **options: Any) -> Any:
        output = self._plain[-1](*inputs, **options)
        if isinstance(output, tuple):
            self._num_outputs, (output, *_) = len(output), output
        raise _Reached(output)

    def _give(self, hidden_BTD: Tensor, *inputs: Any, **options: Any) -> Any:
        if not self._num_outputs:
            return hidden_BTD
        return hidden_BTD, *[None] * (self._num_outputs - 1)

    @contextlib.contextmanager
    def _forwards(self, forwards: list[Callable[..., Any]]) -> Iterator[None]:
        """Replace the ``forward`` of every lower layer inside the context."""
        try:
            for layer, forward in zip(self._layers, forwards, strict=True):
                layer.forward = forward
            yield
        finally:
            for layer, forward in zip(self._layers, self._plain, strict=True):
                layer.forward = forward


class _Reached(Exception):  # noqa: N818 - not an error, it ends a forward pass early
    """Carries the output of the last lower layer out of the forward pass."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD
