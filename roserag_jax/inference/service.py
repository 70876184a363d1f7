"""A decoder that completes prompts as they come: schedulers in threads that take their tasks from one queue.

Whoever has a prompt hands in a `Generation` from any thread, at any time. It takes the next sequence slot that is free
and is decoded beside all others; a generation that is cancelled gives its slot back after the chunk that is running.
"""

import collections
import dataclasses
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from roserag_jax.inference.engine import Engine
from roserag_jax.inference.requests import Completion, DecoderCapacity, DecodeRequest, PrefillRequest, Task
from roserag_jax.inference.scheduler import Scheduler


class Full(Exception):
    """So many generations wait for a slot that no more are taken."""


class Closed(Exception):
    """The service is ending."""


@dataclasses.dataclass(eq=False)
class Generation:
    """One completion of a prompt: what it asks of the decoder, and who is told of it.

    Args:
      prompt: the prompt.
      request: of one branch. Its stop function is called with all new tokens so far after each chunk of steps, which
        is also how they are followed while they come.
      on_end: called once, with the completion or with the error that ended the generation. Like the stop function it
        is called in a decoder thread and must return soon.
      started: when the generation got its slot, of `time.monotonic`; 0 before.
      cancelled: nobody wants the completion any more.
      ended: `on_end` was called.
    """

    prompt: PrefillRequest
    request: DecodeRequest
    on_end: Callable[[Completion | Exception], None]
    started: float = 0.0
    cancelled: bool = False
    ended: bool = False

    def task(self) -> Task:
        """The task that a scheduler runs; returns the completion or the error of the stop function."""
        self.started = time.monotonic()
        stop_function, errors = self.request.stop_function, []

        def stops(tokens: list[int]) -> bool:
            try:
                return self.cancelled or bool(stop_function and stop_function(tokens))
            except Exception as error:  # it must not end all that is decoded beside this
                errors.append(error)
                return True

        if not self.cancelled:
            yield self.prompt
        if self.cancelled:
            return Closed("cancelled")
        (completion,) = yield dataclasses.replace(self.request, stop_function=stops)
        return errors[0] if errors else completion


class DecoderService:
    """Completes prompts in the slots of an engine's decoder threads.

    Args:
      capacity: of the service; its branches are 1.
      prompt_length: the most tokens of a prompt.
      max_waiting: the most generations that may wait for a slot.
    """

    def __init__(self, engine: Engine, capacity: DecoderCapacity, prompt_length: int, max_waiting: int):
        threads = engine.decoder_threads if capacity.slots % engine.decoder_threads == 0 else 1
        self.engine, self.capacity, self.max_waiting = engine, capacity, max_waiting
        of_thread = dataclasses.replace(capacity, slots=capacity.slots // threads)
        self._make_scheduler = lambda: Scheduler(engine, of_thread, prompt_length)
        self._schedulers: list[Scheduler | None] = [self._make_scheduler() for _ in range(threads)]
        self._running: list[dict[int, Generation]] = [{} for _ in range(threads)]
        self._waiting: collections.deque[Generation] = collections.deque()
        self._changed = threading.Condition()  # of `_waiting` and `_closing`
        self._closing = False
        # Daemons, for one that compiles cannot be interrupted.
        self._threads = [
            threading.Thread(target=self._work, args=(thread,), name=f"decoder {thread}", daemon=True)
            for thread in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, generations: list[Generation]) -> None:
        """Have generations decoded, all or none of them.

        Raises:
          Full: too many are waiting.
          Closed: the service is ending.
        """
        with self._changed:
            if self._closing:
                raise Closed("the server is stopping")
            if len(self._waiting) + len(generations) > self.max_waiting:
                raise Full(f"{len(self._waiting)} completions are waiting")
            self._waiting.extend(generations)
            self._changed.notify_all()

    def cancel(self, generations: list[Generation]) -> None:
        """Give up generations: those that wait are dropped, those that are decoded end after the running chunk."""
        with self._changed:
            dropped = [generation for generation in generations if generation in self._waiting]
            for generation in dropped:
                self._waiting.remove(generation)
        for generation in generations:
            generation.cancelled = True
        for generation in dropped:
            self._end(generation, Closed("cancelled"))

    def load(self) -> dict[str, int]:
        """How many sequence slots there are, how many are taken, and how many generations wait for one."""
        taken = sum(map(len, self._running))
        return {"slots": self.capacity.slots, "running": taken, "waiting": len(self._waiting)}

    def close(self, seconds: float = 5.0) -> bool:
        """End all generations with `Closed` and the threads; returns whether they ended within `seconds`."""
        with self._changed:
            self._closing = True
            for scheduler in filter(None, self._schedulers):
                scheduler.cancelled = True
            self._changed.notify_all()
            generations = [*self._waiting, *(g for running in self._running for g in running.values())]
            self._waiting.clear()
        for generation in generations:
            generation.cancelled = True
            self._end(generation, Closed("the server is stopping"))
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self, thread: int) -> None:
        """Run one scheduler until the service is closed; after an error all its generations end, and a new one runs."""
        running = self._running[thread]
        while self._await_work():
            try:
                scheduler = self._schedulers[thread] = self._schedulers[thread] or self._make_scheduler()
                for number, outcome in scheduler.run(self._arriving(running)):
                    self._end(self._give_back(number, running), outcome)
            except Exception as error:
                traceback.print_exception(error)
                self._schedulers[thread] = None
                if not running:  # no scheduler could be made; somebody must be told, or it would be tried for ever
                    self._take(0, running)
                for number in [*running]:
                    self._end(self._give_back(number, running), error)

    def _await_work(self) -> bool:
        """Wait until a generation is waiting; False once the service is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return not self._closing

    def _take(self, number: int, running: dict[int, Generation]) -> Generation | None:
        """Move the generation that waits longest to those that are running; None if there is none."""
        with self._changed:
            if self._waiting:
                running[number] = self._waiting.popleft()
            return running.get(number)

    def _give_back(self, number: int, running: dict[int, Generation]) -> Generation:
        with self._changed:
            return running.pop(number)

    def _arriving(self, running: dict[int, Generation]) -> Iterator[tuple[int, Task] | None]:
        """The tasks of a scheduler as they arrive, None where there is none; waits while nothing is `running`."""
        for number in itertools.count():
            if not running and not self._await_work():
                return
            generation = self._take(number, running)
            if generation or running:
                yield (number, generation.task()) if generation else None

    def _end(self, generation: Generation, outcome: Completion | Exception) -> None:
        """Tell of a generation's end, once."""
        with self._changed:
            told, generation.ended = generation.ended, True
        if not told:
            generation.on_end(outcome)
