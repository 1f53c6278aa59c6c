"""Time the preparation of text beside datasets.map with the same tokenizer, and watch its memory.

    python benchmarks/prepare.py TEXT [--megabytes 100,1000] [--repetitions 1]
        [--tokenizer FOLDER] [--together]

TEXT is a .jsonl or .jsonl.gz file with a column ``text``, or a folder of such files; its lines are
repeated up to every size. The preparations take turns, in a process each, with two threads or
processes of their own; with ``--together`` they run at the same time, which is fairer where others
use the machine too. fedpipe digests, checks, deals out to four clients, tokenises and packs;
datasets loads the file and maps the tokenizer over it, in batches, with num_proc=2. The tokenizer
alone, on two threads that throw its result away, is the bound of both. Time is counted from after
the imports. Memory is the peak of what a command's processes have of their own (Pss_Anon), in sum,
over what they had after the imports.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
from fedpipe.data.tokenizer import SAMPLES

WORKERS = 2
CLIENTS = 4
ARMS = ("fedpipe", "datasets.map", "tokenizer alone")


class Result(NamedTuple):
    """One preparation."""

    seconds: float
    """Wall time."""
    cpu_s: float
    """Processor time of all its processes."""
    alone_s: float
    """Without loading the file, where that is a step of its own."""
    peak_mib: float
    """Peak memory over that after the imports."""


def main() -> None:
    """Measure, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", default="100,1000")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, default=SAMPLES / "tokenizer")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        _prepare(args.arm, args.text, args.tokenizer, args.scratch)
        return
    found: dict[tuple[int, str], list[Result]] = {}
    for size in map(int, args.megabytes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            corpus = _corpus(args.text, Path(folder) / "corpus.jsonl", size * 1_000_000)
            for repetition in range(args.repetitions):
                scratch = Path(folder) / str(repetition)
                groups = [ARMS] if args.together else [(arm,) for arm in ARMS]
                for group in groups:
                    results = _measure(group, corpus, args.tokenizer, scratch)
                    for arm, result in zip(group, results, strict=True):
                        found.setdefault((size, arm), []).append(result)
                        sys.stderr.write(f"{size} MB, {arm}: {result}\n")
    sys.stdout.write(_table(found))


def _table(found: dict[tuple[int, str], list[Result]]) -> str:
    lines = [
        "| text, MB | preparation | s | MB/s | CPU s per MB | peak memory, MiB | speed over map |",
        "|---|---|---|---|---|---|---|",
    ]
    for (size, arm), results in found.items():
        seconds, cpu_s, _, peak = (
            statistics.median(column) for column in zip(*results, strict=True)
        )
        theirs = found[size, ARMS[1]]
        ratios = [t.seconds / r.seconds for t, r in zip(theirs, results, strict=True)]
        alone = [t.alone_s / r.seconds for t, r in zip(theirs, results, strict=True)]
        ratio = f"{statistics.median(ratios):.2f}"
        if arm != ARMS[1]:
            ratio += f" ({statistics.median(alone):.2f} over map alone)"
        lines.append(
            f"| {size:,} | {arm} | {seconds:,.1f} | {size / seconds:.2f} | {cpu_s / size:.3f} "
            f"| {peak:,.0f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def _corpus(text: Path, path: Path, size: int) -> Path:
    """Repeat the documents of some files up to a size."""
    files = sorted(text.glob("*.jsonl*")) if text.is_dir() else [text]
    written = 0
    with open(path, "wb") as out:
        while written < size:
            for line in _documents(files):
                written += out.write(line)
                if written >= size:
                    break
    return path


def _documents(files: list[Path]) -> Iterator[bytes]:
    for file in files:
        opened = gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")
        with opened as lines:
            for line in lines:
                yield json.dumps({"text": json.loads(line)["text"]}).encode() + b"\n"


def _measure(arms: tuple[str, ...], corpus: Path, tokenizer: Path, scratch: Path) -> list[Result]:
    """Run the preparations at the same time, each in a process, and watch their memory."""
    children = {}
    for arm in arms:
        own = scratch / arm
        own.mkdir(parents=True)
        command = [sys.executable, __file__, str(corpus), "--tokenizer", str(tokenizer)]
        command += ["--arm", arm, "--scratch", str(own)]
        with open(own / "result.json", "wb") as out:
            children[arm] = subprocess.Popen(command, stdout=out)
    peaks = dict.fromkeys(arms, 0.0)
    while any(child.poll() is None for child in children.values()):
        for arm, child in children.items():
            if child.poll() is None:
                peaks[arm] = max(peaks[arm], _memory(child.pid))
        time.sleep(0.2)
    results = []
    for arm, child in children.items():
        if child.returncode:
            raise SystemExit(f"{arm} failed: {child.returncode}")
        numbers = json.loads((scratch / arm / "result.json").read_text())
        first = numbers.pop("first_mib")
        results.append(Result(**numbers, peak_mib=peaks[arm] - first))
    return results


def _memory(pid: int) -> float:
    """MiB that a process and its descendants have of their own, in sum."""
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(_memory(int(p)) for p in (task / "children").read_text().split())
    except OSError:  # it has just ended
        return total
    return total


def _prepare(arm: str, corpus: Path, tokenizer: Path, scratch: Path) -> None:
    """Be one of the preparations."""
    arms = dict(zip(ARMS, (_with_fedpipe, _with_map, _alone), strict=True))
    numbers = arms[arm](corpus, tokenizer, scratch)
    times = os.times()
    cpu_s = times.user + times.system + times.children_user + times.children_system
    sys.stdout.write(json.dumps(numbers | {"cpu_s": cpu_s - numbers["cpu_s"]}))


def _with_fedpipe(corpus: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    import tokenizers  # noqa: F401  imported before the clock starts, as on the other side

    from fedpipe.data.corpus import prepare

    config = RunConfig(
        data=DataConfig(
            train=(str(corpus),), valid=(), partition="iid", tokenizer=str(tokenizer),
            cache_dir=str(scratch / "cache"), num_workers=WORKERS,
        ),
        federation=FederationConfig(num_clients=CLIENTS, num_replicas=1, clients_per_round=1),
    )  # fmt: skip
    cpu_s, first_mib = time.process_time(), _memory(os.getpid())
    started = time.perf_counter()
    prepare(config)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "alone_s": seconds, "cpu_s": cpu_s, "first_mib": first_mib}


def _with_map(corpus: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # of texts longer than the model
    encode = transformers.AutoTokenizer.from_pretrained(tokenizer)
    cpu_s, first_mib = time.process_time(), _memory(os.getpid())
    started = time.perf_counter()
    cache = str(scratch / "cache")
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=cache)
    loaded = time.perf_counter()
    rows.map(
        lambda batch: encode(batch["text"], add_special_tokens=False),
        batched=True, num_proc=WORKERS, remove_columns=rows.column_names,
    )  # fmt: skip
    ended = time.perf_counter()
    return {
        "seconds": ended - started, "alone_s": ended - loaded, "cpu_s": cpu_s,
        "first_mib": first_mib,
    }  # fmt: skip


def _alone(corpus: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoders = [Tokenizer.from_file(str(tokenizer / "tokenizer.json")) for _ in range(WORKERS)]
    cpu_s, first_mib = time.process_time(), _memory(os.getpid())

    def encode(encoder: Tokenizer, lines: list[bytes]) -> None:
        encoder.encode_batch_fast([json.loads(line)["text"] for line in lines])

    started = time.perf_counter()
    with open(corpus, "rb") as file, ThreadPoolExecutor(WORKERS) as pool:
        while batches := [lines for _ in encoders if (lines := file.readlines(256 << 10))]:
            list(pool.map(encode, encoders, batches))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "alone_s": seconds, "cpu_s": cpu_s, "first_mib": first_mib}


if __name__ == "__main__":
    main()
