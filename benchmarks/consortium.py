"""Time an outer round over the network, and watch the memory of every process of it.

    python benchmarks/consortium.py FOLDER [--layers 17] [--sites 3] [--wire fp32]

A coordinator and its sites are real processes of NVFlare on this machine, with mutual TLS. Nothing
is trained: every site finds its update in place, of random numbers, so that what is left is the
outer round's own cost. Memory is what no file could give back (RssAnon), sampled five times a
second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
from outer import write_random_update

from fedpipe.commands.consortium.run import locate
from fedpipe.run.ledger import Ledger
from fedpipe.run.outer import GLOBAL, GLOBAL_FACTS
from fedpipe.run.tensor_file import TensorFile
from fedpipe.terminal import show

PROCESSES = {
    "driver": "consortium run",
    "server": "fedpipe.commands.consortium.server",
    "server, the outer round's process": "server.runner_process",
    "agent of a site": "fedpipe.commands.site.client",
    "site, the outer round's process": "client.worker_process",
}
"""What to call a process, and what its command line has."""
COORDINATOR = tuple(PROCESSES)[:3]
TOGETHER = "coordinator, all at one time"
PERIOD_S = 0.2


def main() -> None:
    """Provision, run one outer round, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--wire", default="fp32", choices=("fp32", "bf16", "int8"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    sites = [f"site-{index}" for index in range(args.sites)]
    provision(args, sites)
    put_updates_in_place(args, sites)
    peaks: dict[str, int] = defaultdict(int)
    watching = threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, watching))
    watcher.start()
    began = time.monotonic()
    for site in sites:
        fedpipe(args.folder, "site", "start", "--site-dir", site)
    try:
        fedpipe(args.folder, "consortium", "run", "--config", "consortium.yaml", "--run-dir", "run")
    finally:
        for site in sites:
            fedpipe(args.folder, "site", "stop", "--site-dir", site)
        watching.set()
        watcher.join()
    took = time.monotonic() - began
    record = json.loads((args.folder / "run/rounds/round_000000/round.json").read_text())
    arrived = [line for line in Ledger(args.folder / "run/ledger.jsonl").read()]
    size = (args.folder / "run/rounds/round_000000" / GLOBAL).stat().st_size / 2**20
    show(f"\nweights {size:.0f} MiB, {args.sites} sites, updates {args.wire}\n")
    show(f"- from hand-out to the last update {record['seconds']:.1f} s; whole run {took:.1f} s")
    up = ", ".join(f"{line['seconds']:.1f}" for line in arrived)
    show(f"- updates of {arrived[0]['bytes'] / 2**20:.0f} MiB fetched in {up} s\n")
    show("| process | memory, MiB |\n|---|---|")
    for name in (*PROCESSES, TOGETHER):
        show(f"| {name} | {peaks[name] / 2**20:.0f} |")


def provision(args: argparse.Namespace, sites: list[str]) -> None:
    """Make kits for all, as the guide says."""
    settings = {
        "name": "bench",
        "server": {"host": "localhost", "port": 8472},
        "federation": {"sites": sites, "num_rounds": 1, "min_sites": len(sites)},
        "pretrain": {
            "model": {"size": "base", "num_hidden_layers": args.layers},
            "pipeline": {"cut": [args.layers // 2]},
            "outer": {"wire": args.wire},
        },
    }
    (args.folder / "consortium.yaml").write_text(json.dumps(settings))
    (args.folder / "site.yaml").write_text("accepts: {max_parameters: 1000000000}\n")
    fedpipe(args.folder, "consortium", "init", "--config", "consortium.yaml")
    for site in sites:
        request = f"{site}/kit/request/{site}.request.zip"
        fedpipe(args.folder, "site", "request", f"kits/invitations/{site}.yaml", "--site-dir", site)
        sign = ("consortium", "sign", "--config", "consortium.yaml", "--request", request)
        fedpipe(args.folder, *sign)
        kit = f"kits/signed/{site}.signed.zip"
        fedpipe(args.folder, "site", "join", kit, "--config", "site.yaml", "--site-dir", site)


def put_updates_in_place(args: argparse.Namespace, sites: list[str]) -> None:
    """Write the first weights, and what every site would have learnt from them."""
    config = str(args.folder / "consortium.yaml")
    consortium = locate(config, [], str(args.folder / "run"))
    consortium.begin()
    first = consortium.round_dir(0)
    base = json.loads((first / GLOBAL_FACTS).read_text())
    layouts = TensorFile(first / GLOBAL).layouts
    for number, site in enumerate(sites):
        folder = args.folder / site / "runs" / consortium.identity / "outer" / first.name
        folder.mkdir(parents=True)
        rng = np.random.default_rng(number)
        write_random_update(
            folder, layouts, base["sha256"], wire=args.wire, tokens=number + 1, rng=rng
        )


def watch(peaks: dict[str, int], done: threading.Event) -> None:
    """Remember the most memory of every kind of process, and of the coordinator's together."""
    while not done.wait(PERIOD_S):
        together = 0
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            for name, part in PROCESSES.items():
                if part in line:
                    memory = anonymous_bytes(process.pid)
                    peaks[name] = max(peaks[name], memory)
                    together += memory if name in COORDINATOR else 0
        peaks[TOGETHER] = max(peaks[TOGETHER], together)


def anonymous_bytes(pid: int) -> int:
    """Return the memory of a process that is not the content of files; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def fedpipe(folder: Path, *arguments: str) -> None:
    """Run a command in the folder."""
    subprocess.run([sys.executable, "-m", "fedpipe", *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main()
