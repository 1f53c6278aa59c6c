"""The masked words that the trained model filled in, as text."""

from __future__ import annotations

import json
from pathlib import Path

from fedpipe.printable import printable
from fedpipe.report.summary import Samples


def samples_text(run_dir: Path) -> str:
    """Render samples.json for a console; empty where it is absent."""
    path = run_dir / "samples.json"
    if not path.is_file():
        return ""
    samples: Samples = json.loads(path.read_text(encoding="utf-8"))
    lines = ["masked words of held-out text, filled in by the model and by unigram frequency:"]
    for example in samples["examples"]:
        guesses = ", ".join(f"{word} {p:.3f}" for word, p in example["model"])
        common, share = example["unigram"][0]
        lines.append(f"  {' '.join(example['text'].split())}")
        lines.append(
            f"    truth   {example['truth']}: model {example['truth_probability']:.4f}, "
            f"unigram {example['truth_unigram']:.4f}"
        )
        lines.append(f"    guesses model {guesses}; unigram {common} {share:.3f}")
    return printable("\n".join(lines))
