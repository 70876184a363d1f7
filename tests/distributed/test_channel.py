"""The channel between processes: joining, values, the shared queue, and how one end becomes everybody's."""

import contextlib
import queue
import socket
import threading
import time

import pytest

from roserag_jax.distributed import channel
from roserag_jax.distributed.channel import LOST, End, Hub, Link, ProcessLost, Relay


class Member:
    """A process of a run, as far as the channel sees it."""

    def __init__(self, hub, index, count, settings=None, watchdog=60.0):
        self.ends, self.state = queue.Queue(), (0, 0.0, False)
        self.link = Link(
            ("localhost", hub.port),
            index,
            count,
            name=f"host{index}, pid {index}",
            settings=settings or {"config.seed": "0"},
            join_seconds=5,
            watchdog_seconds=watchdog,
            on_end=self.ends.put,
            state=lambda: self.state,
        )

    def end(self) -> End:
        return self.ends.get(timeout=10)

    def vanish(self):
        """What the kernel does for a process that was killed."""
        self.link._connection.close()


@pytest.fixture
def run(monkeypatch):
    """A function that makes a run of some processes, all in this one."""
    monkeypatch.setattr(channel, "BEAT_SECONDS", 0.05)
    hubs = []

    def make(count, members=None, settings=None, join=5.0, watchdog=60.0):
        hubs.append(hub := Hub(0, count, join, watchdog, {"port": 7}))
        settings = settings or [None] * count
        return hub, [Member(hub, i, count, settings[i], watchdog) for i in (members or range(count))]

    yield make
    for hub in hubs:
        hub._listener.close()


def in_threads(*calls):
    """The results of calls that wait for one another."""
    results = [None] * len(calls)
    work = lambda i: results.__setitem__(i, calls[i]())
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    return results


def test_all_join_and_gather_in_the_order_of_processes(run):
    _, members = run(4)
    assert [m.link.welcome() for m in members] == [{"port": 7}] * 4
    for _ in range(2):
        values = in_threads(*(lambda m=m, i=i: m.link.gather("value", i * i) for i, m in enumerate(members)))
        assert values == [[0, 1, 4, 9]] * 4
    in_threads(*(lambda m=m: m.link.gather("done") for m in members))
    for member in members:
        member.link.leave(0)
        member.vanish()
    time.sleep(0.2)
    assert all(m.ends.empty() for m in members)  # an announced end is no loss


def test_queue_hands_out_each_number_once(run):
    _, members = run(3)
    taken = in_threads(*(lambda m=m: [m.link.take("questions", 2) for _ in range(20)] for m in members))
    assert sorted(sum(taken, [])) == list(range(0, 120, 2))
    assert members[0].link.take("others", 1) == 0


def test_settings_that_differ_are_named_to_everybody(run):
    settings = [{"config.seed": "0", "config.train.beta": "0.1"} for _ in range(3)]
    settings[2] |= {"config.train.beta": "0.5"}
    _, members = run(3, settings=settings)
    for member in members:
        status, why, _ = member.end()
        assert status == 2 and why.startswith("config.train.beta is 0.5 in process 2 and 0.1 in process 0")


def test_process_that_never_starts_is_named(run):
    _, members = run(4, members=[0, 2], join=0.3)
    for member in members:
        status, why, _ = member.end()
        assert status == LOST and "processes 1, 3 of 4 did not join within 0.3 s" in why


def test_process_0_that_never_starts():
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        with pytest.raises(ProcessLost, match="process 0 did not answer at 127.0.0.1:"):
            channel._connect(unused.getsockname(), 0.5)


def test_number_that_is_taken_or_count_that_differs(run):
    hub, members = run(3, members=[0, 1])
    twice = Member(hub, 1, 3)
    assert {m.end().status for m in [*members, twice]} == {2}
    hub, members = run(3, members=[0])
    other = Member(hub, 1, 2)
    assert "number 1 of 2 a run of 3" in members[0].end().why and other.end().status == 2


@pytest.mark.parametrize("gone", [1, 2])
def test_lost_process_is_named_at_once(run, gone):
    _, members = run(3)
    members[0].link.welcome()
    began = time.monotonic()
    members[gone].vanish()
    for i, member in enumerate(members):
        if i != gone:
            assert member.end()[:2] == (LOST, f"process {gone} (host{gone}, pid {gone}) {channel._GONE}")
    assert time.monotonic() - began < 5


def test_lost_process_0_is_named_by_the_others(run):
    hub, members = run(3)
    members[0].link.welcome()
    hub._end = End(LOST, "")  # the hub dies with its process, and says nothing
    for peer in hub._peers.values():
        peer.connection.close()
    assert all(m.end().why.startswith("process 0 is gone") for m in members[1:])


@pytest.mark.parametrize("status", [1, 2, 130, 143])
def test_first_end_is_everybodys_and_what_follows_is_not_news(run, status):
    _, members = run(3)
    members[0].link.welcome()
    members[1].link.leave(status, "No such file.")
    assert [members[i].end()[:2] for i in (0, 2)] == [(status, "process 1: No such file.")] * 2
    members[2].link.leave(2, "another")
    members[1].vanish()
    time.sleep(0.2)
    assert all(m.ends.empty() for m in members)


def test_announced_end_reaches_the_others_before_the_process_has_ended(run):
    _, members = run(3)
    members[0].link.welcome()
    members[1].link.announce(143, "Stopped by SIGTERM.")
    assert [members[i].end()[:2] for i in (0, 2)] == [(143, "Stopped by SIGTERM.")] * 2
    for member in members:
        member.link.leave(143, "Stopped by SIGTERM.")
    time.sleep(0.2)
    assert members[0].ends.empty() and members[2].ends.empty()


def test_silent_process_is_named_by_the_watchdog(run):
    _, members = run(2, watchdog=0.5)
    members[0].link.welcome()
    members[1].link._ended = True  # its thread of beats stops, as all threads of a stopped process do
    status, why, hung = members[0].end()
    assert status == LOST and hung and why.startswith("process 1 (host1, pid 1) has given no sign of life")


def test_process_without_a_step_is_named_unless_one_compiles(run):
    _, members = run(2, watchdog=0.3)
    members[0].link.welcome()
    members[0].state, members[1].state = (8, 1.0, False), (7, 1.0, True)
    time.sleep(0.6)
    assert members[0].ends.empty()
    members[1].state = (7, 1.0, False)
    for member in members:
        status, why, hung = member.end()
        assert status == LOST and hung and "process 1" in why and "no step for 1 s" in why


def test_processes_at_different_places_end(run):
    _, members = run(2)
    for member, place in zip(members, ("saved", "done"), strict=True):
        threading.Thread(target=member.link.gather, args=(place,), daemon=True).start()
    assert members[0].end()[:2] == (1, "processes are at different places: done, saved.")


def test_strangers_are_ignored(run):
    hub, members = run(2, members=[0])
    with socket.create_connection(("localhost", hub.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(10) == b""
    assert Member(hub, 1, 2).link.welcome() == members[0].link.welcome()


def test_relay_passes_on_and_stays_open_without_its_target():
    with socket.create_server(("localhost", 0)) as server:
        relay = Relay(server.getsockname())
        near = socket.create_connection(("localhost", relay.port))
        far, _ = server.accept()
        near.sendall(b"ping")
        assert far.recv(10) == b"ping"
        far.sendall(b"pong")
        assert near.recv(10) == b"pong"
        far.close()
        near.settimeout(0.3)
        with pytest.raises(TimeoutError):
            near.recv(10)
        with contextlib.suppress(OSError):
            near.close()
