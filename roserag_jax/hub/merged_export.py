"""A network with its adapter merged in, as a Hugging Face folder that transformers 4 and 5 and vLLM load.

Configuration and tokenizer are copied from the base model's folder as they are. What only transformers 5 understands
(RoPE under `rope_parameters`, its own tokenizer classes) is written in version 4's spelling beside it.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from roserag_jax.hub import huggingface
from roserag_jax.hub.model_files import ModelFiles
from roserag_jax.hub.tensor_names import tensor_name
from roserag_jax.hub.tokenizer import read_tokenizer
from roserag_jax.models.lora import LoRAParam
from roserag_jax.models.transformer import Transformer


def merged_tensors(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(name, tensor)` of the network with its adapter merged in, in Hugging Face's names and layouts.

    Tensors keep the dtype of the base; the sum is taken in float32.
    """
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(LoRAParam))):
        name = tensor_name(path, model.config)
        value = np.asarray(variable.get_value())
        if "{}" not in name:
            yield name, value
            continue
        linear = getattr(model.layers, path[1])
        delta = None
        if path[-1] == "weight" and linear.lora is not None:
            a, b = np.asarray(linear.lora_a[...]), np.asarray(linear.lora_b[...])
            delta = linear.lora.scale * np.matmul(a, b).mT
        for i, layer in enumerate(value):
            if delta is not None:
                layer = (layer.astype(np.float32) + delta[i]).astype(value.dtype)
            yield name.format(i), np.ascontiguousarray(layer)


def save_weights(model: Transformer, folder: Path, shard_bytes: int = 4 << 30) -> None:
    """Write the merged network as safetensors, in shards with an index where it is larger than `shard_bytes`."""
    from safetensors.numpy import save_file

    shards, size = [{}], 0
    for name, tensor in merged_tensors(model):
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / huggingface.WEIGHTS, metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for shard in shards for t in shard.values())
    _write_json(folder / huggingface.WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_config(source: ModelFiles, dtype: str, folder: Path) -> None:
    """Write `config.json`: the base model's own with another dtype, and version 4's spelling of RoPE beside 5's."""
    file = source.path / huggingface.CONFIG
    config = json.loads(file.read_bytes()) if file.is_file() else source.transformers_config().to_dict()
    spelled = [key for key in ("dtype", "torch_dtype") if key in config] if file.is_file() else ["dtype", "torch_dtype"]
    config |= dict.fromkeys(spelled or ["torch_dtype"], dtype)
    if config.get("rope_parameters") and "rope_theta" not in config:
        config |= _rope_of_version_4(source.transformers_config().rope_parameters)
    _write_json(folder / huggingface.CONFIG, config)


def _rope_of_version_4(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters under the names of transformers 4."""
    local = {}
    if "full_attention" in rope:  # Gemma 3
        local = {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling} | local


def save_generation_config(source: ModelFiles, stop_ids: tuple[int, ...], pad_id: int, folder: Path) -> None:
    """Write `generation_config.json`: the base model's own, or where there is none the tokens that end a turn."""
    file = source.path / huggingface.GENERATION_CONFIG
    if file.is_file():
        shutil.copyfile(file, folder / file.name)
    else:
        _write_json(folder / file.name, {"eos_token_id": list(stop_ids), "pad_token_id": pad_id})


def save_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a Hugging Face folder (its files as they are) or of a GGUF file."""
    if path.suffix == ".gguf":
        read_tokenizer(path).save_pretrained(folder)
    else:
        for file in huggingface.tokenizer_files(path):
            (folder / file.relative_to(path)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(path))
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_bytes())
    # Version 5 saves what is all in tokenizer.json under a class of its own, and extra special tokens as a list.
    changes = {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        changes["additional_special_tokens"] = config.pop("extra_special_tokens")
    if changes:
        _write_json(file, config | changes)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
