"""List every tensor and record that leaves or enters a client.

The list follows from the configuration alone; no torch. A client consists of its own processes:
messages between its own stages or its own data-parallel ranks neither leave nor enter it. Sizes are
those of the traffic ledger (``traffic`` records of metrics.jsonl).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedpipe.config.model_shape import ModelShape
from fedpipe.config.schema import RunConfig
from fedpipe.distributed.sparse_row import SPARSE_BLOCK, SparseRow
from fedpipe.federation.traffic import averaging_bytes, padded_numel
from fedpipe.models.split import StageRole, StageSpec
from fedpipe.pipeline.messages import EdgeMessages, WireTensor
from fedpipe.report.format import bytes_text

Direction = Literal["leaves", "enters"]
When = Literal["start", "micro-batch", "local step", "round", "validation batch", "validation"]
"""A validation batch is a micro-batch of held-out text."""
Parts = Mapping[str, int]
"""Number of a stage's parameters for each key of ``federation.average``."""

_MASTER = "process 0"
FORMATS = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "int8 + scales",
    "sparse": "values of 2 bits + positions + scales",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """One tensor or record that one of the client's processes sends or receives."""

    direction: Direction
    what: str
    peer: str
    """Receiver or sender outside of the client."""
    form: str
    """Shape and wire format of a tensor; a description of anything else."""
    nbytes: int | None
    """Bytes of one transfer; None for pickled records, whose length varies."""
    when: When
    entry: str = ""
    """Entry of the traffic ledger: "forward/0" or "backward/1" with the edge, "fedavg",
    "embedding"; "" for none."""
    first_round: int = 0
    """The first round, from 0, that has it. A message that the share of masked tokens changes is
    listed twice, and the one of a later round takes the place of the other."""


def client_transfers(
    config: RunConfig,
    shape: ModelShape,
    *,
    specs: Sequence[StageSpec],
    edges: Sequence[EdgeMessages],
    last_edges: Sequence[EdgeMessages],
    parts: Sequence[Parts],
) -> tuple[Transfer, ...]:
    """List all transfers between a client and everything outside of it.

    Args:
        config: The run.
        shape: Sizes of the model.
        specs: All stages.
        edges: Messages of a micro-batch over every edge in the first round.
        last_edges: The same in the last round and in every validation.
        parts: Number of parameters of every stage, by key of ``federation.average``.

    Returns:
        What leaves, then what enters, both in the order of ``When``.
    """
    over_edges = _over_edges(config, specs, list(zip(edges, last_edges, strict=True)))
    transfers = [*over_edges, *_verdict(specs), *_records(config)]
    for spec, held in zip(specs, parts, strict=True):
        if spec.role is StageRole.CLIENT:
            transfers += _weights(config, held)
    if specs[-1].decoder == "copied" and specs[-1].role is StageRole.SERVER:
        transfers += _embedding(config, shape, specs)
    often = get_args(When).index
    return tuple(sorted(transfers, key=lambda t: (t.direction != "leaves", often(t.when))))


def stays(config: RunConfig, *, specs: Sequence[StageSpec], parts: Sequence[Parts]) -> list[str]:
    """Name what never leaves a client, the text first."""
    at_home = not any(
        spec.sends_labels and specs[spec.next_stage].role is not spec.role
        for spec in specs
        if spec.next_stage is not None
    )
    kept = {
        part
        for spec, held in zip(specs, parts, strict=True)
        for part, numel in held.items()
        if spec.role is StageRole.CLIENT and numel and not getattr(config.federation.average, part)
    }
    tokens = ["token ids", "labels"] if at_home else ["unmasked token ids"]
    return ["text", *tokens, *sorted(kept), "weight gradients", "optimizer moments"]


def _over_edges(
    config: RunConfig,
    specs: Sequence[StageSpec],
    edges: Sequence[tuple[EdgeMessages, EdgeMessages]],
) -> list[Transfer]:
    """List the messages between a stage of the client and one of the server."""
    transfers = []
    for index, messages in enumerate(edges):
        edge = messages[0].edge
        source, target = specs[edge.source], specs[edge.target]
        if source.role is target.role:
            continue
        leaves = source.role is StageRole.CLIENT
        server = target if leaves else source
        outward: Direction = "leaves" if leaves else "enters"
        peer = f"server stage {server.stage_id}"
        transfers += _over_edge(config, messages, index=index, outward=outward, peer=peer)
    return transfers


def _over_edge(
    config: RunConfig,
    messages: tuple[EdgeMessages, EdgeMessages],
    *,
    index: int,
    outward: Direction,
    peer: str,
) -> list[Transfer]:
    """List the messages of an edge; ``outward`` is the forward direction, seen from the client.

    ``messages`` are those of the first round and of the last.
    """
    back: Direction = "enters" if outward == "leaves" else "leaves"
    first, last = messages
    ways = (
        (outward, list(zip(first.forward, last.forward, strict=True)), f"forward/{index}"),
        (back, list(zip(first.backward, last.backward, strict=True)), f"backward/{index}"),
    )
    opening = [
        Transfer(
            direction=direction,
            what="a zero that opens the edge",
            peer=peer,
            form="(1,) uint8",
            nbytes=1,
            when="start",
        )
        for direction, tensors, _ in ways
        if tensors
    ]
    training = opening + [
        Transfer(
            direction=direction,
            what=tensor.name,
            peer=peer,
            form=_form(tensor),
            nbytes=tensor.nbytes,
            when="micro-batch",
            entry=entry,
            first_round=first_round,
        )
        for direction, tensors, entry in ways
        for before, after in tensors
        for tensor, first_round in ((before, 0), (after, config.switch_round))
        if tensor is before or after != before
    ]
    if not config.data.valid:
        return training
    return training + [
        Transfer(
            direction=outward,
            what=f"{tensor.name} of held-out text",
            peer=peer,
            form=_form(tensor),
            nbytes=tensor.nbytes,
            when="validation batch",
        )
        for tensor in last.forward
    ]


def _form(tensor: WireTensor) -> str:
    return f"{tensor.shape} {FORMATS.get(tensor.wire, tensor.dtype)}"


def _weights(config: RunConfig, parts: Parts) -> list[Transfer]:
    """List the averaged weights of a client stage, which are sent, and received as their mean."""
    federation = config.federation
    averaged = {p: n for p, n in parts.items() if n and getattr(federation.average, p)}
    if not averaged:
        return []
    numel = sum(averaged.values())
    wire = federation.wire if federation.num_replicas > 1 else "fp32"  # all in one process
    what = "weights" if wire != "sparse" else "largest changes"
    peer = "other replicas' clients"
    if federation.server == "sequential":
        peer = "the next client, in the same process"
    elif federation.num_replicas == 1:
        peer = "the round's other clients, in the same process"
    return [
        Transfer(
            direction=direction,
            what=f"{what}: {', '.join(averaged)}",
            peer=peer,
            form=f"{_count(numel, config, wire)} parameters, {FORMATS[wire]}",
            nbytes=averaging_bytes(numel, federation=federation),
            when="round",
            entry="fedavg",
        )
        for direction in ("leaves", "enters")
    ]


def _count(numel: int, config: RunConfig, wire: str) -> str:
    """Write how many of some averaged weights one message holds."""
    federation = config.federation
    if wire != "sparse":
        return f"{numel:,}"
    rows = padded_numel(numel, federation=federation) // SPARSE_BLOCK
    return f"{rows * SparseRow(SPARSE_BLOCK, federation.density).num_sent:,} of {numel:,}"


def _embedding(config: RunConfig, shape: ModelShape, specs: Sequence[StageSpec]) -> list[Transfer]:
    """List the averaged word embedding, as a copy of which the server's decoder starts a turn."""
    first = next(spec for spec in specs if spec.role is StageRole.SERVER)
    moments: list[tuple[When, str]] = [("round", "embedding")]
    moments += [("validation", "")] if config.data.valid else []
    return [
        Transfer(
            direction="leaves",
            what="averaged word embedding",
            peer=f"server stage {first.stage_id}",
            form=f"({shape.vocab_size}, {shape.hidden_size}) float32",
            nbytes=4 * shape.decoder_parameters(),
            when=when,
            entry=entry,
        )
        for when, entry in moments
    ]


def _records(config: RunConfig) -> list[Transfer]:
    """List the records for metrics.jsonl, which process 0, of the first replica, writes."""
    records = [
        _record("configuration, paths and checkpoint of the run", "start", direction="enters"),
        _record("loss, gradient norm, learning rate, time and client id", "local step"),
        _record("bytes and seconds of the round, times of a few instructions", "round"),
        _record("client id, stage and step of an update that is left out, if any", "round"),
        _record("names and SHA-256 of the files that it has saved", "round"),
    ]
    if config.data.valid:
        records.append(_record("summed loss and masked tokens, by client id", "validation"))
    return records


def _verdict(specs: Sequence[StageSpec]) -> list[Transfer]:
    """List the number by which all stages of a replica agree whether an update is left out."""
    if all(spec.role is StageRole.CLIENT for spec in specs):
        return []
    return [
        Transfer(
            direction=direction,
            what="the turn's first number that is not finite, if any",
            peer="the replica's server stages",
            form="(1,) int64",
            nbytes=8,
            when="round",
        )
        for direction in ("leaves", "enters")
    ]


def _record(what: str, when: When, *, direction: Direction = "leaves") -> Transfer:
    return Transfer(
        direction=direction, what=what, peer=_MASTER, form="pickled record", nbytes=None, when=when
    )


# --------------------------------------------------------------------------------------- the text


def per_step(transfer: Transfer, config: RunConfig) -> int:
    """Return the bytes per local step of a micro-batch's transfer, over all data-parallel ranks.

    Of a transfer that begins in a later round it is those of a step in that round.
    """
    if transfer.when != "micro-batch":
        return 0
    messages = config.pipeline.num_micro_batches * config.federation.data_parallel_degree
    return messages * (transfer.nbytes or 0)


def per_round(transfer: Transfer, config: RunConfig) -> int:
    """Return the bytes per round of a transfer of weights, over all data-parallel ranks."""
    if transfer.entry not in ("fedavg", "embedding"):
        return 0
    return config.federation.data_parallel_degree * (transfer.nbytes or 0)


def client_rows(
    transfers: Sequence[Transfer], kept: Sequence[str], *, config: RunConfig
) -> list[tuple[str, str, str]]:
    """Write the transfers of training as rows of the plan: direction, tensor, bytes and peer."""
    rows = []
    for transfer in transfers:
        toward = "to" if transfer.direction == "leaves" else "from"
        if transfer.when == "micro-batch":
            what = f"{transfer.what} {transfer.form}"
            much = f"{bytes_text(per_step(transfer, config))} per local step"
            if transfer.first_round:
                much += f" from round {transfer.first_round + 1}"
        elif transfer.entry == "fedavg" and transfer.direction == "leaves":
            what = transfer.what
            much = f"{bytes_text(per_round(transfer, config))} per round"
            toward = "to and from" if transfer.nbytes else toward
        elif transfer.entry == "embedding":
            what = f"{transfer.what} {transfer.form}"
            much = f"{bytes_text(per_round(transfer, config))} per round"
        else:
            continue
        rows.append((transfer.direction, what, f"{much}, {toward} {transfer.peer}"))
    rows.append(("leaves", "losses, norms, times and byte counts", f"to {_MASTER}"))
    return [*rows, ("stays", "with the client", ", ".join(kept))]


def markdown(transfers: Sequence[Transfer], kept: Sequence[str], *, config: RunConfig) -> str:
    """Write all transfers as a Markdown table, and then what never leaves the client."""
    lines = ["| | what | on the wire | bytes | every | to or from |", "|---|---|---|---|---|---|"]
    for t in transfers:
        size = "" if t.nbytes is None else f"{t.nbytes:,}"
        since = f" from round {t.first_round + 1}" if t.first_round else ""
        lines.append(
            f"| {t.direction} | {t.what} | {t.form} | {size} | {t.when}{since} | {t.peer} |"
        )
    totals = {
        direction: [
            bytes_text(
                sum(
                    size(t, config)
                    for t in transfers
                    if t.direction == direction and not t.first_round
                )
            )
            for size in (per_step, per_round)
        ]
        for direction in ("leaves", "enters")
    }
    (out_step, out_round), (in_step, in_round) = totals["leaves"], totals["enters"]
    step = f"Per local step {out_step} leave and {in_step} enter"
    round_ = f"per round {out_round} leave and {in_round} enter"
    return "\n".join([*lines, "", f"{step}; {round_}. Stays: {', '.join(kept)}."])
