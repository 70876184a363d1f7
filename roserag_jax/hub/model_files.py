"""Find and open what `config.model` names: a Hub id, a Hugging Face folder or a GGUF file.

Each is opened as named tensors (`ModelFiles`) in Hugging Face's names and layouts, read piece by piece.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from roserag_jax.errors import UserError, first_line
from roserag_jax.hub import huggingface
from roserag_jax.hub.gguf import GGUFFile, part_files
from roserag_jax.hub.huggingface import HuggingFaceFolder
from roserag_jax.models import config as model_config
from roserag_jax.user_cache import user_cache
from roserag_jax.workdir import write_atomic

_LARGE = 64 << 20  # bytes of a file whose digest is remembered
_SETTLED_SECONDS = 2.0


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


def _local(name: str) -> Path:
    return Path(os.path.expanduser(name))  # which leaves the home of an unknown user as it is; pathlib raises


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
    path = _local(model)
    if path.exists() or model.endswith(".gguf"):
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
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

    A Hub id gives its commit. Local files are hashed whole, so that one changed bit shows; 5 GB take some seconds, the
    first time. What the project does not read (a README, other files of weights) is left out, and so are names and
    dates of the folder.

    Args:
      weights: False for a folder of which only the tokenizer is used.
      also: further small files that count.

    Raises:
      UserError: there is no such model, or a file may not be read.
    """
    path = resolve_path(model, revision, weights=False)
    if path.parent.name == "snapshots" and not _local(model).exists():
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
            digest.update(f"{file.name if file in small else 'weights'}:{_content(file)}\n".encode())
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()[:32]


def _content(file: Path) -> str:
    """The SHA-256 of a file, remembered in the user's cache for a large one.

    A file is known again by what the kernel changes with its content: a copy, or one that was replaced, is read anew.
    """
    found, cache = file.stat(), user_cache()
    key = f"{file.resolve()} {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
    remembered = cache / "digests" / name if cache and found.st_size > _LARGE else None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if remembered and len(digest := remembered.read_text()) == 64:
            return digest
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    # What was changed a moment ago may change once more within the resolution of the clock.
    if remembered and time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # a cache that cannot be written
            write_atomic(epath.Path(remembered), digest)
    return digest
