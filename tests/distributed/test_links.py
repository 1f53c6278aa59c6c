"""Links between processes against links between threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fedpipe.distributed.comm import Channel
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.wire import TensorSpec
from fedpipe.pipeline.p2p import DistLink, Link, QueueLink
from tests.helpers.distributed import run_distributed

NUM_MESSAGES, WINDOW = 5, 2
SPECS = (
    TensorSpec((2, 6, 16), torch.float32, "int8"),
    TensorSpec((2, 6, 16), torch.bfloat16, "int8"),
    TensorSpec((2, 6, 16), torch.float32, "bf16"),
    TensorSpec((2, 6, 16), torch.bfloat16),
    TensorSpec((2, 3), torch.int32),
)


def _message(index: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(index)
    floats = [torch.randn(2, 6, 16, generator=draw) for _ in SPECS[:-1]]
    floats[0][0, 0] = 0.0
    floats[0][1, 2, 3] = float("inf")
    return [*floats, torch.randint(0, 99, (2, 3), generator=draw)]


def _end(env: ProcessEnv) -> Any:
    """Rank 0 sends every message, rank 1 returns what arrives; both return the bytes sent."""
    store = dist.FileStore(env.rendezvous.removeprefix("file://"), env.world_size)
    dist.init_process_group("gloo", store=store, rank=env.rank, world_size=env.world_size)
    channel = Channel(dist.group.WORLD, source=0, target=1)
    link = DistLink(channel, SPECS, window=WINDOW, device=torch.device("cpu"))
    received = []
    if env.rank == 0:
        for index in range(NUM_MESSAGES):
            link.send(*_message(index))
        link.drain()
    else:
        link.begin(NUM_MESSAGES)
        received = [_plain(link.recv()) for _ in range(NUM_MESSAGES)]
    dist.destroy_process_group()
    return received, link.sent_bytes


def _plain(message: Sequence[torch.Tensor]) -> list[tuple[str, bytes]]:
    """Dtype and bytes: nan equals nan."""
    return [(str(t.dtype), t.contiguous().view(torch.uint8).numpy().tobytes()) for t in message]


def test_every_format_arrives_as_it_does_between_threads_bit_for_bit() -> None:
    (_, sent_bytes), (received, _) = run_distributed(_end, 2)
    link: Link = QueueLink(SPECS, window=WINDOW)
    for index in range(NUM_MESSAGES):
        link.send(*_message(index))
        assert received[index] == _plain(link.recv())
    assert sent_bytes == link.sent_bytes == NUM_MESSAGES * sum(spec.nbytes for spec in SPECS)
