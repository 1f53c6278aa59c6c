"""Make the packaged task anew: ``python -m fedpipe.data.samples.build_tasks NCBI_DISEASE_DIR``.

NCBI_DISEASE_DIR holds ``ncbi_disease.SPLIT.jsonl.gz`` of the whole corpus: a sentence a row, with
its tokens and BIO tags. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
from pathlib import Path

SENTENCES = {"train": 600, "dev": 150, "test": 200}
"""The first ones of each split, which are whole abstracts but for the last."""

ATTRIBUTION = """# Packaged task: source and licence

`ncbi_disease/` holds the first {train}, {dev} and {test} sentences of the training, development and
test splits of the NCBI disease corpus: R. I. Dogan, R. Leaman and Z. Lu, "NCBI disease corpus: a
resource for disease name recognition and concept normalization", Journal of Biomedical Informatics
47, 2014, https://doi.org/10.1016/j.jbi.2013.12.006.

The corpus was made at the United States National Library of Medicine and is given as dedicated to
the public domain (CC0, https://creativecommons.org/publicdomain/zero/1.0/). That is the licence of
the annotated corpus; its sentences are from abstracts of PubMed. They were taken in the tokenised
form of https://github.com/cambridgeltl/MTL-Bioinformatics-2016 (commit df0df02fae6d, folder
data/NCBI-disease-IOB; CC BY 4.0: G. Crichton, S. Pyysalo, B. Chiu and A. Korhonen, BMC
Bioinformatics 18:368, 2017), and nothing but the number of sentences was changed.

It is a slice for tests and first steps: scores on it compare with no published ones.
"""


def build(corpus_dir: Path, output_dir: Path) -> None:
    """Write the slice and its attribution.

    Args:
        corpus_dir: Folder with the corpus files.
        output_dir: Where the packaged task goes.
    """
    folder = output_dir / "ncbi_disease"
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SENTENCES.items():
        name = f"ncbi_disease.{split}.jsonl.gz"
        with gzip.open(corpus_dir / name, "rt", encoding="utf-8") as lines:
            text = "".join(itertools.islice(lines, size))
        (folder / name).write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    (output_dir / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(**SENTENCES), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus_dir", type=Path, help="folder that holds ncbi_disease.*.jsonl.gz")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "tasks")
    arguments = parser.parse_args()
    build(arguments.corpus_dir, arguments.output_dir)
