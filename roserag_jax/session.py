"""The model of a configuration, loaded once and only when a stage asks for it, and the adapter to use with it."""

import copy
import functools
import hashlib
import sys

import jax
import jax.numpy as jnp
from etils import epath

from roserag_jax import automatic_mesh
from roserag_jax.distributed import hardware, processes
from roserag_jax.errors import UserError
from roserag_jax.hub import loading, model_files, peft_adapter, tokenizer
from roserag_jax.inference.engine import Engine
from roserag_jax.inference.requests import DecoderCapacity
from roserag_jax.models.lora import PROJECTIONS, LoRAConfig
from roserag_jax.models.transformer import Transformer
from roserag_jax.workdir import ADAPTER, Workdir, read_manifest, resolve_path, verify_files

_MOST_SLOTS = 64  # on a device: with more, steps are bound by arithmetic, and what is decoded finishes later


class Session:
    """Tokenizer, mesh, frozen weights and engines of one configuration, shared by the stages of a run."""

    model_options = ("model", "revision", "tokenizer", "dtype", "base_dtype")

    def __init__(self, config):
        self.config = config

    @functools.cached_property
    def model_inputs(self) -> dict[str, str]:
        """What a recipe records of the model beside `model_options`: its content, and that of a tokenizer of its own.

        Other weights under the same name are so noticed, and the same ones under another are the same.
        """
        c, revision = self.config, self.config.revision or None
        found = {"config.model": model_files.fingerprint(c.model, revision)}
        if c.tokenizer:
            found["config.tokenizer"] = model_files.fingerprint(c.tokenizer, weights=False)
        return found

    @functools.cached_property
    def tokenizer(self):
        """The `transformers` tokenizer, checked against the model's embedding table."""
        return tokenizer.load_tokenizer(self.config.model, self.config.tokenizer, self.config.revision or None)

    @functools.cached_property
    def source(self) -> model_files.ModelFiles:
        """The weights as named tensors."""
        found = model_files.open_model(self.config.model, self.config.revision or None)
        config, most = self.config, found.config.max_positions
        response = max(config.generate.max_tokens + config.generate.answer_tokens, config.evaluate.max_tokens)
        if config.prompt.max_tokens + response > most:
            print(
                f"Warning: prompts of up to {config.prompt.max_tokens} and responses of up to {response} tokens "
                f"exceed the {most} positions that the model was made for; the longest prompts are understood badly."
            )
        return found

    @functools.cached_property
    def meshes(self) -> automatic_mesh.Meshes:
        """The meshes to decode and to train with; prints why they are so, where there is a choice."""
        meshes = automatic_mesh.choose_meshes(self.config, self.source.config, self._requested_lora, jax.devices())
        if meshes.training.size > 1 and processes.is_main():
            print(meshes.why)
        return meshes

    @functools.cached_property
    def mesh(self):
        """The mesh over all devices, to train with."""
        return self.meshes.training

    @functools.cached_property
    def decoding_session(self) -> "Session":
        """The session to decode with: this one, or one with another mesh, which has the weights while it needs them.

        Several processes decode different questions, so they must not run in step: each has a mesh of its own devices.
        """
        if self.meshes.decoding == self.mesh:
            return self
        session = copy.copy(self)
        session._frozen, session.mesh = self._frozen, self.meshes.decoding
        session.decoding_session = session
        return session

    @functools.cached_property
    def dtype(self):
        """The type of frozen weights and activations. In float32, matmuls are float32 on every backend."""
        if self.config.dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")
        return jnp.dtype(self.config.dtype)

    @functools.cached_property
    def _frozen(self) -> dict:
        """The frozen weights and the mesh that they are on, for this session and the one to decode with."""
        return {"mesh": None, "base": None}

    @property
    def base(self):
        """The frozen weights on the mesh.

        Where they are on another one they move here, and arrays of theirs that somebody still has are lost.
        """
        frozen = self._frozen
        if frozen["mesh"] != self.mesh:
            base = frozen["base"] and loading.move_base(frozen["base"], self.mesh)
            frozen["base"] = None  # before they are loaded once more, where they cannot move
            frozen["base"] = base or loading.load_base(self.source, self.dtype, self.mesh, bool(self.config.base_dtype))
            frozen["mesh"] = self.mesh
        return frozen["base"]

    @property
    def _requested_lora(self) -> LoRAConfig:
        """The adapter of `config.lora`, whatever training starts from."""
        c = self.config.lora
        targets = tuple(t for t in PROJECTIONS if t in c.targets)
        return LoRAConfig(c.rank, c.alpha, c.dropout, targets, c.rslora)

    @functools.cached_property
    def lora(self) -> LoRAConfig:
        """The adapter that the configuration asks for.

        Raises:
          UserError: `config.lora.start` is another kind of adapter.
        """
        c, requested = self.config.lora, self._requested_lora
        if c.start:
            found = peft_adapter.read_lora_config(checked_adapter(c.start))
            for name in ("rank", "alpha", "rslora", "targets"):
                has, wants = getattr(found, name), getattr(requested, name)
                if has != wants:
                    raise UserError(
                        f"config.lora.start={c.start} has {name} {has!r}, not {wants!r}: set config.lora.{name}."
                    )
        return requested

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return tokenizer.stop_ids(self.tokenizer, self.source.path, self.source.config.vocab_size)

    @functools.cached_property
    def turn_end(self) -> int:
        """The token that closes a response in training."""
        return tokenizer.turn_end(self.tokenizer, self.stop_ids, self.config.prompt.template_arguments)

    @property
    def pad_id(self) -> int:
        """A token for padding; it is never seen, so any will do."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and pad < self.source.config.vocab_size else self.stop_ids[0]

    def model(self, adapter: epath.Path | None = None):
        """The network, with a PEFT adapter from a folder if one is given."""
        lora, state = (
            (None, None) if adapter is None else peft_adapter.load_adapter(adapter, self.source.config, self.mesh)
        )
        return loading.assemble(self.source.config, self.base, lora, state)

    def engine(self, adapter: epath.Path | None = None) -> Engine:
        """An engine over `model(adapter)`, the adapter merged into the weights if the configuration says so."""
        if self.decoding_session is not self:
            return self.decoding_session.engine(adapter)
        model = self.model(adapter)
        if adapter is not None and self.config.merge:
            model = loading.merge_adapter(model)
        return self.engine_of(model)

    def slots(self, wanted: int, capacity: DecoderCapacity, prompt_length: int, on_cpu: int) -> int:
        """How many questions to decode at a time: `wanted`, or if that is 0 as many as fit beside the weights.

        Args:
          on_cpu: the number where the devices' memory is not known.
        """
        mesh, config = self.decoding_session.mesh, self.config
        memory = config.mesh.memory_gb * 1e9 or hardware.memory_of(mesh.devices.flat[0])
        if wanted or memory is None:
            return wanted or on_cpu
        itemsize, groups = self.dtype.itemsize, mesh.size // mesh.shape["tensor"]
        weights = automatic_mesh.weight_bytes(self.source.config, itemsize, bool(config.base_dtype))
        each = capacity.slot_bytes(self.source.config, itemsize, prompt_length, mesh.shape["tensor"])
        fits = automatic_mesh.most_questions(weights, mesh, memory, each)
        return max(groups, min(fits, _MOST_SLOTS * groups))

    def engine_of(self, model: Transformer) -> Engine:
        """An engine over a network."""
        return Engine(model, self.mesh, self.stop_ids, self.pad_id, self.config.seed)


def checked_adapter(folder: str | epath.Path) -> epath.Path:
    """A PEFT folder, its files checked where one of our manifests lies beside them.

    Raises:
      UserError: there is none, or it was changed or damaged.
    """
    folder = resolve_path(str(folder))
    if not folder.is_dir():
        raise UserError(f"There is no adapter {folder}.")
    if manifest := read_manifest(folder / "manifest.json"):
        verify_files(folder, manifest)
    return folder


def adapter_folder(config, workdir: Workdir) -> epath.Path:
    """The adapter that the configuration names, or the workdir's own, its files checked.

    Raises:
      UserError: there is none, or it was changed or damaged.
    """
    if config.adapter:
        return checked_adapter(config.adapter)
    workdir.verify(ADAPTER)
    return workdir / ADAPTER


def find_adapter(config, workdir: Workdir) -> epath.Path | None:
    """The adapter to answer with: the one that is named, else the workdir's if it has one; prints which on stderr."""
    folder = adapter_folder(config, workdir) if config.adapter or workdir.manifest(ADAPTER) is not None else None
    print(f"Model: {config.model}, {f'adapter: {folder}' if folder else 'no adapter'}", file=sys.stderr)
    return folder


def adapter_digest(folder: epath.Path) -> str:
    """SHA-256 of an adapter: of the files that are read, whatever else lies beside them."""
    result = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no adapter (no {name}).")
        content = (folder / name).read_bytes()
        result.update(f"{name}:{len(content)}\n".encode() + content)
    return result.hexdigest()
