"""What a coordinator and the agent of a site say to each other, beside the two files. No nvflare.

Both are JSON texts of a few kilobytes. What they hold is all that crosses, but for the weights that
come in and the update that goes out.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from fedpipe.run.outer import GlobalFacts, UpdateFacts

ORDER, ANSWER = "order", "answer"
"""Keys of the two texts."""
TASK = "outer_round"
"""Name of the only task that a site has."""


class Reference(TypedDict):
    """A file that the other end may fetch."""

    owner: str
    """Address of the process that serves it."""
    name: str
    """Under which that process knows it."""
    sha256: str
    bytes: int


class Order(TypedDict):
    """A coordinator asks a site to train an outer round."""

    consortium: str
    """The consortium, and the weights that it began with: its runs do not mix."""
    round: int
    num_rounds: int
    """Outer rounds in all."""
    settings: str
    """YAML: what the site's run has in common with the others'."""
    facts: GlobalFacts
    file: Reference
    """The weights."""


class Answer(TypedDict):
    """What a site replies: an update, or a reason why there is none."""

    facts: NotRequired[UpdateFacts]
    file: NotRequired[Reference]
    declined: NotRequired[str]
    """Why there is no update; it names neither paths nor hosts."""
