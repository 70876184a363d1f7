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
from roserag_jax.hub.tensor_names import EMBEDDING, HEAD, tensor_name
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import LoRAConfig, LoRAParam
from roserag_jax.models.quantization import quantize
from roserag_jax.models.transformer import Transformer


def abstract_model(config: ModelConfig, lora: LoRAConfig, dtype, quantized: bool = False) -> Transformer:
    """Make the network as shapes alone: nothing is allocated."""
    return nnx.eval_shape(lambda: Transformer(config, lora, dtype, nnx.Rngs(0), quantized))


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked, layer, i):
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _set_quantized_layer(stacked, scales, layer, i):
    return tuple(map(_set_layer, (stacked, scales), quantize(layer), (i, i)))


def load_base(source: ModelFiles, dtype, mesh: Mesh, quantized: bool = False) -> nnx.State:
    """Load the frozen parameters: each tensor is read, converted and placed straight into its sharding.

    Stacked parameters are filled layer by layer on the devices, so the host never holds more than one tensor beside the
    result, and each process reads only the pieces that its devices hold. Quantized projections are rounded there too,
    one layer at a time.

    Raises:
      UserError: tensors are missing, unknown, of another shape or not finite.
    """
    base = nnx.to_flat_state(nnx.state(abstract_model(source.config, LoRAConfig(), dtype, quantized)))
    scales = {path[:-1]: variable for path, variable in base if path[-1] == "weight_scale"}
    leaves = [
        (path, variable, tensor_name(path, source.config), variable.get_value().shape)
        for path, variable in base
        if path[-1] != "weight_scale"
    ]
    renamed = _check_tensors(source, [(name, shape) for _, _, name, shape in leaves])

    def read(name, shape, axes, dtype=dtype):
        name = renamed.get(name, name)

        def piece(index):
            index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
            return source.read(name, index).astype(dtype)

        return jax.make_array_from_callback(shape, sharding(shape, axes, mesh), piece)

    def empty(variable):
        value, axes = variable.get_value(), variable.get_metadata()["axes"]
        return jnp.zeros(value.shape, value.dtype, device=sharding(value.shape, axes, mesh))

    filled, to_check = [], {}
    for path, variable, name, shape in leaves:
        axes = variable.get_metadata()["axes"]
        if "{}" not in name:
            array = to_check[name] = read(name, shape, axes)
        elif (scale := scales.get(path[:-1])) is not None and path[-1] == "weight":
            array, of_channels = empty(variable), empty(scale)
            for i in range(shape[0]):
                layer = read(name.format(i), shape[1:], axes[1:], jnp.float32)
                array, of_channels = _set_quantized_layer(array, of_channels, layer, i)
            filled.append(((*path[:-1], "weight_scale"), scale.replace(of_channels)))
            to_check[name] = of_channels
        else:
            array = empty(variable)
            for i in range(shape[0]):
                array = _set_layer(array, read(name.format(i), shape[1:], axes[1:]), i)
            to_check[name] = array
        filled.append((path, variable.replace(array)))
    _check_finite(source, to_check)
    return nnx.from_flat_state(filled)


def move_base(base: nnx.State, mesh: Mesh) -> nnx.State | None:
    """Lay frozen parameters over another mesh; the arrays that they were are given up.

    Returns:
      None where that takes other processes: between the devices of one and those of all, unless every device holds all.
    """
    shardings = state_shardings(base, mesh)
    old, new = jax.tree.leaves(base), jax.tree.leaves(shardings)
    if old[0].sharding.device_set == new[0].device_set:
        return jax.device_put(base, shardings, donate=True)
    if not all(leaf.sharding.is_fully_replicated for leaf in old) or not all(each.is_fully_replicated for each in new):
        return None

    def of_own_copies(leaf, sharding):
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(of_own_copies, base, shardings)


def _check_tensors(source: ModelFiles, wanted: list[tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """Compare names and shapes before anything is placed.

    Args:
      wanted: names, '{}' in which stands for the layer, and shapes, of which the first axis is then the layers.

    Returns:
      The names under which tensors are found that have another in the file.
    """
    expected = {}
    for name, shape in wanted:
        expected |= {name.format(i): shape[1:] for i in range(shape[0])} if "{}" in name else {name: shape}
    found, renamed = source.shapes(), {}
    if source.config.tie_embeddings and HEAD in found:
        if EMBEDDING in found:
            _check_tied(source, found)
        else:  # saved by the other of its two names
            renamed, found[EMBEDDING] = {EMBEDDING: HEAD}, found[HEAD]
        del found[HEAD]
    unknown = sorted(n for n in set(found) - set(expected) if not n.endswith("rotary_emb.inv_freq"))
    missing = sorted(set(expected) - set(found))
    wrong = [f"{n} is {found[n]}, not {s}" for n, s in expected.items() if n in found and found[n] != s]
    for label, names in (("tensors are missing", missing), ("tensors are unknown", unknown), ("shapes differ", wrong)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise UserError(f"{source.path}: {label}: {', '.join(names[:8])}{more}.")
    return renamed


def _check_tied(source: ModelFiles, found: dict[str, tuple[int, ...]]) -> None:
    """Some files hold a tied table twice; if the second differs, which of them is meant is not to be guessed."""
    V, step = found[EMBEDDING][0], 8192
    same = lambda rows: np.array_equal(source.read(EMBEDDING, (rows,)), source.read(HEAD, (rows,)))
    if found[EMBEDDING] != found[HEAD] or not all(same(slice(i, min(i + step, V))) for i in range(0, V, step)):
        raise UserError(
            f"{source.path}: its embeddings are tied, but {HEAD} is not the table; set tie_word_embeddings to false."
        )


@jax.jit
def _finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Whether all values of each array are finite, layer by layer where it is stacked."""
    return {n: jnp.isfinite(a).all(axis=tuple(range("{}" in n, a.ndim))) for n, a in arrays.items()}


def _check_finite(source: ModelFiles, arrays: dict[str, jax.Array]) -> None:
    for name, finite in jax.device_get(_finite(arrays)).items():
        if not finite.all():
            raise UserError(
                f"{source.path}: {name.format(np.argmin(finite))} holds values that are not finite (NaN or Inf); "
                "download it again."
            )


def assemble(config: ModelConfig, base: nnx.State, lora: LoRAConfig | None = None, adapter=None) -> Transformer:
    """Make a network from frozen parameters and, with `lora`, an adapter; nothing is copied."""
    leaves = jax.tree.leaves(base)
    model = abstract_model(
        config, lora or LoRAConfig(), leaves[0].dtype, quantized=any(leaf.dtype == jnp.int8 for leaf in leaves)
    )
    graph, _, _ = nnx.split(model, LoRAParam, ...)
    return nnx.merge(graph, adapter if adapter is not None else nnx.State({}), base)


def init_adapter(config: ModelConfig, lora: LoRAConfig, mesh: Mesh, key: jax.Array) -> nnx.State:
    """Make a new adapter (A random, B zero), by the initialisers that its layers declare."""

    def init(key):
        return nnx.state(Transformer(config, lora, jnp.float32, nnx.Rngs(key)), LoRAParam)

    shardings = state_shardings(jax.eval_shape(init, key), mesh)
    # The base parameters of the random network are dead code to the compiler: only the adapter is ever computed.
    return jax.jit(init, out_shardings=shardings)(key)


@jax.jit
def _folded(weight, a, b, scale):
    return (weight.astype(jnp.float32) + scale * jnp.matmul(a, b).mT).astype(weight.dtype)


def merge_adapter(model: Transformer) -> Transformer:
    """Fold the adapter into a copy of the weights, the sum taken in float32: faster than an adapter beside them."""
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Not(LoRAParam))))
    for path, variable in flat.items():
        linear = getattr(model.layers, path[1]) if path[-1] == "weight" else None
        if linear is not None and linear.lora is not None:
            folded = _folded(variable.get_value(), linear.lora_a[...], linear.lora_b[...], linear.lora.scale)
            flat[path] = variable.replace(folded)
    return assemble(model.config, nnx.from_flat_state(list(flat.items())))
