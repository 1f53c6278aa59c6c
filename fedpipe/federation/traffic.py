"""Predict what averaging costs a rank, and record what a round has sent. Pure: no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fedpipe.config.federation import FederationConfig
from fedpipe.config.schema import PipelineConfig
from fedpipe.distributed.sparse_row import SPARSE_BLOCK, SparseRow
from fedpipe.models.split import pipeline_edges
from fedpipe.report.records import EdgeTraffic, TrafficRecord

BLOCK = 1024
"""Elements of an int8 change that share a float32 scale: 0.4 % on top of a byte each."""
_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4.0 / BLOCK}


def padded_numel(numel: int, *, federation: FederationConfig) -> int:
    """Elements that travel for ``numel``: whole shards, one per replica, of whole blocks.

    A sparse change has blocks and no shards.
    """
    if federation.aggregation.rule != "mean":
        unit = federation.num_replicas
    elif federation.wire == "sparse":
        unit = SPARSE_BLOCK
    else:
        unit = 1 if federation.wire == "fp32" else federation.num_replicas * BLOCK
    return math.ceil(numel / unit) * unit


def hosted_clients(federation: FederationConfig) -> int:
    """Clients of a round on the replica that hosts most of them."""
    return math.ceil(federation.clients_per_round / federation.num_replicas)


def averaging_bytes(numel: int, *, federation: FederationConfig) -> int:
    """Bytes that a rank sends per round for the ``numel`` averaged parameters of its stage.

    With R replicas that host up to h of K clients: the mean sends ``2 (R - 1) / R`` of the weights
    (a ring all-reduce) or of their encoded changes. Sparse changes are gathered whole in a ring,
    ``R - 1`` of them: with 2 replicas a density of 2 % sends 161 times less than float32 (see
    ``SparseRow``), with R replicas ``161 x 2 / R`` times less. Under the other rules every replica
    combines its shard of all clients: median and trimmed mean send ``(h + 1) (R - 1) / R`` of the
    weights, Krum ``(h + 2) (R - 1) / R`` and K x K distances in float64.

    Args:
        numel: Without what stays with the clients, and without a shared stage.
        federation: Replicas, rule and format.
    """
    replicas, rule = federation.num_replicas, federation.aggregation.rule
    if federation.wire == "sparse":
        rows = padded_numel(numel, federation=federation) // SPARSE_BLOCK
        return (replicas - 1) * rows * SparseRow(SPARSE_BLOCK, federation.density).nbytes
    shards = 2 if rule == "mean" else hosted_clients(federation) + (2 if rule == "krum" else 1)
    wire = federation.wire if rule == "mean" else "fp32"
    elements = shards * (replicas - 1) * padded_numel(numel, federation=federation)
    sent = int(elements * _BYTES[wire]) // replicas
    if rule == "krum" and numel:
        sent += 2 * (replicas - 1) * federation.clients_per_round**2 * 8 // replicas
    return sent


def averaging_floats(numel: int, *, federation: FederationConfig) -> int:
    """float32 values that a rank holds for ``averaging_bytes``, beside the global weights.

    The running sum and the residuals of a compressed mean, or every hosted client's weights; and
    the moments of the server optimizer.

    Args:
        numel: Without what stays with the clients, and without a shared stage.
        federation: Rule, format, server optimizer and clients.
    """
    size, moments = padded_numel(numel, federation=federation), {"fedavg": 0, "fedavgm": 1}
    floats = moments.get(federation.server_optimizer.name, 2) * numel
    if federation.aggregation.rule != "mean":
        return floats + hosted_clients(federation) * size
    if federation.wire == "fp32" or federation.num_replicas == 1:
        return floats + numel
    shard = 0 if federation.wire == "sparse" else size // federation.num_replicas
    return floats + numel + size + shard


def traffic_record(
    round_id: int, sent: Sequence[Mapping[str, int]], *, pipeline: PipelineConfig
) -> TrafficRecord:
    """Sum what all processes sent in a round: bytes per pipe edge and per collective."""
    total: Counter[str] = Counter()
    for counts in sent:
        total.update(counts)
    edges: list[EdgeTraffic] = [
        {
            "from": source,
            "to": target,
            "bytes_forward": total[f"forward/bytes/{edge}"],
            "bytes_backward": total[f"backward/bytes/{edge}"],
            "messages_forward": total[f"forward/messages/{edge}"],
            "messages_backward": total[f"backward/messages/{edge}"],
        }
        for edge, (source, target, _) in enumerate(pipeline_edges(pipeline))
    ]
    names = ("fedavg", "shared_gradients", "gradients", "embedding")
    collectives = {name: total[name] for name in names}
    return {"kind": "traffic", "round": round_id, "edges": edges, "collectives": collectives}
