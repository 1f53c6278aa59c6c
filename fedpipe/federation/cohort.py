"""Who trains in a round, on which replica, for how many steps. Pure functions of the seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedpipe.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One client's training in one round, on one replica."""

    client_id: int
    replica_id: int
    num_steps: int
    num_examples: int
    """Trained blocks or examples, those of a second pass counted again."""
    num_tokens: int
    """Trained tokens."""
    weight: float
    """Share in the mean; those of a round's turns sum to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPlan:
    """What happens in a round."""

    turns: tuple[Turn, ...]
    """Turns of the clients that come back, in cohort order, turn k on replica
    ``k mod num_replicas``. A round may have none."""
    stragglers: tuple[int, ...] = ()
    """Clients among them that end early."""
    dropped: tuple[int, ...] = ()
    """Clients that are drawn and lost: nothing of theirs arrives, and nobody waits for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientHistory:
    """What came before a round, by client id: a function of the seed, so nothing is stored."""

    examples_seen: tuple[int, ...]
    """Blocks or examples that the client has trained on: its position in its stream of blocks."""
    last_round: tuple[int | None, ...]
    """Round in which the client trained last; None at its first."""

    def after(self, turns: Sequence[Turn], *, round_id: int) -> Self:
        """Add a round to what came before it."""
        seen, last = list(self.examples_seen), list(self.last_round)
        for turn in turns:
            seen[turn.client_id] += turn.num_examples
            last[turn.client_id] = round_id
        return type(self)(examples_seen=tuple(seen), last_round=tuple(last))

    def kept_in(self, last_rounds: Mapping[int, int]) -> Self:
        """Take the rounds of files that clients keep for those in which they trained last.

        An outer round may have ended without this site, in the middle of a round of its own.
        """
        last = [last_rounds.get(client, known) for client, known in enumerate(self.last_round)]
        return type(self)(examples_seen=self.examples_seen, last_round=tuple(last))


def client_history(
    plan: Callable[[int], Sequence[Turn]],
    *,
    before: int,
    num_clients: int,
    skipped: Sequence[tuple[int, int]] = (),
) -> ClientHistory:
    """Replay all rounds before ``before``; a run does so once, when it starts.

    Args:
        plan: Returns the turns of a round.
        before: The first round that is not replayed.
        num_clients: Data owners.
        skipped: Rounds, from and up to, that the run has not trained.
    """
    history = ClientHistory(examples_seen=(0,) * num_clients, last_round=(None,) * num_clients)
    left_out = {round_id for first, end in skipped for round_id in range(first, end)}
    for round_id in (r for r in range(before) if r not in left_out):
        history = history.after(plan(round_id), round_id=round_id)
    return history


def draw_cohort(
    seed: int, *, round_id: int, num_clients: int, clients_per_round: int
) -> tuple[int, ...]:
    """Draw the clients of a round, uniformly and without replacement.

    Args:
        seed: Of the run.
        round_id: From 0.
        num_clients: Clients to choose from.
        clients_per_round: Clients to choose.

    Returns:
        Client ids in the order in which replicas take them; the same on every rank.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed % 2**64, 0xC0407, round_id]))
    return tuple(int(c) for c in rng.permutation(num_clients)[:clients_per_round])


def num_local_steps(config: RunConfig, num_blocks: int) -> int:
    """Optimizer steps of a client in a round.

    Args:
        config: ``federation.num_local_steps``, or ``num_local_epochs`` where that is set.
        num_blocks: Blocks that the client owns.

    Returns:
        At least 1.
    """
    federation = config.federation
    if federation.num_local_epochs == 0:
        return federation.num_local_steps
    steps = federation.num_local_epochs * num_blocks / config.blocks_per_step
    return max(1, math.floor(steps + 1e-9))  # 0.57 * 100 is 56.99999999999999


def steps_per_round(config: RunConfig, blocks_per_client: Sequence[int]) -> int:
    """By how much the learning-rate schedule advances in a round: the longest turn there can be."""
    return max(num_local_steps(config, blocks) for blocks in blocks_per_client)


def plan_round(
    config: RunConfig, *, round_id: int, blocks_per_client: Sequence[int]
) -> tuple[Turn, ...]:
    """Draw a round's cohort and spread it over the replicas.

    Client k of the cohort goes to replica ``k mod num_replicas``; a replica hosts its clients in
    turn. With fewer clients than replicas the rest idle.

    Args:
        config: Federation, seed and batch.
        round_id: From 0.
        blocks_per_client: Blocks that each client owns.

    Returns:
        The turns, in cohort order.
    """
    federation = config.federation
    cohort = draw_cohort(
        config.seed,
        round_id=round_id,
        num_clients=federation.num_clients,
        clients_per_round=federation.clients_per_round,
    )
    steps = [num_local_steps(config, blocks_per_client[c]) for c in cohort]
    tokens = [s * config.blocks_per_step * config.data.sequence_length for s in steps]
    shares = [1] * len(cohort) if federation.aggregation.weighting == "uniform" else tokens
    total = sum(shares)
    return tuple(
        Turn(
            client_id=client_id,
            replica_id=k % federation.num_replicas,
            num_steps=steps[k],
            num_examples=steps[k] * config.blocks_per_step,
            num_tokens=tokens[k],
            weight=shares[k] / total,
        )
        for k, client_id in enumerate(cohort)
    )


def idle_pct(config: RunConfig, blocks_per_client: Sequence[int], *, num_rounds: int = 20) -> float:
    """Share of the replicas' time in which they wait for the busiest one of their round.

    Args:
        config: Federation, seed and batch; equal replicas.
        blocks_per_client: Blocks that each client owns.
        num_rounds: The first rounds of the run, so many at most, are looked at.

    Returns:
        Percent of the local steps that could have been made.
    """
    made = possible = 0
    for round_id in range(min(num_rounds, config.federation.num_rounds)):
        steps = [0] * config.federation.num_replicas
        for turn in plan_round(config, round_id=round_id, blocks_per_client=blocks_per_client):
            steps[turn.replica_id] += turn.num_steps
        made += sum(steps)
        possible += max(steps) * len(steps)
    return 100 * (1 - made / possible)
