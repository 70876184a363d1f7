"""Adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`, made and read without torch."""

import json
import re
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from roserag_jax.distributed.sharding import sharding
from roserag_jax.errors import UserError, first_line, quote
from roserag_jax.hub.json_files import Fields, read_json_object
from roserag_jax.hub.loading import abstract_model
from roserag_jax.hub.tensor_names import module_name
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import PROJECTIONS, LoRAConfig, LoRAParam

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's, before the name of a module in the model


def _module(projection: str, layer: int) -> str:
    return f"model.layers.{layer}.{module_name(projection)}"


def _tensor_name(projection: str, kind: str, layer: int) -> str:
    letter = {"lora_a": "A", "lora_b": "B"}[kind]
    return f"{_PREFIX}{_module(projection, layer)}.lora_{letter}.weight"


def adapter_files(adapter: nnx.State, lora: LoRAConfig, base: str, revision: str = "") -> dict[str, str | bytes]:
    """Make the files of a folder that `peft.PeftModel.from_pretrained(model, folder)` and vLLM load, by name.

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
        CONFIG: json.dumps(config, indent=2) + "\n",
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }


# PEFT's fields that do not change what an adapter computes, or are read below.
_READ = set(
    "r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_to_transform layers_pattern "
    "init_lora_weights task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "megatron_core megatron_config qalora_group_size loftq_config eva_config corda_config lora_ga_config "
    "runtime_config ensure_weight_tying".split()
)
# All others must be as if they were absent, but for these.
_PLAIN = {"peft_type": "LORA", "bias": "none"}
# Ways to begin an adapter that change the base weights with it; PEFT can convert such an adapter when it saves one.
_WITH_ITS_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def read_lora_config(folder: epath.Path) -> LoRAConfig:
    """Read rank, alpha, dropout and targets of a PEFT adapter.

    Raises:
      UserError: the folder is not a LoRA adapter, is damaged, or uses something that the network does not implement.
    """
    fields = _read_fields(folder)
    return _lora_config(fields, lambda: _read_tensors(folder))


def _read_fields(folder: epath.Path) -> Fields:
    """The fields of `adapter_config.json`, after those that are not implemented were refused."""
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{folder} holds no adapter (no {CONFIG}).")
    fields = Fields(read_json_object(file), str(file))
    for key in sorted({*_PLAIN, *fields.values} - _READ):
        value = fields.values.get(key, "none" if key == "bias" else None)  # as in PEFT
        if (value or None) != _PLAIN.get(key):
            raise UserError(f"{file}: {key}={quote(value)} is not implemented.")
    if (start := str(fields.values.get("init_lora_weights"))).startswith(_WITH_ITS_BASE):
        raise UserError(
            f"{file}: init_lora_weights={quote(start)} belongs to base weights that it changed; save it converted "
            "(path_initial_model_for_weight_conversion)."
        )
    return fields


def _lora_config(fields: Fields, tensors) -> LoRAConfig:
    """The adapter's configuration; absent fields are PEFT's defaults. `tensors()` reads its tensors."""
    targets = fields.values.get("target_modules")
    if targets == "all-linear":
        targets = PROJECTIONS
    elif isinstance(targets, list) and all(isinstance(t, str) for t in targets):
        targets = {t.rsplit(".", 1)[-1] for t in targets}
    elif targets is None or isinstance(targets, str):  # a pattern; what it matched is there by name
        targets = {m.group(1) for m in (re.search(r"\.(\w+)\.lora_A\.weight$", name) for name in tensors()) if m}
    else:
        raise UserError(f"{fields.where}: target_modules={quote(targets)} is not a list of modules or a pattern.")
    if unknown := sorted(set(targets) - set(PROJECTIONS)):
        known = ", ".join(PROJECTIONS)
        raise UserError(f"{fields.where}: target_modules {quote(unknown)} are not implemented; known: {known}.")
    if not targets:
        raise UserError(f"{fields.where}: target_modules names no module, and {WEIGHTS} has none.")
    return LoRAConfig(
        rank=fields.integer("r", 8, 1, 1 << 16),
        alpha=fields.number("lora_alpha", 8, -1e6, 1e6),
        dropout=fields.number("lora_dropout", 0.0, 0.0, 1.0),
        targets=tuple(t for t in PROJECTIONS if t in targets),  # peft keeps them in no order
        rslora=fields.flag("use_rslora", False),
    )


def _read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of `adapter_model.safetensors` by name, in float32."""
    from safetensors import deserialize

    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; only safetensors are read, never pickles.")
    dtypes = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jax.numpy.bfloat16}
    try:
        found = deserialize(file.read_bytes())
    except Exception as error:  # safetensors and the file system raise many kinds
        raise UserError(f"{file} cannot be read ({first_line(error)}); copy it again.") from error
    tensors = {}
    for name, tensor in found:
        if tensor["dtype"] not in dtypes:
            raise UserError(f"{file}: {quote(name)} is of type {tensor['dtype']}, not one of {', '.join(dtypes)}.")
        value = np.frombuffer(tensor["data"], dtypes[tensor["dtype"]]).reshape(tensor["shape"]).astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"{file}: {quote(name)} holds values that are not finite (NaN or Inf).")
        tensors[name] = value
    return tensors


def _is_target(fields: Fields, module: str, layer: int, tensors: dict[str, Any]) -> bool:
    """Whether an adapter has a module, by PEFT's rules for a list of names; else the tensors say so."""
    targets, layers = fields.values.get("target_modules"), fields.integers("layers_to_transform")
    if not isinstance(targets, list) or fields.values.get("exclude_modules"):
        return any(f"{_PREFIX}{module}.lora_{letter}.weight" in tensors for letter in "AB")
    return (not layers or layer in layers) and any(
        module == target or module.endswith(f".{target}") for target in targets
    )


def load_adapter(folder: epath.Path, model_config: ModelConfig, mesh: Mesh) -> tuple[LoRAConfig, nnx.State]:
    """Read a PEFT adapter for the network of `model_config`.

    A module that the adapter leaves out in some layers has zeros there: it changes nothing, and training leaves it so.

    Raises:
      UserError: tensors are missing, unknown, not finite, or of another type or shape.
    """
    fields, tensors, file = _read_fields(folder), _read_tensors(folder), folder / WEIGHTS
    lora = _lora_config(fields, lambda: tensors)
    state = nnx.state(abstract_model(model_config, lora, np.float32), LoRAParam)

    def stack(path, shape):
        value = np.zeros(shape, np.float32)
        for i in range(shape[0]):
            _, projection, kind = path
            if not _is_target(fields, _module(projection, i), i, tensors):
                continue
            name = _tensor_name(projection, kind, i)
            if name not in tensors:
                raise UserError(f"{file}: tensors are missing, first {name}; copy the adapter again.")
            if (found := tensors[name].shape) != (needed := shape[:0:-1]):
                raise UserError(f"{file}: {name} has shape {found}, this model and {CONFIG} need {needed}.")
            value[i] = tensors[name].T
            read.add(name)
        return value

    read = set()
    values = {path: stack(path, v.get_value().shape) for path, v in nnx.to_flat_state(state)}
    if unknown := sorted(set(tensors) - read):
        raise UserError(f"{file}: {len(unknown)} tensors are unknown, first {quote(unknown[0])}.")
    placed = []
    for path, variable in nnx.to_flat_state(state):
        value = values[path]
        layout = sharding(value.shape, variable.get_metadata()["axes"], mesh)
        placed.append((path, variable.replace(jax.make_array_from_callback(value.shape, layout, value.__getitem__))))
    return lora, nnx.from_flat_state(placed)
