"""Where weights come from: a Hub id, a Hugging Face folder or a GGUF file, each as named tensors read piece by piece.

Every source speaks Hugging Face's tensor names and layouts. No pickle and no remote code is ever loaded.
"""

import functools
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from roserag_jax.errors import UserError
from roserag_jax.models import config as model_config


class Source(Protocol):
    """Weights and their configuration."""

    path: Path
    config: model_config.ModelConfig

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its Hugging Face name."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One piece of a tensor."""
        ...

    def hf_config(self) -> Any:
        """The `transformers` config object, for export."""
        ...


class HuggingFaceFolder:
    """A folder with `config.json` and one or many safetensors files."""

    def __init__(self, path: Path):
        import transformers
        from safetensors import SafetensorError, safe_open

        self.path = path
        if not (path / "config.json").is_file():
            raise UserError(
                f"config.model: {path} has no config.json; name a Hugging Face folder, a .gguf file or a Hub id."
            )
        try:
            self._hf = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (ValueError, KeyError) as error:
            kind = json.loads((path / "config.json").read_text()).get("model_type")
            raise UserError(f"{path}/config.json: model type {kind!r} cannot be read: {error}") from error
        self.config = model_config.from_hf(self._hf, str(path / "config.json"))
        self._files = {}
        for file in self._weight_files():
            try:
                handle = safe_open(file, "numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is damaged or incomplete ({error}); download it again.") from error
            self._files.update({name: handle for name in handle.keys()})  # noqa: SIM118 (not a dict)

    def _weight_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: {name!r} is not a plain *.safetensors name inside the folder.")
            if not (self.path / name).is_file():
                raise UserError(f"{self.path} has no {name}; only safetensors weights are read, never pickles.")
        return [self.path / name for name in names]

    def shapes(self):
        """Shape of every tensor, by name."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._files.items()}

    def read(self, name, index):
        """Read one piece from the memory-mapped file."""
        return self._files[name].get_slice(name)[index]

    def hf_config(self):
        """The configuration as downloaded."""
        return self._hf


_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; the name itself where there is none, so that it is reported as unknown."""
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_GGUF_NAMES.get(part, part)}.{kind}"
    part, _, kind = name.partition(".")
    return f"{_GGUF_NAMES.get(part, part)}.{kind}"


@functools.lru_cache(maxsize=1)
def read_gguf(path: Path):
    """The header of a GGUF file; it takes seconds where the vocabulary is large, and two readers ask for it.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    import gguf

    if not path.is_file():
        raise UserError(f"config.model: there is no file {path}.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}") from error


class GGUFFile:
    """A `.gguf` file of the Llama architecture, dequantised tensor by tensor to float32."""

    def __init__(self, path: Path):
        reader = read_gguf(path)
        self.path = path
        self._tensors = {_hf_name(t.name): t for t in reader.tensors}
        self.fields = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")
        }
        for name in ("bos", "eos", "padding"):
            if key := reader.fields.get(f"tokenizer.ggml.{name}_token_id"):
                self.fields[f"{name}_token_id"] = key.contents()
        self.config = model_config.from_gguf(self.fields, [t.name for t in reader.tensors], str(path))
        # One stacked parameter is read from as many tensors as there are layers, once per device that holds a piece.
        self._dequantized = functools.lru_cache(maxsize=self.config.num_layers)(self._dequantize)

    def shapes(self):
        """Shape of every tensor, by name (GGUF lists dimensions fastest first)."""
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name, index):
        """Read one piece of the dequantised tensor."""
        return self._dequantized(name)[index]

    def _dequantize(self, name):
        import gguf

        tensor = self._tensors[name]
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for part, heads in (("q_proj", self.config.num_heads), ("k_proj", self.config.num_kv_heads)):
            if f".{part}." in name:
                # llama.cpp stores each head's rotary pairs side by side; Hugging Face stores the two halves apart.
                pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])
                weights = pairs.swapaxes(1, 2).reshape(weights.shape)
        return weights

    def hf_config(self):
        """A `LlamaConfig` with the sizes of the file's header."""
        import transformers

        c, token = self.config, lambda kind: self.fields.get(f"{kind}_token_id")
        return transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.embed_dim,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.mlp_dim,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tie_embeddings,
            max_position_embeddings=c.max_positions,
            bos_token_id=token("bos"),
            eos_token_id=token("eos"),
            pad_token_id=token("padding"),
            architectures=["LlamaForCausalLM"],
        )


def resolve(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """Local path of `config.model`; a Hub id is downloaded (without the weights unless `weights`).

    Raises:
      UserError: nothing is found under that name, or the Hub cannot be reached.
    """
    if not model:
        raise UserError("config.model is empty; name a Hub id, a Hugging Face folder or a .gguf file.")
    path = Path(model).expanduser()
    if path.exists() or model.endswith(".gguf"):
        return path
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise UserError(f"config.model: there is no folder {model}.")
    import huggingface_hub

    patterns = ["*.json", "*.jinja", "tokenizer.model"] + (["*.safetensors"] if weights else [])
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub client raises many kinds; all mean that the model cannot be had
        raise UserError(
            f"config.model: {model} is no local path and could not be fetched from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, the network and, for a gated "
            "model, `hf auth login`; or give a local folder."
        ) from error


def open_source(model: str, revision: str | None = None) -> Source:
    """Open the weights that `config.model` names."""
    path = resolve(model, revision)
    return GGUFFile(path) if path.suffix == ".gguf" else HuggingFaceFolder(path)
