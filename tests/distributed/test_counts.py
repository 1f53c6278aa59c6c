"""What a local step costs, counted instead of timed: FLOPs, operations, messages, bytes."""

from __future__ import annotations

import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedpipe.commands.plan.flops import stage_flops
from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.env import ProcessEnv
from fedpipe.models.split import stage_specs
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import LENGTH, VOCAB, tiny_config, tiny_data

STEPS = 5


def _count(env: ProcessEnv, config: RunConfig, data: PreparedData) -> Any:
    """Train; return FLOPs, operations by name, messages and bytes of every local step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.models.split import pipeline_edges

    operations: Counter[str] = Counter()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            operations[str(func)] += 1
            return func(*args, **(kwargs or {}))

    comm = Comm(Grid.from_config(config), env, edges=pipeline_edges(config.pipeline))
    replica = PretrainingReplica(config, data, comm=comm)
    (engine,) = replica.stages
    steps: list[tuple[int, dict[str, int], int, int]] = []

    def on_step(stage: int, result: Any) -> None:
        link = engine.links.activations_out
        sent = (link.sent_messages, link.sent_bytes) if link else (0, 0)
        steps.append((flops.get_total_flops(), dict(operations), *sent))

    # The fused attention kernel is one operation whose FLOPs are not counted.
    with FlopCounterMode(display=False) as flops, Operations(), sdpa_kernel(SDPBackend.MATH):
        replica.engine.train(
            range(STEPS), source=replica.training_source(0, start=0), lr=lambda s: 1e-3,
            on_step=on_step,
        )  # fmt: skip
    comm.close()
    return steps


@pytest.mark.parametrize(
    ("pipeline", "padded_length"),
    [
        ({"cut": [2]}, 0),
        ({"cut": [1], "local_head": "mlm+layer"}, 0),
        ({"cut": [1], "local_head": "mlm+layer"}, 18),
    ],
    ids=str,
)
def test_a_local_step_costs_what_the_plan_says_and_every_step_the_same(
    pipeline: dict[str, Any], padded_length: int, tmp_path: Path
) -> None:
    config = tiny_config(
        pipeline=pipeline,
        data={"padded_length": padded_length},
        federation={"num_replicas": 1, "clients_per_round": 1},
    )
    counted = run_distributed(_count, 2, config, tiny_data(tmp_path))
    shape = resolve(config.model, vocab_size=VOCAB, sequence_length=LENGTH)
    length, scored = (padded_length, padded_length) if padded_length else (LENGTH, 2)
    micro_batches = config.pipeline.num_micro_batches
    sequences = micro_batches * config.pipeline.micro_batch_size
    specs = stage_specs(config.pipeline, num_hidden_layers=shape.num_hidden_layers)
    for spec, steps in zip(specs, counted, strict=True):
        cost = stage_flops(spec, config, shape)
        expected = micro_batches * (cost.forward_s + cost.backward_s + cost.head_s)
        if not spec.is_first:
            # No gradient goes back over the cut, so none is computed for the inputs of the first
            # layer's queries, keys and values.
            expected -= sequences * length * 3 * 2 * shape.hidden_size**2
        assert [flops for flops, *_ in steps] == [n * expected for n in range(1, STEPS + 1)]
        assert not any("_local_scalar_dense" in name for name in steps[-1][1]), "nobody waits"
        # The last step posts no receives for another one.
        second, third, fourth = (Counter(operations) for _, operations, *_ in steps[1:4])
        assert third - second == fourth - third
        sent = 0 if spec.is_last else micro_batches
        assert [messages for *_, messages, _ in steps] == [n * sent for n in range(1, STEPS + 1)]
    (*_, nbytes), (*_, twice) = counted[0][:2]
    hidden = 4 * config.pipeline.micro_batch_size * length * shape.hidden_size
    targets = 4 * 2 * config.pipeline.micro_batch_size * scored
    assert (nbytes, twice) == (micro_batches * (hidden + targets), 2 * nbytes)


def _page_faults(env: ProcessEnv, config: RunConfig, data: PreparedData) -> list[int]:
    """Pages that the kernel had given this process by the end of each local step."""
    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.models.split import pipeline_edges

    comm = Comm(Grid.from_config(config), env, edges=pipeline_edges(config.pipeline))
    replica = PretrainingReplica(config, data, comm=comm)
    found: list[int] = []

    def on_step(stage: int, result: Any) -> None:
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    replica.engine.train(
        range(12), source=replica.training_source(0, start=0), lr=lambda s: 1e-3, on_step=on_step
    )
    comm.close()
    return found


def test_a_local_step_reuses_the_memory_of_the_last_one(tmp_path: Path) -> None:
    config = tiny_config(
        model={"hidden_size": 256, "intermediate_size": 2048},
        pipeline={"micro_batch_size": 40},
        federation={"num_replicas": 1, "clients_per_round": 1},
    )
    for faults in run_distributed(_page_faults, 2, config, tiny_data(tmp_path)):
        assert faults[-1] - faults[3] < 8 * 1000, "glibc's own way takes 2,000 to 8,000 a step"
