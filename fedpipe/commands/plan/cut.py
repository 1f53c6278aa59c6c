"""``pipeline.cut: auto``: measure layers and heads on this machine, and balance the stages."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from fedpipe.cluster.local import fork_server, num_threads
from fedpipe.config.schema import RunConfig
from fedpipe.distributed.env import threads_per_process
from fedpipe.distributed.topology import Grid
from fedpipe.errors import LaunchError

if TYPE_CHECKING:
    from fedpipe.commands.plan.costs.layers import LayerCosts

Measure = Callable[[RunConfig], "LayerCosts"]


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
    from fedpipe.commands.plan.costs.layers import best_cut, cut_lines

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

    from fedpipe.commands.plan.costs.measure import measure_layer_costs

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
    context = fork_server(["fedpipe.commands.plan.costs.measure"])
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
