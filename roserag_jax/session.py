"""The model of a configuration, loaded once and only when a stage asks for it."""

import functools

import jax
import jax.numpy as jnp
from etils import epath

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.errors import UserError
from roserag_jax.hub import loading, model_files, peft_adapter, tokenizer
from roserag_jax.inference.engine import Engine
from roserag_jax.models.lora import PROJECTIONS, LoRAConfig
from roserag_jax.models.transformer import Transformer


class Session:
    """Tokenizer, mesh, frozen weights and engines of one configuration, shared by the stages of a run."""

    model_options = ("model", "revision", "tokenizer", "dtype")

    def __init__(self, config):
        self.config = config

    @functools.cached_property
    def tokenizer(self):
        """The `transformers` tokenizer, checked against the model's embedding table."""
        return tokenizer.load_tokenizer(self.config.model, self.config.tokenizer, self.config.revision or None)

    @functools.cached_property
    def source(self) -> model_files.ModelFiles:
        """The weights as named tensors."""
        found = model_files.open_model(self.config.model, self.config.revision or None)
        config, most = self.config, found.config.max_positions
        said = max(config.generate.max_tokens + config.generate.answer_tokens, config.evaluate.max_tokens)
        if config.prompt.max_tokens + said > most:
            print(
                f"Warning: config.prompt.max_tokens={config.prompt.max_tokens} and responses of up to {said} tokens "
                f"are more than the {most} positions that the model knows; the longest prompts are read badly."
            )
        return found

    @functools.cached_property
    def mesh(self):
        """The mesh over all devices."""
        return make_mesh(**self.config.mesh)

    @functools.cached_property
    def own(self) -> "Session":
        """The session to decode with: this one, or of several processes each's own, over its own devices.

        They decode different questions, so they must not run in step; the weights are then read once more.
        """
        if jax.process_count() == 1:
            return self
        own = Session(self.config)
        own.mesh = make_mesh(1, -1, self.config.mesh.tensor, jax.local_devices())
        return own

    def let_go(self) -> None:
        """Drop the weights that `own` holds beside this session's, before training needs the room."""
        self.__dict__.pop("own", None)

    @functools.cached_property
    def dtype(self):
        """Of frozen weights and activations. In float32, products are float32 on every backend."""
        if self.config.dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")
        return jnp.dtype(self.config.dtype)

    @functools.cached_property
    def base(self):
        """The frozen weights on the mesh."""
        return loading.load_base(self.source, self.dtype, self.mesh)

    @functools.cached_property
    def lora(self) -> LoRAConfig:
        """The adapter that the configuration asks for.

        Raises:
          UserError: `config.lora.start` is another kind of adapter.
        """
        c = self.config.lora
        targets = tuple(t for t in PROJECTIONS if t in c.targets)
        asked = LoRAConfig(c.rank, c.alpha, c.dropout, targets, c.rslora)
        if c.start:
            found = peft_adapter.read_lora_config(epath.Path(c.start).expanduser())
            for name in ("rank", "alpha", "rslora", "targets"):
                theirs, ours = getattr(found, name), getattr(asked, name)
                if theirs != ours:
                    raise UserError(
                        f"config.lora.start={c.start} has {name} {theirs!r}, not {ours!r}: set config.lora.{name}."
                    )
        return asked

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return tokenizer.stop_ids(self.tokenizer, self.source.path, self.source.config.vocab_size)

    @functools.cached_property
    def turn_end(self) -> int:
        """The token that closes a response in training."""
        return tokenizer.turn_end(self.tokenizer, self.stop_ids)

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
        model = self.model(adapter)
        if adapter is not None and self.config.merge:
            model = loading.merge_adapter(model)
        return self.engine_of(model)

    def engine_of(self, model: Transformer) -> Engine:
        """An engine over a network."""
        return Engine(model, self.mesh, self.stop_ids, self.pad_id, self.config.seed)
