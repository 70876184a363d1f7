"""The engine: a network that prefills prompts and scores responses behind them.

Axes: B batch, N branches, P prompt, S response length, C shared prefix.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from roserag_jax.distributed.mesh import prefers_unstacked_layers
from roserag_jax.distributed.sharding import sharding
from roserag_jax.models.cache import PrefixCache
from roserag_jax.models.logprobs import token_logprobs
from roserag_jax.models.transformer import Transformer

_SHORT_PREFIX = 32  # tokens; what is shorter is not worth a prefill of its own
# The most of one program that scores: tokens of responses, and bytes of a layer's attention from them to the prompts.
_SCORED_TOKENS, _SCORED_BYTES = 1 << 15, 1 << 31


class Network:
    """The structure of a network, without its weights: a static argument of the programs that run it.

    It is hashed once. JAX would hash a graph of `nnx` anew and flatten its state in Python at every call, which takes a
    millisecond: as long as a decoding step of a small model.
    """

    def __init__(self, graph: nnx.GraphDef, structure):
        self._graph, self._structure = graph, structure
        self._hash = hash((graph, structure))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        return isinstance(other, Network) and (self._graph, self._structure) == (other._graph, other._structure)

    def state(self, weights: tuple) -> nnx.State:
        """The weights by name."""
        return self._structure.unflatten(weights)

    def model(self, weights: tuple) -> Transformer:
        """The network with its weights."""
        return nnx.merge(self._graph, self.state(weights))

    def layers(self, layers: tuple[tuple, ...]) -> tuple[nnx.State, ...]:
        """The states of layers from their arrays."""
        stacked = self.state(tuple(range(self._structure.num_leaves)))["layers"]
        return tuple(jax.tree.structure(stacked).unflatten(arrays) for arrays in layers)


def split(model: Transformer) -> tuple[Network, tuple]:
    """The structure of a network, and its weights."""
    graph, state = nnx.split(model)
    weights, structure = jax.tree.flatten(state)
    return Network(graph, structure), tuple(weights)


class Engine:
    """A network on its mesh, ready to prefill prompts and score responses; `inference.scheduler` decodes with it.

    The batch of every call is the caller's; each shape compiles once.
    """

    def __init__(self, model: Transformer, mesh: Mesh, stop_ids: tuple[int, ...], pad_id: int, seed: int = 0):
        self.network, self.weights = split(model)
        self.config, self.dtype = model.config, model.embed[...].dtype
        self.mesh, self.stop_ids, self.pad_id, self.seed = mesh, tuple(stop_ids), pad_id, seed
        self.on_cpu = mesh.devices.flat[0].platform == "cpu"
        # Two threads that decode use what one leaves idle: a CPU gives attention's batched products a single core.
        self.decoder_threads = 2 if self.on_cpu and mesh.size == 1 and (os.cpu_count() or 1) > 1 else 1

    @functools.cached_property
    def unstacked_layers(self) -> tuple | None:
        """The layers' parameters unstacked, where decoding wants them so; they take their memory once more.

        They are a tuple of arrays for each layer, which `Network.layers` takes.
        """
        if not prefers_unstacked_layers(self.mesh):
            return None
        layers = tuple(jax.tree.leaves(self.network.state(self.weights)["layers"]))
        # One program that is called for each layer: one that makes all of them takes seconds to compile.
        return tuple(_layer(layers, i) for i in range(self.config.num_layers))

    def place(self, *arrays) -> list[jax.Array]:
        """Put host arrays on the devices, their first axis over the mesh's batch axes."""
        batch = lambda a: sharding(a.shape, ("batch",) + (None,) * (a.ndim - 1), self.mesh)
        arrays = [*map(np.asarray, arrays)]
        return jax.device_put(arrays, [*map(batch, arrays)])

    def prefill_shared_prefix(self, tokens: list[int]) -> "SharedPrefix":
        """Prefill what prompts begin with (instructions, few-shot demonstrations); nothing where that is short."""
        C = len(tokens)
        return SharedPrefix(tokens, self.prefill([[*tokens, self.pad_id]], C) if C >= _SHORT_PREFIX else None)

    def prefill(self, prompts: list[list[int]], length: int | None = None) -> PrefixCache:
        """Prefill prompts without their last token, padded to `length` or by default to the bucket of the longest."""
        rows = [p[:-1] for p in prompts]
        tokens, lengths = pad(rows, length or bucket(max(map(len, rows))), self.pad_id)
        with jax.set_mesh(self.mesh):
            return self.prefill_rows(*self.place(tokens, lengths))

    def prefill_rows(self, tokens, lengths, shared: PrefixCache | None = None) -> PrefixCache:
        """`Transformer.prefill` of right-padded rows [B P] behind what `shared` holds, under the ambient mesh."""
        return _prefill(self.network, self.weights, tokens, lengths, shared)

    def score(self, cache: PrefixCache, prompts, responses: list[list[list[int]]], length: int) -> np.ndarray:
        """Log-probabilities [B, N, length] of N responses (tokens, stop token included) per prompt; 0 past each end.

        Many responses are scored in chunks of equally many branches, so that the memory for their activations is
        limited.
        """
        N, B = len(responses[0]), len(prompts)
        bytes_per_token = 4 * self.config.num_heads * cache.v.shape[3]
        chunks = -(-N * B * length // min(_SCORED_TOKENS, _SCORED_BYTES // bytes_per_token))
        chunk = -(-N // min(chunks, N))
        flat = [r for row in responses for r in row + [[]] * (-N % chunk)]
        targets, lengths = pad(flat, length, self.pad_id)
        targets = targets.reshape(B, -1, length)
        first = np.broadcast_to(np.array([p[-1] for p in prompts])[:, None, None], (*targets.shape[:2], 1))
        branches = np.concatenate([first, targets[:, :, :-1]], axis=2)
        logprobs = []
        with jax.set_mesh(self.mesh):
            for start in range(0, N, chunk):
                placed = self.place(branches[:, start : start + chunk], targets[:, start : start + chunk])
                logprobs.append(np.asarray(_score(self.network, self.weights, cache, *placed)))
        real = np.arange(length) < lengths.reshape(B, -1)[..., None]
        return np.where(real, np.concatenate(logprobs, axis=1), 0.0)[:, :N]


@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Tokens that prompts begin with, and their keys and values, or None where they are too few to be shared."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    cache: PrefixCache | None = None

    def of(self, prompt: list[int]) -> PrefixCache | None:
        """The cache, if this prompt begins with the tokens and they are not all of it."""
        C = len(self.tokens)
        return self.cache if len(prompt) > C and prompt[:C] == self.tokens else None


def bucket(length: int) -> int:
    """The padded length for `length` tokens: few sizes, so few compilations; past 128 a third is padding at most."""
    for step, limit in ((16, 128), (64, 1024), (128, 2048)):
        if length <= limit:
            return max(-(-length // step), 1) * step
    return -(-length // 256) * 256


def coarse_bucket(length: int) -> int:
    """The padded length among fewer sizes than those of `bucket`: 32, 64, 96, 128, 192, 256, 384, 512, ..."""
    step = max(32, 1 << max((length - 1).bit_length() - 2, 0))
    return max(-(-length // step), 1) * step


def joined_sizes(counts: collections.Counter[int], minimum: float) -> list[tuple[int, int]]:
    """Sizes and how many members each has, as few as will do: one of fewer than `minimum` joins the next larger."""
    result, few = [], 0
    for size, count in sorted(counts.items()):
        few += count
        if few >= minimum or size == max(counts):
            result.append((size, few))
            few = 0
    return result


def shared_prefix_length(prompts: list[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; 0 where they are too few to be worth a prefill of their own.

    The last token of a prompt begins its branches and is never among them.
    """
    if not prompts:
        return 0
    first, last = min(prompts), max(prompts)  # what these begin with, all between them do
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    common = min(next(differ, len(first)), min(map(len, prompts)) - 1)
    return common if common >= _SHORT_PREFIX else 0


def pad(rows: list[list[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [rows, length] and the rows' lengths."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


@jax.jit
def _layer(stacked: tuple, i) -> tuple:
    """Layer i of stacked arrays."""
    return tuple(jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for a in stacked)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(network, weights, tokens, lengths, shared):
    return network.model(weights).prefill(tokens, lengths, shared)


@functools.partial(jax.jit, static_argnums=0)
def _score(network, weights, cache, branches, targets):
    model = network.model(weights)
    return token_logprobs(model.extend(branches, cache), targets, model.table, model.config.final_softcap)
