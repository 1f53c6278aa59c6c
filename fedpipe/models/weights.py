"""The configuration of the whole model, and the first weights of a stage: new, or of a folder."""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig

from fedpipe.config.half_files import read_json_object, weight_files
from fedpipe.config.model_shape import ModelShape
from fedpipe.errors import ConfigError
from fedpipe.families.family import Family, modeling
from fedpipe.models.split import AUX_HEADS

modeling("modeling_utils")  # before anything else imports a model, see there
modeling("generation.candidate_generator")  # which the models of adapters import
modeling("utils.logging").disable_progress_bar()  # 5.x shows one for every folder, on stderr


def without_first_values() -> AbstractContextManager[None]:
    """Return a context in which transformers makes models without giving them first values.

    For models whose parameters are replaced at once: values that are never written take no memory.
    """
    try:
        from transformers.modeling_utils import no_init_weights
    except ImportError:  # 5.x
        from transformers.initialization import no_init_weights
    context: AbstractContextManager[None] = no_init_weights()
    return context


def hf_config(shape: ModelShape, *, pad_id: int, cls_id: int, sep_id: int) -> PretrainedConfig:
    """Build the transformers configuration of the whole, unsplit model.

    Args:
        shape: Sizes of the model.
        pad_id: Padding token; RoBERTa counts positions from ``pad_id + 1``.
        cls_id: First token of a block.
        sep_id: Last token of a block.

    Returns:
        A configuration with an untied decoder: stages are built one by one, and the caller ties
        the decoder of a stage to the word embedding where that is wanted.
    """
    tokens = {"pad": pad_id, "cls": cls_id, "sep": sep_id}
    config: PretrainedConfig = shape.kind.config_class()(
        **{**shape.config, "tie_word_embeddings": False},
        **{name: tokens[role] for name, role in shape.kind.special_tokens.items()},
    )
    for name, value in shape.config.items():  # some have other names in transformers 5.x
        if not hasattr(config, name):
            setattr(config, name, value)
    config._attn_implementation = "sdpa"  # modules are built without a PreTrainedModel to set it
    return config


def initialise(
    module: nn.Module,
    *,
    family: Family,
    config: PretrainedConfig,
    seed: int,
    sinusoidal_positions: bool = False,
) -> None:
    """Give every parameter its first value, a function of the seed and of its full name only.

    So a parameter starts with the same value for every cut, number of stages and process. Matrices
    are normal, with the family's deviation and cut-off, biases 0, norms 1 (Devlin et al. 2019).
    Every decoder starts as a copy of the word embedding, as a tied one would. Every auxiliary head
    starts as a copy of the final head, so that all stages begin with the same mapping from hidden
    states to words; later stages then learn from earlier ones at once. Position embeddings may
    start as sinusoids, Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762, scaled
    to the same standard deviation.
    """
    cutoff = family.cutoff(config)
    for name, parameter in module.named_parameters():
        source = in_final_head(name, family=family)
        source = family.word_embeddings if source == family.decoder else source
        with torch.no_grad():
            std = family.deviation(config, source)
            if sinusoidal_positions and name.endswith("position_embeddings.weight"):
                parameter.copy_(_sinusoids(*parameter.shape).mul_(std * 2**0.5))
            elif name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(stable_seed(seed, source))
                if cutoff is None:
                    parameter.normal_(0.0, std, generator=generator)
                else:
                    limit = cutoff * std
                    nn.init.trunc_normal_(parameter, 0.0, std, -limit, limit, generator)


def _sinusoids(num_positions: int, size: int) -> torch.Tensor:
    """(positions, size) sines in the even columns, cosines in the odd ones."""
    steps = torch.arange(0, size, 2, dtype=torch.float64) / size
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * 10000.0**-steps
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :size].float()


def stable_seed(*parts: object) -> int:
    """Derive a 63-bit seed from values whose text is the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def load_pretrained(module: nn.Module, *, family: Family, path: str) -> list[str]:
    """Fill a stage from a Hugging Face folder, reading only the tensors that the stage holds.

    Every head of the stages is filled from the folder's head. If the folder has no masked-LM head,
    the heads keep their first values. A tied decoder is read from the word embedding.
    ``LayerNorm.gamma`` and ``.beta`` of old folders, such as the original BERT's, are read as
    weight and bias.

    Args:
        module: A stage; changed in place.
        family: The stage's family.
        path: Folder with model.safetensors or pytorch_model.bin, whole or in shards.

    Returns:
        Names of the parameters that the folder does not hold: those of heads, and new positions.

    Raises:
        ConfigError: A file cannot be read, a tensor has another shape or holds NaN or infinity, a
            parameter of the encoder is missing, or a decoder that config.json ties to the word
            embedding is another one.
    """
    content = read_json_object(Path(path) / "config.json", key="model.path")
    wanted = dict(module.named_parameters())
    candidates = {name: _candidates(name, family=family) for name in wanted}
    names = {option for options in candidates.values() for option in options}
    if family.word_embeddings in names:
        names.add(family.decoder)
    found = _read_tensors(path, names)
    both = [found[name] for name in (family.decoder, family.word_embeddings) if name in found]
    positions = family.fields["max_position_embeddings"].default
    positions = content.get("max_position_embeddings", positions)
    is_tied = content.get("tie_word_embeddings", family.fields["tie_word_embeddings"].default)
    if is_tied and len(both) > 1 and not both[0].equal(both[1]):
        raise ConfigError(
            f"model.path: expected {family.decoder} to be {family.word_embeddings} in {path}, as"
            " tie_word_embeddings in config.json says, got another one. Set it to false there if"
            " the decoder was trained, or remove the decoder from the weights."
        )
    missing = []
    for name, parameter in wanted.items():
        source = next((c for c in candidates[name] if c in found), None)
        if source is None:
            if name.startswith(f"{family.prefix}."):
                raise ConfigError(
                    f"model.path: expected {name} in {path}, got a folder without it. Use a whole "
                    f"{family.model_type} model, written by save_pretrained."
                )
            missing.append(name)
            continue
        tensor, target = found[source], parameter
        if not tensor.isfinite().all():
            raise ConfigError(
                f"model.path: expected finite weights in {path}, got NaN or infinity in {source}."
                " Download or save the model again, or use another folder."
            )
        if name.endswith("position_embeddings.weight") and len(tensor) == positions:
            target = parameter[: len(tensor)]  # model.max_position_embeddings may ask for more
            missing += [f"{name}[{len(tensor)}:]"] if len(target) < len(parameter) else []
        if tensor.shape != target.shape:
            raise ConfigError(
                f"model.path: expected {source} of shape {list(parameter.shape)}, got "
                f"{list(tensor.shape)} in {path}. Use that model's own tokenizer and sizes."
            )
        with torch.no_grad():
            target.copy_(tensor)
    return missing


def in_final_head(name: str, *, family: Family) -> str:
    """Return the name that a parameter of an auxiliary head has in the final head."""
    root = f"{family.head}." if family.head else ""
    return re.sub(rf"^{AUX_HEADS}\.\d+\.head\.", root, name)


def _candidates(name: str, *, family: Family) -> list[str]:
    """Return the names under which a folder may hold a parameter, best first."""
    name = in_final_head(name, family=family)
    if name == family.decoder:
        options = [name, family.word_embeddings]
    elif name.startswith(f"{AUX_HEADS}."):
        return []
    else:
        options = [name]
    if name in family.twins:
        # transformers 4.x saves one bias under two names; 5.x has two, and uses this one.
        options.insert(0, family.twins[name])
    options += [
        o.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for o in options
        if "LayerNorm." in o
    ]
    return options + [o.removeprefix(f"{family.prefix}.") for o in options]


def _read_tensors(path: str, wanted: set[str]) -> dict[str, torch.Tensor]:
    folder = Path(path)
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder, key="model.path"):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as handle:
                    for name in wanted & set(handle.keys()):
                        found[name] = handle.get_tensor(name)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
                found |= {name: torch.as_tensor(state[name]) for name in wanted & set(state)}
        except Exception as error:  # a damaged pickle can raise any exception
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"model.path: expected readable weights in {file}, got {reason}. "
                "Download or save the model again."
            ) from error
    return found
