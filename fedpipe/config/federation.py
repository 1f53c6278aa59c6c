"""The ``federation`` section: clients, rounds, and how their changes become one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedpipe.config.require import require


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageConfig:
    """What FedAvg averages; a part that is off stays with its client, by client id."""

    embeddings: bool = True
    """Word, position and type embeddings."""
    client_layers: bool = True
    """Encoder layers of the client stages."""
    aux_head: bool = True
    """Auxiliary heads."""
    server_layers: bool = True
    """Encoder layers of the server stages."""
    final_head: bool = True
    """The masked-LM head of the last stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregationConfig:
    """How a round's clients become one model, per stage."""

    rule: Literal["mean", "median", "trimmed_mean", "krum"] = "mean"
    """mean is FedAvg. The others withstand num_byzantine arbitrary clients: coordinate-wise median
    or trimmed mean, or multi-Krum."""
    weighting: Literal["tokens", "uniform"] = "tokens"
    """Weight of a client in the mean: its trained tokens, or 1. The robust rules need uniform."""
    num_byzantine: int = 0
    """Clients of a cohort that may send anything: trimmed from each end, or Krum's f."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        require(
            self.num_byzantine >= 0,
            "federation.aggregation.num_byzantine",
            "0 or more",
            self.num_byzantine,
        )
        require(
            self.rule == "mean" or self.weighting == "uniform",
            "federation.aggregation.weighting",
            f"uniform with federation.aggregation.rule={self.rule}",
            self.weighting,
            "A robust rule has no weights.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptimizerConfig:
    """What turns the averaged change of a round into the next global weights, per stage."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    """fedavg takes the average as it is. fedavgm adds momentum, fedadam and fedyogi also scale it
    by its own second moment."""
    lr: float = 1.0
    """Step along the averaged change."""
    betas: tuple[float, ...] = (0.9, 0.99)
    """Decay of the first moment (momentum) and of the second."""
    tau: float = 1e-3
    """Term in the denominator of fedadam and fedyogi."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        require(self.lr > 0, "federation.server_optimizer.lr", "a value above 0", self.lr)
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "federation.server_optimizer.betas",
            "two values in [0, 1)",
            list(self.betas),
        )
        require(self.tau > 0, "federation.server_optimizer.tau", "a value above 0", self.tau)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackConfig:
    """Clients that send a false update, to study robust rules; nobody attacks by default."""

    kind: Literal["none", "sign_flip", "noise"] = "none"
    """sign_flip sends ``-scale`` times the change; noise adds Gaussian noise of ``scale`` times the
    change's own standard deviation."""
    num_attackers: int = 0
    """Clients 0 .. num_attackers - 1 attack whenever they are drawn."""
    scale: float = 1.0
    """Strength."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        require(
            self.num_attackers >= 0,
            "federation.attack.num_attackers",
            "0 or more",
            self.num_attackers,
        )
        require(self.scale > 0, "federation.attack.scale", "a value above 0", self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationConfig:
    """Clients, rounds and what survives between them."""

    num_clients: int = 6
    """Data owners."""
    num_replicas: int = 2
    """Copies of the pipeline; each hosts one client at a time."""
    clients_per_round: int = 2
    """Clients that train in a round, drawn from the seed."""
    num_rounds: int = 12
    """Rounds in all."""
    num_local_steps: int = 20
    """Optimizer steps of each client in a round. Ignored where num_local_epochs is set."""
    num_local_epochs: float = 0.0
    """Passes over a client's blocks in a round; 0 means num_local_steps for everyone."""
    data_parallel_degree: int = 1
    """Ranks inside a replica's stage that share a client's batch; their gradients are averaged."""
    server: Literal["replicated", "shared", "sequential"] = "replicated"
    """Server stages across clients. replicated: one copy per replica, averaged per round. shared:
    one model, its gradients averaged over the replicas every step. sequential (FedBERT's): one
    replica, every client starts from the state in which the one before it ended."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """What FedAvg averages, part by part."""
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    """Mean, or a rule that withstands false updates."""
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    """What is done with the averaged change."""
    fedprox_mu: float = 0.0
    """Weight of FedProx's pull to the round's global weights; 0 means none."""
    wire: Literal["fp32", "bf16", "int8"] = "fp32"
    """Format in which changes of the weights travel; what bf16 and int8 round off is sent in a
    later round (error feedback)."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """Clients that attack, in a study."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Optimizer moments at the start of a client's turn: fresh, or those the client left with."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        for name in (
            "num_clients",
            "num_replicas",
            "clients_per_round",
            "num_rounds",
            "num_local_steps",
            "data_parallel_degree",
        ):
            require(
                getattr(self, name) >= 1, f"federation.{name}", "1 or more", getattr(self, name)
            )
        require(
            self.num_local_epochs >= 0,
            "federation.num_local_epochs",
            "0 or more",
            self.num_local_epochs,
        )
        require(self.fedprox_mu >= 0, "federation.fedprox_mu", "0 or more", self.fedprox_mu)
        require(
            self.clients_per_round <= self.num_clients,
            "federation.clients_per_round",
            f"1..{self.num_clients} (federation.num_clients)",
            self.clients_per_round,
            "Draw fewer clients or raise federation.num_clients.",
        )
