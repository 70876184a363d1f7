"""The decoder's host side: which task has which sequence slot, which request is served next, who has finished.

A task has a slot to itself from its first request to its result. All slots decode together, in one program on the
devices, whatever each is doing; between two chunks of steps the host polls who has finished, sends tasks their
completions and serves the next requests. So nobody waits for the longest of a batch. On a CPU two schedulers, each with
half of the slots, run in decoder threads side by side.

Axes: B slots, X devices that slots are split over, N branches, S tokens of a forced prefix, M suffix-cache length.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roserag_jax.distributed.sharding import devices
from roserag_jax.inference import decode_step, kv_cache
from roserag_jax.inference.decode_step import DecodeState, RequestParams
from roserag_jax.inference.engine import Engine, bucket, pad
from roserag_jax.inference.requests import Completion, DecoderCapacity, DecodeRequest, PrefillRequest, Task
from roserag_jax.inference.sampling import SamplingParams, question_seed
from roserag_jax.models.cache import SuffixCache

_COMPILING = threading.Lock()  # so that two threads do not both compile a program; running it holds no lock
_TASKS = threading.Lock()  # tasks share a tokenizer, which is not made for several threads at once


def run_tasks(
    engine: Engine,
    tasks: dict[int, Task],
    prompt_lengths: list[int],
    capacity: DecoderCapacity,
    extra_stop_ids: tuple[int, ...] = (),
) -> Iterator[tuple[int, Any]]:
    """Run tasks by number and yield `(number, result)` of each as soon as it is finished.

    Args:
      prompt_lengths: the length of the longest prompt of each number, also of those that have no task any more: what is
        left of a stopped run is then decoded in the shapes of the whole. Tasks are run in few classes of like lengths.
      extra_stop_ids: tokens that end the branches of a request with `use_extra_stop_ids`, besides the model's own.
    """
    for members in length_classes(prompt_lengths, capacity.slots):
        longest, slots = max(prompt_lengths[i] for i in members), min(capacity.slots, len(members))
        if not (members := [i for i in members if i in tasks]):
            continue
        threads = engine.decoder_threads if slots % engine.decoder_threads == 0 else 1
        of_thread = dataclasses.replace(capacity, slots=slots // threads)
        schedulers = [Scheduler(engine, of_thread, longest, extra_stop_ids) for _ in range(threads)]
        # Each thread has its own share, so that what is decoded beside what depends on no race between them.
        shares = [[(i, tasks[i]) for i in members[thread::threads]] for thread in range(threads)]
        yield from _run_in_threads(schedulers, shares)


def length_classes(lengths: list[int], minimum: int) -> list[list[int]]:
    """Indices by length class (up to 256, 512, 1024, ... tokens); one of fewer than `minimum` joins the next."""
    classes: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        classes.setdefault(max(8, (length - 1).bit_length()), []).append(i)
    result: list[list[int]] = []
    for _, members in sorted(classes.items()):
        if result and len(result[-1]) < minimum:
            members = sorted(result.pop() + members)
        result.append(members)
    return result


def _run_in_threads(schedulers: list["Scheduler"], shares: list[list[tuple[int, Task]]]) -> Iterator[tuple[int, Any]]:
    """Run several schedulers, each in a thread unless it is alone, and yield their results; an error ends all."""
    if len(schedulers) == 1:
        yield from schedulers[0].run(shares[0])
        return
    results: queue.SimpleQueue = queue.SimpleQueue()

    def work(scheduler, share):
        try:
            for result in scheduler.run(share):
                results.put(result)
            results.put(None)
        except BaseException as error:  # raised again by whoever waits for the results
            results.put(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(schedulers, shares, strict=True)]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
            else:
                yield result
    finally:  # also if the caller is interrupted or asks for no more
        for scheduler in schedulers:
            scheduler.cancelled = True
        for thread in threads:
            thread.join()


@dataclasses.dataclass
class SequenceSlot:
    """A task in its slot.

    Args:
      number: the task's.
      request: what it waits for.
      running: whether branches of the request are being decoded; otherwise it is pending.
      completions: of the request's branches that are finished, in order.
      forced_logprobs: [N S] of the forced prefixes of the branches that are running.
    """

    number: int
    task: Task
    request: PrefillRequest | DecodeRequest | None = None
    running: bool = False
    completions: list[Completion] = dataclasses.field(default_factory=list)
    forced_logprobs: np.ndarray | None = None

    def next_prefixes(self, branches: int) -> list[list[int]]:
        """The forced prefixes of the next `branches` branches, or of those that are running."""
        start = len(self.completions)
        return self.request.forced_prefixes[start : start + branches]


class Scheduler:
    """B sequence slots for prompts of one length class.

    Keys and values live on the devices; everything small (counts, flags, tokens) is NumPy between two chunks, and is
    there edited in place.
    """

    def __init__(
        self, engine: Engine, capacity: DecoderCapacity, prompt_length: int, extra_stop_ids: tuple[int, ...] = ()
    ):
        self.engine = engine
        self.X = devices("batch", engine.mesh)
        B, N = -(-capacity.slots // self.X) * self.X, capacity.branches
        S, M = capacity.max_new_tokens, capacity.suffix_length
        self.N, self.P, self.M = N, bucket(prompt_length), M
        stop_mask = np.zeros((2, engine.config.vocab_size), bool)
        stop_mask[:, list(engine.stop_ids)] = True
        stop_mask[1, list(extra_stop_ids)] = True
        self.stop_mask = jnp.asarray(stop_mask)
        self.slots: list[SequenceSlot | None] = [None] * B
        self.cancelled = False
        options = {"dtype": engine.dtype, "mesh": engine.mesh, "stacked": engine.unstacked_layers is None}
        self.prompts = kv_cache.allocate_prefix(engine.config, B, self.P, **options)
        self.prompt_lengths = np.zeros(B, np.int32)  # tokens of the prefix cache
        suffix = kv_cache.allocate_suffix(engine.config, B, N, M, **options)
        self.state = DecodeState(
            cache=SuffixCache(
                *suffix, np.zeros((B, N, M), np.int32), np.zeros((B, N, M), bool), np.zeros((), np.int32)
            ),
            last_token=np.zeros((B, N), np.int32),
            tokens=np.zeros((B, N, S), np.int32),
            logprobs=np.zeros((B, N, S), np.float32),
            num_tokens=np.zeros((B, N), np.int32),
            active=np.zeros((B, N), bool),
            stopped=np.zeros((B, N), bool),
        )
        zeros = lambda dtype: np.zeros(B, dtype)
        self.params = RequestParams(
            prompt_length=zeros(np.int32),
            max_new_tokens=zeros(np.int32),
            sampling=SamplingParams(zeros(np.float32), zeros(np.float32), zeros(np.int32), zeros(np.float32)),
            question_seed=zeros(np.uint32),
            first_sample=zeros(np.uint32),
            use_extra_stop_ids=zeros(np.int32),
        )

    def run(self, tasks: Iterable[tuple[int, Task]]) -> Iterator[tuple[int, Any]]:
        """Run numbered tasks of one length class, as `run_tasks` does; they begin in their order."""
        waiting = iter(tasks)
        while not self.cancelled:
            for b in range(len(self.slots)):
                while self.slots[b] is None and (following := next(waiting, None)):
                    self.slots[b] = SequenceSlot(*following)
                    yield from self._advance(b)
            if not any(self.slots):
                return
            served = self._serve_pending()
            for b in self._decode_chunk() if served is None else served:
                yield from self._advance(b)

    def _advance(self, b: int) -> Iterator[tuple[int, Any]]:
        """Send a task what it waits for and take its next request; at its end free the slot and yield its result."""
        slot = self.slots[b]
        try:
            with _TASKS:
                slot.request = slot.task.send(slot.completions if isinstance(slot.request, DecodeRequest) else None)
                while isinstance(slot.request, DecodeRequest) and not slot.request.forced_prefixes:
                    slot.request = slot.task.send([])
            self._check_size(slot.request)
            slot.completions = []
        except StopIteration as end:
            self.slots[b] = None
            yield slot.number, end.value

    def _check_size(self, request: PrefillRequest | DecodeRequest) -> None:
        """Raise a ValueError for a request that the caches have no room for; a ring would silently overwrite itself."""
        if isinstance(request, PrefillRequest):
            if len(request.tokens) - 1 > self.P:
                raise ValueError(f"a prompt of {len(request.tokens)} tokens is longer than the {self.P} of the decoder")
            return
        forced, new = max(map(len, request.forced_prefixes)) - 1, request.max_new_tokens
        if new > self.state.tokens.shape[2] or forced + new > self.M or (forced and bucket(forced) > self.M):
            raise ValueError(
                f"a forced prefix of {forced + 1} tokens and {new} new ones fit none of the decoder's request shapes"
            )

    def _serve_pending(self) -> list[int] | None:
        """Serve the next pending request of one slot of every device, prompts first.

        Returns:
          The slots that have what they waited for; None if it is time to decode. Devices work in step, so a request is
          served once half of them have one that is pending, or nothing is being decoded.
        """
        per_device = len(self.slots) // self.X
        decoding = any(slot and slot.running for slot in self.slots)
        for kind, serve in ((PrefillRequest, self._prefill), (DecodeRequest, self._start)):
            pending: dict[int, int] = {}  # a slot of each device
            for b, slot in enumerate(self.slots):
                if slot and not slot.running and isinstance(slot.request, kind):
                    pending.setdefault(b // per_device, b)
            if pending and (2 * len(pending) >= self.X or not decoding):
                return serve(pending)
        return None

    def _rows(self, pending: dict[int, int], of_slot, otherwise) -> tuple[list, np.ndarray, np.ndarray]:
        """One row for each device, of its slot that is served or else `otherwise`; the slots [X] and whether any is."""
        rows = [of_slot(pending[x]) if x in pending else otherwise for x in range(self.X)]
        per_device = len(self.slots) // self.X
        slots = np.array([pending.get(x, 0) % per_device for x in range(self.X)], np.int32)
        return rows, slots, np.array([x in pending for x in range(self.X)])

    def _prefill(self, pending: dict[int, int]) -> list[int]:
        """Prefill the prompts of slots that have the same shared prefix; returns these slots."""
        shared = self.slots[next(iter(pending.values()))].request.shared_prefix
        pending = {x: b for x, b in pending.items() if self.slots[b].request.shared_prefix is shared}
        C = 0 if shared is None else shared.v.shape[3]
        rows, slots, served = self._rows(pending, lambda b: self.slots[b].request.tokens[C:-1], [])
        tokens, lengths = pad(rows, min(bucket(max(map(len, rows))), self.P - C), self.engine.pad_id)
        for x, b in pending.items():
            self.prompt_lengths[b] = C + lengths[x]
        e = self.engine
        with jax.set_mesh(e.mesh), _COMPILING:
            placed = e.place(tokens, lengths, slots, served)
            self.prompts = decode_step.prefill_slots(e.graph, e.state, self.prompts, *placed, shared)
        return list(pending.values())

    def _start(self, pending: dict[int, int]) -> list[int]:
        """Start the next branches of slots; returns those that have no tokens to decode and so are finished."""
        state, params, N = self.state, self.params, self.N
        if not any(slot and slot.running for slot in self.slots):
            state.cache.write_position[...] = (
                0  # so that one task at a time gives the same bits whatever was decoded before
            )
        no_branch = [[]] * N
        prefixes_of = lambda b: (self.slots[b].next_prefixes(N) + no_branch)[:N]
        prefixes, slots, served = self._rows(pending, prefixes_of, no_branch)
        for x, b in pending.items():
            slot, request = self.slots[b], self.slots[b].request
            slot.running, slot.forced_logprobs = True, np.zeros((N, 0), np.float32)
            state.cache.used[b], state.cache.positions[b] = False, 0
            state.last_token[b] = [prefix[-1] if prefix else 0 for prefix in prefixes[x]]
            state.num_tokens[b], state.stopped[b] = 0, False
            state.active[b] = [bool(prefix) and request.max_new_tokens > 0 for prefix in prefixes[x]]
            visible = self.prompt_lengths[b] if request.prompt_length is None else request.prompt_length
            params.prompt_length[b], params.max_new_tokens[b] = visible, request.max_new_tokens
            params.question_seed[b] = question_seed(request.question_id)
            params.first_sample[b] = request.first_sample + len(slot.completions)
            params.use_extra_stop_ids[b] = request.use_extra_stop_ids
            for field in dataclasses.fields(SamplingParams):
                getattr(params.sampling, field.name)[b] = getattr(request.sampling, field.name)
        if any(len(prefix) > 1 for row in prefixes for prefix in row):
            self._extend(prefixes, pending, slots, served)
        return self._collect()

    def _extend(self, prefixes: list[list[list[int]]], pending: dict[int, int], slots, served) -> None:
        """Put forced prefixes, all but their last token, into the suffix cache, just before the next write position."""
        e, N, cache = self.engine, self.N, self.state.cache
        longest = np.array([max(len(prefix) for prefix in row) - 1 for row in prefixes])  # of each device
        S, flat = bucket(longest.max()), [prefix for row in prefixes for prefix in row]
        tokens, lengths = pad([prefix[:-1] for prefix in flat], S, e.pad_id)
        targets, _ = pad([prefix[1:] for prefix in flat], S, e.pad_id)
        tokens, targets, lengths = (a.reshape(self.X, N, *a.shape[1:]) for a in (tokens, targets, lengths))
        visible = [self.params.prompt_length[pending[x]] if x in pending else 0 for x in range(self.X)]
        first = ((cache.write_position - longest) % self.M).astype(np.int32)
        placed = e.place(tokens, targets, lengths, np.array(visible, np.int32), slots, served, first)
        with jax.set_mesh(e.mesh), _COMPILING:
            (k, v), logprobs = decode_step.extend_slots(e.graph, e.state, self.prompts, (cache.k, cache.v), *placed)
        self.state = dataclasses.replace(self.state, cache=dataclasses.replace(cache, k=k, v=v))
        logprobs = np.asarray(logprobs)
        for x, b in pending.items():
            self.slots[b].forced_logprobs = logprobs[x]
            written = (first[x] + np.arange(S)) % self.M
            cache.used[b][:, written] = np.arange(S) < lengths[x, :, None]
            cache.positions[b][:, written] = visible[x] + np.arange(S)

    def _decode_chunk(self) -> list[int]:
        """Decode a chunk of steps; returns the slots whose requests are finished."""
        e = self.engine
        with jax.set_mesh(e.mesh), _COMPILING:
            self.state = decode_step.decode_chunk(
                e.graph,
                e.state,
                e.unstacked_layers,
                self.prompts,
                self._place(self.state),
                self._place(self.params),
                self.stop_mask,
                jax.random.key(e.seed),
            )
        self.state = self._to_host(self.state)
        self._apply_stop_functions()
        return self._collect()

    def _place(self, tree):
        """A tree with its host arrays on the devices, slots over the mesh's batch axes; a scalar is left as is."""
        leaves, structure = jax.tree.flatten(tree)
        on_host = [i for i, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray) and leaf.ndim]
        for i, placed in zip(on_host, self.engine.place(*(leaves[i] for i in on_host)), strict=True):
            leaves[i] = placed
        return structure.unflatten(leaves)

    @staticmethod
    def _to_host(state: DecodeState) -> DecodeState:
        """The state with everything but keys and values as NumPy arrays that can be written."""
        leaves, structure = jax.tree.flatten(state)
        kept = {id(leaf) for leaf in jax.tree.leaves((state.cache.k, state.cache.v))}
        on_host = jax.device_get([leaf for leaf in leaves if id(leaf) not in kept])
        copies = map(np.array, on_host)
        return structure.unflatten([leaf if id(leaf) in kept else next(copies) for leaf in leaves])

    def _apply_stop_functions(self) -> None:
        """End the branches whose request's stop function says so."""
        for b, slot in enumerate(self.slots):
            if not (slot and slot.running and slot.request.stop_function):
                continue
            for n in np.flatnonzero(self.state.active[b]):
                with _TASKS:
                    stops = slot.request.stop_function(self._new_tokens(b, n))
                if stops:
                    self.state.active[b, n], self.state.stopped[b, n] = False, True

    def _new_tokens(self, b: int, n: int) -> list[int]:
        return self.state.tokens[b, n, : self.state.num_tokens[b, n]].tolist()

    def _collect(self) -> list[int]:
        """Take the completions of slots whose branches are all finished; returns those whose requests are finished."""
        finished = []
        for b, slot in enumerate(self.slots):
            if not (slot and slot.running) or self.state.active[b].any():
                continue
            for n, prefix in enumerate(slot.next_prefixes(self.N)):
                tokens = self._new_tokens(b, n)
                logprobs = self.state.logprobs[b, n, : len(tokens)].copy()
                forced_logprobs = slot.forced_logprobs[n, : len(prefix) - 1]
                stopped = bool(self.state.stopped[b, n])
                slot.completions.append(Completion(tokens, logprobs, stopped, forced_logprobs))
            slot.running = False
            if len(slot.completions) == len(slot.request.forced_prefixes):
                finished.append(b)
        return finished
