"""Draw the clients of a round, the stragglers and the lost clients from the seed. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpipe.config.finetune import FinetuneConfig
from fedpipe.federation.cohort import RoundPlan, Turn, draw_cohort

_SCENARIO, _ORDER = 0x5CE2A, 0x0DDE2


def draw_round(
    config: FinetuneConfig, round_id: int, num_clients: int
) -> tuple[list[int], set[int], list[int]]:
    """Draw the clients that return an update in a round, the stragglers, and the lost clients.

    A client is slow or lost as the seed, the round and its id decide, so that clients do not depend
    on each other.

    Args:
        config: The run, for seed, cohort and scenario.
        round_id: Index of the round, from 0.
        num_clients: Number of clients.

    Returns:
        Clients that return an update, in cohort order; the stragglers among them; lost clients.
    """
    scenario = config.scenario
    cohort = draw_cohort(
        config.seed,
        round_id=round_id,
        num_clients=num_clients,
        clients_per_round=config.federation.clients_per_round,
    )
    back, slow, lost = [], set(), []
    for client_id in cohort:
        dropout, straggling = _generator(_SCENARIO, config.seed, round_id, client_id).random(2)
        if dropout < scenario.dropout_share:
            lost.append(client_id)
            continue
        back.append(client_id)
        if straggling < scenario.straggler_share:
            slow.add(client_id)
    return back, slow, lost


def plan_tuning_round(
    config: FinetuneConfig, *, round_id: int, lengths: Sequence[NDArray[np.int64]]
) -> RoundPlan:
    """Plan a round: turns, local steps and weights.

    The weight of a client that returns an update is its number of trained examples or trained
    tokens, or 1.

    Args:
        config: The run, for federation, scenario, batch and seed.
        round_id: Index of the round, from 0.
        lengths: By client, the number of tokens of each of its examples.

    Returns:
        The plan; it has no turns if too few clients return for the aggregation rule.
    """
    federation = config.federation
    back, slow, lost = draw_round(config, round_id, len(lengths))
    aggregation = federation.aggregation
    if len(back) < aggregation.fewest_clients():
        return RoundPlan(turns=(), dropped=tuple(lost))
    planned = []
    for client_id in back:
        steps = num_tuning_steps(config, len(lengths[client_id]), slow=client_id in slow)
        rows = list(
            batches(config, client_id, round_id=round_id, size=len(lengths[client_id]), steps=steps)
        )
        examples = sum(map(len, rows))
        tokens = int(sum(lengths[client_id][batch].sum() for batch in rows))
        planned.append((client_id, steps, examples, tokens))
    column = {"uniform": None, "examples": 2, "tokens": 3}[aggregation.weighting]
    shares = [1 if column is None else entry[column] for entry in planned]
    return RoundPlan(
        turns=tuple(
            Turn(
                client_id=client_id,
                replica_id=k % federation.num_replicas,
                num_steps=steps,
                num_examples=examples,
                num_tokens=tokens,
                weight=shares[k] / sum(shares),
            )
            for k, (client_id, steps, examples, tokens) in enumerate(planned)
        ),
        stragglers=tuple(client for client in back if client in slow),
        dropped=tuple(lost),
    )


def num_tuning_steps(config: FinetuneConfig, num_examples: int, *, slow: bool = False) -> int:
    """Return the number of local steps of a client in a round, at least 1.

    Args:
        config: The run, for ``federation.num_local_steps``, or ``num_local_epochs`` if it is set.
        num_examples: Number of examples of the client.
        slow: Whether the client is a straggler.
    """
    federation = config.federation
    steps = federation.num_local_steps
    if federation.num_local_epochs:
        steps = round(federation.num_local_epochs * math.ceil(num_examples / config.batch_size))
    return max(1, int(steps * config.scenario.straggler_work) if slow else steps)


def batches(
    config: FinetuneConfig, client_id: int, *, round_id: int, size: int, steps: int
) -> Iterator[NDArray[np.int64]]:
    """Draw the batches of a client in a round.

    Every pass over the examples has a new order, and its last batch may be smaller.

    Args:
        config: The run, for batch size and seed.
        client_id: Id of the client.
        round_id: Index of the round, from 0.
        size: Number of examples of the client.
        steps: Number of batches.

    Yields:
        Indices of the client's examples.
    """
    per_pass = math.ceil(size / config.batch_size)
    order = np.empty(0, dtype=np.int64)
    for step in range(steps):
        index = step % per_pass
        if index == 0:
            order = _generator(_ORDER, config.seed, round_id, client_id, step).permutation(size)
        yield order[index * config.batch_size : (index + 1) * config.batch_size]


def _generator(*parts: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([part % 2**64 for part in parts]))
