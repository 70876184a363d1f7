"""What a network is: one `ModelConfig`, read from a `transformers` configuration.

A family differs from the Llama block in a handful of ways, each of them a field here. A setting that changes the
mathematics and that the network does not implement is refused by name, never ignored.
"""

import dataclasses
import math
from typing import Any

from roserag_jax.errors import UserError, first_line, quote


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and mathematics of a decoder. Hashable, so that it can be closed over by `jit`."""

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, Any], ...] = ()  # items of Hugging Face's `rope_parameters`; () means plain RoPE
    rope_local_theta: float | None = None  # RoPE base of the sliding layers (Gemma 3)
    tie_embeddings: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight (Gemma)
    post_norms: bool = False  # a second norm after attention and after the MLP (Gemma 2 and 3)
    activation: str = "silu"
    embed_scale: float = 1.0
    query_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()  # per layer; () means no layer slides
    max_positions: int = 0

    @property
    def attention_scale(self) -> float:
        """What queries are multiplied by before the dot product."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# What each scaling of RoPE takes beside the base.
_ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _rope(parameters: dict, source: str) -> tuple[float, tuple]:
    """Base and scaling items from one `rope_parameters` dict."""
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise UserError(f"{source}: rope_type {quote(kind)} is not implemented; known: {', '.join(_ROPE_TYPES)}.")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{source}: partial_rotary_factor {quote(parameters['partial_rotary_factor'])} is not implemented."
        )
    needed = _ROPE_TYPES[kind]
    for name in ("rope_theta", *needed):
        value = parameters.get(name)
        if not _is_number(value) or not 0 < value <= 1e12:
            raise UserError(f"{source}: {name}={quote(value)} of RoPE ({kind}) is not a positive number.")
    if kind == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        raise UserError(f"{source}: low_freq_factor of RoPE is not below its high_freq_factor.")
    scaling = tuple((name, parameters[name]) for name in sorted(needed))
    return float(parameters["rope_theta"]), (*scaling, ("rope_type", kind)) if scaling else ()


def _common(hf, source: str) -> dict:
    """The fields that every family reads alike from a `transformers` config object."""
    activation = getattr(hf, "hidden_activation", None) or getattr(hf, "hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{source}: activation {quote(activation)} is not implemented; known: {', '.join(_ACTIVATIONS)}."
        )
    theta, scaling = (0.0, ()) if "full_attention" in hf.rope_parameters else _rope(hf.rope_parameters, source)
    return {
        "family": hf.model_type,
        "vocab_size": hf.vocab_size,
        "embed_dim": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "mlp_dim": hf.intermediate_size,
        "norm_eps": hf.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": hf.tie_word_embeddings,
        "qkv_bias": bool(getattr(hf, "attention_bias", False)),
        "out_bias": bool(getattr(hf, "attention_bias", False)),
        "activation": _ACTIVATIONS[activation],
        "max_positions": hf.max_position_embeddings,
    }


def _sliding(hf, source: str) -> dict:
    """Window and the layers it applies to, from `sliding_window` and `layer_types`."""
    types = getattr(hf, "layer_types", None) or []
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{source}: layer_types {sorted(unknown)} are not implemented.")
    layers = tuple(kind == "sliding_attention" for kind in types)
    window = getattr(hf, "sliding_window", None)
    if window is None or not any(layers):
        return {}
    return {"sliding_window": window, "sliding_layers": layers}


def _llama(hf, source):
    return _common(hf, source) | {"mlp_bias": bool(hf.mlp_bias)}


def _mistral(hf, source):
    window = {"sliding_window": hf.sliding_window, "sliding_layers": (True,) * hf.num_hidden_layers}
    return _common(hf, source) | (window if hf.sliding_window else {})


def _qwen2(hf, source):
    return _common(hf, source) | {"qkv_bias": True} | _sliding(hf, source)


def _qwen3(hf, source):
    return _common(hf, source) | {"qk_norm": True} | _sliding(hf, source)


def _gemma(hf, source):
    return _common(hf, source) | {"norm_plus_one": True, "embed_scale": hf.hidden_size**0.5}


def _gemma2(hf, source):
    return (
        _gemma(hf, source)
        | {
            "post_norms": True,
            "query_scale": hf.query_pre_attn_scalar**-0.5,
            "attention_softcap": hf.attn_logit_softcapping,
            "final_softcap": hf.final_logit_softcapping,
        }
        | _sliding(hf, source)
    )


def _gemma3(hf, source):
    theta, scaling = _rope(hf.rope_parameters["full_attention"], source)
    local_theta, local_scaling = _rope(hf.rope_parameters["sliding_attention"], source)
    if local_scaling:
        raise UserError(f"{source}: RoPE scaling on sliding layers is not implemented.")
    return _gemma2(hf, source) | {
        "qk_norm": True,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_local_theta": local_theta,
    }


# Fields that change what a known model type computes, by what they would need.
_REFUSED = {
    "quantization_config": "use the original, unquantized weights",
    "use_bidirectional_attention": "attention here is causal",
    "auto_map": "the model comes with code of its own, which is never run",
}
_READERS = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}


MOST_LAYERS = 4096  # more are a damaged file


def check_family(model_type: str | None, source: str) -> None:
    """Refuse a model type that no reader knows.

    Raises:
      UserError: it is unknown.
    """
    if model_type not in _READERS:
        known = ", ".join(_READERS)
        raise UserError(f"{source}: model type {quote(model_type)} is not implemented; known: {known}.")


def from_hf(hf, source: str) -> ModelConfig:
    """Read a `transformers` config object; `source` names it in errors.

    Raises:
      UserError: the model type, or a setting that changes the mathematics, is not implemented.
    """
    check_family(hf.model_type, source)
    for field, why in _REFUSED.items():
        if getattr(hf, field, None):
            raise UserError(f"{source}: {field}={quote(getattr(hf, field))} is not implemented: {why}.")
    try:
        config = ModelConfig(**_READERS[hf.model_type](hf, source))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{source}: a setting has an impossible type or value ({first_line(error)}).") from error
    _check_values(config, source)
    return config


# The numbers of a configuration and their bounds; sizes are whole.
_SIZES = {name: 1 << 24 for name in "vocab_size embed_dim num_heads num_kv_heads head_dim mlp_dim".split()}
_SIZES |= {"num_layers": MOST_LAYERS, "max_positions": 1 << 31, "sliding_window": 1 << 31}
_NUMBERS = {
    "norm_eps": 1.0,
    "rope_theta": 1e12,
    "rope_local_theta": 1e12,
    "embed_scale": 1e6,
    "query_scale": 1e6,
    "attention_softcap": 1e9,
    "final_softcap": 1e9,
}
_MAY_BE_ABSENT = ("sliding_window", "rope_local_theta", "query_scale", "attention_softcap", "final_softcap")


def _check_values(c: ModelConfig, source: str) -> None:
    """Refuse values that no network has: of another type, out of bounds, or at odds with one another."""
    for name, most in (_SIZES | _NUMBERS).items():
        value = getattr(c, name)
        if value is None and name in _MAY_BE_ABSENT:
            continue
        whole = name not in _SIZES or isinstance(value, int)
        if not _is_number(value) or not whole or not 0 < value <= most:
            raise UserError(f"{source}: {name}={quote(value)} is not a number above 0 and up to {most:g}.")
    if c.num_heads % c.num_kv_heads or c.head_dim % 2:
        raise UserError(
            f"{source}: {c.num_heads} query heads, {c.num_kv_heads} key/value heads and a head size of {c.head_dim} "
            "do not go together."
        )
    if len(c.sliding_layers) not in (0, c.num_layers):
        raise UserError(f"{source}: layer_types names {len(c.sliding_layers)} layers of {c.num_layers}.")
    if not isinstance(c.tie_embeddings, bool):
        raise UserError(f"{source}: tie_word_embeddings={quote(c.tie_embeddings)} is not true or false.")
