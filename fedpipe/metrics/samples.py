"""The masked words that the trained model filled in, as text."""

from __future__ import annotations

import json
from pathlib import Path


def samples_text(run_dir: Path) -> str:
    """Render samples.json for a console; empty where it is absent."""
    path = run_dir / "samples.json"
    if not path.is_file():
        return ""
    samples = json.loads(path.read_text(encoding="utf-8"))
    lines = ["masked words of held-out text: truth | model's best guesses | unigram guess"]
    for example in samples["examples"]:
        model = ", ".join(f"{word} {p:.2f}" for word, p in example["model"])
        unigram = ", ".join(f"{word} {p:.2f}" for word, p in example["unigram"][:1])
        lines.append(f"  ... {' '.join(example['text'].split())} ...")
        lines.append(f"      {example['truth']} | {model} | {unigram}")
    return "\n".join(lines)
