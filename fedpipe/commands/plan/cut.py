"""``pipeline.cut: auto``: measure layers and heads, and choose the cut that balances the stages.

No torch, except in the process that measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection

from fedpipe.cluster.local import fork_server, num_threads
from fedpipe.commands.plan.ideal import predict
from fedpipe.config.schema import RunConfig
from fedpipe.distributed.env import threads_per_process
from fedpipe.distributed.topology import Grid
from fedpipe.errors import LaunchError
from fedpipe.models.split import placement, stage_specs
from fedpipe.pipeline.timeline import StageCost


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCosts:
    """Measured stages, divided into time that moves with a layer and time that stays."""

    layers_s: tuple[float, ...]
    """Forward and backward pass of every encoder layer for one micro-batch."""
    rest_s: tuple[float, ...]
    """The same for everything else in each stage, such as its head."""
    stages: tuple[StageCost, ...]
    """Measured costs of the stages."""

    def with_cut(self, cut: Sequence[int]) -> list[StageCost]:
        """Return the costs of stages with another cut.

        The ratio of forward to backward pass and the optimizer step of a stage are as measured.
        """
        bounds = [0, *cut, len(self.layers_s)]
        bounds += [len(self.layers_s)] * (len(self.stages) + 1 - len(bounds))  # heads at the client
        costs = []
        for index, stage in enumerate(self.stages):
            total = self.rest_s[index] + sum(self.layers_s[bounds[index] : bounds[index + 1]])
            measured = stage.forward_s + stage.backward_s
            forward = stage.forward_s / measured if measured else 0.0
            costs.append(
                replace(stage, forward_s=total * forward, backward_s=total * (1.0 - forward))
            )
        return costs


def best_cut(costs: LayerCosts, config: RunConfig) -> tuple[int, ...]:
    """Find the cut with the least time of the busiest process, and with the fewest moved layers.

    Args:
        costs: Costs of layers and stages for the objective of ``config``.
        config: The run; its number of stages is kept, and a client without layers may stay so.

    Returns:
        A value for ``pipeline.cut``.
    """
    num_layers, present = len(costs.layers_s), config.pipeline.cut
    num_micro_batches = config.pipeline.num_micro_batches
    held = placement(stage_specs(config.pipeline, num_hidden_layers=1))  # by process
    fixed = [
        sum(num_micro_batches * costs.rest_s[i] + costs.stages[i].optimizer_s for i in own)
        for own in ([spec.stage_id for spec in process] for process in held)
    ]

    def load(stage: int, first: int, end: int) -> float:
        return fixed[stage] + num_micro_batches * sum(costs.layers_s[first:end])

    @cache
    def best(stage: int, first: int) -> tuple[float, int, tuple[int, ...]]:
        if stage == len(present):
            return load(stage, first, num_layers), 0, ()
        least = 0 if stage == 0 and present[0] == 0 else first + 1
        found = []
        for end in range(least, num_layers - (len(present) - stage) + 1):
            busiest, moved, ends = best(stage + 1, end)
            busiest = max(busiest, load(stage, first, end))
            found.append((busiest, moved + abs(end - present[stage]), (end, *ends)))
        return min(found)

    return best(0, 0)[2]


def cut_lines(costs: LayerCosts, config: RunConfig, *, cut: tuple[int, ...]) -> list[str]:
    """Write the measured costs, and the predicted speed of a cut beside that of the configuration.

    Args:
        costs: Costs of layers and stages for the objective of ``config``.
        config: The run, with whose cut ``cut`` is compared.
        cut: A cut, for example from ``best_cut``.

    Returns:
        Lines for people.
    """
    whole, last = costs.layers_s[0], costs.layers_s[-1]
    heads = ", ".join(f"{1000 * rest:,.1f}" for rest in costs.rest_s)
    lines = [
        f"  measured layer {1000 * whole:,.1f} ms per micro-batch, forward and backward; the last "
        f"one {1000 * last:,.1f}; beside layers, by stage: {heads}"
    ]
    tokens = config.pipeline.num_micro_batches * config.pipeline.micro_batch_size
    tokens *= config.data.sequence_length
    paces = []
    for each in dict.fromkeys((config.pipeline.cut, cut)):
        stages = costs.with_cut(each)
        step_s = predict(config.pipeline.schedule, stages, config).step_s
        paces.append(tokens / step_s)
        loads = ", ".join(f"{1000 * (s.forward_s + s.backward_s):,.1f}" for s in stages)
        lines.append(
            f"  cut      {str(list(each)):<10} {loads} ms per micro-batch by stage; predicted "
            f"{paces[-1]:,.0f} tokens/s"
        )
    gain = "the best there is" if len(paces) == 1 else f"{paces[1] / paces[0]:.2f} x"
    lines[-1] += f", {gain}"
    return lines


Measure = Callable[[RunConfig], LayerCosts]


def choose_cut(
    config: RunConfig, *, measure: Measure, notify: Callable[[str], None]
) -> tuple[int, ...]:
    """Choose the cut into as many stages as the configuration has.

    Args:
        config: The run; the choice is compared with its cut.
        measure: ``measure_here`` or ``measure_in_a_process``.
        notify: Called with lines about the choice and its reasons.

    Returns:
        A value for ``pipeline.cut``.
    """
    notify("measuring layers and heads")
    costs = measure(config)
    cut = best_cut(costs, config)
    for line in cut_lines(costs, config, cut=cut):
        notify(line)
    return cut


def measure_here(config: RunConfig, *, threads: int | None = None) -> LayerCosts:
    """Measure in this process, with as many threads as a process of the run has.

    Args:
        config: The run.
        threads: Number of threads; None takes that of ``fedpipe pretrain`` on this machine.
    """
    import torch

    from fedpipe.commands.plan.measure import measure_layer_costs

    before = torch.get_num_threads()
    torch.set_num_threads(threads or _threads(config))
    try:
        return measure_layer_costs(config)
    finally:
        torch.set_num_threads(before)


def measure_in_a_process(config: RunConfig) -> LayerCosts:
    """Measure in a new process, so that this one need not import torch.

    Raises:
        LaunchError: The new process has failed.
    """
    context = fork_server(["fedpipe.commands.plan.measure"])
    reader, writer = context.Pipe(duplex=False)
    arguments = (config, writer, _threads(config))
    process = context.Process(target=_measure, args=arguments, daemon=True)
    process.start()
    writer.close()
    try:
        costs: LayerCosts = reader.recv()
        return costs
    except EOFError:
        raise LaunchError(
            "pipeline.cut: the stages could not be measured, see above. Write the cut as a list."
        ) from None
    finally:
        process.join()


def _threads(config: RunConfig) -> int:
    return num_threads(threads_per_process(Grid.from_config(config).world_size))


def _measure(config: RunConfig, writer: Connection, threads: int) -> None:
    writer.send(measure_here(config, threads=threads))
