"""What NVFlare starts at the coordinator for an outer round: our controller, in its own process.

It hands the weights out and puts what comes back where the driver looks for it, unread. It decides
nothing: checks, rules and deadlines are the driver's, which outlives it. No torch.
"""

from __future__ import annotations

import json
import os
import queue
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedpipe.commands.consortium.flare import fetch, offer
from fedpipe.commands.consortium.messages import (
    ANSWER,
    ORDER,
    TASK,
    Order,
    check_answer,
    content,
)
from fedpipe.commands.consortium.run import UPDATES
from fedpipe.commands.consortium.server import CONSORTIUM_DIR
from fedpipe.errors import FederationError
from fedpipe.files import write_text
from fedpipe.run.ledger import LEDGER_FILE, Ledger, described
from fedpipe.run.outer import GLOBAL, UPDATE, UPDATE_FACTS, UpdateFacts, check_facts

ORDERS, DECLINED = "orders", "declined.json"
"""In the folder of an outer round, and in the folder of a site's update."""
_LOOK_S = 0.2


class OuterRound(Controller):
    """Gives an order to every site of a job, and waits for their answers."""

    def __init__(self, folder: str, sites: list[str]) -> None:
        """Take what the job says.

        Args:
            folder: Of the outer round, below the directory of the consortium.
            sites: Who trains in this job.
        """
        super().__init__()
        self.folder, self.sites = folder, sites
        self._came: queue.Queue[tuple[str, object]] = queue.Queue()

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing before the outer round."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing after it."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Hand out, and take in until all have answered or the driver ends the job."""
        consortium = Path(os.environ[CONSORTIUM_DIR])
        folder = consortium / self.folder
        cell: Any = fl_ctx.get_engine().get_cell()
        self._source, reference = offer(cell, folder / GLOBAL, receivers=0)
        for site in self.sites:
            text = (folder / ORDERS / f"{site}.json").read_text(encoding="utf-8")
            order: Order = json.loads(text) | {"file": reference}
            data = Shareable()
            data[ORDER] = json.dumps(order)
            task = Task(TASK, data=data, result_received_cb=self._note)
            self.broadcast(task, fl_ctx, targets=[site], min_responses=1)
        missing = set(self.sites)
        with ThreadPoolExecutor(len(self.sites)) as pool:  # a slow site holds up no other
            while missing and not abort_signal.triggered:
                try:
                    site, reply = self._came.get(timeout=_LOOK_S)
                except queue.Empty:
                    if not self.get_num_standing_tasks():
                        return  # whoever has not answered will not
                    continue
                missing.discard(site)
                answer = content(reply)
                pool.submit(self._take_in, site, answer, cell, consortium, folder, abort_signal)

    def _note(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """Remember an answer; NVFlare holds a lock meanwhile, so nothing is fetched here."""
        answer = client_task.result.get(ANSWER)
        if answer is not None:
            self._came.put((client_task.client.name, answer))

    def _take_in(
        self,
        site: str,
        answer: Mapping[str, Any],
        cell: Any,
        consortium: Path,
        folder: Path,
        abort_signal: Signal,
    ) -> None:
        """Take in what a site has answered; whatever is wrong with it concerns no other site."""
        target = folder / UPDATES / site
        target.mkdir(parents=True, exist_ok=True)
        try:
            if "declined" in answer:
                raise FederationError(str(answer["declined"])[:500])
            check_answer(answer, most_bytes=2 * (folder / GLOBAL).stat().st_size)
            facts = answer["facts"]
            check_facts(facts, UpdateFacts, source=target / UPDATE_FACTS)
            began = time.monotonic()
            fetch(cell, answer["file"], target / UPDATE, abort_signal=abort_signal)
            line = {
                "site": site, "round": facts["round"], "sha256": facts["sha256"],
                "seconds": round(time.monotonic() - began, 3), **described(target / UPDATE),
                "facts": facts,
            }  # fmt: skip
            Ledger(consortium / LEDGER_FILE).write("received", line)
            write_text(target / UPDATE_FACTS, json.dumps(facts, indent=1) + "\n")
        except FederationError as error:
            write_text(target / DECLINED, json.dumps({"why": str(error)}) + "\n")
        except Exception as error:  # the network, a full disk: the site is asked again
            self.logger.error(f"{site}: {type(error).__name__}: {error}")

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """Drop an answer that nobody waits for any more; the next outer round is asked for anew."""
