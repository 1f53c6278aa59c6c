"""The frozen layers below the first adapter: run once per example, then left out."""

# B = sequences, T = tokens per sequence, D = hidden size

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedpipe.errors import ConfigError

WITHOUT = {
    "albert": "all of its layers are one",
    "bart": "it has an encoder's layers and a decoder's",
}
"""Families whose layers are no stack that begins at the tokens, by reason."""


def check_first_layer(model_config: Any, first_layer: int) -> None:
    """Refuse a first layer that the model has not.

    Raises:
        ConfigError: The family has no lower layers, or the model too few layers.
    """
    family, layers = model_config.model_type, model_config.num_hidden_layers
    if first_layer and family in WITHOUT:
        raise ConfigError(
            f"method.first_layer: expected 0 with {family}, got {first_layer}: {WITHOUT[family]}."
            " Leave it out."
        )
    if first_layer >= layers:
        raise ConfigError(
            f"method.first_layer: expected a layer below {layers}, got {first_layer}. Lower it: an"
            " adapter needs a layer."
        )


class LowerLayers:
    """Embeddings and the layers below the first that is trained, of a model with an adapter.

    Nothing of them changes, so what they give for an example does not either.
    """

    def __init__(self, model: Any, first_layer: int) -> None:
        """Take hold of a model's forward pass.

        Args:
            model: Of transformers, on which the adapters library has put an adapter.
            first_layer: Number of lower layers, 1 or more.
        """
        self._model = model
        self._layers = [layer for index, layer in model.iter_layers() if index < first_layer]
        self._plain = [layer.forward for layer in self._layers]
        self._num_outputs = 0
        """Of a layer; 0 where it returns a tensor instead of a tuple."""
        self.hidden_size: int = model.config.hidden_size

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Run them alone, without dropout.

        Args:
            inputs: Of the model, (B, T) each.

        Returns:
            Hidden states (B, T, D) that the first trained layer reads.
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
        """Let the model's forward pass begin with what ``run`` returned."""
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
        """Give every lower layer another forward for a while."""
        try:
            for layer, forward in zip(self._layers, forwards, strict=True):
                layer.forward = forward
            yield
        finally:
            for layer, forward in zip(self._layers, self._plain, strict=True):
                layer.forward = forward


class _Reached(Exception):  # noqa: N818 - no error, the way out of a forward pass
    """The last lower layer has its output."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD
