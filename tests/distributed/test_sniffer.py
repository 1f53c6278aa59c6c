"""The sniffer sees every way out of a process, and finds ids however they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fedpipe.distributed.env import ProcessEnv
from tests.helpers.distributed import run_distributed
from tests.helpers.sniffer import Secrets, Sent, Sniffer

IDS = np.array([[4010, 1207, 3301, 2222, 1999], [1005, 4711, 3003, 2718, 1414]])


def _secrets() -> Secrets:
    secrets = Secrets(smallest=5)
    secrets.add("ids", IDS)
    return secrets


def _ways_out(rank: int, ids: torch.Tensor) -> dict[str, Any]:
    """Every call that fedpipe or DeepSpeed may make, with the ids as what rank 0 gives."""
    other, gathered = 1 - rank, [torch.empty_like(ids) for _ in range(2)]

    def exchange() -> None:
        work = dist.isend(ids, other) if rank == 0 else dist.irecv(torch.empty_like(ids), other)
        work.wait()

    return {
        "isend": exchange,
        "all_reduce": lambda: dist.all_reduce(ids.clone()),
        "reduce": lambda: dist.reduce(ids.clone(), dst=1),
        "broadcast": lambda: dist.broadcast(ids.clone(), src=0),
        "all_gather": lambda: dist.all_gather(gathered, ids),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(
            torch.empty(4, 5, dtype=ids.dtype), ids
        ),
        "gather": lambda: dist.gather(ids, gathered if rank == 1 else None, dst=1),
        "scatter": lambda: dist.scatter(ids.clone(), [ids, ids] if rank == 0 else None, src=0),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty_like(ids), ids),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty_like(ids[:1]), ids),
        "gather_object": lambda: dist.gather_object(
            {"a": [("x", ids[0].tolist())]}, [None, None] if rank == 1 else None, dst=1
        ),
        "all_gather_object": lambda: dist.all_gather_object([None, None], ids.numpy()),
        "broadcast_object_list": lambda: dist.broadcast_object_list([ids.short()], src=0),
        "store": lambda: dist.distributed_c10d._get_default_store().set("k", ids.numpy().tobytes()),
    }  # fmt: skip


def _leak(env: ProcessEnv) -> dict[str, set[str]]:
    """Send the ids from rank 0 in every way; return what the sniffer there has found."""
    sniffer = Sniffer()
    sniffer.install()
    store = dist.FileStore(env.rendezvous.removeprefix("file://"), env.world_size)
    dist.init_process_group("gloo", store=store, rank=env.rank, world_size=env.world_size)
    found = {}
    ids = torch.from_numpy(IDS) if env.rank == 0 else torch.zeros(2, 5, dtype=torch.int64)
    for name, way_out in _ways_out(env.rank, ids).items():
        before = len(sniffer.sent)
        way_out()
        found[name] = set().union(*(_secrets().find(s) for s in sniffer.sent[before:]))
    dist.destroy_process_group()
    return found


def test_no_way_out_of_a_process_is_overlooked() -> None:
    leaking, honest = run_distributed(_leak, 2)
    assert leaking == dict.fromkeys(leaking, {"ids"})
    assert honest == dict.fromkeys(honest, set()), "what is received is not what is sent"


@pytest.mark.parametrize("dtype", ["<i2", "<u2", "<i4", "<i8"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_four_ids_in_a_row_are_found_wherever_they_stand(dtype: str, offset: int) -> None:
    noise = np.random.default_rng(0).bytes(3000)
    inside = noise[:offset] + IDS[1, 1:].astype(dtype).tobytes() + noise
    assert _secrets().find(Sent("send", "torch.uint8", (len(inside),), inside)) == {"ids"}
    three = noise[:offset] + IDS[1, 2:].astype(dtype).tobytes() + noise
    assert _secrets().find(Sent("send", "torch.uint8", (len(three),), three)) == set()
