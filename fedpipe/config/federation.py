"""The ``federation`` section: clients, rounds, and how their changes become one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from fedpipe.config.require import above_zero, at_least, require


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
    """mean is FedAvg. The others withstand num_byzantine arbitrary clients: the coordinate-wise
    median or trimmed mean, and multi-Krum."""
    weighting: Literal["tokens", "examples", "uniform"] = "tokens"
    """Weight of a client in the mean: its trained tokens, its examples (the same in pre-training,
    whose blocks are all full), or 1. The robust rules need uniform."""
    num_byzantine: int = 0
    """Clients of a cohort that may send anything: the number that is trimmed at each end, or the f
    of Krum."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "federation.aggregation.", num_byzantine=0)
        require(
            self.rule == "mean" or self.weighting == "uniform",
            "federation.aggregation.weighting",
            f"uniform with federation.aggregation.rule={self.rule}",
            self.weighting,
            "A robust rule has no weights.",
        )

    def fewest_clients(self, *, num_refused: int = 0) -> int:
        """Return how many clients the rule needs.

        Args:
            num_refused: Clients of the cohort whose updates are known to be bad and left out. They
                are among the num_byzantine that the rule withstands, so fewer of those remain.
        """
        smallest = 2 * self.num_byzantine_left(num_refused)
        return smallest + {"mean": 1, "krum": 3}.get(self.rule, 1)

    def num_byzantine_left(self, num_refused: int) -> int:
        """Return how many clients may send anything where some of them have been left out."""
        return max(0, self.num_byzantine - num_refused)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptimizerConfig:
    """What turns the averaged change of a round into the next global weights, per stage."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    """fedavg takes the average as it is. fedavgm adds momentum; fedadam and fedyogi also divide it
    by the root of a second moment."""
    lr: float = 1.0
    """Step along the averaged change."""
    nesterov: bool = False
    """fedavgm looks ahead: its step is that of the next momentum, as in DiLoCo."""
    betas: tuple[float, ...] = (0.9, 0.99)
    """Decay of the first moment (momentum) and of the second."""
    tau: float = 1e-3
    """Term in the denominator of fedadam and fedyogi."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        above_zero(self, "federation.server_optimizer.", "lr", "tau")
        require(
            self.name == "fedavgm" or not self.nesterov,
            "federation.server_optimizer.nesterov",
            f"false with federation.server_optimizer.name={self.name}",
            self.nesterov,
            "Only momentum can look ahead: set federation.server_optimizer.name=fedavgm.",
        )
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "federation.server_optimizer.betas",
            "two values in [0, 1)",
            list(self.betas),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackConfig:
    """Clients that send a false update, to study robust rules; nobody attacks by default."""

    kind: Literal["none", "sign_flip", "noise"] = "none"
    """sign_flip sends ``-scale`` times the change; noise adds Gaussian noise of ``scale`` times the
    change's own standard deviation."""
    num_attackers: int = 0
    """Clients 0 .. num_attackers - 1 attack whenever they are drawn."""
    scale: float = 1.0
    """Strength of the attack."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "federation.attack.", num_attackers=0)
        above_zero(self, "federation.attack.", "scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationConfig:
    """Clients, rounds and what survives between them."""

    num_clients: int = 6
    """Number of data owners."""
    num_replicas: int = 2
    """Number of copies of the pipeline. Each hosts one client at a time."""
    clients_per_round: int = 2
    """Number of clients that train in a round, drawn from the seed."""
    num_rounds: int = 12
    """Number of rounds in all."""
    num_local_steps: int = 20
    """Optimizer steps of each client in a round, unless num_local_epochs is set."""
    num_local_epochs: float = 0.0
    """Passes over a client's blocks in a round; 0 means num_local_steps for everyone."""
    data_parallel_degree: int = 1
    """Ranks inside a replica's stage that share a client's batch; their gradients are averaged."""
    server: Literal["replicated", "shared", "sequential"] = "replicated"
    """How clients share the server stages. replicated: each replica has a copy, and a round
    averages them. shared: there is one model, and the replicas average its gradients at every step.
    sequential (FedBERT): there is one replica, and every stage starts a turn as the client before
    has left it."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """What FedAvg averages, part by part."""
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    """Mean, or a rule that withstands false updates."""
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    """What is done with the averaged change."""
    fedprox_mu: float = 0.0
    """Weight of FedProx's pull towards the global weights of the round, on all that is averaged; 0
    means none."""
    wire: Literal["fp32", "bf16", "int8", "sparse"] = "fp32"
    """Format in which changes of the weights travel. What bf16 and int8 round off is sent in a
    later round (error feedback). sparse sends the largest changes alone, in 2 bits each; the others
    are sent in later rounds."""
    density: float = 0.02
    """Share of the weights whose changes ``wire=sparse`` sends in a round; 0.01 to 0.03 is
    usual."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """Clients that attack, in a study."""
    on_bad_update: Literal["refuse", "stop"] = "refuse"
    """What happens when the loss, the gradient norm or the weights of a client become NaN or
    infinite. refuse leaves its whole update out of the round, records that, and goes on with the
    other clients; stop ends the run."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Optimizer moments at the start of a client's turn: fresh ones (reset), or those that the
    client had at its last end (keep). A shared or sequential server keeps its own."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(
            self,
            "federation.",
            num_clients=1,
            num_replicas=1,
            clients_per_round=1,
            num_rounds=1,
            num_local_steps=1,
            data_parallel_degree=1,
            num_local_epochs=0,
            fedprox_mu=0,
        )
        require(
            self.clients_per_round <= self.num_clients,
            "federation.clients_per_round",
            f"1..{self.num_clients} (federation.num_clients)",
            self.clients_per_round,
            "Draw fewer clients or raise federation.num_clients.",
        )
        require(0 < self.density <= 1, "federation.density", "a value in (0, 1]", self.density)
        self._check_rule()
        self._check_attack()
        if self.server == "shared":
            self._check_shared()
        if self.server == "sequential":
            self._check_sequential()

    def _check_rule(self) -> None:
        rule, num_byzantine = self.aggregation.rule, self.aggregation.num_byzantine
        with_rule = f"with federation.aggregation.rule={rule}"
        if rule == "mean":
            require(
                num_byzantine == 0,
                "federation.aggregation.num_byzantine",
                f"0 {with_rule}",
                num_byzantine,
                "One client can move a mean anywhere; set the rule to trimmed_mean or krum.",
            )
            return
        require(
            num_byzantine > 0 or rule == "median",
            "federation.aggregation.num_byzantine",
            f"1 or more {with_rule}",
            num_byzantine,
            "It is what the rule withstands.",
        )
        smallest = self.aggregation.fewest_clients()
        require(
            self.clients_per_round >= smallest,
            "federation.clients_per_round",
            f"{smallest} or more {with_rule} and num_byzantine={num_byzantine}",
            self.clients_per_round,
            "Draw more clients or lower federation.aggregation.num_byzantine.",
        )
        self._expect(with_rule, {"wire": "fp32"})

    def _check_attack(self) -> None:
        attack = self.attack
        require(
            attack.num_attackers <= self.num_clients,
            "federation.attack.num_attackers",
            f"0..{self.num_clients} (federation.num_clients)",
            attack.num_attackers,
        )
        require(
            (attack.kind == "none") == (attack.num_attackers == 0),
            "federation.attack.num_attackers",
            f"{'0' if attack.kind == 'none' else '1 or more'} with federation.attack.kind="
            f"{attack.kind}",
            attack.num_attackers,
            "Set both or neither.",
        )

    def _check_shared(self) -> None:
        with_server = "with federation.server=shared"
        require(
            self.clients_per_round % self.num_replicas == 0,
            "federation.clients_per_round",
            f"a multiple of federation.num_replicas ({self.num_replicas}) {with_server}",
            self.clients_per_round,
            "Every replica takes part in every step.",
        )
        require(
            self.average.server_layers,
            "federation.average.server_layers",
            f"true {with_server}",
            False,
            "A shared layer cannot stay with a client.",
        )
        self._expect(with_server, {"aggregation.rule": "mean", "num_local_epochs": 0})

    def _check_sequential(self) -> None:
        self._expect(
            "with federation.server=sequential",
            {
                "num_replicas": 1,
                "aggregation.rule": "mean",
                "server_optimizer.name": "fedavg",
                "server_optimizer.lr": 1,
                "wire": "fp32",
                "fedprox_mu": 0,
                "attack.kind": "none",
            },
        )

    def _expect(self, condition: str, expected: Mapping[str, object]) -> None:
        """Refuse a value other than the only one, by key, that a condition allows."""
        for name, value in expected.items():
            found = attrgetter(name)(self)
            key = f"federation.{name}"
            require(found == value, key, f"{value} {condition}", found, f"Set {key}={value}.")
