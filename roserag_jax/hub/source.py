"""Where weights come from: a Hub id, a Hugging Face folder or a GGUF file, each as named tensors read piece by piece.

Every source speaks Hugging Face's tensor names and layouts. No pickle and no remote code is ever loaded.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from roserag_jax.errors import UserError, first_line
from roserag_jax.hub.gguf import GGUFFile
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


def _read_hf_config(path: Path):
    """The `transformers` configuration of a Hugging Face folder."""
    import transformers

    if not (path / "config.json").is_file():
        raise UserError(
            f"config.model: {path} has no config.json; name a Hugging Face folder, a .gguf file or a Hub id."
        )
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        kind = json.loads((path / "config.json").read_text()).get("model_type")
        raise UserError(f"{path}/config.json: model type {kind!r} cannot be read: {error}") from error


class HuggingFaceFolder:
    """A folder with `config.json` and one or many safetensors files."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path, self._hf = path, _read_hf_config(path)
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
            # The Hub's cache links to files beside its snapshots; nothing else may lead out of the folder.
            root = self.path.parent.parent if self.path.parent.name == "snapshots" else self.path
            if not (self.path / name).resolve().is_relative_to(root.resolve()):
                raise UserError(f"{self.path / name} leads out of its folder; put the file itself there.")
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
        # Mistral's repositories hold the weights a second time.
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"]
            )
        )
    except Exception as error:  # the Hub client raises many kinds; all mean that the model cannot be had
        raise UserError(
            f"config.model: {model} is no local path and could not be fetched from the Hub "
            f"({type(error).__name__}: {first_line(error)}). Check the name, the network and, for a gated "
            "model, `hf auth login`; or give a local folder."
        ) from error


def read_config(model: str, revision: str | None = None) -> tuple[Path, model_config.ModelConfig]:
    """Where a model lies and what it is, without its weights: of a Hub id only the small files are fetched."""
    path = resolve(model, revision, weights=False)
    if path.suffix == ".gguf":
        return path, GGUFFile(path).config
    hf = _read_hf_config(path)
    return path, model_config.from_hf(hf, str(path / "config.json"))


def open_source(model: str, revision: str | None = None) -> Source:
    """Open the weights that `config.model` names."""
    path = resolve(model, revision)
    return GGUFFile(path) if path.suffix == ".gguf" else HuggingFaceFolder(path)
