"""GGUF files: llama.cpp's names, layouts and header, spoken to the rest as Hugging Face's.

A family is a line in each of the tables below. What a header cannot say exactly (and what the network does not
implement) is refused by name.
"""

import functools
from pathlib import Path

import numpy as np

from roserag_jax.errors import UserError
from roserag_jax.models import config as model_config
from roserag_jax.models import rope

# llama.cpp's architecture: Hugging Face's model type and class.
FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = _NAMES | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# A tensor of RoPE's frequency factors, which belongs to the header in all but its place.
_ROPE_FACTORS = "rope_freqs.weight"


def hf_name(name: str, arch: str) -> str:
    """Hugging Face's name of a GGUF tensor; the name itself where there is none, so that it is reported as unknown."""
    names = _GEMMA_NAMES if arch.startswith("gemma") else _NAMES
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{names.get(part, part)}.{kind}"
    part, _, kind = name.partition(".")
    return f"{names.get(part, part)}.{kind}"


@functools.lru_cache(maxsize=1)
def read(path: Path):
    """The `gguf.GGUFReader` of a file; it takes seconds where the vocabulary is large, and two readers ask for it.

    It slices its memory map a million times for a large vocabulary, which takes a plain array a third of the time.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        data = property(lambda self: self._plain, lambda self, mapped: setattr(self, "_plain", np.asarray(mapped)))

    if not path.is_file():
        raise UserError(f"config.model: there is no file {path}.")
    try:
        return Reader(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is damaged, incomplete or no GGUF file: {error}") from error


class GGUFFile:
    """A `.gguf` file, dequantised tensor by tensor to float32 (every type that the `gguf` package dequantises)."""

    def __init__(self, path: Path):
        reader = read(path)
        self.path = path
        field = lambda key: reader.fields[key].contents() if key in reader.fields else None
        self.arch = field("general.architecture")
        if self.arch not in FAMILIES:
            raise UserError(
                f"{path}: GGUF architecture {self.arch!r} is unknown here; known: {', '.join(FAMILIES)}. "
                "Use the model's Hugging Face folder."
            )
        self._tensors = {hf_name(t.name, self.arch): t for t in reader.tensors if t.name != _ROPE_FACTORS}
        factors = next((np.array(t.data, np.float32) for t in reader.tensors if t.name == _ROPE_FACTORS), None)
        self._hf = _transformers_config(self.arch, field, self.shapes(), factors, str(path))
        self.config = model_config.from_hf(self._hf, str(path))
        self._dequantized = functools.lru_cache(maxsize=1)(self._dequantize)  # a tensor is read once per device

    def shapes(self):
        """Shape of every tensor, by name (GGUF lists dimensions fastest first)."""
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name, index):
        """Read one piece of the dequantised tensor."""
        return self._dequantized(name)[index]

    def transformers_config(self):
        """The `transformers` configuration that the header amounts to."""
        return self._hf

    def _dequantize(self, name):
        import gguf

        tensor = self._tensors[name]
        try:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{self.path}: {tensor.name} is of type {tensor.tensor_type.name}: {error}") from error
        if self.arch.startswith("gemma") and name.endswith("norm.weight"):
            return weights - 1  # llama.cpp stores what Gemma's norms multiply by, Hugging Face what is added to 1
        for part, heads in (("q_proj", self.config.num_heads), ("k_proj", self.config.num_kv_heads)):
            if self.arch == "llama" and f".{part}." in name:
                # llama.cpp stores each head's rotary pairs side by side; Hugging Face stores the two halves apart.
                pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])
                weights = pairs.swapaxes(1, 2).reshape(weights.shape)
        return weights


def _transformers_config(arch: str, field, shapes, factors, source: str):
    """The `transformers` configuration of a header; `field(key)` gives a metadata value or None."""
    import transformers

    get = lambda key, default=None: default if field(f"{arch}.{key}") is None else field(f"{arch}.{key}")
    heads, dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", dim // heads)
    refused = {
        "rope.dimension_count": (get("rope.dimension_count", head_dim), head_dim),
        "attention.value_length": (get("attention.value_length", head_dim), head_dim),
        "expert_count": (get("expert_count", 0), 0),
    }
    for key, (value, allowed) in refused.items():
        if value != allowed:
            raise UserError(f"{source}: {arch}.{key}={value} is not implemented (only {allowed} is).")
    model_type, architecture = FAMILIES[arch]
    rope_parameters = _rope(get, factors, head_dim, source)
    fields = {
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "hidden_size": dim,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "max_position_embeddings": get("context_length"),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    if model_type.startswith("gemma"):
        # llama.cpp writes no query scale; its 27B models, known by their layers, scale by the width of a head's share.
        largest = (arch, get("block_count")) in (("gemma2", 46), ("gemma3", 62))
        fields["query_pre_attn_scalar"] = dim // heads if largest else head_dim
        names = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
        said = {name.removeprefix("attention."): get(name) for name in names}
        # Early files say none of them; they are then the family's.
        fields |= {name: value for name, value in said.items() if value is not None}
    if model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10000.0)}
        fields["rope_parameters"] = {"full_attention": rope_parameters, "sliding_attention": local}
    if model_type == "llama" and "model.layers.0.self_attn.q_proj.bias" in shapes:
        fields["attention_bias"] = True
    return transformers.AutoConfig.for_model(model_type, architectures=[architecture], **fields)


def _rope(get, factors, head_dim: int, source: str) -> dict:
    """RoPE's parameters. Llama 3.1's scaling comes as a tensor of factors, from which it is recovered."""
    kind, theta = get("rope.scaling.type", "none"), get("rope.freq_base", 10000.0)
    if factors is not None:
        stretch = float(factors.max())
        scaling = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": stretch,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        plain = rope.inverse_frequencies(head_dim, theta)
        scaled = rope.inverse_frequencies(head_dim, theta, tuple(scaling.items()))
        if np.allclose(plain / factors, scaled, rtol=1e-3):
            return scaling
        raise UserError(f"{source}: {_ROPE_FACTORS} is not Llama 3.1's scaling; use the model's Hugging Face folder.")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": get("rope.scaling.factor")}
    if kind != "none":
        raise UserError(f"{source}: rope.scaling.type={kind!r} is not implemented; use the Hugging Face folder.")
    return {"rope_type": "default", "rope_theta": theta}
