"""The run of a site as a SLURM job: a scheduler that is down, and one that refuses the job."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from fedpipe.commands.consortium.config import read_consortium, settings_for
from fedpipe.commands.consortium.messages import Order
from fedpipe.commands.site import site as site_module
from fedpipe.commands.site.site import ATTEMPTS, LOG_FILE, Declined, Site
from fedpipe.config.tree import dump, wrap
from fedpipe.federation.outer import write_first_global
from fedpipe.run.outer import GLOBAL, has_arrived
from tests.helpers.network import POLICY, PRETRAIN
from tests.helpers.slurm import Cluster, wait_until
from tests.slurm.conftest import PROFILE

Ask = Callable[[], Path | None]
_SOON = "MessageTimeout=2\n"
"""A command of SLURM gives up after twenty seconds otherwise."""


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site that has joined; its agent's commands find the cluster."""
    folder = tmp_path / "alpha"
    folder.mkdir()
    (folder / "site.yaml").write_text(dump(POLICY))
    (folder / "profile.yaml").write_text(f"{PROFILE}1\n")
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    own = tmp_path / "slurm.conf"
    own.write_text((cluster.folder / "slurm.conf").read_text() + _SOON)
    monkeypatch.setenv("SLURM_CONF", str(own))
    monkeypatch.setattr(site_module, "_AGAIN_S", 1.0)
    return Site(folder)


@pytest.fixture
def ask(site: Site, tmp_path: Path) -> Ask:
    """Let the site train the only outer round, as its agent does."""
    weights = tmp_path / "coordinator"
    weights.mkdir()
    tree = {"federation": {"sites": ["alpha"]}, "pretrain": PRETRAIN}
    _, run = read_consortium(wrap(tree, "tests"), source="tests")
    facts = write_first_global(weights, run)
    order: dict[str, Any] = {
        "consortium": "heart-1", "round": 0, "num_rounds": 1, "facts": dict(facts),
        "settings": dump(settings_for("alpha", run)),
        "file": {
            "owner": "server", "name": "R1", "sha256": facts["sha256"],
            "bytes": (weights / GLOBAL).stat().st_size,
        },
    }  # fmt: skip

    def fetch(path: Path) -> None:
        shutil.copy(weights / GLOBAL, path)

    return lambda: site.answer(cast(Order, order), fetch=fetch, is_over=threading.Event().is_set)


@pytest.mark.matrix(sample=0)  # 40 seconds, most of them waiting for SLURM's own timeouts
def test_a_site_waits_for_a_scheduler_that_is_down_and_says_so_once(
    site: Site, ask: Ask, cluster: Cluster
) -> None:
    with ThreadPoolExecutor() as pool:
        with cluster.without_controller():
            answer = pool.submit(ask)
            attempts = "runs/heart-1/outer/round_000000/" + ATTEMPTS
            ended = site.path / attempts
            wait_until(
                lambda: ended.is_file() and len(ended.read_text().split()) > 3,
                what=lambda: (site.path / LOG_FILE).read_text(),
            )
        folder = answer.result()
    assert folder is not None and has_arrived(folder)
    log = (site.path / LOG_FILE).read_text()
    assert log.count("the scheduler does not answer, and is asked again") == 1
    assert log.count("Unable to contact slurm controller") == 1
    assert len(list(site.path.glob("runs/*/run/logs/*_submission.sh"))) == 1


def test_the_coordinator_hears_why_the_scheduler_does_not_take_a_job(site: Site, ask: Ask) -> None:
    (site.path / "profile.yaml").write_text(f"{PROFILE}1\n".replace("mem_gb: 2", "mem_gb: 9999"))
    with pytest.raises(Declined) as declined:
        ask()
    assert str(declined.value) == (
        "the site's SLURM does not take the job: Requested node configuration is not available."
    )
    assert "sbatch: error:" in (site.path / LOG_FILE).read_text()
