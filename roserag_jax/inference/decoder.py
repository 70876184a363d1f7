"""Decoding many questions on few slots: what is finished makes room at once for what waits.

A task is a generator that yields what it wants next, `Read` (a prompt) or `Decode` (branches behind it), is sent what
came of it, and returns its result. A task has a slot to itself from its first wish to its result. All slots step
together, on the device; between chunks of steps the host sees who has finished and serves the next wishes. On a CPU two
decoders, each with half of the slots, run in threads side by side.

Axes: B slots, D devices that slots are split over, N branches, P prompt, S opening length, M own-cache slots,
T new tokens, L layers, K key/value heads, h head size.
"""

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from roserag_jax.distributed.sharding import devices, partition_spec, sharding
from roserag_jax.inference.engine import Engine, bucket, pad
from roserag_jax.inference.sampling import Sampling, draw, question_key
from roserag_jax.models.cache import PrefixCache, SuffixCache, unstack
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.logprobs import token_logprobs

_COMPILING = threading.Lock()  # so that two decoders do not both compile a program; running it holds no lock
_TASKS = threading.Lock()  # tasks share a tokenizer, which is not made for several threads at once
_CHUNK = 16  # steps between two looks of the host, if nobody finishes before
_PREFIX_AXES = ("batch", "heads", None, None)
_OWN_AXES = ("batch", "heads", None, None, None)


class Read(NamedTuple):
    """A wish to have a prompt read (all but its last token); the task is sent None.

    `shared` is what prompts of its kind begin with, from `Engine.read_shared`.
    """

    tokens: list[int]
    shared: PrefixCache | None = None


@dataclasses.dataclass(frozen=True)
class Decode:
    """A wish to have branches decoded behind the prompt read last; the task is sent a list of `Branch`.

    Each opening is the prompt's last token and what the branch has said so far. There may be more than a slot has
    branches: they then take turns.

    Args:
      limit: new tokens of a branch; 0 asks for the openings' log-probabilities alone.
      question, first_sample: branch n draws with the key of this question's sample `first_sample + n`.
      also_stop: the decoder's further stop tokens end a branch too.
      ends: tells from its new tokens whether a branch is at its end; asked now and then, so it may see tokens past it.
      length: how much of the prompt is seen; None is all of it.
    """

    openings: list[list[int]]
    limit: int
    sampling: Sampling = Sampling()
    question: str = ""
    first_sample: int = 0
    also_stop: bool = False
    ends: Callable[[list[int]], bool] | None = None
    length: int | None = None


class Branch(NamedTuple):
    """What became of a branch: new tokens (the stop token is not among them) and log-probabilities at temperature 1
    over the whole vocabulary; `finished` is False where it ran into the limit."""

    tokens: list[int]
    logprobs: np.ndarray
    finished: bool
    opening_logprobs: np.ndarray


Task = Generator[Read | Decode, Any, Any]


class Room(NamedTuple):
    """Sizes of a decoder: tasks at a time, branches of each at a time, and for each kind of `Decode` that they yield
    the most tokens of an opening and the most new ones."""

    tasks: int
    branches: int
    turns: tuple[tuple[int, int], ...]

    @property
    def new(self) -> int:
        """The most new tokens of a branch."""
        return max(new for _, new in self.turns)

    @property
    def slots(self) -> int:
        """Slots that a branch's own tokens need; an opening's last token is the first that is decoded."""
        return max(new + (bucket(opening - 1) if opening > 1 else 0) for opening, new in self.turns)

    def memory(self, config: ModelConfig, itemsize: int, prompt: int) -> int:
        """Bytes that one task takes, weights aside: its prompt, its branches and three arrays of their logits."""
        token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
        cached = token * (bucket(prompt) + self.branches * self.slots)
        return cached + 3 * 4 * self.branches * config.vocab_size


@dataclasses.dataclass
class _Slot:
    number: int
    task: Task
    wish: Read | Decode | None = None
    branches: list[Branch] = dataclasses.field(default_factory=list)
    opening_logprobs: np.ndarray | None = None
    running: bool = False


def run(
    engine: Engine, tasks: dict[int, Task], prompts: list[int], room: Room, also_stop: tuple[int, ...] = ()
) -> Iterator[tuple[int, Any]]:
    """Run tasks by number and yield `(number, result)` of each as soon as it is finished.

    Args:
      prompts: the length of the longest prompt of each number, also of those that have no task any more: what is left
        of a stopped run is then decoded in the shapes of the whole. Tasks are worked through in few classes of like
        lengths.
      also_stop: tokens that end the branches of a `Decode` with `also_stop`, besides the model's own.
    """
    for members in length_classes(prompts, room.tasks):
        longest, slots = max(prompts[i] for i in members), min(room.tasks, len(members))
        if not (members := [i for i in members if i in tasks]):
            continue
        lanes = engine.lanes if slots % engine.lanes == 0 else 1
        room_of_lane = room._replace(tasks=slots // lanes)
        decoders = [Decoder(engine, room_of_lane, longest, also_stop) for _ in range(lanes)]
        # Each lane has its own share, so that what stands beside what depends on no race between them.
        yield from _side_by_side(decoders, [[(i, tasks[i]) for i in members[lane::lanes]] for lane in range(lanes)])


def _side_by_side(decoders: list["Decoder"], shares: list[list[tuple[int, Task]]]) -> Iterator[tuple[int, Any]]:
    """Run several decoders, all but a single one in threads, and yield what they do; an error in one ends all."""
    if len(decoders) == 1:
        yield from decoders[0].run(shares[0])
        return
    made: queue.SimpleQueue = queue.SimpleQueue()

    def work(decoder, share):
        try:
            for result in decoder.run(share):
                made.put(result)
            made.put(None)
        except BaseException as error:  # raised again by whoever waits for the results
            made.put(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(decoders, shares, strict=True)]
    try:
        for thread in threads:
            thread.start()
        busy = len(threads)
        while busy:
            result = made.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                busy -= 1
            else:
                yield result
    finally:  # also if the caller is interrupted or asks for no more
        for decoder in decoders:
            decoder.told_to_stop = True
        for thread in threads:
            thread.join()


def length_classes(lengths: list[int], least: int) -> list[list[int]]:
    """Indices by length class (up to 256, 512, 1024, ... tokens); one of fewer than `least` goes with the next."""
    classes: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        classes.setdefault(max(8, (length - 1).bit_length()), []).append(i)
    result: list[list[int]] = []
    for _, members in sorted(classes.items()):
        if result and len(result[-1]) < least:
            members = sorted(result.pop() + members)
        result.append(members)
    return result


class Decoder:
    """B slots with room for prompts of one length class.

    Keys and values live on the devices; everything small (counts, flags, tokens) is NumPy between two chunks, and is
    there edited in place.
    """

    def __init__(self, engine: Engine, room: Room, prompt: int, also_stop: tuple[int, ...] = ()):
        c, self.engine, self.N = engine.config, engine, room.branches
        self.D = devices("batch", engine.mesh)
        B = -(-room.tasks // self.D) * self.D
        N, T = self.N, room.new
        self.P, self.M = bucket(prompt), room.slots
        stops = np.zeros((2, c.vocab_size), bool)
        stops[:, list(engine.stop_ids)] = True
        stops[1, list(also_stop)] = True
        self.stops = jnp.asarray(stops)
        self.slots: list[_Slot | None] = [None] * B
        self.told_to_stop = False
        heads, h = (B, c.num_kv_heads), c.head_dim
        self.prefix = tuple(self._empty(heads + size, _PREFIX_AXES) for size in ((h, self.P), (self.P, h)))
        self.own = tuple(self._empty((*heads, N, *size), _OWN_AXES) for size in ((h, self.M), (self.M, h)))
        self.lengths = np.zeros(B, np.int32)
        self.turn = np.int32(0)  # the slot of the own caches that is written next
        self.state = {
            "positions": np.zeros((B, N, self.M), np.int32),
            "used": np.zeros((B, N, self.M), bool),
            "token": np.zeros((B, N), np.int32),
            "tokens": np.zeros((B, N, T), np.int32),
            "logprobs": np.zeros((B, N, T), np.float32),
            "counts": np.zeros((B, N), np.int32),
            "active": np.zeros((B, N), bool),
            "stopped": np.zeros((B, N), bool),
        }
        self.asked = {
            "limit": np.zeros(B, np.int32),
            "question": np.zeros(B, np.uint32),
            "first_sample": np.zeros(B, np.uint32),
            "knobs": np.zeros((B, 4), np.float32),
            "also_stop": np.zeros(B, np.int32),
            "seen": np.zeros(B, np.int32),
        }

    def _empty(self, shape, axes):
        """An empty cache: of a layer's `shape`, stacked for all of them, or apart as the layers are."""
        e, L = self.engine, self.engine.config.num_layers
        zeros = lambda shape, axes: jnp.zeros(shape, e.dtype, device=sharding(shape, axes, e.mesh))
        if e.layers is None:
            return zeros((L, *shape), (None, *axes))
        return tuple(zeros(shape, axes) for _ in range(L))

    def _place(self, values: dict) -> dict:
        return dict(zip(values, self.engine.place(*values.values()), strict=True))

    def run(self, tasks: Iterable[tuple[int, Task]]) -> Iterator[tuple[int, Any]]:
        """Run numbered tasks of one length class, as `run` does; they begin in their order."""
        waiting = iter(tasks)
        while not self.told_to_stop:
            for b in range(len(self.slots)):
                while self.slots[b] is None and (following := next(waiting, None)):
                    self.slots[b] = _Slot(*following)
                    yield from self._answer(b)
            if not any(self.slots):
                return
            done = self._serve()
            for b in self._steps() if done is None else done:
                yield from self._answer(b)

    def _answer(self, b: int) -> Iterator[tuple[int, Any]]:
        """Send a task what it waits for and note its next wish; if it has none, free the slot and yield its result."""
        slot = self.slots[b]
        try:
            with _TASKS:
                slot.wish = slot.task.send(slot.branches if isinstance(slot.wish, Decode) else None)
                while isinstance(slot.wish, Decode) and not slot.wish.openings:
                    slot.wish = slot.task.send([])
            slot.branches = []
        except StopIteration as end:
            self.slots[b] = None
            yield slot.number, end.value

    def _serve(self) -> list[int] | None:
        """Serve the next wish of one slot of every device; returns the slots that have got what they waited for, or
        None if it is time to decode.

        Devices work in step, so it is worth it once half of them have a slot that waits, or nothing is being decoded.
        """
        per_device = len(self.slots) // self.D
        decoding = any(slot and slot.running for slot in self.slots)
        for kind, serve in ((Read, self._read), (Decode, self._open)):
            asking = {}
            for b, slot in enumerate(self.slots):
                if slot and not slot.running and isinstance(slot.wish, kind):
                    asking.setdefault(b // per_device, b)
            if asking and (2 * len(asking) >= self.D or not decoding):
                return serve(asking)
        return None

    def _rows(self, asking: dict[int, int], of_slot: Callable, other):
        """One row for each device: of its slot that is served, or `other`; where it lies there, and which are real."""
        rows = [of_slot(asking[d]) if d in asking else other for d in range(self.D)]
        per_device = len(self.slots) // self.D
        at = np.array([asking.get(d, 0) % per_device for d in range(self.D)], np.int32)
        return rows, at, np.array([d in asking for d in range(self.D)])

    def _read(self, asking: dict[int, int]) -> list[int]:
        """Read a prompt into each of the slots."""
        shared = self.slots[next(iter(asking.values()))].wish.shared
        asking = {d: b for d, b in asking.items() if self.slots[b].wish.shared is shared}
        C = 0 if shared is None else shared.v.shape[3]
        rest, at, real = self._rows(asking, lambda b: self.slots[b].wish.tokens[C:-1], [])
        tokens, lengths = pad(rest, min(bucket(max(map(len, rest))), self.P - C), self.engine.pad_id)
        for d, b in asking.items():
            self.lengths[b] = C + lengths[d]
        e = self.engine
        with jax.set_mesh(e.mesh), _COMPILING:
            self.prefix = _read(e.graph, e.state, self.prefix, *e.place(tokens, lengths, at, real), shared)
        return list(asking.values())

    def _open(self, asking: dict[int, int]) -> list[int]:
        """Begin the next branches of each of the slots; returns those whose branches have no tokens to decode."""
        if not any(slot and slot.running for slot in self.slots):
            self.turn = np.int32(0)  # so that one question at a time gives the same bits whatever came before it
        N, no_branch = self.N, [[]] * self.N
        batch = lambda b: self.slots[b].wish.openings[len(self.slots[b].branches) :][:N]
        openings, at, real = self._rows(asking, lambda b: (batch(b) + no_branch)[:N], no_branch)
        S = max(len(o) for row in openings for o in row) - 1  # tokens to read before the first that is decoded
        if S:
            logprobs, used, positions = self._extend(openings, bucket(S), asking, at, real)
        for d, b in asking.items():
            slot, wish, state, asked = self.slots[b], self.slots[b].wish, self.state, self.asked
            slot.running = True
            slot.opening_logprobs = logprobs[d] if S else np.zeros((N, 0), np.float32)
            state["used"][b], state["positions"][b] = (used[d], positions[d]) if S else (False, 0)
            state["token"][b] = [o[-1] if o else 0 for o in openings[d]]
            state["counts"][b], state["stopped"][b] = 0, False
            state["active"][b] = [bool(o) and wish.limit > 0 for o in openings[d]]
            asked["limit"][b], asked["also_stop"][b] = wish.limit, wish.also_stop
            asked["question"][b] = question_key(wish.question)
            asked["first_sample"][b] = wish.first_sample + len(slot.branches)
            asked["knobs"][b] = dataclasses.astuple(wish.sampling)
            asked["seen"][b] = self._seen(b)
        return self._collect()

    def _seen(self, b: int) -> int:
        """How much of its prompt a slot's branches see."""
        length = self.slots[b].wish.length
        return self.lengths[b] if length is None else length

    def _extend(self, openings, S: int, asking, at, real):
        """Read openings of several tokens, all but their last, into the slots' rings just behind their next turn."""
        e, flat = self.engine, [o for row in openings for o in row]
        tokens, lengths = pad([o[:-1] for o in flat], S, e.pad_id)
        targets, _ = pad([o[1:] for o in flat], S, e.pad_id)  # what follows each token
        tokens, targets, lengths = (a.reshape(self.D, self.N, *a.shape[1:]) for a in (tokens, targets, lengths))
        seen = np.array([self._seen(asking[d]) if d in asking else 0 for d in range(self.D)], np.int32)
        placed = e.place(tokens, targets, lengths, seen, at, real)
        with jax.set_mesh(e.mesh), _COMPILING:
            self.own, logprobs = _extend(e.graph, e.state, self.prefix, self.own, *placed, (self.turn - S) % self.M)
        behind = (self.turn - S + np.arange(S)) % self.M
        used, positions = np.zeros((self.D, self.N, self.M), bool), np.zeros((self.D, self.N, self.M), np.int32)
        used[:, :, behind] = np.arange(S) < lengths[..., None]
        positions[:, :, behind] = seen[:, None, None] + np.arange(S)
        return np.asarray(logprobs), used, positions

    def _steps(self) -> list[int]:
        """Decode a chunk; returns the slots that have got their branches."""
        e = self.engine
        with jax.set_mesh(e.mesh), _COMPILING:
            self.own, self.turn, state = _steps(
                e.graph,
                e.state,
                e.layers,
                self.prefix,
                self.own,
                self.turn,
                self._place(self.state),
                self._place(self.asked),
                self.stops,
                jax.random.key(e.seed),
            )
        self.state = {name: np.array(value) for name, value in jax.device_get(state).items()}
        self.turn = np.int32(self.turn)
        for b, slot in enumerate(self.slots):
            if slot and slot.running and slot.wish.ends:
                for n in np.flatnonzero(self.state["active"][b]):
                    with _TASKS:
                        ended = slot.wish.ends(self._said(b, n))
                    if ended:
                        self.state["active"][b, n], self.state["stopped"][b, n] = False, True
        return self._collect()

    def _said(self, b: int, n: int) -> list[int]:
        return self.state["tokens"][b, n, : self.state["counts"][b, n]].tolist()

    def _collect(self) -> list[int]:
        """Take what running slots have finished; returns those that have nothing left to decode."""
        done = []
        for b, slot in enumerate(self.slots):
            if not (slot and slot.running) or self.state["active"][b].any():
                continue
            for n, opening in enumerate(slot.wish.openings[len(slot.branches) :][: self.N]):
                count = self.state["counts"][b, n]
                finished = bool(self.state["stopped"][b, n])
                logprobs = self.state["logprobs"][b, n, :count].copy()
                opening_logprobs = slot.opening_logprobs[n, : len(opening) - 1]
                slot.branches.append(Branch(self._said(b, n), logprobs, finished, opening_logprobs))
            slot.running = False
            if len(slot.branches) == len(slot.wish.openings):
                done.append(b)
        return done


def _on_each(function, axes, cache, *rest):
    """`function(batch, cache, *rest)` on each device's own slots; all have slots or devices on the axis `batch`."""
    mesh, stacked = jax.sharding.get_abstract_mesh(), not isinstance(cache, tuple)
    axes = (None, *axes) if stacked else axes
    spec = lambda a: partition_spec(a.shape, axes if a.ndim == len(axes) else ("batch",), mesh)
    specs = jax.tree.map(spec, (cache, *rest))
    function = functools.partial(function, int(stacked))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0])(cache, *rest)


def _take(cache, axes, at):
    """The slot `at` of each device, [L D ...]."""

    def take(batch, cache, at):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at[0], 1, axis=batch), cache)

    rows = _on_each(take, axes, cache, at)
    return jnp.stack(rows) if isinstance(rows, tuple) else rows


def _put(cache, axes, fresh, at, real):
    """Write each device's fresh row [L D ...] at its slot `at`, from the front of all other axes, where it is real."""

    def put(batch, cache, fresh, at, real):
        def write(a, fresh):
            start = [0] * a.ndim
            start[batch] = at[0]
            fresh = jnp.where(real[0], fresh, jax.lax.dynamic_slice(a, start, fresh.shape))
            return jax.lax.dynamic_update_slice(a, fresh, start)

        return jax.tree.map(write, cache, fresh)

    return _on_each(put, axes, cache, unstack(fresh) if isinstance(cache, tuple) else fresh, at, real)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(graph, state, prefix, tokens, lengths, at, real, shared):
    cache = nnx.merge(graph, state).prefill(tokens, lengths, shared)
    return tuple(_put(a, _PREFIX_AXES, new, at, real) for a, new in zip(prefix, (cache.k, cache.v), strict=True))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _extend(graph, state, prefix, own, tokens, targets, lengths, seen, at, real, first):
    model = nnx.merge(graph, state)
    D, N, S = tokens.shape
    M = jax.tree.leaves(own)[0].shape[-1]
    cache = PrefixCache(*(_take(a, _PREFIX_AXES, at) for a in prefix), seen)
    hidden, new = model.extend_cached(
        tokens, jnp.arange(S) < lengths[..., None], cache, model.empty_suffix_cache(D, N, S)
    )
    logprobs = token_logprobs(hidden, targets, model.table, model.config.final_softcap)

    def ring(a, axis):
        widths = [(0, M - S if i == axis else 0) for i in range(a.ndim)]
        return jnp.roll(jnp.pad(a, widths), first, axis)

    rows = ring(new.k, 5), ring(new.v, 4)
    return tuple(_put(a, _OWN_AXES, row, at, real) for a, row in zip(own, rows, strict=True)), logprobs


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _steps(graph, state, layers, prefix, own, turn, small, asked, stops, seed):
    """Up to `_CHUNK` steps of all slots; fewer if one of them finishes."""
    model = nnx.merge(graph, state)
    B, N, _ = small["tokens"].shape
    cache = PrefixCache(*prefix, asked["seen"])
    fold = lambda i, n: jax.random.fold_in(jax.random.fold_in(seed, i), n)
    samples = asked["first_sample"][:, None] + jnp.arange(N, dtype=jnp.uint32)
    keys = jax.vmap(jax.vmap(fold, (None, 0)))(asked["question"], samples).reshape(-1)
    knobs = jnp.repeat(asked["knobs"], N, axis=0)
    busy = small["active"].any(-1)

    def goes_on(carry):
        step, _, _, small = carry
        return (step < _CHUNK) & small["active"].any() & (small["active"].any(-1) == busy).all()

    def advance(carry):
        step, own, turn, small = carry
        active, counts = small["active"], small["counts"]
        ring = SuffixCache(*own, small["positions"], small["used"], turn)
        extend = model.extend_cached if layers is None else functools.partial(model.extend_unstacked, layers)
        hidden, ring = extend(small["token"][..., None], active[..., None], cache, ring)
        logits = model.logits(hidden).reshape(B * N, -1)
        token = draw(logits, jax.vmap(jax.random.fold_in)(keys, counts.reshape(-1)), knobs)
        logprob = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        token, logprob = token.reshape(B, N).astype(jnp.int32), logprob.reshape(B, N)
        stopped = active & stops[asked["also_stop"][:, None], token]
        says = active & ~stopped
        here = says[..., None] & (jnp.arange(small["tokens"].shape[2]) == counts[..., None])
        counts = counts + says
        small = {
            "positions": ring.positions,
            "used": ring.used,
            "token": token,
            "tokens": jnp.where(here, token[..., None], small["tokens"]),
            "logprobs": jnp.where(here, logprob[..., None], small["logprobs"]),
            "counts": counts,
            "active": says & (counts < asked["limit"][:, None]),
            "stopped": small["stopped"] | stopped,
        }
        return step + 1, (ring.k, ring.v), ring.write_position, small

    _, own, turn, small = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), own, turn, small))
    return own, turn, small
