"""Where a teacher answers: what is asked there, in which order, and what happens when it fails."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from ultralytics.nn.distillation.overlap import SideStream, SideThread, at_once, usable_cores


@pytest.mark.parametrize(("beside", "main"), [(at_once, True), (SideThread(), False)])
def test_an_answer_is_asked_for_once(beside, main):
    asked = []
    answer = beside(lambda: asked.append(threading.current_thread() is threading.main_thread()) or 7, torch.zeros(2))
    assert [answer(), answer()] == [7, 7]
    assert asked == [main]


def test_a_thread_answers_while_its_asker_goes_on():
    begun, gone_on = threading.Event(), threading.Event()
    answer = SideThread()(lambda: begun.set() or gone_on.wait(60), torch.zeros(2))
    assert begun.wait(60)  # before anyone takes the answer
    gone_on.set()  # at once, nobody would get here before the minute is over
    assert answer()


def test_a_thread_answers_in_turn():
    """Also where the first takes longest."""
    beside, order = SideThread(), []
    answers = [
        beside(lambda k=k: time.sleep(0.1 * (k == 0)) or order.append(k) or k, torch.zeros(2)) for k in range(20)
    ]
    assert [answer() for answer in answers] == order == list(range(20))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thread_answers_in_the_precision_of_its_asker(enabled, dtype):
    def ask():
        return torch.is_autocast_enabled("cpu"), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    beside = SideThread()
    with torch.autocast("cpu", dtype, enabled):
        answer = beside(ask, torch.zeros(2))
    assert answer() == (enabled, dtype if enabled else torch.float32)
    assert beside(ask, torch.zeros(2))() == (False, torch.float32)


@pytest.mark.parametrize("beside", [at_once, SideThread()])
def test_what_fails_is_raised(beside):
    def ask():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        beside(ask, torch.zeros(2))()
    assert beside(lambda: 7, torch.zeros(2))() == 7  # the next is answered


class Streams:
    """Stands in for CUDA's streams, and notes what they are told."""

    def __init__(self, monkeypatch):
        self.told, self.main, self.side = [], self.make("main"), self.make("side")
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: self.told.append(f"{stream.name} uses x"))

    def make(self, name):
        wait = lambda other: self.told.append(f"{name} waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, device="cuda:0", wait_stream=wait)

    @contextmanager
    def use(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


def test_a_stream_waits_and_is_waited_for(monkeypatch):
    streams = Streams(monkeypatch)
    answer = SideStream("cuda:0")(lambda: streams.told.append(f"asked on {streams.current.name}") or 7, torch.zeros(2))
    assert streams.told == ["side waits for main", "side uses x", "asked on side"]
    assert answer() == 7
    assert streams.told[3:] == ["main waits for side"]


def test_cores_that_may_be_used(monkeypatch):
    """Those that a container or `taskset` leaves, where the system says so."""
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    assert usable_cores() == 64
