"""Pre-train one model on the text of several owners, look at the losses, and use the model.

Usage: ``python examples/own_corpus.py NORTH.txt SOUTH.txt``: a file for each owner, with a document
a line. JSON lines (.jsonl, with the text under "text") and Parquet work as well.
"""

import sys

from transformers import pipeline

import fedpipe

files = sys.argv[1:]
run = fedpipe.pretrain(
    {
        "name": "own-corpus",
        "data": {"train": files, "valid": [], "partition": "paths", "sequence_length": 32},
        "federation": {"num_clients": len(files), "num_rounds": 3, "num_replicas": 1},
    }
)
print(run.metrics("round")[["round", "clients", "loss", "seconds"]])
guess = pipeline("fill-mask", model=run.model, tokenizer=run.tokenizer)
print(guess(f"The patient has a {run.tokenizer.mask_token} .")[0]["sequence"])
print(run.report)
