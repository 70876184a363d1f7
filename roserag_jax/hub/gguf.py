"""GGUF files: llama.cpp's header, tensor names and layouts, translated to Hugging Face's.

A family is a line in each of the tables below. What a header cannot say exactly, and what the network does not
implement, is refused by name.
"""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from roserag_jax.errors import UserError, first_line, quote
from roserag_jax.hub.json_files import Fields
from roserag_jax.hub.tensor_names import EMBEDDING, HEAD
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


# Header fields that the network does not implement, with the values that change nothing in what is computed.
_REFUSED = {
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (0.0, 1.0),
}


def hf_name(name: str, arch: str) -> str:
    """Hugging Face's name of a GGUF tensor; the name itself where there is none, so that it is reported as unknown."""
    names = _GEMMA_NAMES if arch.startswith("gemma") else _NAMES
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{names.get(part, part)}.{kind}"
    part, _, kind = name.partition(".")
    return f"{names.get(part, part)}.{kind}"


def part_files(path: Path) -> list[Path]:
    """List the files of a model: of one split by llama.cpp (`NAME-00001-of-00003.gguf`) all, else the file itself."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    name, _, count = match.groups()
    return [path.with_name(f"{name}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]


def read(path: Path) -> Any:
    """Read the header of a file, as a `gguf.GGUFReader`.

    It takes seconds where the vocabulary is large, and the tokenizer and the weights ask for it: the last are kept.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    try:
        status = path.stat()
        return _read(path, status.st_mtime_ns, status.st_size)
    except FileNotFoundError as error:
        raise UserError(f"config.model: there is no file {path}.") from error
    except PermissionError as error:
        raise UserError(f"{path} may not be read ({error.strerror}); change its permissions.") from error
    except Exception as error:  # a damaged header fails in many ways
        raise UserError(f"{path} is damaged, incomplete or not a GGUF file: {first_line(error)}") from error


_MOST_ENTRIES = 1 << 22  # of one list in a header; a vocabulary has a few 100,000


@functools.lru_cache(maxsize=2)
def _read(path: Path, changed: int, size: int) -> Any:
    import gguf

    array = int(gguf.GGUFValueType.ARRAY)  # compared a million times

    class Reader(gguf.GGUFReader):
        # It slices its memory map a million times for a large vocabulary; a plain array takes a third of the time.
        data = property(lambda self: self._plain, lambda self, mapped: setattr(self, "_plain", np.asarray(mapped)))

        def _get(self, offset, dtype, count=1, override_order=None):
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != count:
                raise ValueError("it ends too early")
            return found

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type == array and self._get(orig_offs + 4, np.uint64)[0] > _MOST_ENTRIES:
                raise ValueError(f"a list of more than {_MOST_ENTRIES} entries")
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_fields(self, offs, count):
            return super()._build_fields(offs, self._counted(count))

        def _build_tensor_info(self, offs, count):
            return super()._build_tensor_info(offs, self._counted(count))

        def _counted(self, count):
            if count > _MOST_ENTRIES:
                raise ValueError(f"a header of {count} entries")
            return count

    return Reader(path)


def tokens(path: Path) -> list[str]:
    """List the tokens of the vocabulary in a header, by id; empty where it has none."""
    field = read(path).fields.get("tokenizer.ggml.tokens")
    return [] if field is None else field.contents()


def header_fields(path: Path) -> Fields:
    """Read all of a header but its long lists (the vocabulary) as fields by llama.cpp's keys."""
    import gguf

    def value(field):
        short = gguf.GGUFValueType.ARRAY not in field.types[:1] or len(field.data) <= model_config.MOST_LAYERS
        return field.contents() if short else None

    try:
        return Fields({key: value(field) for key, field in read(path).fields.items()}, str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: a text in its header is not UTF-8.") from error


class GGUFFile:
    """A `.gguf` file, dequantized tensor by tensor to float32 (every type that the `gguf` package dequantizes)."""

    def __init__(self, path: Path):
        self.path, header = path, header_fields(path)
        self.arch = header.text("general.architecture", None)
        kind = header.text("general.type", "model")
        if kind != "model":
            raise UserError(f"{path} holds {quote(kind)} (general.type), not a model; name the model's own file.")
        tensors = _tensors(path, header)
        if self.arch not in FAMILIES:
            raise UserError(
                f"{path}: GGUF architecture {quote(self.arch)} is not implemented; known: {', '.join(FAMILIES)}. "
                "Use the model's Hugging Face folder."
            )
        if not tensors:
            raise UserError(f"{path} holds a vocabulary and no weights; name a file with the model's weights.")
        factors = tensors.pop(_ROPE_FACTORS, None)
        factors = None if factors is None else np.array(factors.data, np.float32)
        self._tensors = {hf_name(name, self.arch): tensor for name, tensor in tensors.items()}
        if EMBEDDING not in self._tensors:
            raise UserError(f"{path} has no token embeddings (token_embd.weight).")
        self._hf = _transformers_config(self.arch, header, self.shapes(), factors)
        self.config = model_config.from_hf(self._hf, str(path))
        self._dequantized = functools.lru_cache(maxsize=1)(self._dequantize)  # a tensor is read once per device

    def shapes(self):
        """Shape of every tensor, by name (GGUF lists dimensions fastest first)."""
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name, index):
        """Read one piece of the dequantized tensor."""
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


def _tensors(path: Path, header: Fields) -> dict[str, Any]:
    """The tensors of a file, or of all parts of a split file, by llama.cpp's name."""
    parts, count = part_files(path), header.integer("split.count", 1, 0)
    if count > 1 and (len(parts) != count or header.integer("split.no", 0) != 0 or path != parts[0]):
        raise UserError(
            f"{path} is one of {count} parts of a model; name the first (NAME-00001-of-{count:05d}.gguf), with the "
            "others beside it."
        )
    tensors = {}
    for part in parts if count > 1 else [path]:
        tensors.update({tensor.name: tensor for tensor in read(part).tensors})
    if len(tensors) != (total := header.integer("split.tensors.count", len(tensors))):
        raise UserError(f"{path} and its parts hold {len(tensors)} tensors, not {total}; download them again.")
    return tensors


def _transformers_config(arch: str, header: Fields, shapes: dict, factors: np.ndarray | None) -> Any:
    """The `transformers` configuration that a header amounts to."""
    import transformers

    fields = _sizes(arch, header) | {
        "vocab_size": shapes[EMBEDDING][0],
        "tie_word_embeddings": HEAD not in shapes,
        "bos_token_id": header.integer("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": header.integer("tokenizer.ggml.eos_token_id", None),
        "pad_token_id": header.integer("tokenizer.ggml.padding_token_id", None),
    }
    head_dim, layers = fields["head_dim"], fields["num_hidden_layers"]
    theta = header.number(f"{arch}.rope.freq_base", 10000.0, 1e-3, 1e12)
    rope_parameters = _scaling(arch, header, theta, factors, head_dim)
    fields["rope_parameters"] = rope_parameters
    model_type, architecture = FAMILIES[arch]
    if model_type.startswith("gemma"):
        # llama.cpp writes no query scale; its 27B models, known by their layers, scale by the width of a head's share.
        share = fields["hidden_size"] // fields["num_attention_heads"]
        fields["query_pre_attn_scalar"] = share if (arch, layers) in (("gemma2", 46), ("gemma3", 62)) else head_dim
        # Early files say none of them; they are then the family's.
        given = {"sliding_window": header.integer(f"{arch}.attention.sliding_window", None, 1, 1 << 31)}
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            given[name] = header.number(f"{arch}.{name}", None, 1e-3, 1e6)
        fields |= {name: value for name, value in given.items() if value is not None}
    if model_type == "gemma3_text":
        local = header.number(f"{arch}.rope.freq_base_swa", 10000.0, 1e-3, 1e12)
        local = {"rope_type": "default", "rope_theta": local}
        fields["rope_parameters"] = {"full_attention": rope_parameters, "sliding_attention": local}
    if model_type == "llama" and "model.layers.0.self_attn.q_proj.bias" in shapes:
        fields["attention_bias"] = True
    try:
        return transformers.AutoConfig.for_model(model_type, architectures=[architecture], **fields)
    except Exception as error:  # transformers checks the values, and raises many kinds
        raise UserError(f"{header.where}: its header cannot be understood: {first_line(error)}") from error


def _sizes(arch: str, header: Fields) -> dict[str, Any]:
    """The sizes of the network, by Hugging Face's names."""

    def size(key: str, default: int | None = None, most: int = 1 << 24) -> int:
        name = f"{arch}.{key}"
        value = header.values.get(name)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(f"{header.where}: {name}={quote(value)} differs by layer, which is not implemented.")
            header.values[name] = value[0]
        if (found := header.integer(name, default, 1, most)) is None:
            raise UserError(f"{header.where} is damaged: its header has no {name}.")
        return found

    width, heads, layers = (
        size("embedding_length"),
        size("attention.head_count"),
        size("block_count", most=model_config.MOST_LAYERS),
    )
    head_dim = size("attention.key_length", max(width // heads, 1))
    allowed = {"rope.dimension_count": (head_dim,), "attention.value_length": (head_dim,)} | _REFUSED
    for key, values in allowed.items():
        value = header.values.get(f"{arch}.{key}", values[0])
        if value not in values:
            only = " or ".join(map(str, values))
            raise UserError(f"{header.where}: {arch}.{key}={quote(value)} is not implemented (only {only} is).")
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": size("feed_forward_length"),
        "rms_norm_eps": header.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6, 0, 1),
        "max_position_embeddings": size("context_length"),
    }


def _scaling(arch: str, header: Fields, theta: float, factors: np.ndarray | None, head_dim: int) -> dict[str, Any]:
    """RoPE's parameters by llama.cpp's rules: a factor without a type is linear scaling, and has an old name too.

    Llama 3.1's scaling comes as a tensor of factors, from which it is recovered.
    """
    kind = header.text(f"{arch}.rope.scaling.type", "linear")
    factor = header.number(f"{arch}.rope.scaling.factor", None, 0, 1e6)
    if factor is None:
        factor = header.number(f"{arch}.rope.scale_linear", None, 0, 1e6)
    if factors is not None:
        if factors.size != head_dim // 2 or not (np.isfinite(factors) & (factors > 0)).all():
            raise UserError(f"{header.where}: {_ROPE_FACTORS} is damaged; download the file again.")
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
        raise UserError(
            f"{header.where}: {_ROPE_FACTORS} is not Llama 3.1's scaling; use the model's Hugging Face folder."
        )
    if kind not in ("none", "linear"):
        raise UserError(
            f"{header.where}: rope.scaling.type={quote(kind)} is not implemented; use the Hugging Face folder."
        )
    if kind == "none" or not factor or factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
