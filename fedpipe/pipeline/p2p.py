"""Links: one direction of one pipeline edge, with a bounded window of messages in flight.

``DistLink`` carries messages between processes (gloo, NCCL), ``QueueLink`` between stages that are
threads of one process. A message is a tuple of tensors whose specs both ends know in advance.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpipe.distributed.comm import Channel
from fedpipe.distributed.device import StreamMessage
from fedpipe.distributed.wire import TensorSpec

_POLL_S = 0.5
"""Seconds after which a waiting thread checks whether its neighbour has failed."""


class Link(Protocol):
    """One direction of an edge; the sending and the receiving end call different methods."""

    sent_bytes: int
    """Bytes this end has sent."""
    sent_messages: int
    """Messages this end has sent."""

    def resize(self, specs: tuple[TensorSpec, ...]) -> None:
        """Give the messages that follow other specs, at both ends, while none is under way."""

    def begin(self, num_messages: int) -> None:
        """Announce the number of messages that will follow (receiving end)."""

    def send(self, *tensors: Tensor) -> None:
        """Send one message; wait only while the window is full (sending end)."""

    def recv(self) -> tuple[Tensor, ...]:
        """Wait for the next message (receiving end)."""

    def drain(self) -> None:
        """Wait until all sent messages have been received (sending end)."""


class DistLink:
    """Messages between two processes.

    A gloo send completes only once its receive has been posted. So receives are posted ``window``
    messages ahead, before the stage computes, and the sender keeps up to ``window`` sends pending
    and their tensors referenced.
    """

    def __init__(
        self, channel: Channel, specs: tuple[TensorSpec, ...], *, window: int, device: torch.device
    ) -> None:
        """Wrap a channel.

        Args:
            channel: Channel of the edge and direction.
            specs: Tensors of every message.
            window: Messages in flight.
            device: Device of received tensors.
        """
        self._channel, self._specs, self._window, self._device = channel, specs, window, device
        self._sending: deque[list[tuple[Any, Tensor]]] = deque()
        self._receiving: deque[list[tuple[Any, Tensor]]] = deque()
        self._expected = 0
        self.sent_bytes = self.sent_messages = 0

    def resize(self, specs: tuple[TensorSpec, ...]) -> None:
        """Give the messages that follow other specs."""
        assert not (self._sending or self._receiving), "messages are under way"
        self._specs = specs

    def begin(self, num_messages: int) -> None:
        """Post the first receives."""
        self._expected += num_messages
        while self._expected and len(self._receiving) < self._window:
            self._post()

    def _post(self) -> None:
        if self._expected == 0:
            return
        self._expected -= 1
        buffers = [spec.empty(self._device) for spec in self._specs]
        self._receiving.append([(self._channel.irecv(b), b) for b in buffers])

    def send(self, *tensors: Tensor) -> None:
        """Send one message, encoded as the specs say."""
        while len(self._sending) >= self._window:
            self._wait_oldest_send()
        message = []
        for tensor, spec in zip(tensors, self._specs, strict=True):
            wire = spec.encode(tensor)
            message.append((self._channel.isend(wire), wire))
            self.sent_bytes += spec.nbytes
        self._sending.append(message)
        self.sent_messages += 1

    def _wait_oldest_send(self) -> None:
        for work, _ in self._sending.popleft():
            work.wait()

    def recv(self) -> tuple[Tensor, ...]:
        """Wait for the next message, and post one more receive."""
        message = self._receiving.popleft()
        for work, _ in message:
            work.wait()
        self._post()
        pairs = zip(message, self._specs, strict=True)
        return tuple(spec.decode(buffer) for (_, buffer), spec in pairs)

    def drain(self) -> None:
        """Wait until all sent messages have been received."""
        while self._sending:
            self._wait_oldest_send()


class QueueLink:
    """Messages between two threads of one process, copied only if the wire format changes them."""

    def __init__(self, specs: tuple[TensorSpec, ...], *, window: int) -> None:
        """Create an empty link; both ends use this object."""
        self._specs = specs
        self._queue: queue.Queue[StreamMessage] = queue.Queue(maxsize=window)
        self._closed = threading.Event()
        self.sent_bytes = self.sent_messages = 0

    def resize(self, specs: tuple[TensorSpec, ...]) -> None:
        """Give the messages that follow other specs."""
        assert self._queue.empty(), "messages are under way"
        self._specs = specs

    def begin(self, num_messages: int) -> None:
        """Do nothing: there are no receives to post."""

    def send(self, *tensors: Tensor) -> None:
        """Put one message into the queue, encoded as the specs say."""
        message = StreamMessage(
            tuple(s.encode(t) for t, s in zip(tensors, self._specs, strict=True))
        )
        self._until_closed(lambda: self._queue.put(message, timeout=_POLL_S))
        self.sent_bytes += sum(s.nbytes for s in self._specs)
        self.sent_messages += 1

    def recv(self) -> tuple[Tensor, ...]:
        """Wait for the next message."""
        message = self._until_closed(lambda: self._queue.get(timeout=_POLL_S)).receive()
        return tuple(s.decode(b) for b, s in zip(message, self._specs, strict=True))

    def _until_closed(self, action: Callable[[], Any]) -> Any:
        while not self._closed.is_set():
            try:
                return action()
            except (queue.Full, queue.Empty):
                continue
        raise BrokenPipeError("the neighbouring stage has failed")

    def drain(self) -> None:
        """Do nothing: the queue holds what was sent."""

    def close(self) -> None:
        """Make both ends raise BrokenPipeError; called when a stage has failed."""
        self._closed.set()
