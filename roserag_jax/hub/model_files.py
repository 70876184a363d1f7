"""Find and open what `config.model` names: a Hub id, a Hugging Face folder or a GGUF file.

Each is opened as named tensors (`ModelFiles`) in Hugging Face's names and layouts, read piece by piece.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

from roserag_jax.errors import UserError, first_line
from roserag_jax.hub import huggingface
from roserag_jax.hub.gguf import GGUFFile, part_files
from roserag_jax.hub.huggingface import HuggingFaceFolder
from roserag_jax.models import config as model_config


@runtime_checkable
class ModelFiles(Protocol):
    """Weights and their configuration."""

    path: Path
    config: model_config.ModelConfig

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its Hugging Face name."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read one piece of a tensor."""
        ...

    def transformers_config(self) -> Any:
        """The `transformers` config object, for export."""
        ...


def resolve_path(
    model: str,
    revision: str | None = None,
    weights: bool = True,
    *,
    option: str = "model",
    extra: tuple[str, ...] = (),
) -> Path:
    """Find the local path of `config.model`; a Hub id is downloaded (without the weights unless `weights`).

    Args:
      option: the option that named it, for errors.
      extra: further files to download.

    Raises:
      UserError: nothing is found under that name, or the Hub cannot be reached.
    """
    if not model:
        raise UserError(f"config.{option} is empty; name a Hub id, a Hugging Face folder or a .gguf file.")
    path = Path(model).expanduser()
    if path.exists() or model.endswith(".gguf"):
        return path
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise UserError(f"config.{option}: there is no folder {model}.")
    import huggingface_hub

    small = (huggingface.CONFIG, huggingface.GENERATION_CONFIG, *huggingface.TOKENIZER_FILES)
    patterns = [*small, f"{huggingface.CHAT_TEMPLATES}/*.jinja", *extra]
    patterns += [huggingface.WEIGHTS_INDEX, "*.safetensors"] if weights else []
    try:
        # Mistral's repositories hold the weights a second time.
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"]
            )
        )
    except Exception as error:  # the Hub client raises many kinds; all mean that the model cannot be downloaded
        raise UserError(
            f"config.{option}: {model} is not a local path and could not be downloaded from the Hub "
            f"({type(error).__name__}: {first_line(error)}). Check the name, the network and, for a gated "
            "model, `hf auth login`; or give a local folder."
        ) from error


def read_config(model: str, revision: str | None = None) -> tuple[Path, model_config.ModelConfig]:
    """Read where a model is and what it is, without its weights: of a Hub id only the small files are downloaded."""
    path = resolve_path(model, revision, weights=False)
    if path.suffix == ".gguf":
        return path, GGUFFile(path).config
    hf = huggingface.read_transformers_config(path)
    return path, model_config.from_hf(hf, str(path / huggingface.CONFIG))


def open_model(model: str, revision: str | None = None) -> ModelFiles:
    """Open the weights that `config.model` names."""
    path = resolve_path(model, revision)
    return GGUFFile(path) if path.suffix == ".gguf" else HuggingFaceFolder(path)


def fingerprint(model: str, revision: str | None = None, weights: bool = True, *, also: tuple[Path, ...] = ()) -> str:
    """Identify a model's content, for a recipe: equal for equal files, another after they were replaced.

    A Hub id gives its commit. Of local files, the small ones are hashed whole; of weights the size, the first 16 MB
    (the header), and 4 kB of each megabyte, or of each 4,096th part of larger files: 5 GB take about a second. What the
    project does not read (a README, other files of weights) is left out, and so are names and dates of the folder.

    Args:
      weights: False for a folder of which only the tokenizer is used.
      also: further small files that count.

    Raises:
      UserError: there is no such model, or a file may not be read.
    """
    path = resolve_path(model, revision, weights=False)
    if path.parent.name == "snapshots" and not Path(model).expanduser().exists():
        return f"{model}@{path.name}"
    small, large = [], part_files(path)
    if path.is_dir():
        settings = (path / huggingface.CONFIG, path / huggingface.GENERATION_CONFIG)
        small = [file for file in settings if file.is_file()] + huggingface.tokenizer_files(path)
        small += also
        large = huggingface.weight_files(path) if weights else []
    digest = hashlib.sha256()
    for file in (*small, *large):
        try:
            size = file.stat().st_size
            digest.update(f"{file.name if file in small else 'weights'}:{size}\n".encode())
            with file.open("rb") as opened:
                for piece in _samples(opened, size) if file in large else [opened.read()]:
                    digest.update(piece)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()[:32]


def _samples(opened: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the beginning of a file of weights, then short pieces at even distances and its end."""
    beginning, piece = 16 << 20, 4096
    yield opened.read(beginning)
    for start in (*range(beginning, size, max(1 << 20, size // 4096)), max(size - piece, 0)):
        opened.seek(start)
        yield opened.read(piece)
