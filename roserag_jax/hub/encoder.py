"""Encoders of the BERT family from Hugging Face folders: configuration, weights and the files beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from roserag_jax.errors import UserError, first_line, quote
from roserag_jax.hub import huggingface, model_files
from roserag_jax.hub.json_files import Fields, read_json_object
from roserag_jax.hub.tokenizer import check_ids, read_tokenizer
from roserag_jax.models.bert import Bert, BertConfig

# What lies beside the encoder: sentence-transformers' list of modules, its settings, and ColBERT's.
MODULES, SENTENCE_SETTINGS, COLBERT_SETTINGS = "modules.json", "config_sentence_transformers.json", "artifact.metadata"
POOLING, DENSE = "1_Pooling/config.json", "1_Dense/model.safetensors"
_SETTINGS = (MODULES, SENTENCE_SETTINGS, COLBERT_SETTINGS, "sentence_bert_config.json", POOLING, "1_Dense/config.json")
_PICKLES = ("pytorch_model.bin", "model.bin", "1_Dense/pytorch_model.bin")

_FAMILIES = ("bert", "roberta", "xlm-roberta")
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Tensors of pre-training's heads and what is computed anew.
_IGNORED = ("cls.", "pooler.", "lm_head.", "classifier.", "embeddings.position_ids")
_OUTSIDE_THE_LAYERS = {
    ("embed",): "embeddings.word_embeddings.weight",
    ("positions",): "embeddings.position_embeddings.weight",
    ("types",): "embeddings.token_type_embeddings.weight",
    ("embed_norm", "scale"): "embeddings.LayerNorm.weight",
    ("embed_norm", "bias"): "embeddings.LayerNorm.bias",
}
_MODULES_OF_A_LAYER = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


class Encoder(NamedTuple):
    """An encoder as it was read.

    Attributes:
      path: its folder.
      bert: the network, replicated over the mesh.
      tokenizer: of `transformers`.
      extra: tensors of the folder that are no part of the network, by name.
    """

    path: Path
    bert: Bert
    tokenizer: Any
    extra: dict[str, np.ndarray]


def resolve_encoder(name: str, option: str, revision: str | None = None, weights: bool = True) -> Path:
    """Find the folder of an encoder that an option names; a Hub id is downloaded.

    Raises:
      UserError: there is none, or it has only pickled weights.
    """
    extra = (*_SETTINGS, DENSE) if weights else _SETTINGS
    path = model_files.resolve_path(name, revision, weights, option=option, extra=extra)
    if not path.is_dir():
        raise UserError(f"config.{option}={name!r}: name a Hugging Face folder or a Hub id.")
    pickled = [file for file in _PICKLES if (path / file).is_file()]
    if pickled and not any((path / file).is_file() for file in (huggingface.WEIGHTS, huggingface.WEIGHTS_INDEX)):
        raise UserError(
            f"config.{option}: {path} has its weights as a pickle ({pickled[0]}), which can run code and is never "
            'read; convert it once, where you trust it: python -c "import torch, safetensors.torch as s; '
            "w = torch.load('pytorch_model.bin', weights_only=True); "
            "s.save_file({k: v.clone() for k, v in w.items()}, 'model.safetensors')\""
        )
    return path


def encoder_fingerprint(name: str, option: str) -> str:
    """Identify an encoder's content, for a recipe: weights, tokenizer and the settings beside them."""
    path = resolve_encoder(name, option, weights=False)
    settings = [path / file for file in (*_SETTINGS, DENSE) if (path / file).is_file()]
    return model_files.fingerprint(name, also=tuple(settings))


def read_bert_config(folder: Path) -> BertConfig:
    """Read the sizes of an encoder from its `config.json`.

    Raises:
      UserError: it is missing or damaged, or what it describes is not implemented.
    """
    file = folder / huggingface.CONFIG
    if not file.is_file():
        raise UserError(f"{folder} has no config.json; name a Hugging Face folder of an encoder.")
    fields = Fields(read_json_object(file), str(file))
    family, activation = fields.text("model_type", "bert"), fields.text("hidden_act", "gelu")
    refused = {
        "model_type": (family in _FAMILIES, family, ", ".join(_FAMILIES)),
        "hidden_act": (activation in _ACTIVATIONS, activation, ", ".join(_ACTIVATIONS)),
        "position_embedding_type": (
            (kind := fields.text("position_embedding_type", "absolute")) == "absolute",
            kind,
            "absolute",
        ),
        "is_decoder": (not (decodes := fields.flag("is_decoder", False)), decodes, "false"),
    }
    for name, (good, value, known) in refused.items():
        if not good:
            raise UserError(f"{file}: {name} {quote(value)} is not implemented for encoders; known: {known}.")
    size = lambda name, most=1 << 24: fields.integer(name, None, 1, most) or _missing(file, name)
    config = BertConfig(
        vocab_size=size("vocab_size"),
        embed_dim=size("hidden_size"),
        num_layers=size("num_hidden_layers", 4096),
        num_heads=size("num_attention_heads"),
        mlp_dim=size("intermediate_size"),
        position_rows=size("max_position_embeddings"),
        type_rows=fields.integer("type_vocab_size", 2, 1),
        norm_eps=fields.number("layer_norm_eps", 1e-12, 0, 1),
        activation=_ACTIVATIONS[activation],
        first_position=0 if family == "bert" else 1 + fields.integer("pad_token_id", 1),
    )
    if config.embed_dim % config.num_heads or config.max_positions < 8:
        raise UserError(f"{file}: its sizes do not go together (hidden_size, num_attention_heads, positions).")
    return config


def _missing(file: Path, name: str):
    raise UserError(f"{file} has no {name}.")


def load_encoder(folder: Path, mesh: Mesh, dtype=jnp.float32) -> Encoder:
    """Load an encoder, replicated over a mesh: batches of texts are what is split.

    Both layouts are read: with the prefix 'bert.' (or 'roberta.'), and without.

    Raises:
      UserError: tensors are missing or unknown, of another shape or not finite; the tokenizer is not the model's.
    """
    config = read_bert_config(folder)
    tokenizer = read_tokenizer(folder)
    check_ids(tokenizer.get_vocab().values(), f"The tokenizer of {folder}", config.vocab_size)
    tensors, extra = {}, {}
    for file in huggingface.weight_files(folder):
        for name, read in _tensors(file):
            bare = name.removeprefix("bert.").removeprefix("roberta.")
            if bare.startswith(("embeddings.", "encoder.")) and not bare.startswith(_IGNORED):
                tensors[bare] = read
            elif not bare.startswith(_IGNORED):
                extra[name] = read()
    abstract = nnx.eval_shape(lambda: Bert(config, dtype, nnx.Rngs(0)))
    everywhere, filled = NamedSharding(mesh, PartitionSpec()), []
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        array = _read(tensors, folder, path, variable.get_value().shape).astype(dtype)
        filled.append((path, variable.replace(jax.device_put(array, everywhere))))
    if tensors:
        raise UserError(f"{folder}: tensors are unknown: {', '.join(sorted(tensors)[:8])}.")
    graph, _ = nnx.split(abstract)
    return Encoder(folder, nnx.merge(graph, nnx.from_flat_state(filled)), tokenizer, extra)


def _read(tensors: dict[str, Callable], folder: Path, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Take one parameter's tensors out of those that a folder has, stacked where it is of the layers."""
    if path in _OUTSIDE_THE_LAYERS:
        names, each = [_OUTSIDE_THE_LAYERS[path]], shape
    else:
        _, part, kind = path
        kind = "bias" if kind == "bias" else "weight"
        names = [f"encoder.layer.{i}.{_MODULES_OF_A_LAYER[part]}.{kind}" for i in range(shape[0])]
        each = shape[1:]
    found = []
    for name in names:
        if name not in tensors:
            raise UserError(f"{folder}: the tensor {name} is missing.")
        array = tensors.pop(name)()
        if array.shape != each:
            raise UserError(f"{folder}: the tensor {name} is {array.shape}, not {each}.")
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"{folder}: {name} holds values that are not finite (NaN or Inf); download it again.")
        found.append(array)
    return found[0] if each == shape else np.stack(found)


def _tensors(file: Path) -> list[tuple[str, Callable[[], np.ndarray]]]:
    """The tensors of a safetensors file by name, each read when its function is called."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(file, "numpy")
        return [(name, lambda name=name: handle.get_tensor(name)) for name in handle.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or incomplete ({first_line(error)}); download it again.") from error


def read_projection(encoder: Encoder) -> np.ndarray:
    """The projection [size of a vector, model width] of a ColBERT checkpoint, in either of its layouts.

    Raises:
      UserError: there is none, or it is of another shape.
    """
    weight = encoder.extra.get("linear.weight")
    if weight is None and (file := encoder.path / DENSE).is_file():
        tensors = dict(_tensors(file))
        weight = tensors["linear.weight"]() if "linear.weight" in tensors else None
    if weight is None:
        raise UserError(f"{encoder.path} is not a ColBERT checkpoint: it has no linear.weight, nor one in {DENSE}.")
    if weight.ndim != 2 or weight.shape[1] != encoder.bert.config.embed_dim:
        raise UserError(
            f"{encoder.path}: linear.weight is {weight.shape}, not [size, {encoder.bert.config.embed_dim}]."
        )
    return weight.astype(np.float32)
