"""The decoder's host side: which task has which sequence slot, which request is served next, who has finished.

A task has a slot to itself from its first request to its result. All slots decode together, in one program on the
devices, whatever each is doing; after a chunk of steps the host polls who has finished, sends tasks their
completions and serves the next requests. So nobody waits for the longest of a batch. On a CPU two schedulers, each with
half of the slots, run in decoder threads side by side.

Axes: B slots, X devices that slots are split over, N branches, S tokens of a forced prefix, M suffix-cache length.
"""

import collections
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from roserag_jax.distributed.sharding import devices
from roserag_jax.inference import decode_step, kv_cache
from roserag_jax.inference.decode_step import DecodeState, RequestParams
from roserag_jax.inference.engine import Engine, bucket, coarse_bucket, joined_sizes, pad
from roserag_jax.inference.requests import Completion, DecoderCapacity, DecodeRequest, PrefillRequest, Task
from roserag_jax.inference.sampling import SamplingParams, question_seed
from roserag_jax.models.cache import SuffixCache

_COMPILING = threading.Lock()  # so that two threads do not both compile a program; running it holds no lock
TASKS_LOCK = threading.Lock()  # tasks share a tokenizer, which is not made for several threads at once
_MANY_SLOTS = 16  # with so many the devices run ahead of the host
_TOGETHER, _TOGETHER_TOKENS = (8, 4), 2048  # slots of a device served in one program where so many wait; their tokens


class NumberedTask(NamedTuple):
    """A task, the number that its result is yielded with, and the length of its longest prompt."""

    number: int
    length: int
    task: Task


class LengthClass(NamedTuple):
    """Prompts of up to `longest` tokens are decoded together; about `count` are expected."""

    longest: int
    count: int


def run_tasks(
    engine: Engine,
    tasks: Iterable[NumberedTask],
    classes: list[LengthClass],
    capacity: DecoderCapacity,
    extra_stop_ids: tuple[int, ...] = (),
) -> Iterator[tuple[int, Any]]:
    """Run tasks and yield `(number, result)` of each as soon as it is finished.

    Tasks are taken when slots are free for them, and a few more where their lengths are of another class than what is
    being decoded: they come best in the order of their lengths, but any order will do.

    Args:
      classes: from `length_classes`, of all prompts, also of those whose tasks a former run has finished: what is left
        is then decoded in the same shapes.
      extra_stop_ids: tokens that end the branches of a request with `use_extra_stop_ids`, besides the model's own.
    """
    slots = min(capacity.slots, sum(each.count for each in classes))
    threads = engine.decoder_threads if slots % engine.decoder_threads == 0 else 1
    of_thread = dataclasses.replace(capacity, slots=max(slots // threads, 1))
    # Each thread has its own share, so that what is decoded beside what depends on no race between them.
    dealer = _Dealer(tasks, threads)
    decoders = [Decoder(engine, dealer.share(i), classes, of_thread, extra_stop_ids) for i in range(threads)]
    yield from decoders[0].run() if threads == 1 else _run_in_threads(decoders)


def length_classes(lengths: Iterable[int], minimum: int) -> list[LengthClass]:
    """Length classes of prompts: up to 256, 512, 1024, ... tokens, the last up to the longest prompt.

    A class of fewer than `minimum` prompts joins the next.
    """
    counts, longest = collections.Counter(), 0
    for length in lengths:
        counts[_power(length)] += 1
        longest = max(longest, length)
    return [LengthClass(min(limit, bucket(longest)), count) for limit, count in joined_sizes(counts, minimum)]


def _power(length: int) -> int:
    return 1 << max(8, (length - 1).bit_length())


class _Dealer:
    """Deals tasks out to decoder threads in turn."""

    def __init__(self, tasks: Iterable[NumberedTask], threads: int):
        self._tasks, self._turns = iter(tasks), itertools.cycle(range(threads))
        self._dealt = [collections.deque() for _ in range(threads)]
        self._lock = threading.Lock()

    def share(self, thread: int) -> Iterator[NumberedTask]:
        """The tasks of a thread, taken when they are asked for."""
        while True:
            with self._lock:
                while not self._dealt[thread]:
                    if (following := next(self._tasks, None)) is None:
                        return
                    self._dealt[next(self._turns)].append(following)
                found = self._dealt[thread].popleft()
            yield found


class Decoder:
    """Runs the tasks of one thread, one length class after another.

    Args:
      tasks: as they come; of those of other classes than the one that is being decoded, some are kept waiting.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Iterator[NumberedTask],
        classes: list[LengthClass],
        capacity: DecoderCapacity,
        extra_stop_ids: tuple[int, ...],
    ):
        self.engine, self.tasks, self.classes, self.capacity = engine, tasks, classes, capacity
        self.extra_stop_ids, self.cancelled = extra_stop_ids, False
        self.scheduler: Scheduler | None = None
        self.waiting: dict[LengthClass, collections.deque] = collections.defaultdict(collections.deque)

    def run(self) -> Iterator[tuple[int, Any]]:
        """Run all tasks; yields their results as `run_tasks` does."""
        while not self.cancelled and (of := self._next_class()):
            self.scheduler = None  # its caches make room for the next one's
            capacity = dataclasses.replace(self.capacity, slots=min(self.capacity.slots, max(of.count, 1)))
            self.scheduler = Scheduler(self.engine, capacity, of.longest, self.extra_stop_ids)
            yield from self.scheduler.run(self._of_class(of))

    def cancel(self) -> None:
        """Have `run` end after the chunk that is running."""
        self.cancelled = True
        if self.scheduler:
            self.scheduler.cancelled = True

    def _class(self, length: int) -> LengthClass:
        """The class of a length; for one that was not expected, one of its own with a single slot."""
        return next((each for each in self.classes if length <= each.longest), LengthClass(_power(length), 1))

    def _take(self) -> bool:
        """Put the next task with those of its class; False where there is none."""
        if found := next(self.tasks, None):
            self.waiting[self._class(found.length)].append(found)
        return found is not None

    def _next_class(self) -> LengthClass | None:
        """The class of which most tasks wait; None where there are no more tasks."""
        if not any(self.waiting.values()) and not self._take():
            return None
        return max(self.waiting, key=lambda each: len(self.waiting[each]))

    def _of_class(self, of: LengthClass) -> Iterator[tuple[int, Task]]:
        """Tasks of a class, until there are no more or too many others wait."""
        while not self.cancelled:
            if self.waiting[of]:
                found = self.waiting[of].popleft()
                yield found.number, found.task
            elif sum(map(len, self.waiting.values())) > self.capacity.slots or not self._take():
                return


def _run_in_threads(decoders: list[Decoder]) -> Iterator[tuple[int, Any]]:
    """Run several decoders, each in a thread, and yield their results; an error ends all."""
    results: queue.SimpleQueue = queue.SimpleQueue()

    def work(decoder):
        try:
            for result in decoder.run():
                results.put(result)
            results.put(None)
        except BaseException as error:  # raised again by whoever waits for the results
            results.put(error)

    threads = [threading.Thread(target=work, args=(decoder,)) for decoder in decoders]
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
        for decoder in decoders:
            decoder.cancel()
        for thread in threads:
            thread.join()


@dataclasses.dataclass
class SequenceSlot:
    """A task in its slot.

    Args:
      number: the task's.
      request: what it waits for.
      running: whether branches of the request are being decoded; otherwise it is pending.
      first_chunk: the chunk in which they started; what chunks before it say of the slot is not about them.
      completions: of the request's branches that are finished, in order.
      forced_logprobs: [R N S] of forced prefixes, on the devices, and the slot's row: of the branches that are running.
    """

    number: int
    task: Task
    request: PrefillRequest | DecodeRequest | None = None
    running: bool = False
    first_chunk: int = 0
    completions: list[Completion] = dataclasses.field(default_factory=list)
    forced_logprobs: tuple[jax.Array, int] | None = None

    def next_prefixes(self, branches: int) -> list[list[int]]:
        """The forced prefixes of the next `branches` branches, or of those that are running."""
        start = len(self.completions)
        return self.request.forced_prefixes[start : start + branches]


@dataclasses.dataclass(frozen=True)
class _Updates:
    """What `decode_step.update_slots` is to change before the next chunk: NumPy arrays with an entry for each slot."""

    started: np.ndarray
    empty_suffix: np.ndarray
    last_token: np.ndarray
    active: np.ndarray
    ended: np.ndarray

    @classmethod
    def none(cls, slots: int, branches: int) -> "_Updates":
        flat, square = (slots,), (slots, branches)
        return cls(*map(np.zeros, (flat, flat, square, square, square), (bool, bool, np.int32, bool, bool)))


class Scheduler:
    """B sequence slots for prompts of one length class.

    Caches and state live on the devices, and only what changes is sent there. With few slots the host waits for each
    chunk of steps. With many, the devices run the next chunk while the host reads the one before; what is decoded when
    is a function of the requests, never of who is faster.
    """

    def __init__(
        self, engine: Engine, capacity: DecoderCapacity, prompt_length: int, extra_stop_ids: tuple[int, ...] = ()
    ):
        self.engine = engine
        self.X = devices("batch", engine.mesh)
        B, N = -(-capacity.slots // self.X) * self.X, capacity.branches
        S, M = capacity.max_new_tokens, capacity.suffix_length
        self.B, self.N, self.P, self.M, self.S = B, N, bucket(prompt_length), M, S
        stop_mask = np.zeros((2, engine.config.vocab_size), bool)
        stop_mask[:, list(engine.stop_ids)] = True
        stop_mask[1, list(extra_stop_ids)] = True
        self.stop_mask, self.seed = jnp.asarray(stop_mask), jax.random.key(engine.seed)
        self.slots: list[SequenceSlot | None] = [None] * B
        self.cancelled = False
        self.run_ahead = int(B >= _MANY_SLOTS)  # chunks that are dispatched before an earlier one is read
        self.chunks = 0  # dispatched so far
        options = {"dtype": engine.dtype, "mesh": engine.mesh, "stacked": engine.unstacked_layers is None}
        self.prompts = kv_cache.allocate_prefix(engine.config, B, self.P, **options)
        self.prompt_lengths = np.zeros(B, np.int32)  # tokens of the prefix cache
        suffix = kv_cache.allocate_suffix(engine.config, B, N, M, **options)
        zeros = lambda dtype, *shape: engine.place(np.zeros((B, *shape), dtype))[0]
        self.state = DecodeState(
            cache=SuffixCache(*suffix, zeros(np.int32, N, M), zeros(bool, N, M), jnp.int32(0)),
            last_token=zeros(np.int32, N),
            tokens=zeros(np.int32, N, S),
            logprobs=zeros(np.float32, N, S),
            num_tokens=zeros(np.int32, N),
            active=zeros(bool, N),
            stopped=zeros(bool, N),
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
        self.placed_params = self._place(self.params)
        self.updates: _Updates | None = None

    def run(self, tasks: Iterable[tuple[int, Task] | None]) -> Iterator[tuple[int, Any]]:
        """Run numbered tasks of one length class, as `run_tasks` does; they begin in their order.

        Args:
          tasks: they may arrive while others run: None says that there is none right now, and is asked again after the
            next chunk. Who has none to run either waits for one instead (`inference.service`).
        """
        waiting, unread = iter(tasks), collections.deque()
        while not self.cancelled:
            yield from self._fill_slots(waiting)
            if not any(self.slots):
                return
            if (served := self._serve_pending()) is None:
                unread.append((self.chunks, self._dispatch_chunk()))
                served = self._read_chunk(*unread.popleft()) if len(unread) > self.run_ahead else []
            for b in served:
                yield from self._advance(b)

    def _fill_slots(self, waiting: Iterator[tuple[int, Task] | None]) -> Iterator[tuple[int, Any]]:
        """Give each free slot the next task; yields the results of tasks that request nothing."""
        for b in range(self.B):
            while self.slots[b] is None and (following := next(waiting, None)):
                self.slots[b] = SequenceSlot(*following)
                yield from self._advance(b)

    def _advance(self, b: int) -> Iterator[tuple[int, Any]]:
        """Send a task what it waits for and take its next request; at its end free the slot and yield its result."""
        slot = self.slots[b]
        try:
            with TASKS_LOCK:
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
        if new > self.S or forced + new > self.M or (forced and bucket(forced) > self.M):
            raise ValueError(
                f"a forced prefix of {forced + 1} tokens and {new} new ones fit none of the decoder's request shapes"
            )

    def _serve_pending(self) -> list[int] | None:
        """Serve pending requests, prompts first.

        Returns:
          The slots that have what they waited for; None if it is time to decode. Devices work in step, so requests are
          served once half of the devices have one that is pending, or nothing is being decoded.
        """
        decoding = any(slot and slot.running for slot in self.slots)
        for kind, serve in ((PrefillRequest, self._prefill), (DecodeRequest, self._start)):
            pending: list[list[int]] = [[] for _ in range(self.X)]  # slots of each device
            for b, slot in enumerate(self.slots):
                if slot and not slot.running and isinstance(slot.request, kind):
                    pending[b * self.X // self.B].append(b)
            waiting = sum(map(bool, pending))
            if waiting and (2 * waiting >= self.X or not decoding):
                return serve(pending)
        return None

    def _take_group(self, pending: list[list[int]], length_of: Callable, tokens: int = 1, together=_TOGETHER):
        """Take from `pending` the slots to serve in one program: the next of each device, or several where many wait.

        Args:
          length_of: the padded length of a slot's rows; `tokens` are that many times as many.
          together: how many of a device may be served together, the most first; one may be always.

        Returns:
          The slots [R], None where a row is empty; where they lie within their devices, [R]; which rows are slots, [R].
        """
        length = max(length_of(of_device[0]) for of_device in pending if of_device)
        alike = [[b for b in of_device if length_of(b) <= length] for of_device in pending]
        waiting = max(map(len, alike))
        W = next((W for W in together if waiting >= W and W * length * tokens <= _TOGETHER_TOKENS), 1)
        group = [(of_device + [None] * W)[:W] for of_device in alike]
        for of_device, taken in zip(pending, group, strict=True):
            of_device[:] = [b for b in of_device if b not in taken]
        rows = [b for of_device in group for b in of_device]
        per_device = self.B // self.X
        slots = np.array([0 if b is None else b % per_device for b in rows], np.int32)
        return rows, slots, np.array([b is not None for b in rows])

    def _prefill(self, pending: list[list[int]]) -> list[int]:
        """Prefill prompts that have the same shared prefix; returns their slots."""
        first = next(self.slots[of_device[0]].request for of_device in pending if of_device)
        shared, few = first.shared_prefix, first.few_shapes
        C = 0 if shared is None else shared.v.shape[3]
        is_like = lambda request: request.shared_prefix is shared and request.few_shapes == few
        rest_of = lambda b: self.slots[b].request.tokens[C:-1]
        padded = lambda rest: min((coarse_bucket if few else bucket)(len(rest)), self.P - C)
        pending = [[b for b in bs if is_like(self.slots[b].request)] for bs in pending]
        together = () if few else _TOGETHER
        rows, slots, served = self._take_group(pending, lambda b: padded(rest_of(b)), together=together)
        rests = [[] if b is None else rest_of(b) for b in rows]
        tokens, lengths = pad(rests, padded(max(rests, key=len)), self.engine.pad_id)
        taken = [(b, length) for b, length in zip(rows, lengths, strict=True) if b is not None]
        for b, length in taken:
            self.prompt_lengths[b] = C + length
        e = self.engine
        with jax.set_mesh(e.mesh), _COMPILING:
            tokens, lengths, slots, served = self._place((tokens, lengths, slots, served))
            cache = e.prefill_rows(tokens, lengths, shared)
            self.prompts = kv_cache.put_slots(self.prompts, (cache.k, cache.v), slots, served)
        return [b for b, _ in taken]

    def _start(self, pending: list[list[int]]) -> list[int]:
        """Start the next branches of slots; returns those that have no tokens to decode and so are finished."""
        if not any(slot and slot.running for slot in self.slots):
            # So that one task at a time gives the same bits whatever was decoded before.
            cache = dataclasses.replace(self.state.cache, write_position=jnp.int32(0))
            self.state = dataclasses.replace(self.state, cache=cache)
        started = [b for of_device in pending for b in of_device]
        for b in started:
            self._start_slot(b)
        self.placed_params = None
        forced = [[b for b in bs if self._longest_prefix(b) > 1] for bs in pending]
        while any(forced):
            self._extend(forced)
        return self._collect([b for b in started if not self.slots[b].request.max_new_tokens], None)

    def _start_slot(self, b: int) -> None:
        """Note what the next branches of a slot start from."""
        self.updates = updates = self.updates or _Updates.none(self.B, self.N)
        slot, request, params = self.slots[b], self.slots[b].request, self.params
        slot.running, slot.first_chunk, slot.forced_logprobs = True, self.chunks, None
        prefixes = slot.next_prefixes(self.N)
        updates.started[b], updates.empty_suffix[b] = True, self._longest_prefix(b) == 1
        updates.last_token[b], updates.active[b] = 0, False
        updates.last_token[b, : len(prefixes)] = [prefix[-1] for prefix in prefixes]
        updates.active[b, : len(prefixes)] = request.max_new_tokens > 0
        visible = self.prompt_lengths[b] if request.prompt_length is None else request.prompt_length
        params.prompt_length[b], params.max_new_tokens[b] = visible, request.max_new_tokens
        params.question_seed[b] = question_seed(request.question_id)
        params.first_sample[b] = request.first_sample + len(slot.completions)
        params.use_extra_stop_ids[b] = request.use_extra_stop_ids
        for field in dataclasses.fields(SamplingParams):
            getattr(params.sampling, field.name)[b] = getattr(request.sampling, field.name)

    def _longest_prefix(self, b: int) -> int:
        return max(map(len, self.slots[b].next_prefixes(self.N)))

    def _extend(self, pending: list[list[int]]) -> None:
        """Put forced prefixes, all but their last token, into the suffix cache of a group of slots."""
        e, N = self.engine, self.N
        rows, slots, served = self._take_group(pending, lambda b: bucket(self._longest_prefix(b) - 1), tokens=N)
        prefixes = [prefix for b in rows for prefix in self._padded_prefixes(b)]
        S = bucket(max(map(len, prefixes)) - 1)
        tokens, lengths = pad([prefix[:-1] for prefix in prefixes], S, e.pad_id)
        targets, _ = pad([prefix[1:] for prefix in prefixes], S, e.pad_id)
        tokens, targets, lengths = (a.reshape(len(rows), N, *a.shape[1:]) for a in (tokens, targets, lengths))
        visible = np.array([0 if b is None else self.params.prompt_length[b] for b in rows], np.int32)
        with jax.set_mesh(e.mesh), _COMPILING:
            placed = self._place((tokens, targets, lengths, visible, slots, served))
            cache, logprobs = decode_step.extend_slots(e.network, e.weights, self.prompts, self.state.cache, *placed)
        self.state = dataclasses.replace(self.state, cache=cache)
        for row, b in enumerate(rows):
            if b is not None:
                self.slots[b].forced_logprobs = logprobs, row

    def _padded_prefixes(self, b: int | None) -> list[list[int]]:
        prefixes = [] if b is None else self.slots[b].next_prefixes(self.N)
        return prefixes + [[]] * (self.N - len(prefixes))

    def _dispatch_chunk(self) -> tuple:
        """Dispatch a chunk of steps, with what has changed since the last one; returns what `_read_chunk` reads."""
        e = self.engine
        with jax.set_mesh(e.mesh), _COMPILING:
            if self.updates:
                fields = [getattr(self.updates, field.name) for field in dataclasses.fields(_Updates)]
                self.state = decode_step.update_slots(self.state, *self._place(fields))
                self.updates = None
            if self.placed_params is None:
                # A copy: the devices may read it when the host has long gone on to change the parameters.
                self.placed_params = self._place(jax.tree.map(np.copy, self.params))
            self.state, outputs = decode_step.decode_chunk(
                e.network,
                e.weights,
                e.unstacked_layers,
                self.prompts,
                self.state,
                self.placed_params,
                self.stop_mask,
                self.seed,
            )
        self.chunks += 1
        return outputs

    def _place(self, tree):
        """A tree of host arrays on the devices, slots over the mesh's batch axes; on one device the call does that."""
        if self.engine.mesh.size == 1:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(self.engine.place(*leaves))

    def _read_chunk(self, number: int, outputs: tuple) -> list[int]:
        """Wait for a chunk and take what it has finished; returns the slots whose requests are finished."""
        active, *rest = jax.device_get(outputs)
        active = np.array(active)
        stopped, num_tokens, tokens, logprobs = rest
        stopped = np.array(stopped)
        finished = []
        for b, slot in enumerate(self.slots):
            if not (slot and slot.running and slot.first_chunk <= number):
                continue
            if slot.request.stop_function:
                for n in np.flatnonzero(active[b]):
                    with TASKS_LOCK:
                        stops = slot.request.stop_function(tokens[b, n, : num_tokens[b, n]].tolist())
                    if stops:
                        self.updates = self.updates or _Updates.none(self.B, self.N)
                        self.updates.ended[b, n], active[b, n], stopped[b, n] = True, False, True
            if not active[b].any():
                finished.append(b)
        return self._collect(finished, (stopped, num_tokens, tokens, logprobs))

    def _collect(self, finished: list[int], outputs: tuple | None) -> list[int]:
        """Take the completions of slots whose branches are all finished; returns those whose requests are finished.

        Args:
          outputs: what was decoded; None where nothing was to be.
        """
        done = []
        for b in finished:
            slot = self.slots[b]
            array, row = slot.forced_logprobs or (np.zeros((1, self.N, 0), np.float32), 0)
            forced_logprobs = np.asarray(array)[row]
            for n, prefix in enumerate(slot.next_prefixes(self.N)):
                tokens, logprobs, stops = [], np.zeros(0, np.float32), False
                if outputs is not None:
                    stopped, num_tokens, all_tokens, all_logprobs = outputs
                    count, stops = num_tokens[b, n], bool(stopped[b, n])
                    tokens, logprobs = all_tokens[b, n, :count].tolist(), all_logprobs[b, n, :count].copy()
                slot.completions.append(Completion(tokens, logprobs, stops, forced_logprobs[n, : len(prefix) - 1]))
            slot.running = False
            if len(slot.completions) == len(slot.request.forced_prefixes):
                done.append(b)
        return done
