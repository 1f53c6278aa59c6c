"""``pipeline.cut: auto``: measure the stages where the run will be, then cut where they balance."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from fedpipe.config.schema import RunConfig
from fedpipe.distributed.env import threads_per_process
from fedpipe.distributed.topology import Grid
from fedpipe.errors import LaunchError
from fedpipe.launcher.fork_server import fork_server

if TYPE_CHECKING:
    from fedpipe.workflows.costs.layers import LayerCosts

Measure = Callable[[RunConfig], "LayerCosts"]


def choose_cut(
    config: RunConfig, *, measure: Measure, notify: Callable[[str], None]
) -> tuple[int, ...]:
    """Choose the cut into as many stages as the configuration has.

    Args:
        config: Its own cut is what the choice is compared with.
        measure: ``measure_here`` or ``measure_in_a_process``.
        notify: Told the choice and why.

    Returns:
        As ``pipeline.cut``.
    """
    from fedpipe.workflows.costs.layers import best_cut, cut_lines

    notify("measuring layers and heads")
    costs = measure(config)
    cut = best_cut(costs, config)
    for line in cut_lines(costs, config, cut=cut):
        notify(line)
    return cut


def measure_here(config: RunConfig, *, local_world_size: int | None = None) -> LayerCosts:
    """Measure in this process, with the threads that a process of the run has.

    Args:
        config: The run.
        local_world_size: Processes of the run on this node; None means all of them.
    """
    import torch

    from fedpipe.workflows.costs.measure import measure_layer_costs

    before = torch.get_num_threads()
    num_processes = local_world_size or Grid.from_config(config).world_size
    torch.set_num_threads(threads_per_process(num_processes))
    try:
        return measure_layer_costs(config)
    finally:
        torch.set_num_threads(before)


def measure_in_a_process(config: RunConfig) -> LayerCosts:
    """Measure in a process of its own; this one imports no torch.

    Raises:
        LaunchError: It could not measure.
    """
    context = fork_server()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(config, writer), daemon=True)
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


def _measure(config: RunConfig, writer: Connection) -> None:
    writer.send(measure_here(config))
