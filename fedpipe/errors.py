"""The exceptions of fedpipe, as one small tree.

``FedPipeError``
    ``ConfigError``       a key of the YAML, of an override or of the DeepSpeed JSON
    ``CorpusError``       a corpus, a partition, a tokenizer or a vocabulary
    ``TopologyError``     processes that do not fit the grid
    ``CheckpointError``   a run directory or a checkpoint
    ``FederationError``   replicas that cannot be averaged
    ``LaunchError``       a process that did not finish
        ``TrainingError`` numbers of the training that are no longer finite
        ``OutputError``   files that the system does not let us write
        ``SchedulerError``  SLURM, which does not answer

The command line prints a ``FedPipeError`` in one line and ends with 2 (a ``LaunchError`` with 1);
anything else is a bug and keeps its traceback.
"""

from fedpipe.printable import printable


class FedPipeError(Exception):
    """An error whose message says in one line what is wrong, what was found, and a way out.

    Messages quote text of users and their files, so control characters in them are escaped.
    """

    def __init__(self, message: str) -> None:
        """Store the message with its control characters escaped."""
        super().__init__(printable(message))
        self.reported = False
        """Whether another process of the run has shown this error already."""


class ConfigError(FedPipeError):
    """A configuration key is unknown, has the wrong type or an impossible value."""


class CorpusError(FedPipeError):
    """Text, vocabulary or partition cannot be used."""


class TopologyError(FedPipeError):
    """The processes that were started do not fill the process grid."""


class CheckpointError(FedPipeError):
    """A run directory or a checkpoint cannot be used."""


class FederationError(FedPipeError):
    """The replicas do not hold the same tensors, or none of them has trained."""


class LaunchError(FedPipeError):
    """A process of the run failed; the message names it and its log."""


class TrainingError(LaunchError):
    """The training cannot go on: a loss, a gradient or a weight is no longer finite."""


class OutputError(CheckpointError, LaunchError):
    """The system refuses to read or write a file, for example because the disk is full.

    The same command continues the run once the cause is removed.
    """


class SchedulerError(LaunchError):
    """SLURM does not answer; the same command works once it does."""


def is_users(error: FedPipeError) -> bool:
    """Whether the user must change something, because the same command would fail again."""
    return not isinstance(error, LaunchError)


def error_in(line: str) -> FedPipeError | None:
    """Rebuild an error from a line ``Class: message``; None if this tree has no such class."""
    kind, _, text = line.partition(": ")
    return error_named(kind, text)


def error_named(kind: str, text: str) -> FedPipeError | None:
    """Rebuild an error that another process has reported.

    Args:
        kind: Name of the error's class.
        text: The error's message.

    Returns:
        The error; None if the class is not one of this tree.
    """
    classes: list[type[FedPipeError]] = [FedPipeError]
    for known in classes:  # grows while it is read: subclasses of subclasses follow
        classes += known.__subclasses__()
    return next((known(text) for known in classes if known.__name__ == kind), None)
