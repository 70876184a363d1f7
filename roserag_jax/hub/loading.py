"""Loading: named tensors become the network's stacked parameters, each placed straight into its sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from roserag_jax.distributed.sharding import sharding, state_shardings
from roserag_jax.errors import UserError
from roserag_jax.hub.model_files import ModelFiles
from roserag_jax.hub.tensor_names import tensor_name
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import LoRAConfig, LoRAParam
from roserag_jax.models.transformer import Transformer


def abstract_model(config: ModelConfig, lora: LoRAConfig, dtype) -> Transformer:
    """The network as shapes alone: nothing is allocated."""
    return nnx.eval_shape(lambda: Transformer(config, lora, dtype, nnx.Rngs(0)))


def _check(source: ModelFiles, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes before anything is placed."""
    found = source.shapes()
    ignored = {"lm_head.weight"} if source.config.tie_embeddings else set()
    unknown = sorted(n for n in set(found) - set(expected) - ignored if not n.endswith("rotary_emb.inv_freq"))
    missing = sorted(set(expected) - set(found))
    wrong = [f"{n} is {found[n]}, not {s}" for n, s in expected.items() if n in found and found[n] != s]
    for label, names in (("tensors are missing", missing), ("tensors are unknown", unknown), ("shapes differ", wrong)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise UserError(f"{source.path}: {label}: {', '.join(names[:8])}{more}.")
    if ignored & set(found):
        _check_tied(source, found)


def _check_tied(source: ModelFiles, found: dict[str, tuple[int, ...]]) -> None:
    """Some files hold a tied table twice; if the second differs, which of them is meant is not to be guessed."""
    table, again = "model.embed_tokens.weight", "lm_head.weight"
    V, step = found[table][0], 8192
    same = lambda rows: np.array_equal(source.read(table, (rows,)), source.read(again, (rows,)))
    if found[table] != found[again] or not all(same(slice(i, min(i + step, V))) for i in range(0, V, step)):
        raise UserError(
            f"{source.path}: its embeddings are tied, but {again} is not the table; set tie_word_embeddings to false."
        )


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked, layer, i):
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0)


def load_base(source: ModelFiles, dtype, mesh: Mesh) -> nnx.State:
    """The frozen parameters: each tensor is read, converted and placed straight into its sharding.

    Stacked parameters are filled layer by layer on the devices, so the host never holds more than one tensor beside the
    result, and each process reads only the pieces that its devices hold.

    Raises:
      UserError: tensors are missing, unknown or of another shape.
    """
    base = nnx.state(abstract_model(source.config, LoRAConfig(), dtype))
    leaves = [
        (path, variable, tensor_name(path, source.config), variable.get_value().shape)
        for path, variable in nnx.to_flat_state(base)
    ]
    expected = {}
    for _, _, name, shape in leaves:
        inner = shape[1:] if "{}" in name else shape
        layers = range(shape[0]) if "{}" in name else [None]
        expected.update({name.format(i): inner for i in layers})
    _check(source, expected)

    def read(name, shape, axes):
        def piece(index):
            index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
            return source.read(name, index).astype(dtype)

        return jax.make_array_from_callback(shape, sharding(shape, axes, mesh), piece)

    filled = []
    for path, variable, name, shape in leaves:
        axes = variable.get_metadata()["axes"]
        if "{}" not in name:
            array = read(name, shape, axes)
        else:
            array = jnp.zeros(shape, dtype, device=sharding(shape, axes, mesh))
            for i in range(shape[0]):
                array = _set_layer(array, read(name.format(i), shape[1:], axes[1:]), i)
        filled.append((path, variable.replace(array)))
    return nnx.from_flat_state(filled)


def assemble(config: ModelConfig, base: nnx.State, lora: LoRAConfig | None = None, adapter=None) -> Transformer:
    """A network from frozen parameters and, with `lora`, an adapter; nothing is copied."""
    dtype = jax.tree.leaves(base)[0].dtype
    model = abstract_model(config, lora or LoRAConfig(), dtype)
    graph, _, _ = nnx.split(model, LoRAParam, ...)
    return nnx.merge(graph, adapter if adapter is not None else nnx.State({}), base)


def init_adapter(config: ModelConfig, lora: LoRAConfig, mesh: Mesh, key: jax.Array) -> nnx.State:
    """A fresh adapter (A random, B zero), by the initialisers that its layers declare."""

    def init(key):
        return nnx.state(Transformer(config, lora, jnp.float32, nnx.Rngs(key)), LoRAParam)

    shardings = state_shardings(jax.eval_shape(init, key), mesh)
    # The base parameters of the random network are dead code to the compiler: only the adapter is ever computed.
    return jax.jit(init, out_shardings=shardings)(key)


@jax.jit
def _folded(weight, a, b, scale):
    return (weight.astype(jnp.float32) + scale * jnp.matmul(a, b).mT).astype(weight.dtype)


def merge_adapter(model: Transformer) -> Transformer:
    """The network with its adapter folded into its weights, the sum taken in float32: faster, but a copy of them."""
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Not(LoRAParam))))
    for path, variable in flat.items():
        linear = getattr(model.layers, path[1]) if path[-1] == "weight" else None
        if linear is not None and linear.lora is not None:
            folded = _folded(variable.get_value(), linear.lora_a[...], linear.lora_b[...], linear.lora.scale)
            flat[path] = variable.replace(folded)
    return assemble(model.config, nnx.from_flat_state(list(flat.items())))
