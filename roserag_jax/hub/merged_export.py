"""The network with its adapter merged in, written as a Hugging Face folder."""

import json
from pathlib import Path

import numpy as np
from flax import nnx

from roserag_jax.hub.model_files import ModelFiles
from roserag_jax.hub.tensor_names import tensor_name
from roserag_jax.models.lora import LoRAParam
from roserag_jax.models.transformer import Transformer


def merged_tensors(model: Transformer):
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


def save_merged(model: Transformer, source: ModelFiles, folder: Path, shard_bytes: int = 4 << 30) -> None:
    """Write config, generation config and sharded safetensors of the merged network into `folder`."""
    from safetensors.numpy import save_file

    hf = source.transformers_config()
    hf.dtype = str(np.dtype(model.embed[...].dtype))
    hf.save_pretrained(folder)
    generation = source.path / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_text(generation.read_text())

    shards, size = [{}], 0
    for name, tensor in merged_tensors(model):
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
