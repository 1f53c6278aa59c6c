"""From a checkpoint to Hugging Face folders, and a look at what the model has learnt."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedpipe import __version__
from fedpipe.config.half_files import read_json_object
from fedpipe.config.load import load_config
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData, token_counts
from fedpipe.data.masking import validation_batch
from fedpipe.data.tokenizer import TokenizerInfo, tokenizer_info
from fedpipe.errors import CheckpointError
from fedpipe.families import FAMILIES
from fedpipe.files import replace_folder, write_text
from fedpipe.models.lengths import longest_input, num_positions
from fedpipe.models.split import StageSpec, merge, model_stages, part_of, split
from fedpipe.models.stage import build_stages
from fedpipe.models.weights import hf_config, without_first_values
from fedpipe.printable import printable
from fedpipe.report.format import count
from fedpipe.report.summary import Guess, Sample, Samples
from fedpipe.report.writer import read_metrics
from fedpipe.run.checkpoint import (
    CLIENTS,
    Checkpoint,
    client_file,
    client_files,
    find_latest,
    stage_file,
)
from fedpipe.run.outer import GLOBAL
from fedpipe.run.run_dir import RunDir, prepared_text
from fedpipe.run.update import crosses_whole, described

if TYPE_CHECKING:  # its module imports scipy if it is not fedpipe.models.weights that imports it
    from transformers import PreTrainedModel

EXPORT = "export"
NUM_EXAMPLES = 8
COMMON = 0.02
"""Words above this share of the text (the, of, and) are not shown: a unigram guess finds them."""
_SPACES = ("\u0120", "\u2581")
"""What tokens of byte-level BPE and of SentencePiece have in place of a leading space."""


def export_run(run_dir: Path) -> Path:
    """Write the newest checkpoint of a run as Hugging Face folders.

    ``RUN_DIR/export`` holds the model; where a part of it stays with its clients, one folder per
    client lies below instead, since no single model exists.

    Args:
        run_dir: A run directory with a checkpoint.

    Returns:
        The folder.

    Raises:
        CheckpointError: There is no run, or no intact checkpoint.
    """
    config = load_config(RunDir.open(run_dir, "pretrain").saved, [])
    checkpoint, _ = find_latest(run_dir)
    if checkpoint is None:
        raise CheckpointError(
            f"{run_dir}: expected a checkpoint to export, got none. Resume the run first."
        )
    target = run_dir / EXPORT
    export_checkpoint(run_dir, config, checkpoint, target)
    return target


def export_checkpoint(
    run_dir: Path, config: RunConfig, checkpoint: Checkpoint | None, target: Path
) -> None:
    """Write the model of a checkpoint, in the place of what is there.

    Args:
        run_dir: Of the run.
        config: Its configuration.
        checkpoint: One of its checkpoints; None means the first weights, before any training.
        target: The folder; it has all of its files or is absent.
    """
    data = prepared_text(run_dir, config)
    shape = model_shape(config, vocab_size=data.vocab_size, pad_id=data.pad_id)
    model_config = hf_config(shape, pad_id=data.pad_id, cls_id=data.cls_id, sep_id=data.sep_id)
    specs = model_stages(config, shape)
    if checkpoint is None:
        stages = build_stages(specs, model_config, config)
        parts = [{n: p.detach() for n, p in stage.named_parameters()} for stage in stages]
    else:
        parts = [load_file(checkpoint.path / stage_file(s.stage_id)) for s in specs]
    tokenizer = load_tokenizer(Path(data.tokenizer_dir), data)
    cut_texts(tokenizer, _trained_length(config))
    num_rounds = checkpoint.position.round_id if checkpoint else 0
    federation = config.federation
    card = model_card(
        config,
        f"{federation.num_clients} clients whose text was not pooled: {count(num_rounds, 'round')},"
        f" {federation.clients_per_round} clients per round",
        score=_newest_score(run_dir, num_rounds),
        tied=specs[-1].decoder != "own",
    )
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(aside: Path) -> None:
        if checkpoint is None or not _kept_in_model(config, specs, parts):
            _save(merge(parts), model_config, aside, tokenizer, card)
            return
        for client_id, own in enumerate(_client_parts(run_dir, config, specs, checkpoint)):
            state = merge([part | kept for part, kept in zip(parts, own, strict=True)])
            folder = aside / f"client_{client_id:04d}"
            _save(state, model_config, folder, tokenizer, card)

    replace_folder(target, write)


def export_global(folder: Path, config: RunConfig, target: Path, *, sites: int) -> bool:
    """Write the weights of an outer round as a Hugging Face folder, in the place of what is there.

    Args:
        folder: Of the outer round.
        config: What the runs of all sites have in common.
        target: The folder; it has all of its files or is absent.
        sites: Of the consortium.

    Returns:
        Whether it was written; it is not where a part of the model stays with the clients.
    """
    specs, model_config = described(config)
    if not crosses_whole(config):
        return False
    state = merge(split(load_file(folder / GLOBAL), specs))  # pages of the file, not memory
    info = tokenizer_info(config)
    tokenizer = load_tokenizer(Path(info.directory), info)
    cut_texts(tokenizer, _trained_length(config))
    rounds = count(int(folder.name.rpartition("_")[2]), "outer round")
    card = model_card(
        config,
        f"{count(sites, 'site')} that share no cluster and whose text was not pooled: {rounds}",
        score="see the coordinator's report",
        tied=specs[-1].decoder != "own",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(target, lambda aside: _save(state, model_config, aside, tokenizer, card))
    return True


def _trained_length(config: RunConfig) -> int:
    """Tokens up to which positions have been trained: by this run, or the model it continued."""
    length = config.data.sequence_length
    if not config.model.path:
        return length
    folder = Path(config.model.path)
    positions = num_positions(read_json_object(folder / "config.json", key="model.path"))
    before = longest_input(folder, key="model.path") or positions
    return max(length, min(before, positions))


def _kept_in_model(
    config: RunConfig, specs: Sequence[StageSpec], parts: Sequence[dict[str, Tensor]]
) -> bool:
    """Whether a part that is exported stays with its clients."""
    average = config.federation.average
    kept = {
        part_of(name, spec)
        for spec, part in zip(specs, parts, strict=True)
        for name in part
        if not getattr(average, part_of(name, spec))
    }
    return bool(kept - {"aux_head"})


def _client_parts(
    run_dir: Path, config: RunConfig, specs: Sequence[StageSpec], checkpoint: Checkpoint
) -> list[list[dict[str, Tensor]]]:
    """By client and stage, the tensors that stayed with the client; none before its first turn.

    The manifest says which file is a client's: inside a round it may be that of this very round.
    """
    listed = sorted(client_files(checkpoint))
    result = []
    for client_id in range(config.federation.num_clients):
        own: list[dict[str, Tensor]] = []
        for spec in specs:
            prefix = client_file(client_id, spec.stage_id, 0, round_id=0).partition(".round_")[0]
            state: dict[str, Any] = {}
            for name in (n for n in listed if n.startswith(f"{prefix}.")):
                state = torch.load(run_dir / CLIENTS / name, map_location="cpu", weights_only=True)
            own.append(dict(state.get("kept", {})))
        result.append(own)
    return result


def _save(
    state: dict[str, Tensor],
    model_config: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
) -> None:
    """Write one Hugging Face folder: weights, configuration, tokenizer, model card."""
    write_model(build_model(state, model_config), folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(printable(card), encoding="utf-8")


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configuration so that transformers 4.x and 5.x read the same model.

    The decoder's bias is one tensor with the head's in 4.x. In 5.x it is one only where the decoder
    is the word embedding, and two otherwise. A folder that holds both names is read alike by both.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        is_shared = any(tensor.data_ptr() == other.data_ptr() for other in tensors.values())
        tensors[name] = tensor.clone() if is_shared else tensor
    if model.config.tie_word_embeddings:
        del tensors[FAMILIES[model.config.model_type].decoder]
    model.save_pretrained(folder, state_dict=tensors)


def load_tokenizer(folder: Path, ids_of: PreparedData | TokenizerInfo) -> PreTrainedTokenizerBase:
    """Read the run's tokenizer; a folder with nothing but a tokenizer.json is enough."""
    if (folder / "tokenizer_config.json").is_file():
        return _auto_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = {part: getattr(ids_of, f"{part}_id") for part in ("cls", "sep", "mask", "pad")}
    names = {f"{part}_token": tokenizer.convert_ids_to_tokens(i) for part, i in ids.items()}
    tokenizer.add_special_tokens(names)
    return tokenizer


def cut_texts(tokenizer: Any, length: int) -> None:
    """Let a fast tokenizer cut texts to so many tokens at most, also without transformers."""
    tokenizer.model_max_length = length
    truncation = tokenizer.backend_tokenizer.truncation
    if truncation and truncation["max_length"] > length:
        tokenizer.backend_tokenizer.enable_truncation(**truncation | {"max_length": length})


def _auto_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # after fedpipe.models.weights, so without scikit-learn

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def build_model(state: dict[str, Tensor], model_config: Any) -> PreTrainedModel:
    """Put merged stage tensors into the transformers model they are named after.

    Without a decoder among them it is the word embedding.

    Raises:
        CheckpointError: A tensor is missing, is not the model's, or holds nan or inf.
    """
    check_finite(state)
    family = FAMILIES[model_config.model_type]
    model_config = copy.deepcopy(model_config)
    model_config.tie_word_embeddings = family.decoder not in state
    with without_first_values():
        model: PreTrainedModel = family.masked_lm_class()(model_config)
    twins = {second: first for first, second in family.twins.items()}
    same = {family.decoder: family.word_embeddings, **twins}
    state = {n: state[other] for n, other in same.items() if other in state} | state
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if set(state) != set(parameters):
        difference = sorted(set(state) ^ set(parameters))
        raise CheckpointError(
            f"export: expected the model's own parameters, got a difference at {difference[:3]}. "
            "The checkpoint is of another model."
        )
    for name, tensor in state.items():
        assert parameters[name].shape == tensor.shape, name
        parameters[name].data = tensor  # without a copy: the coordinator of a consortium is small
    return model.eval()


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse to export weights that no model can compute with.

    Raises:
        CheckpointError: A tensor holds nan or inf.
    """
    spoilt = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if spoilt:
        raise CheckpointError(
            f"export: expected finite weights in the checkpoint, got nan or inf in {spoilt[0]} and"
            f" {len(spoilt) - 1} other tensors. Train again in a new --run-dir with a lower"
            " optimizer.lr."
        )


def _newest_score(run_dir: Path, num_rounds: int) -> str:
    """Say what a run's last validation before the end of so many rounds has found."""
    records = read_metrics(run_dir / "metrics.jsonl") if num_rounds else []
    evaluations = [
        r for r in records if r["kind"] == "eval" and r["stages"] and r["round"] < num_rounds
    ]
    if not evaluations:
        return "not validated"
    last = evaluations[-1]["stages"][-1]
    return f"{last['loss']:.4f} nats, perplexity {last['perplexity']:.1f}"


def model_card(config: RunConfig, trained: str, *, score: str, tied: bool) -> str:
    """Describe a model; ``trained`` says over whom, and how long."""
    decoder = "one tensor" if tied else "separate tensors (`tie_word_embeddings: false`)"
    path = "/".join(Path(config.model.path).parts[-2:])
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---
# {config.name}

A {config.model.family} masked language model, pre-trained with fedpipe {__version__} over
{trained}, `{config.pipeline.objective}` over {config.pipeline.num_stages} pipeline stages.

- First weights: {f"those of `{path}`" if path else "random"}
- Held-out masked-LM loss of the final head, all clients: {score}
- Sequence length: at most {_trained_length(config)} tokens; longer text needs `truncation=True`
- Masked share {", then ".join(map(str, config.data.mask_probabilities))}
- Decoder and word embedding are {decoder}

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained("{EXPORT}")
tokenizer = AutoTokenizer.from_pretrained("{EXPORT}")
```
"""


def write_samples(run_dir: Path, config: RunConfig, data: PreparedData) -> list[Sample]:
    """Let the exported model fill in masked words of held-out text, beside a unigram guess.

    Writes ``samples.json``. Only whole words are hidden, one per example; the unigram guess is the
    most frequent tokens of the training text.

    Returns:
        The examples.
    """
    folder = run_dir / EXPORT
    if not (folder / "config.json").is_file():  # one folder per client: show the first
        folder = next(iter(sorted(folder.glob("client_*"))))
    family = FAMILIES[AutoConfig.from_pretrained(folder).model_type]
    model = family.masked_lm_class().from_pretrained(folder).eval()
    tokenizer = _auto_tokenizer(folder)
    counts = token_counts(data).astype(np.float64)
    counts[list(data.special_ids)] = 0
    unigram = (counts + 1) / (counts + 1).sum()
    starts_word, is_word = word_tokens(tokenizer, data.vocab_size)
    examples: list[Sample] = []
    rng = np.random.default_rng(config.seed)
    clients = [shard.client_id for shard in data.valid if shard.num_blocks]
    for index in range(NUM_EXAMPLES):
        first, client = divmod(index, len(clients))
        block = validation_batch(data, config, clients[client], first=first, count=1)
        ids = block.input_ids[0].copy()
        ids[block.positions[0]] = block.labels[0]  # the text as it was
        inner = np.arange(8, len(ids) - 8)
        fits = is_word[ids[inner]] & starts_word[ids[inner + 1]] & (unigram[ids[inner]] < COMMON)
        if not fits.any():
            continue
        position = int(rng.choice(inner[fits]))
        truth = int(ids[position])
        ids[position] = data.mask_id
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, position]
        probabilities = logits.softmax(-1).numpy()
        window = tokenizer.decode(ids[max(1, position - 16) : position + 12].tolist())
        mask = tokenizer.mask_token
        examples.append(
            {
                "text": re.sub(rf"\s*{re.escape(mask)}", f" {mask}", window),
                "truth": tokenizer.decode([truth]).strip(),
                "truth_probability": float(probabilities[truth]),
                "truth_unigram": float(unigram[truth]),
                "model": _top(probabilities, tokenizer),
                "unigram": _top(unigram, tokenizer),
            }
        )
    result: Samples = {"unigram_loss": _unigram_loss(config, data, unigram), "examples": examples}
    write_text(run_dir / "samples.json", json.dumps(result, indent=1))
    return examples


def word_tokens(tokenizer: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tell which tokens begin a word, and which of these are letters only.

    A token of letters is a whole word where the next token begins another word.

    Args:
        tokenizer: Byte-level BPE, SentencePiece or WordPiece, which mark the beginning of words
            differently.
        vocab_size: Of the run; an id may have no entry.

    Returns:
        Two arrays (V,) of bool, by token id.
    """
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(range(vocab_size))]
    if any(token.startswith("##") for token in tokens):
        starts = np.array([not token.startswith("##") for token in tokens])
    else:
        starts = np.array([token.startswith(_SPACES) for token in tokens])
    letters = np.array([token.lstrip("".join(_SPACES)).isalpha() for token in tokens])
    return starts, starts & letters


def _top(probabilities: np.ndarray, tokenizer: Any, k: int = 3) -> list[Guess]:
    best = np.argsort(probabilities)[::-1][:k]
    return [(tokenizer.decode([int(i)]).strip(), float(probabilities[i])) for i in best]


def _unigram_loss(config: RunConfig, data: PreparedData, unigram: np.ndarray) -> float:
    """Mean loss of the unigram guess on the very tokens that validation scores, in nats."""
    limit = config.validation.max_blocks_per_client
    total, count = 0.0, 0
    for shard in data.valid:
        blocks = min(shard.num_blocks, limit) if limit else shard.num_blocks
        if blocks:
            batch = validation_batch(data, config, shard.client_id, first=0, count=blocks)
            total += float(-np.log(unigram[batch.labels]).sum())
            count += batch.labels.size
    return total / count if count else float("nan")
