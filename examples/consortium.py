"""A consortium on one machine: three sites and a coordinator train the model of the quick start.

Usage: ``python examples/consortium.py [FOLDER]``, or ``make consortium``. Every site has its own
journals of the packaged text, a folder, a certificate and an agent; only weight changes go from
site to coordinator, over mutual TLS. The commands are those of docs/how-to/consortium.md, and each
is shown before it runs. Given again, it goes on where it was.
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path

from fedpipe.data import samples

SITES = {
    "alpha": ("PLoS ONE", "Nutrients", "Critical Care"),
    "beta": ("Trials", "BMC Cancer", "BMC Public Health"),
    "gamma": ("BMC Musculoskeletal Disorders", "Journal of Medical Internet Research"),
}
CONSORTIUM = """\
name: heart
server: {host: localhost, port: 8002}
federation: {sites: [alpha, beta, gamma], num_rounds: 4, min_sites: 2}
pretrain:
  model:
    {family: roberta, size: tiny, initializer_range: 0.05, position_init: sinusoidal,
     hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}
  data: {sequence_length: 32, mask_probability: 0.3}
  pipeline: {cut: [2], micro_batch_size: 32, num_micro_batches: 1}
  federation: {num_local_steps: 200, optimizer_state: keep}
  optimizer: {lr: 2e-3, warmup_ratio: 0.2}
  outer: {num_inner_rounds: 1}
"""
POLICY = """\
pretrain:
  data: {{train: [{site}.jsonl], valid: [{site}-held-out.jsonl], partition: column}}
  federation: {{num_clients: 2, num_replicas: 1, clients_per_round: 1}}
  pipeline: {{colocate: true}}
  validation: {{max_blocks_per_client: 64}}
accepts: {{max_parameters: 10000000, max_steps: 1000}}
sends: {{metrics: [train_loss, base_valid_loss, valid_loss, seconds]}}
"""

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/consortium")
folder.mkdir(parents=True, exist_ok=True)


def fedpipe(*arguments: str) -> None:
    """Show a command, and run it in the folder of the consortium."""
    print(f"$ fedpipe {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "fedpipe", *arguments], cwd=folder, check=True)


def write_text(site: str, part: str, name: str) -> None:
    """Write the documents of a site's journals."""
    source = Path(samples.__file__).parent / f"bio_pmc.{part}.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        own = [line for line in lines if json.loads(line)["journal"] in SITES[site]]
    (folder / name).write_text("".join(own), encoding="utf-8")


(folder / "consortium.yaml").write_text(CONSORTIUM)
fedpipe("consortium", "init", "--config", "consortium.yaml")
for site in SITES:
    if not (folder / site / "site.yaml").exists():
        write_text(site, "train", f"{site}.jsonl")
        write_text(site, "valid", f"{site}-held-out.jsonl")
        (folder / f"{site}.yaml").write_text(POLICY.format(site=site))
        request = f"{site}/kit/request/{site}.request.zip"
        fedpipe("site", "request", f"kits/invitations/{site}.yaml", "--site-dir", site)
        fedpipe("consortium", "sign", "--config", "consortium.yaml", "--request", request)
        kit = f"kits/signed/{site}.signed.zip"
        fedpipe("site", "join", kit, "--config", f"{site}.yaml", "--site-dir", site)
try:
    for site in SITES:
        fedpipe("site", "start", "--site-dir", site)
    fedpipe("consortium", "run", "--config", "consortium.yaml", "--run-dir", "run")
finally:
    for site in SITES:
        fedpipe("site", "stop", "--site-dir", site)
