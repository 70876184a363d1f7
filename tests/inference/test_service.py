"""The decoder service: prompts that arrive while others are decoded, are cancelled, or find no place."""

import queue
import threading
import time

import pytest
from conftest import IDS, NUCLEUS, PROMPTS, sample, tokens_of

from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.inference.service import Closed, DecoderService, Full, Generation

pytest.importorskip("torch")


def generation(i, ended, new=12, stop_function=None, sampling=NUCLEUS):
    """A generation of prompt `i`, whose end is put into the queue `ended`."""
    request = DecodeRequest([PROMPTS[i][-1:]], new, sampling, IDS[i], 1, stop_function=stop_function)
    return Generation(PrefillRequest(PROMPTS[i]), request, lambda outcome: ended.put((i, outcome)))


@pytest.fixture
def service_of(tiny_engine):
    """A function that starts a service over the small engine; all are closed at the end."""
    started = []

    def start(slots, max_waiting=100, new=400):
        started.append(DecoderService(tiny_engine, DecoderCapacity(slots, 1, ((1, new),)), 32, max_waiting))
        return started[-1]

    yield start
    assert all(service.close() for service in started)


@pytest.mark.parametrize("slots", [2, 32])  # in two threads; with 16 slots each, the devices run ahead of the host
def test_generations_that_arrive_at_any_time_are_those_of_one_call(service_of, tiny_engine, slots):
    """From three threads, a moment apart, more than there are slots: the samples of `run_tasks`, bit for bit."""
    service, ended = service_of(slots, new=12), queue.Queue()

    def client():
        for i in (0, 1, 2, 3, 1, 0):
            service.submit([generation(i, ended)])
            time.sleep(0.01)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    expected = [row[1] for row in tokens_of(sample(tiny_engine, [0, 1, 2, 3], samples=2, slots=2, branches=1))]
    for _ in range(18):
        i, completion = ended.get(timeout=60)
        assert completion.tokens == expected[i]
    for thread in clients:
        thread.join()
    assert service.load() == {"slots": slots, "running": 0, "waiting": 0} and ended.empty()


def test_a_cancelled_generation_gives_its_slot_to_the_next(service_of):
    """One slot: the first would decode for long, the second is dropped while it waits, the third is served."""
    service, ended, first_tokens = service_of(1), queue.Queue(), threading.Event()
    follow = lambda tokens: first_tokens.set()
    long, dropped, last = (
        generation(0, ended, 400, follow, SamplingParams()),
        generation(1, ended),
        generation(2, ended),
    )
    service.submit([long, dropped, last])
    assert first_tokens.wait(60)
    service.cancel([dropped, long])
    ends = dict(ended.get(timeout=60) for _ in range(3))
    assert isinstance(ends[1], Closed) and len(ends[0].tokens) < 400 and len(ends[2].tokens) == 12


def test_a_stop_function_that_fails_ends_its_own_generation_alone(service_of):
    service, ended = service_of(2), queue.Queue()
    service.submit([generation(0, ended, 40, lambda tokens: 1 / 0), generation(1, ended)])
    ends = dict(ended.get(timeout=60) for _ in range(2))
    assert isinstance(ends[0], ZeroDivisionError) and len(ends[1].tokens) == 12


def test_a_decoder_that_fails_tells_its_generations_and_serves_the_next(service_of, capsys):
    """A prompt beyond the capacity breaks the scheduler: all that it decodes end with the error, a new one goes on."""
    service, ended = service_of(1), queue.Queue()
    broken = generation(0, ended)
    broken.prompt = PrefillRequest(PROMPTS[1] * 9)
    service.submit([broken, generation(1, ended)])
    assert isinstance(ended.get(timeout=60)[1], ValueError) and len(ended.get(timeout=60)[1].tokens) == 12
    assert "longer than the" in capsys.readouterr().err


def test_a_full_or_closed_service_takes_no_more(service_of):
    """All or none of a request's completions are taken; closing tells those that wait and those that are decoded."""
    service, ended, started = service_of(1, max_waiting=2), queue.Queue(), threading.Event()
    service.submit([generation(0, ended, 400, lambda tokens: started.set(), SamplingParams())])
    assert started.wait(60)
    service.submit([generation(1, ended)])
    with pytest.raises(Full):
        service.submit([generation(2, ended), generation(3, ended)])
    assert service.load() == {"slots": 1, "running": 1, "waiting": 1}
    assert service.close()
    assert all(isinstance(ended.get(timeout=1)[1], Closed) for _ in range(2)) and ended.empty()
    with pytest.raises(Closed):
        service.submit([generation(2, ended)])
