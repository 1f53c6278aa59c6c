"""Links: one direction of one pipeline edge, with a bounded window of messages in flight.

``DistLink`` carries messages between processes (gloo, NCCL); ``QueueLink`` between stages that are
threads of one process. A message is a tuple of tensors whose specs are agreed once.
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
from fedpipe.distributed.device import Handover
from fedpipe.distributed.wire import TensorSpec

_POLL_S = 0.5
"""How soon a waiting thread notices that its neighbour has failed."""


class Link(Protocol):
    """One direction of an edge; each end calls its own half."""

    sent_bytes: int
    """Bytes this end has sent."""
    sent_messages: int
    """Messages this end has sent."""

    def begin(self, num_messages: int) -> None:
        """Announce that so many more messages come (receiving end)."""

    def send(self, *tensors: Tensor) -> None:
        """Send one message; waits only while the window is full."""

    def recv(self) -> tuple[Tensor, ...]:
        """Wait for the next message."""

    def drain(self) -> None:
        """Wait until everything sent has been received (sending end)."""


class DistLink:
    """Messages between two processes.

    A gloo send is a rendezvous: it completes when its receive has been posted. So receives are
    posted ``window`` messages ahead, before the stage computes, and the sender keeps up to
    ``window`` sends pending, holding their tensors.
    """

    def __init__(
        self, channel: Channel, specs: tuple[TensorSpec, ...], *, window: int, device: torch.device
    ) -> None:
        """Wrap a channel.

        Args:
            channel: The edge's direction.
            specs: Tensors of every message.
            window: Messages in flight.
            device: Where received tensors live.
        """
        self._channel, self._specs, self._window, self._device = channel, specs, window, device
        self._sending: deque[list[tuple[Any, Tensor]]] = deque()
        self._receiving: deque[list[tuple[Any, Tensor]]] = deque()
        self._expected = 0
        self.sent_bytes = self.sent_messages = 0

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
        """Send one message, in the formats of the specs."""
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
        """Wait for the next message, then post the receive of a later one."""
        message = self._receiving.popleft()
        for work, _ in message:
            work.wait()
        self._post()
        pairs = zip(message, self._specs, strict=True)
        return tuple(spec.decode(buffer) for (_, buffer), spec in pairs)

    def drain(self) -> None:
        """Wait until everything sent has been received."""
        while self._sending:
            self._wait_oldest_send()


class QueueLink:
    """Messages between two threads of one process; a format that changes nothing copies nothing."""

    def __init__(self, specs: tuple[TensorSpec, ...], *, window: int) -> None:
        """Make an empty link; both ends share this object."""
        self._specs = specs
        self._queue: queue.Queue[Handover] = queue.Queue(maxsize=window)
        self._closed = threading.Event()
        self.sent_bytes = self.sent_messages = 0

    def begin(self, num_messages: int) -> None:
        """Nothing to post."""

    def send(self, *tensors: Tensor) -> None:
        """Hand one message over, in the formats of the specs."""
        message = Handover(tuple(s.encode(t) for t, s in zip(tensors, self._specs, strict=True)))
        self._until_closed(lambda: self._queue.put(message, timeout=_POLL_S))
        self.sent_bytes += sum(s.nbytes for s in self._specs)
        self.sent_messages += 1

    def recv(self) -> tuple[Tensor, ...]:
        """Wait for the next message."""
        message = self._until_closed(lambda: self._queue.get(timeout=_POLL_S)).take()
        return tuple(s.decode(b) for b, s in zip(message, self._specs, strict=True))

    def _until_closed(self, action: Callable[[], Any]) -> Any:
        while not self._closed.is_set():
            try:
                return action()
            except (queue.Full, queue.Empty):
                continue
        raise BrokenPipeError("the neighbouring stage has failed")

    def drain(self) -> None:
        """Nothing to wait for: the receiver holds what was sent."""

    def close(self) -> None:
        """Make both ends raise BrokenPipeError instead of waiting for a stage that has failed."""
        self._closed.set()
