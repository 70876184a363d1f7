"""The adapter as PEFT writes it: `adapter_config.json` and `adapter_model.safetensors`, made and read without torch."""

import json

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from roserag_jax.distributed.sharding import sharding
from roserag_jax.errors import UserError
from roserag_jax.hub.loading import abstract_model
from roserag_jax.hub.tensor_names import module_name
from roserag_jax.models.lora import PROJECTIONS, LoRAConfig, LoRAParam


def _tensor_name(projection: str, kind: str, layer: int) -> str:
    letter = {"lora_a": "A", "lora_b": "B"}[kind]
    return f"base_model.model.model.layers.{layer}.{module_name(projection)}.lora_{letter}.weight"


def adapter_files(adapter: nnx.State, lora: LoRAConfig, base: str, revision: str = "") -> dict[str, str | bytes]:
    """The files of a folder that `peft.PeftModel.from_pretrained(model, folder)` and vLLM load, by name.

    Args:
      base, revision: what the adapter belongs to, written as `base_model_name_or_path` and `revision`.
    """
    from safetensors.numpy import save

    tensors = {}
    for (_, projection, kind), variable in nnx.to_flat_state(adapter):
        for i, layer in enumerate(np.asarray(variable.get_value())):
            tensors[_tensor_name(projection, kind, i)] = np.ascontiguousarray(layer.T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": lora.rslora,
        "use_dora": False,
    }
    return {
        "adapter_config.json": json.dumps(config, indent=2) + "\n",
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


# What the network implements of PEFT's fields that change what an adapter computes or holds.
_PLAIN = {"peft_type": "LORA", "bias": "none"} | dict.fromkeys(
    "use_dora fan_in_fan_out lora_bias modules_to_save rank_pattern alpha_pattern exclude_modules layers_to_transform "
    "layer_replication use_qalora alora_invocation_tokens trainable_token_indices target_parameters use_bdlora "
    "arrow_config kasa_config velora_config monteclora_config".split()
)
# Ways to begin an adapter that change the base weights with it; PEFT can convert such an adapter when it saves one.
_WITH_ITS_BASE = ("pissa", "corda", "olora", "loftq")


def read_lora_config(folder: epath.Path) -> LoRAConfig:
    """Rank, alpha, dropout and targets of a PEFT adapter.

    Raises:
      UserError: the folder is no LoRA adapter, or uses something that the network does not implement.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no adapter (no adapter_config.json).")
    config = json.loads(file.read_text())
    for key, wanted in _PLAIN.items():
        if (config.get(key) or None) != wanted:
            raise UserError(f"{file}: {key}={config[key]!r} is not implemented.")
    if (start := str(config.get("init_lora_weights"))).startswith(_WITH_ITS_BASE):
        raise UserError(
            f"{file}: init_lora_weights={start!r} belongs to base weights that it changed; save it converted "
            "(path_initial_model_for_weight_conversion)."
        )
    targets = config["target_modules"]
    if isinstance(targets, str) and targets != "all-linear":
        raise UserError(f"{file}: target_modules={targets!r} is a pattern, which is not implemented; list the modules.")
    targets = PROJECTIONS if targets == "all-linear" else targets
    if unknown := set(targets) - set(PROJECTIONS):
        raise UserError(f"{file}: target_modules {sorted(unknown)} are unknown; known: {', '.join(PROJECTIONS)}.")
    targets = tuple(t for t in PROJECTIONS if t in targets)  # peft keeps them in no order
    dropout, rslora = config.get("lora_dropout", 0.0), bool(config.get("use_rslora"))
    return LoRAConfig(config["r"], config["lora_alpha"], dropout, targets, rslora)


def load_adapter(folder: epath.Path, model_config, mesh: Mesh) -> tuple[LoRAConfig, nnx.State]:
    """Read a PEFT adapter for the network of `model_config`.

    Raises:
      UserError: tensors are missing, left over or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as tensors_of

    lora, file = read_lora_config(folder), folder / "adapter_model.safetensors"
    try:
        tensors = tensors_of(file.read_bytes())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    state = nnx.state(abstract_model(model_config, lora, np.float32), LoRAParam)

    def stack(path, shape):
        names = [_tensor_name(*path[1:], i) for i in range(shape[0])]
        if absent := [n for n in names if n not in tensors]:
            raise UserError(f"{file}: {len(absent)} tensors are missing, first {absent[0]}.")
        value = np.stack([tensors.pop(n).T.astype(np.float32) for n in names])
        if value.shape != shape:
            raise UserError(f"{file}: {names[0]} has shape {value.shape[:0:-1]}, this model needs {shape[:0:-1]}.")
        return value

    values = {path: stack(path, v.get_value().shape) for path, v in nnx.to_flat_state(state)}
    if tensors:
        raise UserError(f"{file}: {len(tensors)} tensors are unknown, first {min(tensors)}.")
    placed = []
    for path, variable in nnx.to_flat_state(state):
        value = values[path]
        layout = sharding(value.shape, variable.get_metadata()["axes"], mesh)
        placed.append((path, variable.replace(jax.make_array_from_callback(value.shape, layout, value.__getitem__))))
    return lora, nnx.from_flat_state(placed)
