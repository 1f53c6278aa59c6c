"""All collectives and messages of fedpipe; no other module calls torch.distributed.

Process groups are created here before DeepSpeed attaches to them: one for control, one per pipeline
edge and direction, one per replica, one per stage over the replicas (FedAvg), and one per stage
over a client's data-parallel ranks. Groups of a single rank are not created, since they would do
nothing.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedpipe.distributed.board import Board
from fedpipe.distributed.device import gpu_uuid, select_device
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid, check_devices

NO_LIMIT = timedelta(days=365)
"""Time-out of every group and store. The watch, which knows what each rank is doing, decides when a
rank hangs; a time-out of torch would also end the wait for a healthy rank."""


def _new_group(ranks: list[int], **how: Any) -> Any:
    """Create a group without torch's default time-out of half an hour."""
    return dist.new_group(ranks, timeout=NO_LIMIT, **how)


def tcp_store(env: ProcessEnv) -> dist.Store:
    """Connect to the store of a ``tcp`` rendezvous; waits until its host answers."""
    host, port = env.address
    return dist.TCPStore(host, port, is_master=False, timeout=NO_LIMIT)


def host_store(listener: socket.socket) -> dist.Store:
    """Host the store of a ``tcp`` rendezvous for as long as the returned object lives.

    Args:
        listener: A bound, listening socket, which the store takes over.
    """
    address, port = listener.getsockname()[:2]
    host = "127.0.0.1" if address in ("::", "0.0.0.0") else address
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=NO_LIMIT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""``all_gather_single`` is the new name since torch 2.13."""


def _packed(value: Any) -> tuple[Tensor, list[int]]:
    """Pickle a value, padded with zeros to the longest of all ranks; return it and all sizes.

    torch's own collectives of objects pad with uninitialised memory, and so send its old content,
    which has been token ids.

    Collective: every rank.
    """
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([content.numel()]))
    lengths = [int(size) for size in sizes]
    payload = torch.zeros(max(lengths), dtype=torch.uint8)
    payload[: content.numel()] = content
    return payload, lengths


def _unpacked(rows: list[Tensor], sizes: list[int]) -> list[Any]:
    return [
        pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)
    ]


def _from_all(value: Any) -> list[Any]:
    """Send a picklable value of every rank to every rank. Collective: every rank."""
    payload, sizes = _packed(value)
    rows = [torch.empty_like(payload) for _ in sizes]
    dist.all_gather(rows, payload)
    return _unpacked(rows, sizes)


class Channel:
    """Point-to-point messages between two ranks, in one direction, in order."""

    def __init__(self, group: Any, *, source: int, target: int) -> None:
        """Wrap the two-rank group of an edge."""
        self._group, self._source, self._target = group, source, target

    def isend(self, tensor: Tensor) -> Any:
        """Start sending; the tensor must stay alive and unchanged until ``wait()`` returns."""
        return dist.isend(tensor, dst=self._target, group=self._group)

    def irecv(self, tensor: Tensor) -> Any:
        """Start receiving into a contiguous tensor; it is filled once ``wait()`` returns."""
        return dist.irecv(tensor, src=self._source, group=self._group)


class Pending:
    """A collective that has started."""

    def __init__(self, result: Tensor, work: Any = None, *, source: Tensor | None = None) -> None:
        """Wrap a collective.

        Args:
            result: The tensor that it fills.
            work: Torch's handle; None if there is nothing to wait for.
            source: The tensor that it reads, which must live until then.
        """
        self._result, self._work, self._source = result, work, source

    def wait(self) -> Tensor:
        """Wait for the collective, and return its result."""
        if self._work is not None:
            self._work.wait()
        return self._result


class Comm:
    """The process groups of one process, and the bytes it has sent through them."""

    def __init__(
        self,
        grid: Grid,
        env: ProcessEnv,
        *,
        edges: Iterable[tuple[int, int, bool]],
        board: Board | None = None,
    ) -> None:
        """Join the run.

        Args:
            grid: The process grid.
            env: Rank and rendezvous of this process.
            edges: Source stage, target stage, and whether gradients go back.
            board: The board of ranks that have met already; None creates one over the rendezvous.

        Raises:
            TopologyError: The processes do not fill the grid.

        Collective: every rank constructs it.
        """
        grid.check_world_size(env.world_size)
        self.grid, self.env = grid, env
        self.rank = env.rank
        self.stages, self.replica, self.data = grid.coordinates(env.rank)
        self.device = select_device(env.local_rank)
        self.sent_bytes: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._init_process_group(board)
        if self.device.type == "cuda":
            self._check_devices()
        self._channels: dict[tuple[int, int], Channel] = {}
        self._replica_groups: dict[int, Any] = {}
        self._data_groups: dict[int, Any] = {}
        self._make_groups(edges)
        self._connect()

    def _check_devices(self) -> None:
        check_devices(_from_all(gpu_uuid(self.device)))

    def _init_process_group(self, board: Board | None) -> None:
        scheme, _, path = self.env.rendezvous.partition("://")
        store: dist.Store
        if self.env.world_size == 1:
            store = dist.HashStore()
        elif scheme == "file":
            store = dist.FileStore(path, self.env.world_size)
        else:
            store = tcp_store(self.env)
            if board is None:
                # A second connection, because other threads cannot use one that waits for a peer.
                board = Board(tcp_store(self.env), attempt=self.env.attempt)
        self.board = board or Board(store, attempt=self.env.attempt)
        """Short texts that the ranks leave for each other."""
        dist.init_process_group(
            # Control messages, checkpoint votes and records always use gloo.
            backend="cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"fedpipe/{self.env.attempt}", store),
            rank=self.rank,
            world_size=self.env.world_size,
            timeout=NO_LIMIT,
        )
        self._attach_deepspeed()

    def _attach_deepspeed(self) -> None:
        import deepspeed

        for name, value in (
            ("RANK", self.rank),
            ("WORLD_SIZE", self.env.world_size),
            ("LOCAL_RANK", self.env.local_rank),
        ):  # DeepSpeed looks for a launcher's variables when an engine is built
            os.environ[name] = str(value)
        # DeepSpeed would compile its shared-memory all-reduce, which fedpipe does not use, at first
        # use: that takes a minute and needs a compiler. The dictionary is taken from vars(),
        # because an ordinary access makes DeepSpeed call compilers for a second on every rank.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)

    def _make_groups(self, edges: Iterable[tuple[int, int, bool]]) -> None:
        """Create every group of the grid, on every rank in the same order, as torch requires.

        With ``use_local_synchronization`` only members would take part. But torch then names a
        group by the number of groups that a rank has, and that differs between the ends of an edge.
        """
        grid = self.grid
        self._self_group = _new_group([self.rank], use_local_synchronization=True)
        replicas = list(
            itertools.product(range(grid.num_replicas), range(grid.data_parallel_degree))
        )
        edges = () if grid.colocate else edges
        for (source, target, backward), (replica, data) in itertools.product(edges, replicas):
            for ends in [(source, target), (target, source)][: 1 + backward]:
                ranks = [grid.rank(stage, replica, data) for stage in ends]
                group = _new_group(ranks)
                if (replica, data) == (self.replica, self.data) and self.rank in ranks:
                    channel = Channel(group, source=ranks[0], target=ranks[1])
                    self._channels[ends] = channel
        self._own_replica: Any = None
        for replica in range(grid.num_replicas):
            ranks = grid.replica_ranks(replica)
            group = _new_group(ranks) if len(ranks) > 1 else None
            if replica == self.replica:
                self._own_replica = group
        for stage, (replica, data) in itertools.product(range(grid.num_virtual_stages), replicas):
            if replica == 0:
                self._keep(self._replica_groups, stage, grid.replica_group(stage, data))
            if data == 0:
                self._keep(self._data_groups, stage, grid.data_group(stage, replica))

    def _keep(self, groups: dict[int, Any], stage: int, ranks: list[int]) -> None:
        """Create a group, and keep it if this rank is a member."""
        group = _new_group(ranks) if len(ranks) > 1 else None
        if self.rank in ranks:
            groups[stage] = group

    def _connect(self) -> None:
        """Open every edge with a first message, on all ranks in the same order.

        NCCL connects two ranks when both ask for it, and each waits for the other. Two neighbours
        that both receive first, as on an edge with gradients, would wait for ever.
        """
        for (source, _), channel in self._channels.items():
            message = torch.zeros(1, dtype=torch.uint8, device=self.device)
            sends = source in self.stages
            (channel.isend(message) if sends else channel.irecv(message)).wait()

    def channel(self, source: int, target: int) -> Channel:
        """Return the channel from one stage to another."""
        return self._channels[source, target]

    def is_master(self) -> bool:
        """Whether this is rank 0, which writes the run's records."""
        return self.rank == 0

    def sum_over_replicas_(self, stage: int, tensor: Tensor, *, label: str) -> int:
        """Sum a tensor over the replicas of a stage, in place.

        Args:
            stage: A stage of this process.
            tensor: Same shape and dtype on every replica.
            label: Entry of the traffic ledger.

        Returns:
            Bytes that this rank sent: ``2 (R - 1) / R`` of the tensor, a ring all-reduce over R
            replicas (Patarasuk and Yuan 2009).

        Collective: the same stage and data index of every replica.
        """
        group = self._replica_groups[stage]
        if group is None:
            return 0
        size = dist.get_world_size(group)
        dist.all_reduce(tensor, group=group)
        sent = 2 * (size - 1) * tensor.numel() * tensor.element_size() // size
        self._count(label, sent)
        return sent

    def all_to_all(self, stage: int, tensor: Tensor, *, label: str) -> Pending:
        """Start to send slice r of a tensor to replica r of a stage, on all replicas.

        Args:
            stage: A stage of this process.
            tensor: (R, ...), contiguous, same shape and dtype on every replica; must not change
                before the collective has ended.
            label: Entry of the traffic ledger; this rank sends ``(R - 1) / R`` of the tensor.

        Returns:
            (R, ...): slice r came from replica r.

        Collective: the same stage and data index of every replica.
        """
        group = self._replica_groups[stage]
        if group is None:
            return Pending(tensor)
        self._count(label, tensor.nbytes - tensor[0].nbytes)
        result = torch.empty_like(tensor)
        work = dist.all_to_all_single(result, tensor, group=group, async_op=True)
        return Pending(result, work, source=tensor)

    def all_gather(self, stage: int, tensor: Tensor, *, label: str) -> Pending:
        """Start to send a tensor to all replicas of a stage.

        Args:
            stage: A stage of this process.
            tensor: Contiguous, same shape and dtype on every replica; must not change before the
                collective has ended.
            label: Entry of the traffic ledger; in a ring this rank sends R - 1 tensors of this
                size, its own and those that it passes on.

        Returns:
            (R, ...): slice r comes from replica r.

        Collective: the same stage and data index of every replica.
        """
        group = self._replica_groups[stage]
        if group is None:
            return Pending(tensor.unsqueeze(0))
        size = dist.get_world_size(group)
        self._count(label, (size - 1) * tensor.nbytes)
        result = tensor.new_empty((size, *tensor.shape))
        work = _all_gather(result.flatten(), tensor.flatten(), group=group, async_op=True)
        return Pending(result, work, source=tensor)

    def send_down_pipe(self, tensor: Tensor, *, label: str) -> None:
        """Send a tensor from the first stage to all later ones, over the edges of activations.

        Args:
            tensor: Contiguous, same shape and dtype on every process; overwritten on later stages.
            label: Entry of the traffic ledger; each process except the last sends the tensor once.

        Collective: every process of a replica with the same data index, while no message of a
        micro-batch is in flight.
        """
        if self.grid.colocate:
            return
        stage = self.stages[0]
        if stage > 0:
            self.channel(stage - 1, stage).irecv(tensor).wait()
        if stage + 1 < self.grid.num_stages:
            self.channel(stage, stage + 1).isend(tensor).wait()
            self._count(label, tensor.nbytes)

    def _count(self, label: str, sent: int) -> None:
        with self._counting:  # the stages of a process may be threads
            self.sent_bytes[label] += sent

    def gather(self, value: Any) -> list[Any] | None:
        """Collect a picklable value of every rank on rank 0.

        Returns:
            The values by rank on rank 0, None elsewhere.

        Collective: every rank.
        """
        if self.env.world_size == 1:
            return [value]
        payload, sizes = _packed(value)
        rows = [torch.empty_like(payload) for _ in sizes] if self.rank == 0 else None
        dist.gather(payload, rows, dst=0)
        return None if rows is None else _unpacked(rows, sizes)

    def broadcast(self, value: Any) -> Any:
        """Send rank 0's picklable value to every rank. Collective: every rank."""
        values = [value]
        if self.env.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def agree(self, ok: bool, *, message: str = "") -> list[str]:
        """Send every rank the errors of all ranks, so that none waits for a rank that has failed.

        Args:
            ok: Whether this rank can go on.
            message: The error of this rank.

        Returns:
            The messages of all failed ranks; empty if all ranks can go on.

        Collective: every rank.
        """
        if self.env.world_size == 1:
            return [] if ok else [message]
        return [m for m in _from_all(None if ok else message) if m is not None]

    def min_over_replica(self, value: int) -> int:
        """Return the minimum of a whole number over the processes of this replica.

        Collective: every process of the replica.
        """
        if self._own_replica is None:
            return value
        least = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._own_replica)
        return int(least)

    def barrier(self) -> None:
        """Wait for every rank. Collective: every rank."""
        if self.env.world_size > 1:
            self.agree(True)

    def stage_mpu(self, stage: int) -> StageMPU:
        """Return the ``mpu`` object that DeepSpeed asks for the groups of one stage."""
        return StageMPU(
            data_group=self._data_groups[stage],
            self_group=self._self_group,
            data_ranks=self.grid.data_group(stage, self.replica),
            rank=self.rank,
        )

    def close(self) -> None:
        """Destroy all process groups."""
        if dist.is_initialized():
            dist.destroy_process_group()


class StageMPU:
    """DeepSpeed's model-parallel unit (mpu) for one stage.

    The model-parallel group is this rank alone, so norms and overflow checks never involve another
    stage. The data-parallel group is the ranks that share this client's batch, never other clients.
    """

    _self_groups: dict[int, Any] = {}

    def __init__(
        self, *, data_group: Any, self_group: Any, data_ranks: list[int], rank: int
    ) -> None:
        """Wrap the groups that ``Comm`` made."""
        self._data_group, self._self_group = data_group or self_group, self_group
        self._data_ranks, self._rank = data_ranks, rank

    def get_model_parallel_rank(self) -> int:
        """Return 0: a stage is not sharded."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """Return 1."""
        return 1

    def get_model_parallel_group(self) -> Any:
        """Return the group of this rank alone."""
        return self._self_group

    def get_data_parallel_rank(self) -> int:
        """Return the index among the ranks that share the client's batch."""
        return self._data_ranks.index(self._rank)

    def get_data_parallel_world_size(self) -> int:
        """Return how many ranks share the client's batch."""
        return len(self._data_ranks)

    def get_data_parallel_group(self) -> Any:
        """Return the group of the ranks that share the client's batch."""
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return the global ranks of that group."""
        return list(self._data_ranks)
