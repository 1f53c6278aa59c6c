"""What NVFlare starts at a site for an outer round: our executor, in its own process. No torch.

It has no state. Called again for the same outer round, it hands over what is there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedpipe.commands.consortium.flare import fetch, offer
from fedpipe.commands.consortium.messages import ANSWER, ORDER, TASK, Answer, Order, content
from fedpipe.commands.site.site import Declined, Site
from fedpipe.run.outer import UPDATE

SITE_DIR = "FEDPIPE_SITE"
"""Environment variable with the folder of the site."""


class SiteRound(Executor):
    """Answers the order of a coordinator with an update, or with a reason for none."""

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Train an outer round; NVFlare calls this in a thread.

        Args:
            task_name: ``outer_round``; anything else is refused.
            shareable: Holds the order.
            fl_ctx: Of NVFlare.
            abort_signal: Is set when the coordinator does not wait any more.
        """
        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        order = cast(Order, content(shareable.get(ORDER)))
        cell: Any = fl_ctx.get_engine().get_cell()
        site = Site(Path(os.environ[SITE_DIR]))

        def bring(path: Path) -> None:
            fetch(cell, order["file"], path, abort_signal=abort_signal)

        answer: Answer
        try:
            folder = site.answer(order, fetch=bring, is_over=lambda: bool(abort_signal.triggered))
        except Declined as declined:
            answer = {"declined": str(declined)}
        else:
            if folder is None:
                return make_reply(ReturnCode.TASK_ABORTED)
            site.note_sent(folder, order)
            # Served until this process ends, which is when the coordinator has it.
            self._source, reference = offer(cell, folder / UPDATE, receivers=1)
            answer = {"facts": site.facts_to_send(folder), "file": reference}
        reply = Shareable()
        reply[ANSWER] = json.dumps(answer)
        return reply
