"""What a coordinator and the agent of a site say to each other, beside the two files. No nvflare.

Both are JSON texts of a few kilobytes. What they hold is all that crosses, but for the weights that
come in and the update that goes out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict

from fedpipe.errors import FederationError
from fedpipe.run.outer import GlobalFacts, UpdateFacts

ORDER, ANSWER = "order", "answer"
"""Keys of the two texts."""
TASK = "outer_round"
"""Name of the only task that a site has."""
PIECE_S = 60.0
"""How long a piece may take before it is asked for again: 5 MiB at 0.7 Mbit/s."""
ENVIRONMENT = {"NVFLARE_STREAMING_RETRY_WAIT": str(PIECE_S), "MALLOC_ARENA_MAX": "2"}
"""For the processes of NVFlare. They send again what has not been confirmed for so long: after its
own 5 s a slow link has the same piece many times, and is busy with them when it is back. And pieces
that many threads have held go back to few arenas, which saves 100 MB of 500."""
_MOST = 2**20
"""Characters of a text; a longer one is not ours."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


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
    """Name of the training; trainings of the same consortium do not mix."""
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


def content(text: object) -> dict[str, Any]:
    """Return what a text of the other end holds; nothing where it is not one of ours."""
    try:
        found = json.loads(text) if isinstance(text, str) and len(text) <= _MOST else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def check_order(order: Mapping[str, Any]) -> None:
    """Refuse what is no order of an outer round.

    Raises:
        FederationError: The message may leave the site.
    """
    _check(
        "an order",
        order,
        {
            "consortium": lambda name: isinstance(name, str) and bool(_NAME.fullmatch(name)),
            "num_rounds": lambda value: type(value) is int and value > 0,
            "round": lambda value: type(value) is int and 0 <= value < order["num_rounds"],
            "settings": lambda value: isinstance(value, str),
            "facts": lambda facts: isinstance(facts, dict),
            "file": _is_reference,
        },
    )


def check_answer(answer: Mapping[str, Any], *, most_bytes: int) -> None:
    """Refuse what is no answer with an update.

    Args:
        answer: Of a site.
        most_bytes: That the update may have.

    Raises:
        FederationError: It is none.
    """
    _check(
        "an answer",
        answer,
        {
            "facts": lambda facts: isinstance(facts, dict),
            "file": lambda file: (
                _is_reference(file)
                and file["bytes"] <= most_bytes
                and file["sha256"] == answer["facts"].get("sha256")
            ),
        },
    )


def _check(what: str, found: Mapping[str, Any], keys: dict[str, Callable[[Any], bool]]) -> None:
    for key, is_right in keys.items():
        if not is_right(found.get(key)):
            raise FederationError(f"expected {what} with a {key} that can be used, got another.")


def _is_reference(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("owner"), str)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("sha256"), str)
        and bool(_DIGEST.fullmatch(value["sha256"]))
        and type(value.get("bytes")) is int
        and value["bytes"] >= 0
    )
