"""Work out a run before it starts: processes, stages, bytes, memory and the ideal bubble.

The plan follows from the configuration alone; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from fedpipe import __version__
from fedpipe.commands.plan.disclosure import FORMATS, Transfer, client_rows, client_transfers, stays
from fedpipe.commands.plan.flops import stage_flops
from fedpipe.config.deepspeed import autocast_dtype, deepspeed_config
from fedpipe.config.model_shape import ModelShape, model_shape
from fedpipe.config.schema import AverageConfig, PipelineConfig, RunConfig
from fedpipe.data.tokenizer import tokenizer_info
from fedpipe.distributed.sparse_row import SPARSE_BLOCK, SparseRow
from fedpipe.distributed.topology import Grid
from fedpipe.federation.traffic import averaging_bytes, averaging_floats
from fedpipe.models.split import StageRole, StageSpec, model_stages, stage_specs
from fedpipe.pipeline.messages import EdgeMessages, edge_messages
from fedpipe.pipeline.schedule import SCHEDULES
from fedpipe.pipeline.timeline import simulate
from fedpipe.report.format import bytes_text, count

Row = tuple[str, str, str]
"""A line of the plan: its subject and two columns."""

_FLOAT32 = 4
"""Bytes of a weight, a gradient and each of Adam's moments."""
_BYTES_IN_UPDATE = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 1024}
"""Bytes of a weight in the update of a site; int8 has one scale for 1,024 weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage and its costs."""

    spec: StageSpec
    num_parameters: int
    """Parameters, with a tied decoder counted once."""
    muon_parameters: int
    """Parameters that Muon trains; 0 without it."""
    averaged_parameters: int
    """Parameters that FedAvg averages; others stay with their client, or last for one turn."""
    cost_share_pct: float
    """Share of all stages' FLOPs."""
    state_bytes: int
    """Weights, gradients, moments, global weights and buffers for averaging, per rank."""
    activation_bytes: int
    """Activations of the micro-batches in flight, logits and messages, per rank; an estimate."""
    fedavg_bytes: int
    """Bytes that a rank sends per round to average the weights of the replicas."""
    shared_gradient_bytes: int
    """Bytes that a rank sends per local step to average gradients over the replicas."""
    gradient_bytes: int
    """Bytes that a rank sends per local step to average gradients inside its client."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IdealPlan:
    """Result of simulating one schedule."""

    bubble_pct: float
    step_flops: float
    """Length of a local step, in FLOPs that one process could do in that time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that ``render`` shows."""

    config: RunConfig
    grid: Grid
    shape: ModelShape
    stages: tuple[StagePlan, ...]
    edges: tuple[EdgeMessages, ...]
    """Messages of a micro-batch over every edge, in the order of the sending stages. Where the
    share of masked tokens changes, those of the first rounds."""
    last_edges: tuple[EdgeMessages, ...]
    """The same in the last round, and in every validation."""
    ideal: dict[str, IdealPlan]
    """Simulated schedules; streaming has local losses, the others back-propagate over the cuts."""
    transfers: tuple[Transfer, ...]
    """Tensors and records that leave or enter a client."""
    stays: list[str]
    """What never leaves a client."""
    warnings: tuple[str, ...]
    """Warnings about the tokenizer."""

    def __str__(self) -> str:
        """Return what ``fedpipe plan`` shows."""
        return render(self)

    @property
    def messages_per_step(self) -> int:
        """Messages per edge, local step and replica, over all its data-parallel ranks."""
        pipeline, federation = self.config.pipeline, self.config.federation
        return pipeline.num_micro_batches * federation.data_parallel_degree


def build_plan(config: RunConfig) -> Plan:
    """Work out the plan of a run.

    Args:
        config: A checked configuration.

    Returns:
        The plan.

    Raises:
        ConfigError: The model does not fit the vocabulary.
        CorpusError: The tokenizer cannot be read.
    """
    tokenizer = tokenizer_info(config)
    shape = model_shape(config, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
    autocast = autocast_dtype(deepspeed_config(config))
    specs = model_stages(config, shape)
    edges, last_edges = (
        edge_messages(of_round, specs, hidden_size=shape.hidden_size)
        for of_round in (config.in_round(0), config.in_last_round)
    )
    parts = [_parts(spec, shape) for spec in specs]
    return Plan(
        config=config,
        grid=Grid.from_config(config),
        shape=shape,
        stages=_stages(specs, config, shape, activation_size=2 if autocast else 4),
        edges=edges,
        last_edges=last_edges,
        ideal={name: _ideal(name, config, shape) for name in SCHEDULES},
        transfers=client_transfers(
            config, shape, specs=specs, edges=edges, last_edges=last_edges, parts=parts
        ),
        stays=stays(config, specs=specs, parts=parts),
        warnings=tokenizer.warnings,
    )


# ------------------------------------------------------------------------------------- the numbers


def _stages(
    specs: tuple[StageSpec, ...], config: RunConfig, shape: ModelShape, *, activation_size: int
) -> tuple[StagePlan, ...]:
    costs = [stage_flops(spec, config, shape) for spec in specs]
    flops = [cost.forward_s + cost.backward_s + cost.head_s for cost in costs]
    replicas, data = config.federation.num_replicas, config.federation.data_parallel_degree
    sharded = deepspeed_config(config).get("zero_optimization", {}).get("stage", 0) > 0
    plans = []
    for spec, own_flops in zip(specs, flops, strict=True):
        parts = _parts(spec, shape)
        copied = shape.decoder_parameters() if spec.decoder == "copied" else 0
        parameters = sum(parts.values()) + copied
        averaged = sum(n for part, n in parts.items() if _is_averaged(part, config))
        by_muon = _layer_matrices(spec, shape) if config.optimizer.name == "muon" else 0
        moments = 2 * parameters - by_muon  # Muon has one of a weight, Adam two
        moments = ceil(moments / data) if sharded else moments
        shared = config.federation.server == "shared" and spec.role is StageRole.SERVER
        passed_on = shared or config.federation.server == "sequential"
        sent = 0 if passed_on else averaged
        # Buffers for averaging, beside the weights, gradients and global weights.
        averaging = averaging_floats(sent, federation=config.federation)
        # If moments pass from turn to turn, a copy is kept in case the turn's update is left out.
        before = moments if passed_on and spec.role is StageRole.SERVER else 0
        state = _FLOAT32 * (3 * parameters - copied + moments + before + averaging)
        plans.append(
            StagePlan(
                spec=spec,
                num_parameters=parameters,
                muon_parameters=by_muon,
                averaged_parameters=averaged,
                cost_share_pct=100.0 * own_flops / sum(flops),
                state_bytes=state,
                activation_bytes=_activation_bytes(spec, config, shape, element=activation_size),
                fedavg_bytes=averaging_bytes(sent, federation=config.federation),
                shared_gradient_bytes=(
                    2 * (replicas - 1) * parameters * _FLOAT32 // replicas if shared else 0
                ),
                gradient_bytes=2 * (data - 1) * parameters * _FLOAT32 // data,
            )
        )
    return tuple(plans)


def _parts(spec: StageSpec, shape: ModelShape) -> dict[str, int]:
    """Return the number of a stage's parameters for each key of ``federation.average``."""
    layers = "client_layers" if spec.role is StageRole.CLIENT else "server_layers"
    parts = {layers: shape.layer_parameters(spec.first_layer, spec.end_layer)}
    if spec.is_first:
        parts["embeddings"] = shape.embedding_parameters()
    if spec.is_last:
        parts["final_head"] = shape.head_parameters(tied=spec.decoder != "own")
    elif spec.has_head:
        parts["aux_head"] = shape.head_parameters(tied=spec.decoder != "own")
        if spec.head == "mlm+layer":
            parts["aux_head"] += shape.layer_parameters(spec.end_layer, spec.end_layer + 1)
    return parts


def _layer_matrices(spec: StageSpec, shape: ModelShape) -> int:
    """Return the weights of the matrices in a stage's layers, the auxiliary one among them."""
    layers = spec.num_layers + (spec.head == "mlm+layer" and not spec.is_last)
    return layers * sum(shape.kind.linear_flops(shape.config))  # one multiply-add per weight


def _is_averaged(part: str, config: RunConfig) -> bool:
    average: AverageConfig = config.federation.average
    return bool(getattr(average, part))


def _ideal(schedule: str, config: RunConfig, shape: ModelShape) -> IdealPlan:
    pipeline = config.pipeline
    if schedule == "streaming":
        pipeline = replace(pipeline, objective="local_loss", schedule="streaming")
    else:
        pipeline = replace(pipeline, objective="end_to_end", schedule="1f1b")
    specs = stage_specs(pipeline, num_hidden_layers=shape.num_hidden_layers)
    timeline = simulate(
        schedule,
        specs,
        [stage_flops(spec, config, shape) for spec in specs],
        num_micro_batches=pipeline.num_micro_batches,
        in_flight=pipeline.in_flight,
    )
    return IdealPlan(bubble_pct=timeline.bubble_pct, step_flops=timeline.step_s)


def _activation_bytes(
    spec: StageSpec, config: RunConfig, shape: ModelShape, *, element: int
) -> int:
    """Estimate the bytes of activations, from ``9 D + 2 F + 2.5 h T`` elements per layer and token.

    Source: Korthikanti et al. 2022, section 4.1, https://arxiv.org/abs/2205.05198, for a
    feed-forward width F; h T is one row of the attention of h heads over T tokens. A layer that is
    run at masked positions only keeps its input, keys and values, 3 D, for every token.
    """
    pipeline, length = config.pipeline, config.data.num_positions
    hidden, tokens = shape.hidden_size, pipeline.micro_batch_size * length
    masked = pipeline.micro_batch_size * config.data.num_scored
    attention = 2.5 * shape.num_attention_heads * length
    row = 6 * hidden + 2 * shape.intermediate_size + attention
    layer = tokens * (3 * hidden + row)
    masked_layer = tokens * 3 * hidden + masked * row
    own = spec.num_layers * layer - (layer - masked_layer if spec.ends_encoder else 0)
    if pipeline.activation_checkpointing:
        own = spec.num_layers * tokens * hidden + (layer if spec.num_layers else 0)
    own += 3 * tokens * hidden if spec.is_first else 0
    held = _micro_batches_held(spec, pipeline) * own * element
    # Logits and their gradient are float32 even under autocast.
    head = float(masked * (2 * shape.vocab_size + 6 * hidden) * _FLOAT32 if spec.has_head else 0)
    head += masked_layer * element if spec.head == "mlm+layer" else 0
    edges = (not spec.is_first) + (not spec.is_last)
    message = masked if spec.is_home_head else tokens
    return ceil(held + head + edges * pipeline.in_flight * message * hidden * element)


def _micro_batches_held(spec: StageSpec, pipeline: PipelineConfig) -> int:
    """Return how many micro-batches are between forward and backward pass at the same time."""
    ahead = 1
    if pipeline.schedule == "1f1b":
        ahead = spec.num_stages - spec.stage_id
    elif pipeline.schedule == "streaming" and spec.home_head is not None:
        ahead = pipeline.in_flight + 1
    return min(ahead, pipeline.num_micro_batches)


# --------------------------------------------------------------------------------------- the text


def render(plan: Plan) -> str:
    """Write the plan as lines of text.

    Args:
        plan: The plan.

    Returns:
        A headline and one or more indented lines per subject, without a newline at the end.
    """
    rows = [
        *_model_row(plan),
        *_stage_rows(plan),
        *_muon_rows(plan),
        *_batch_rows(plan),
        *_traffic_rows(plan),
        *_memory_rows(plan),
        *_ideal_rows(plan),
        *client_rows(plan.transfers, plan.stays, config=plan.config),
        *_site_rows(plan),
    ]
    warnings = [f"  warning  {text}" for text in plan.warnings]
    return "\n".join([_headline(plan), *aligned_rows(rows), *warnings])


def aligned_rows(rows: Sequence[Row]) -> list[str]:
    """Write rows of the plan as indented lines with aligned columns."""
    width = max(len(middle) for _, middle, _ in rows)
    return [f"  {name:<8} {middle:<{width}}  {end}".rstrip() for name, middle, end in rows]


def _headline(plan: Plan) -> str:
    federation, stages = plan.config.federation, plan.config.pipeline.num_stages
    parts = f"{count(federation.num_replicas, 'replica')} x {count(stages, 'stage')}"
    if plan.grid.colocate:
        parts += " as threads"
    processes = count(plan.grid.world_size, "process", "es")
    degree = federation.data_parallel_degree
    return f"fedpipe {__version__}  {plan.config.name}  {processes} = {parts} x {degree} data"


def _model_row(plan: Plan) -> list[Row]:
    shape = plan.shape
    sizes = (
        f"{shape.family}, {count(shape.num_hidden_layers, 'layer')} x {shape.hidden_size},"
        f" {count(shape.num_attention_heads, 'head')}, feed-forward {shape.intermediate_size}"
    )
    positions = f"{shape.vocab_size:,} tokens, {shape.max_position_embeddings:,} positions"
    return [("model", sizes, positions)]


def _stage_rows(plan: Plan) -> list[Row]:
    contents = [", ".join(stage.spec.contents) or "nothing" for stage in plan.stages]
    width = max(len(text) for text in contents)
    rows = []
    for stage, text in zip(plan.stages, contents, strict=True):
        millions = f"{stage.num_parameters / 1e6:,.1f}"
        share = f"{millions:>8} M parameters  {stage.cost_share_pct:5.1f} % of the compute"
        middle = f"{stage.spec.role.value:<7}  {text:<{width}}"
        rows.append((f"stage {stage.spec.stage_id}", middle, share))
    return rows


def _muon_rows(plan: Plan) -> list[Row]:
    if plan.config.optimizer.name != "muon":
        return []
    millions = [f"{stage.muon_parameters / 1e6:,.1f}" for stage in plan.stages]
    return [("muon", f"{_per_stage(millions)} M parameters", "per stage; AdamW has the others")]


def _batch_rows(plan: Plan) -> list[Row]:
    pipeline, federation, data = plan.config.pipeline, plan.config.federation, plan.config.data
    sequences = plan.config.blocks_per_step
    batch = (
        f"{count(sequences, 'sequence')} ="
        f" {count(pipeline.num_micro_batches, 'micro-batch', 'es')} x {pipeline.micro_batch_size} x"
        f" {federation.data_parallel_degree} data"
    )
    masked, then = (c.data.num_masked for c in (plan.config.in_round(0), plan.config.in_last_round))
    tokens = f"{data.sequence_length} tokens per sequence, {masked} masked"
    if plan.config.switch_round:
        tokens += f", {then} from round {plan.config.switch_round + 1}"
    if data.padded_length:
        tokens += f", padded to {data.padded_length}, a loss at every position"
    if federation.num_local_epochs > 0:
        length, total = f"{federation.num_local_epochs:g} local epochs", ""
    else:
        length = count(federation.num_local_steps, "local step")
        seen = sequences * data.sequence_length * federation.num_local_steps
        seen *= federation.clients_per_round * federation.num_rounds
        total = f", {seen:,} tokens in all"
    cohort = f"{count(federation.num_clients, 'client')}, {federation.clients_per_round} per round"
    rounds = f"{count(federation.num_rounds, 'round')}{total}{_idle(plan)}"
    return [("batch", batch, tokens), ("round", f"{cohort}, {length}", rounds)]


def _idle(plan: Plan) -> str:
    federation = plan.config.federation
    idle = -federation.clients_per_round % federation.num_replicas
    if not idle:
        return ""
    turns = ceil(federation.clients_per_round / federation.num_replicas)
    return f", {count(idle, 'replica')} idle in turn {turns} of {turns}"


def _traffic_rows(plan: Plan) -> list[Row]:
    average = [bytes_text(stage.fedavg_bytes) for stage in plan.stages]
    messages = plan.messages_per_step
    wires = {edge.forward[0].wire or edge.forward[0].dtype for edge in plan.edges}
    kind = f", {'/'.join(sorted(wires))}" if wires else ""
    rows = []
    for edges in (plan.edges, plan.last_edges):
        forward = _per_edge([messages * edge.bytes_forward for edge in edges])
        backward = _per_edge([messages * edge.bytes_backward for edge in edges])
        since = f", from round {plan.config.switch_round + 1}" if edges != plan.edges else ""
        sent = f"{forward} forward, {backward} backward"
        rows.append(("traffic", sent, f"per edge, local step and replica{kind}{since}"))
    averaged = f"sent per stage, rank and round{_narrower(plan)}"
    rows = [*dict.fromkeys(rows), ("fedavg", _per_stage(average), averaged)]
    if plan.config.federation.server == "shared":
        shared = [bytes_text(stage.shared_gradient_bytes) for stage in plan.stages]
        rows.append(("shared", _per_stage(shared), "gradients sent per stage, rank and step"))
    if plan.config.federation.data_parallel_degree > 1:
        gradients = [bytes_text(stage.gradient_bytes) for stage in plan.stages]
        rows.append(("data", _per_stage(gradients), "gradients sent per stage, rank and step"))
    return rows


def _narrower(plan: Plan) -> str:
    """Say how many times fewer bytes a narrow ``federation.wire`` sends."""
    federation = plan.config.federation
    sending = [stage for stage in plan.stages if stage.fedavg_bytes]
    if federation.wire == "fp32" or not sending:
        return ""
    wide = replace(federation, wire="fp32")
    before = sum(averaging_bytes(s.averaged_parameters, federation=wide) for s in sending)
    factor = before / sum(stage.fedavg_bytes for stage in sending)
    return f", {factor:.3g} times less than in float32"


def _memory_rows(plan: Plan) -> list[Row]:
    total = [bytes_text(stage.state_bytes + stage.activation_bytes) for stage in plan.stages]
    largest = max(stage.state_bytes for stage in plan.stages)
    if plan.grid.colocate:
        everything = sum(stage.state_bytes + stage.activation_bytes for stage in plan.stages)
        return [("memory", bytes_text(everything), "per rank (all stages), estimated")]
    return [
        (
            "memory",
            _per_stage(total),
            f"per rank, estimated; {bytes_text(largest)} of it weights and optimizer",
        )
    ]


def _ideal_rows(plan: Plan) -> list[Row]:
    own = plan.config.pipeline.schedule
    others = [name for name in SCHEDULES if name != own]
    mine = f"{own}: bubble {plan.ideal[own].bubble_pct:.1f} %"
    rest = ", ".join(f"{name}: {plan.ideal[name].bubble_pct:.1f} %" for name in others)
    return [("ideal", mine, rest)]


def _site_rows(plan: Plan) -> list[Row]:
    """Say what leaves and enters the site in an outer round, where there are other sites."""
    outer = plan.config.outer
    if not outer.folder:
        return []
    numel = sum(stage.averaged_parameters for stage in plan.stages)
    row = SparseRow(SPARSE_BLOCK, plan.config.federation.density)
    per_weight = _BYTES_IN_UPDATE | {"sparse": row.nbytes / row.length}
    size = bytes_text(int(numel * per_weight[outer.wire]))
    every = f"per outer round ({count(outer.num_inner_rounds, 'round')})"
    return [
        (
            "site",
            f"leaves: change of {numel:,} weights, {FORMATS[outer.wire]}",
            f"{size} {every}, to the coordinator",
        ),
        (
            "site",
            "leaves: trained tokens, losses by stage, seconds",
            f"{every}, to the coordinator",
        ),
        (
            "site",
            f"enters: {numel:,} weights, float32",
            f"{bytes_text(_FLOAT32 * numel)} {every}, from the coordinator",
        ),
    ]


def _per_edge(values: list[int]) -> str:
    """Write one value if all edges have the same, otherwise all."""
    texts = [bytes_text(value) for value in values] or [bytes_text(0)]
    return texts[0] if len(set(texts)) == 1 else _per_stage(texts)


def _per_stage(values: list[str]) -> str:
    """Write the values of all stages, equal neighbours once: ``1.0 GiB, 6 x 2.0 GiB, 1.5 GiB``."""
    runs: list[tuple[int, str]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1] = (runs[-1][0] + 1, value)
        else:
            runs.append((1, value))
    return ", ".join(value if times == 1 else f"{times} x {value}" for times, value in runs)
