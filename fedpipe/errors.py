"""Everything a user can get wrong, as one small tree of exceptions.

``FedPipeError``
    ``ConfigError``       a key of the YAML, of an override or of the DeepSpeed JSON
    ``CorpusError``       a corpus, a partition, a tokenizer or a vocabulary
    ``TopologyError``     processes that do not fit the grid
    ``CheckpointError``   a run directory or a checkpoint
    ``FederationError``   replicas that cannot be averaged
    ``LaunchError``       a process that did not finish
        ``TrainingError`` numbers of the training that are no longer finite
        ``OutputError``   files that the system does not let us write

The command line prints a ``FedPipeError`` in one line and ends with 2 (a ``LaunchError`` with 1);
anything else is a bug and keeps its traceback.
"""

from fedpipe.printable import printable


class FedPipeError(Exception):
    """What is wrong, the value that was found, and a way out, in one line.

    Messages quote what users and their files hold; nothing in them can command a terminal.
    """

    def __init__(self, message: str) -> None:
        """Take the message, and make it safe to show."""
        super().__init__(printable(message))
        self.told = False
        """Another process of the run has shown it."""


class ConfigError(FedPipeError):
    """A configuration key is unknown, has the wrong type or an impossible value."""


class CorpusError(FedPipeError):
    """Text, vocabulary or partition cannot be used."""


class TopologyError(FedPipeError):
    """The processes that were started do not fill the process grid."""


class CheckpointError(FedPipeError):
    """A run directory or a checkpoint cannot be used."""


class FederationError(FedPipeError):
    """Replicas do not hold the same tensors, or nothing was trained."""


class LaunchError(FedPipeError):
    """A process of the run failed; the message names it and its log."""


class TrainingError(LaunchError):
    """The training cannot go on: a loss, a gradient or a weight is no longer finite."""


class OutputError(CheckpointError, LaunchError):
    """The system refuses a file: the disk is full, for example. The same command goes on later."""


def is_users(error: FedPipeError) -> bool:
    """Whether the user can mend it: the same command again would find the same."""
    return not isinstance(error, LaunchError)


def error_in(line: str) -> FedPipeError | None:
    """Make an error again from ``Class: message``; None if the line does not say one."""
    kind, _, text = line.partition(": ")
    return error_named(kind, text)


def error_named(kind: str, text: str) -> FedPipeError | None:
    """Make an error again that another process has told by the name of its class.

    Args:
        kind: Name of the class.
        text: Its message.

    Returns:
        The error; None if it is none of this tree.
    """
    classes: list[type[FedPipeError]] = [FedPipeError]
    for known in classes:  # and theirs
        classes += known.__subclasses__()
    return next((known(text) for known in classes if known.__name__ == kind), None)
