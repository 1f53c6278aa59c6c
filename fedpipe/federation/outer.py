"""How the updates of sites become the next weights: tensor by tensor, from files to a file.

The rules and optimizers are those of a round on one cluster (``fedpipe.federation.rules``), applied
to the differences that sites send. Sites are taken in the order of their names, so the result does
not depend on who was first, and no more is in memory than one tensor of every site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpipe.config.federation import AggregationConfig, ServerOptimizerConfig
from fedpipe.config.schema import RunConfig
from fedpipe.errors import FederationError
from fedpipe.federation.rules import (
    ServerOptimizer,
    krum_select,
    median,
    squared_distances,
    trimmed_mean,
)
from fedpipe.files import sync, write_atomically
from fedpipe.report.format import is_number
from fedpipe.run.outer import (
    GLOBAL,
    UPDATE,
    UPDATE_FACTS,
    GlobalFacts,
    UpdateFacts,
    check_digest,
    read_facts,
)
from fedpipe.run.tensor_file import Layout, Layouts, TensorFile, first_difference, write_tensors
from fedpipe.run.update import decode, encoded_layout, first_weights, write_global

_MOST = 2**63
"""Above every number of tokens or seconds, and above every loss."""
_MOST_SHOWN = 120
"""Characters of what a site has written, in a message."""
MOMENTS = "moments.safetensors"
"""The outer optimizer's, beside the weights that they belong to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteUpdate:
    """What a site has sent for an outer round, checked."""

    site: str
    facts: UpdateFacts
    file: TensorFile

    def change(self, name: str, layout: Layout, density: float = 1.0) -> Tensor:
        """Return the difference of one tensor, float32; ``density`` is of a sparse update."""
        return torch.from_numpy(decode(self.file.read(name), layout, self.facts["wire"], density))


def write_first_global(folder: Path, config: RunConfig) -> GlobalFacts:
    """Write the weights of outer round 0: the first ones of the model.

    Args:
        folder: Of the outer round; exists.
        config: Of every site.
    """
    layouts, tensors = first_weights(config)
    arrays = (np.asarray(tensor.numpy()) for tensor in tensors)
    return write_global(folder, 0, layouts, arrays, config=config)


def read_update(
    site: str, folder: Path, base: GlobalFacts, layouts: Layouts, *, density: float = 1.0
) -> SiteUpdate:
    """Read the update of a site, and refuse one that must not be averaged.

    Args:
        site: Its name.
        folder: Holds ``update.safetensors`` and ``update.json``.
        base: The weights that every site has started from.
        layouts: Of these weights.
        density: ``federation.density`` of every site, where ``outer.wire`` is sparse.

    Raises:
        FederationError: It is of other weights or of another outer round, its file is damaged, its
            tensors are not those of the weights or hold NaN or infinity, or it has no tokens.
    """
    facts: UpdateFacts = read_facts(folder / UPDATE_FACTS, UpdateFacts)
    for what, own, theirs in (
        ("outer round", base["round"], facts["round"]),
        ("SHA-256 of its base", base["sha256"], facts["base_sha256"]),
    ):
        if own != theirs:
            raise _refusal(site, f"{what} {str(own)[:12]}", str(theirs)[:12])
    if facts["wire"] not in ("fp32", "bf16", "int8", "sparse"):
        raise _refusal(site, "format fp32, bf16, int8 or sparse", str(facts["wire"]))
    tokens = facts["tokens"]
    if not (type(tokens) is int and 0 < tokens < _MOST):
        raise _refusal(site, "a whole number of tokens above 0", str(tokens))
    for what, value in (("seconds", facts["seconds"]), ("valid_tokens", facts["valid_tokens"])):
        if not (is_number(value) and 0 <= value < _MOST):
            raise _refusal(site, f"{what} of 0 or more", str(value))
    for key in ("train_loss", "base_valid_loss", "valid_loss"):
        losses: object = facts[key]
        if not (isinstance(losses, list) and all(_is_loss(loss) for loss in losses)):
            raise _refusal(site, f"a list of numbers as {key}", str(losses))
    check_digest(folder / UPDATE, facts["sha256"])
    update = SiteUpdate(site=site, facts=facts, file=TensorFile(folder / UPDATE))
    expected = {n: encoded_layout(layout, facts["wire"], density) for n, layout in layouts.items()}
    if difference := first_difference(expected, update.file.layouts):
        raise _refusal(site, "the tensors of the weights", difference)
    for name, layout in layouts.items():
        try:
            change = update.change(name, layout, density)
        except RuntimeError:
            raise _refusal(site, "positions within its tensors", f"others in {name}") from None
        if not bool(change.isfinite().all()):
            raise _refusal(site, "finite numbers", f"NaN or infinity in {name}")
    return update


def _is_loss(value: object) -> bool:
    return value is None or (is_number(value) and abs(value) < _MOST)


def _refusal(site: str, expected: str, found: str) -> FederationError:
    return FederationError(
        f"the update of {site}: expected {expected}, got {found[:_MOST_SHOWN]}. It is left out;"
        " see the site's own log."
    )


def write_next_global(
    folder: Path,
    base: Path,
    updates: Sequence[SiteUpdate],
    *,
    index: int,
    aggregation: AggregationConfig,
    optimizer: ServerOptimizerConfig,
    config: RunConfig,
) -> GlobalFacts:
    """Make the weights of the next outer round of those of this one and the updates of its sites.

    Args:
        folder: Of the next outer round; exists.
        base: Folder of this one.
        updates: From ``read_update``, at least one.
        index: This outer round.
        aggregation: The rule. Weights of the mean are tokens, or equal.
        optimizer: What is done with the aggregate; its moments lie beside the weights.
        config: Of every site.

    Raises:
        FederationError: The rule needs more sites, or whole changes.
    """
    updates = sorted(updates, key=lambda update: update.site)
    fewest = aggregation.fewest_clients()
    if len(updates) < fewest:
        raise FederationError(
            f"aggregation.rule: expected updates of {fewest} sites or more for"
            f" {aggregation.rule}, got {len(updates)}. Wait for more sites, or take another rule."
        )
    sparse = [update.site for update in updates if update.facts["wire"] == "sparse"]
    if sparse and aggregation.rule != "mean":
        raise FederationError(
            f"aggregation.rule: expected mean with sparse updates, got {aggregation.rule}. It needs"
            f" whole changes: set outer.wire=int8 at {', '.join(sparse)}."
        )
    weights, before = TensorFile(base / GLOBAL), base / MOMENTS
    layouts = weights.layouts
    density = config.federation.density
    combine = _combination(updates, layouts, aggregation)
    moments = _moment_layouts(layouts, optimizer)
    old = TensorFile(before) if moments and before.is_file() else None

    def advance(name: str) -> tuple[Tensor, ServerOptimizer]:
        start = torch.from_numpy(weights.read(name))
        step = ServerOptimizer(optimizer, like=start)
        if old is not None:
            step.moments.update(
                (kind, torch.from_numpy(old.read(f"{name}.{kind}"))) for kind in step.moments
            )
        changes = torch.stack([u.change(name, layouts[name], density) for u in updates])
        step.step_(start, start + combine(changes))
        return start, step

    if moments:
        parts = (
            np.asarray(moment.numpy())
            for name in layouts
            for moment in advance(name)[1].moments.values()
        )
        write_atomically(folder / MOMENTS, partial(write_tensors, layouts=moments, tensors=parts))
        sync(folder)
    new = (np.asarray(advance(name)[0].numpy()) for name in layouts)
    return write_global(folder, index + 1, layouts, new, config=config)


Combine = Callable[[Tensor], Tensor]
"""Takes one tensor's changes of all sites, (K, ...), and returns the aggregate."""


def _combination(
    updates: Sequence[SiteUpdate], layouts: Layouts, aggregation: AggregationConfig
) -> Combine:
    """Return how the sites' changes are combined; for krum the sites are chosen first."""
    byzantine = aggregation.num_byzantine
    if aggregation.rule == "median":
        return median
    if aggregation.rule == "trimmed_mean":
        return partial(trimmed_mean, num_byzantine=byzantine)
    chosen = list(range(len(updates)))
    if aggregation.rule == "krum":
        distances_KK = torch.zeros(len(updates), len(updates), dtype=torch.float64)
        for name, layout in layouts.items():
            rows = torch.stack([u.change(name, layout).flatten() for u in updates])
            distances_KK += squared_distances(rows)
        chosen = krum_select(distances_KK, num_byzantine=byzantine)
    equal = aggregation.weighting == "uniform"
    shares = [1 if equal else updates[k].facts["tokens"] for k in chosen]

    def mean(changes: Tensor) -> Tensor:
        total = torch.zeros_like(changes[0])
        for k, share in zip(chosen, shares, strict=True):
            total.add_(changes[k], alpha=share / sum(shares))
        return total

    return mean


def _moment_layouts(layouts: Layouts, optimizer: ServerOptimizerConfig) -> Layouts:
    """What the outer optimizer keeps of every tensor; empty for one that keeps nothing."""
    kinds = ServerOptimizer(optimizer, like=torch.zeros(1)).moments
    return {f"{name}.{kind}": layout for name, layout in layouts.items() for kind in kinds}
