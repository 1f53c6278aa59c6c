"""From the trained weights of a round's clients to one aggregate, over the replicas of a stage.

An aggregator takes the clients that its replica hosts, one after another; ``reduce`` brings the
replicas together. Every replica gets the same bits: either the collective says so, or each
coordinate is computed by one replica, in its shard, and handed to the others.
"""

# K = clients of the round, R = replicas, H = clients that a replica hosts at most, N = parameters
# that are averaged, P = N padded to R shards of S; a bucket's own sizes are in lower case

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from fedpipe.config.federation import FederationConfig
from fedpipe.distributed.comm import Comm, Pending
from fedpipe.distributed.sparse_row import SPARSE_BLOCK
from fedpipe.distributed.wire import TensorSpec
from fedpipe.federation.rules import krum_select, median, squared_distances, trimmed_mean
from fedpipe.federation.traffic import BLOCK, hosted_clients, padded_numel

BUCKET_ELEMENTS = 16 * 2**20
"""Elements per collective, 64 MiB of float32: large enough for full bandwidth."""
ENCODED_BUCKET_ELEMENTS = 2**20
"""The same where they are encoded: 4 MiB of float32 stay in a cache from pass to pass. 16.8 million
take 0.29 s on a CPU core, in buckets four times as large 0.41 s."""
LEDGER = "fedavg"
"""Entry of the traffic ledger."""


class Aggregator(ABC):
    """Clients in, one flat vector of weights out."""

    def __init__(
        self, federation: FederationConfig, *, stage_id: int, numel: int, comm: Comm
    ) -> None:
        """Start with no client.

        Args:
            federation: Rule, format, clients and replicas.
            stage_id: A stage of this process.
            numel: N of the stage.
            comm: Its replica group holds the stage once per replica.
        """
        self._federation, self._stage_id, self._comm = federation, stage_id, comm
        self._replicas = federation.num_replicas
        self._numel, self._padded = numel, padded_numel(numel, federation=federation)
        self.unfinished_round: dict[str, Tensor] = {}
        """The unfinished round, live: what a checkpoint in mid-round holds and writes back."""
        self.residuals: dict[str, Tensor] = {}
        """What this replica has rounded off and owes to the next round, live."""

    @abstractmethod
    def add(self, tensors: Iterable[Tensor], *, weight: float) -> None:
        """Take a client's trained weights, N elements in all; ``weight`` is its share."""

    @abstractmethod
    def leave_out(self) -> None:
        """Skip a client whose update is refused: its place in the cohort stays empty."""

    @abstractmethod
    def forget(self) -> None:
        """Forget the round's clients."""

    @abstractmethod
    def reduce(
        self,
        start_N: Tensor,
        *,
        num_clients: int,
        left_out: Collection[int] = (),
        share: float = 1.0,
    ) -> Tensor:
        """Combine the round's clients and forget them.

        Args:
            start_N: float32 weights that the clients started from.
            num_clients: K; client k was on replica ``k mod R``.
            left_out: Those of them whose updates are refused.
            share: What the weights of the others sum to.

        Returns:
            The aggregate (N), the same on every replica.

        Collective: this stage and data index of every replica.
        """

    def _buckets(self, flat: Tensor, size: int) -> tuple[Tensor, ...]:
        """Split the last dimension; every bucket has a shard of whole blocks for every replica."""
        shards = self._replicas * BLOCK
        return flat.split(max(1, size // shards) * shards, dim=-1)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self._comm.device)

    def _sum_over_replicas_(self, flat: Tensor) -> None:
        for bucket in flat.split(BUCKET_ELEMENTS):
            self._comm.sum_over_replicas_(self._stage_id, bucket, label=LEDGER)


class Mean(Aggregator):
    """The weighted mean, ``sum_k (n_k / n) w_k``.

    Source: FedAvg, McMahan et al. 2017, algorithm 1, https://arxiv.org/abs/1602.05629.
    """

    def __init__(
        self, federation: FederationConfig, *, stage_id: int, numel: int, comm: Comm
    ) -> None:
        """Start with no client; see ``Aggregator``."""
        super().__init__(federation, stage_id=stage_id, numel=numel, comm=comm)
        self._sum_N = self.unfinished_round["sum"] = self._zeros(numel)

    def add(self, tensors: Iterable[Tensor], *, weight: float) -> None:
        """Add to a running sum."""
        offset = 0
        for tensor in tensors:
            part = self._sum_N[offset : offset + tensor.numel()]
            part.add_(tensor.flatten().float(), alpha=weight)
            offset += tensor.numel()

    def leave_out(self) -> None:
        """Do nothing: a sum has no places."""

    def forget(self) -> None:
        """Empty the sum."""
        self._sum_N.zero_()

    def reduce(
        self,
        start_N: Tensor,
        *,
        num_clients: int,
        left_out: Collection[int] = (),
        share: float = 1.0,
    ) -> Tensor:
        """All-reduce the sums; a replica without clients adds zero."""
        self._sum_over_replicas_(self._sum_N)
        mean_N = self._sum_N / share
        self.forget()
        return mean_N


class EncodedMean(Mean):
    """The weighted mean; a replica's change travels encoded, with error feedback.

    With a replica's change ``d = sum_k (n_k / n) (w_k - start)``, encoding Q and residual e:
    ``x = d + e``, send Q(x), ``e <- x - Q(x)``. What is not sent in one round is sent in a later
    one.
    """

    block: int
    """Elements that are encoded as one row."""

    def __init__(
        self, federation: FederationConfig, *, stage_id: int, numel: int, comm: Comm
    ) -> None:
        """Start with no client and nothing owed; see ``Aggregator``."""
        super().__init__(federation, stage_id=stage_id, numel=numel, comm=comm)
        self._weight = self.unfinished_round["weight"] = torch.zeros((), dtype=torch.float64)
        self._change_P = self.residuals["change"] = self._zeros(self._padded)

    def add(self, tensors: Iterable[Tensor], *, weight: float) -> None:
        """Add to a running sum, and to the weight in it."""
        super().add(tensors, weight=weight)
        self._weight += weight

    def forget(self) -> None:
        """Empty the sum; what is owed stays owed."""
        super().forget()
        self._weight.zero_()

    def _owe_change(self, start_N: Tensor, *, share: float) -> None:
        """Add the round's change to what is owed, and forget the clients."""
        own_N, weight = self._change_P[: self._numel], float(self._weight)
        own_N.add_(self._sum_N, alpha=1 / share).sub_(start_N, alpha=weight / share)
        self.forget()

    def _encode(self, owed: Tensor) -> Tensor:
        """Encode a part of what is owed; what is not in the encoding stays owed."""
        spec = self._spec(owed)
        rows = owed.view(spec.shape)
        encoded = spec.encode(rows)
        rows.sub_(spec.decode(encoded))
        return encoded

    def _spec(self, part: Tensor) -> TensorSpec:
        return TensorSpec(
            (part.numel() // self.block, self.block),
            torch.float32,
            wire=self._federation.wire,
            density=self._federation.density,
        )


class CompressedMean(EncodedMean):
    """The mean in bf16 or int8, with error feedback at both ends.

    Replica r sums shard r of all replicas' encoded changes, adds a residual of its own and hands
    the encoded sum to all, in the same way.
    Source: DoubleSqueeze, Tang et al. 2019, algorithm 1, https://arxiv.org/abs/1905.05957; shards
    take the place of its server, as in 1-bit Adam, section 5, https://arxiv.org/abs/2102.02888.
    """

    block = BLOCK

    def __init__(
        self, federation: FederationConfig, *, stage_id: int, numel: int, comm: Comm
    ) -> None:
        """Start with no client and nothing owed; see ``Aggregator``."""
        super().__init__(federation, stage_id=stage_id, numel=numel, comm=comm)
        self._total_S = self.residuals["total"] = self._zeros(self._padded // self._replicas)

    def reduce(
        self,
        start_N: Tensor,
        *,
        num_clients: int,
        left_out: Collection[int] = (),
        share: float = 1.0,
    ) -> Tensor:
        """Exchange encoded shards, sum them, exchange encoded sums.

        All buckets are under way at once: one is encoded while others travel.
        """
        self._owe_change(start_N, share=share)
        changes = self._buckets(self._change_P, ENCODED_BUCKET_ELEMENTS)
        totals = self._total_S.split(changes[0].numel() // self._replicas)
        scattered = [self._scatter(change) for change in changes]
        gathered = [
            self._gather(pending, total) for pending, total in zip(scattered, totals, strict=True)
        ]
        shards = [
            self._spec(total).decode(encoded).flatten()
            for pending, total in zip(gathered, totals, strict=True)
            for encoded in pending.wait()
        ]
        return torch.cat(shards)[: self._numel].add_(start_N)

    def _scatter(self, change: Tensor) -> Pending:
        shards = [self._encode(shard) for shard in change.chunk(self._replicas)]
        return self._comm.all_to_all(self._stage_id, torch.stack(shards), label=LEDGER)

    def _gather(self, pending: Pending, total: Tensor) -> Pending:
        spec = self._spec(total)
        for encoded in pending.wait():
            total.view(spec.shape).add_(spec.decode(encoded))
        return self._comm.all_gather(self._stage_id, self._encode(total), label=LEDGER)


class SparseMean(EncodedMean):
    """The mean of the largest values of every replica's change (see ``SparseRow``).

    Every replica gets the encoded changes of all and adds them in the order of the replicas, so all
    have the same sum bit for bit, and nothing is rounded a second time.
    Source: SparseLoCo, Sarfi et al. 2025, algorithm 1, https://arxiv.org/abs/2508.15706, with a
    residual that does not decay.
    """

    block = SPARSE_BLOCK

    def reduce(
        self,
        start_N: Tensor,
        *,
        num_clients: int,
        left_out: Collection[int] = (),
        share: float = 1.0,
    ) -> Tensor:
        """Gather the encoded changes, and sum them.

        All buckets are under way at once: one is encoded while others travel.
        """
        self._owe_change(start_N, share=share)
        changes = self._change_P.split(max(1, ENCODED_BUCKET_ELEMENTS // self.block) * self.block)
        gathered = [
            self._comm.all_gather(self._stage_id, self._encode(change), label=LEDGER)
            for change in changes
        ]
        total_P = torch.zeros_like(self._change_P)
        for pending, change, total in zip(
            gathered, changes, total_P.split(len(changes[0])), strict=True
        ):
            spec = self._spec(change)
            for encoded in pending.wait():
                total.view(spec.shape).add_(spec.decode(encoded))
        return total_P[: self._numel].add_(start_N)


class RobustRule(Aggregator):
    """Median, trimmed mean or multi-Krum of the clients (see ``fedpipe.federation.rules``).

    Every replica gets its shard of all clients and combines it, so what a rank sends does not grow
    with the number of replicas.
    """

    def __init__(
        self, federation: FederationConfig, *, stage_id: int, numel: int, comm: Comm
    ) -> None:
        """Start with no client; see ``Aggregator``."""
        super().__init__(federation, stage_id=stage_id, numel=numel, comm=comm)
        self._rows_HP = self.unfinished_round["rows"] = self._zeros(
            hosted_clients(federation), self._padded
        )
        self._count = self.unfinished_round["count"] = torch.zeros((), dtype=torch.int64)

    def add(self, tensors: Iterable[Tensor], *, weight: float) -> None:
        """Keep the client's weights; all clients weigh the same."""
        torch.cat(
            [t.flatten() for t in tensors], out=self._rows_HP[int(self._count), : self._numel]
        )
        self._count += 1

    def leave_out(self) -> None:
        """Leave a row as it is."""
        self._count += 1

    def forget(self) -> None:
        """Begin with the first row again."""
        self._count.zero_()

    def reduce(
        self,
        start_N: Tensor,
        *,
        num_clients: int,
        left_out: Collection[int] = (),
        share: float = 1.0,
    ) -> Tensor:
        """Combine shard by shard, bucket by bucket.

        What travels is the same whoever is left out; the rule then sees the others alone.
        """
        self.forget()
        aggregation = self._federation.aggregation
        num_byzantine = aggregation.num_byzantine_left(len(left_out))
        taken = [k for k in range(num_clients) if k not in left_out]
        if aggregation.rule == "krum":
            return self._krum_mean(num_clients, taken, num_byzantine=num_byzantine)
        result = []
        for bucket_Hp in self._buckets(self._rows_HP, BUCKET_ELEMENTS):
            clients_Ks = self._exchange(bucket_Hp, num_clients)[taken]
            if aggregation.rule == "median":
                shard = median(clients_Ks)
            else:
                shard = trimmed_mean(clients_Ks, num_byzantine=num_byzantine)
            result.append(self._comm.all_gather(self._stage_id, shard, label=LEDGER).wait())
        return torch.cat([bucket.flatten() for bucket in result])[: self._numel]

    def _exchange(self, bucket_Hp: Tensor, num_clients: int) -> Tensor:
        """Return this replica's shard of a bucket, of every client, (K, s)."""
        mine_RHs = bucket_Hp.unflatten(1, (self._replicas, -1)).transpose(0, 1).contiguous()
        all_RHs = self._comm.all_to_all(self._stage_id, mine_RHs, label=LEDGER).wait()
        # Client k of the cohort is the (k div R)th of replica k mod R.
        return all_RHs.transpose(0, 1).flatten(0, 1)[:num_clients]

    def _krum_mean(self, num_clients: int, taken: list[int], *, num_byzantine: int) -> Tensor:
        buckets = self._buckets(self._rows_HP, BUCKET_ELEMENTS)
        distances = [squared_distances(self._exchange(b, num_clients)) for b in buckets]
        distances_KK = torch.stack(distances).sum(0)
        self._comm.sum_over_replicas_(self._stage_id, distances_KK, label=LEDGER)
        among = krum_select(distances_KK[taken][:, taken], num_byzantine=num_byzantine)
        selected = [taken[index] for index in among]
        mine = [k // self._replicas for k in selected if k % self._replicas == self._comm.replica]
        mean_P = self._rows_HP[mine].sum(0).div_(len(selected))
        self._sum_over_replicas_(mean_P)
        return mean_P[: self._numel]


def make_aggregator(
    federation: FederationConfig, *, stage_id: int, numel: int, comm: Comm
) -> Aggregator:
    """Return the aggregator that a configuration asks for; see ``Aggregator``."""
    kind: type[Aggregator] = Mean
    if federation.aggregation.rule != "mean":
        kind = RobustRule
    elif federation.wire != "fp32" and federation.num_replicas > 1:
        kind = SparseMean if federation.wire == "sparse" else CompressedMean
    return kind(federation, stage_id=stage_id, numel=numel, comm=comm)
