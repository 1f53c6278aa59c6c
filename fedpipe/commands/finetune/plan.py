"""The plan of a fine-tuning as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpipe import __version__
from fedpipe.commands.finetune.micro_batches import task_messages
from fedpipe.commands.finetune.prepared import ClientFacts, TuningData
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.distributed.topology import Grid
from fedpipe.models.peft import Counts
from fedpipe.models.split import StageRole, StageSpec, owner, part_of, stage_specs
from fedpipe.models.tuned_stage import local_head_numel
from fedpipe.printable import printable
from fedpipe.report.format import bytes_text, count

_BYTES = 4
"""Bytes of a float32 that is sent."""


def render_plan(
    config: FinetuneConfig,
    data: TuningData,
    counts: Counts,
    *,
    trained: Mapping[str, int],
    model_config: Any,
) -> str:
    """Write the plan of a fine-tuning as lines of text.

    Args:
        config: The run.
        data: Examples of the run.
        counts: Counts of parameters, without those of local heads.
        trained: Number of elements of every trained tensor, by its full name.
        model_config: Configuration of the model.
    """
    federation, scenario, task = config.federation, config.scenario, data.task
    stages: list[tuple[StageSpec, dict[str, int]]] = []
    kept = 0 if federation.average.final_head else counts.head
    sent, shape = counts.trainable - kept, "one model each"
    if config.is_cut:
        stages = _stages(config, data, trained, model_config)
        sent, shape = _sent_by_client(config, stages), f"{count(len(stages), 'stage')} per replica"
    grid = Grid.of(config.stages, federation)
    share = 100 * counts.trainable / (counts.model + counts.head)
    rows = [
        f"fedpipe {__version__}  {config.name}  {count(grid.world_size, 'process', 'es')}, {shape}",
        f"  model    {config.model.path}  {counts.model / 1e6:,.2f} M parameters",
        f"  method   {config.method.name}  {counts.trainable:,} trained ({share:.3f} %):"
        f" {counts.adapter:,} of the {_what(config)}, {counts.head:,} of the head",
        *_lower_lines(config, data, model_config),
        *(_stage_line(spec, held) for spec, held in stages),
        f"  task     {config.task.name}: {task.kind}, "
        + (f"{len(task.labels)} labels, " if task.labels else "")
        + f"{data.train.num_examples:,} training and {data.test.num_examples:,} held-out examples",
        *(f"           left out of {printable(rows)}" for rows in data.left_out),
        *_client_lines(config, data.facts),
        f"  round    {federation.clients_per_round} of {federation.num_clients} clients, "
        + _local_work(config)
        + f", batches of {config.batch_size}; {count(federation.num_rounds, 'round')}",
        f"  traffic  {bytes_text(sent * _BYTES)} up and down  per client and round, float32",
    ]
    if config.is_cut:
        specs = tuple(spec for spec, _ in stages)
        rows += _edge_lines(config, specs, data, hidden_size=model_config.hidden_size)
    if config.method.lora_average == "product":
        rows[-1] += "; down also the residual of the products"
    if scenario.straggler_share or scenario.dropout_share:
        rows.append(
            f"  scenario {100 * scenario.dropout_share:g} % of a cohort are lost,"
            f" {100 * scenario.straggler_share:g} % make {100 * scenario.straggler_work:g} % of"
            " their steps"
        )
    return "\n".join(rows)


def _lower_lines(config: FinetuneConfig, data: TuningData, model_config: Any) -> list[str]:
    first = config.method.first_layer
    if not first:
        return []
    num_tokens = int(data.train.starts[-1] + data.test.starts[-1])
    return [
        f"  lower    embeddings and {count(first, 'layer')} run once per example; on disk up to"
        f" {bytes_text(num_tokens * model_config.hidden_size * _BYTES)} per process"
    ]


def _what(config: FinetuneConfig) -> str:
    return "model" if config.method.name == "full" else "adapter"


def _local_work(config: FinetuneConfig) -> str:
    federation = config.federation
    if federation.num_local_epochs:
        plural = "" if federation.num_local_epochs == 1 else "s"
        return f"{federation.num_local_epochs:g} local epoch{plural}"
    return count(federation.num_local_steps, "local step")


def _client_lines(config: FinetuneConfig, facts: Sequence[ClientFacts]) -> list[str]:
    sizes = sorted(fact.num_examples for fact in facts)
    entropies = sorted(fact.entropy_bits for fact in facts)
    middle = len(facts) // 2
    lines = [
        f"  clients  {len(facts)}, {config.task.split}: {sizes[0]} / {sizes[middle]} / {sizes[-1]}"
        f" examples, label entropy {entropies[0]:.2f} / {entropies[middle]:.2f} /"
        f" {entropies[-1]:.2f} bits  (least / median / most)"
    ]
    lacking = [fact for fact in facts if fact.missing]
    if lacking and len(lacking[0].missing) > 0:
        lines.append(
            f"           {count(len(lacking), 'client')} without examples of some labels, such as"
            f" client {lacking[0].client_id}: {', '.join(lacking[0].missing[:4])}"
        )
    return lines


def _stages(
    config: FinetuneConfig, data: TuningData, trained: Mapping[str, int], model_config: Any
) -> list[tuple[StageSpec, dict[str, int]]]:
    """Write a row per stage, with its trained parameters by key of ``federation.average``."""
    specs = stage_specs(config.stages, num_hidden_layers=model_config.num_hidden_layers)
    held: list[dict[str, int]] = [{} for _ in specs]
    for name, numel in trained.items():
        stage_id = owner(name, specs)
        part = part_of(name, specs[stage_id])
        held[stage_id][part] = held[stage_id].get(part, 0) + numel
    for spec in specs:
        if spec.has_head and not spec.is_last:
            held[spec.stage_id]["aux_head"] = local_head_numel(model_config, data.task.kind)
    return list(zip(specs, held, strict=True))


def _sent_by_client(
    config: FinetuneConfig, stages: Sequence[tuple[StageSpec, Mapping[str, int]]]
) -> int:
    average = config.federation.average
    return sum(
        numel
        for spec, held in stages
        for part, numel in held.items()
        if spec.role is StageRole.CLIENT and getattr(average, part)
    )


def _stage_line(spec: StageSpec, held: Mapping[str, int]) -> str:
    what = ", ".join(spec.contents).replace("lm_head", "head").replace("aux_head", "local head")
    return f"  stage {spec.stage_id}  {spec.role.value:<8} {what}  {sum(held.values()):,} trained"


def _edge_lines(
    config: FinetuneConfig, specs: tuple[StageSpec, ...], data: TuningData, *, hidden_size: int
) -> list[str]:
    num = config.pipeline.num_micro_batches
    return [
        f"           stage {edge.edge.source} to {edge.edge.target}:"
        f" {bytes_text(num * edge.bytes_forward)} forward,"
        f" {bytes_text(num * edge.bytes_backward)} backward  per local step"
        for edge in task_messages(config, specs, data, hidden_size=hidden_size)
    ]
