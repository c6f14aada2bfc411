"""The device goes from thread to thread: never had by two, never idle while someone waits, never lost."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lossd_server.engine import Asker, Batching
from lossd_server.engine.steps import Step
from lossd_server.engine.turns import Task, Turns
from lossd_server.errors import CallerGoneError, DeadlineError, Reason, UnavailableError
from tests.domain.regions import wait_until

STEP = Step(items=["step"], size=0)


class Device:
    """What tasks have their turn at; holds each batch until it is let go."""

    def __init__(self, **batching):
        self.batches: list[list[object]] = []
        self.free = threading.Event()
        self.entered = threading.Semaphore(0)
        self.inside = self.most = 0
        self.turns = Turns(self.work, Batching(**batching) if batching else None)
        self.threads: list[threading.Thread] = []

    def work(self, tasks):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.batches.append([task.steps[0].items[0] for task in tasks])
        self.entered.release()
        assert self.free.wait(20)
        for task in tasks:
            task.error = task.asker.problem()
        self.inside -= 1

    def ask(self, *names, flow=None, size=0, kind="here", **asker):
        """Brings a task in so many steps, in a thread of its own."""
        steps = [Step(items=[name], size=size) for name in names]
        costs = [step.cost for step in steps]
        task = Task(job=None, asker=Asker(**asker), steps=steps, costs=costs, flow=flow, kind=kind)
        thread = threading.Thread(target=self.complete, args=(task,))
        waiting, is_busy = self.turns.waiting_count, self.turns.busy_seconds > 0
        thread.start()
        self.threads.append(thread)
        if is_busy:
            wait_until(lambda: self.turns.waiting_count == waiting + 1)
        else:
            assert self.entered.acquire(timeout=20)
        return task

    def complete(self, task):
        try:
            self.turns.complete(task)
        except UnavailableError as error:
            task.error = error

    def end(self):
        self.free.set()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


def test_the_device_goes_to_those_of_one_flow_in_the_order_of_asking():
    device = Device()
    for number in range(8):
        device.ask(number)
    device.end()
    assert device.batches == [[number] for number in range(8)]


def test_a_small_task_goes_before_large_ones_that_came_earlier():
    device = Device()
    device.ask("first", flow="big", size=100 << 20)
    device.ask("second", flow="big", size=100 << 20)
    device.ask("third", flow="other", size=100 << 20)
    device.ask("small", flow="small")
    device.end()
    assert device.batches == [["first"], ["small"], ["second"], ["third"]]


def test_a_task_of_many_steps_gives_way_to_another_flow_but_not_to_its_own():
    device = Device()
    device.ask("a1", "a2", "a3", flow="a", size=100 << 20)
    device.ask("b", flow="a")
    device.ask("c", flow="c")
    device.end()
    assert device.batches == [["a1"], ["c"], ["a2"], ["a3"], ["b"]]


def test_whoever_gives_up_leaves_the_queue_at_once():
    device = Device()
    device.ask("held")
    late = device.ask("late", deadline=time.monotonic() + 0.2)
    gone = threading.Event()
    left = device.ask("left", is_gone=gone.is_set)
    device.ask("patient")
    device.threads[1].join(20)
    assert isinstance(late.error, DeadlineError)
    gone.set()
    device.threads[2].join(20)
    assert isinstance(left.error, CallerGoneError)
    assert device.turns.waiting_count == 1
    device.end()
    assert device.batches == [["held"], ["patient"]]


def test_those_turned_away_go_at_once_and_the_one_at_the_device_ends_well():
    device = Device()
    held, waiting = device.ask("held"), device.ask("waiting")
    device.turns.refuse(lambda: UnavailableError(Reason.DRAINING, "the server is stopping"))
    device.threads[1].join(20)
    assert isinstance(waiting.error, UnavailableError)
    refused = Task(job=None, asker=Asker(), steps=[STEP], costs=[1])
    with pytest.raises(UnavailableError):
        device.turns.complete(refused)
    device.end()
    assert held.error is None
    device.turns.admit()
    device.ask("later")
    device.end()
    assert device.batches == [["held"], ["later"]]


def test_who_takes_it_at_once_has_it_alone_and_the_next_one_is_called():
    device = Device()
    assert device.turns.take()
    assert not device.turns.take()
    device.ask("first")
    device.ask("second")
    assert device.batches == []
    device.turns.give_back()
    assert device.entered.acquire(timeout=20)
    assert not device.turns.take()
    device.end()
    assert device.batches == [["first"], ["second"]]
    assert device.turns.busy_seconds == 0
    assert device.turns.take()


def test_nobody_takes_it_at_once_where_all_are_turned_away_or_what_waits_goes_together():
    device = Device()
    device.turns.refuse(lambda: UnavailableError(Reason.DRAINING, "the server is stopping"))
    with pytest.raises(UnavailableError):
        device.turns.take()
    assert not Device(max_items=8).turns.take()


def test_what_waits_goes_together_as_far_as_there_is_room():
    device = Device(max_items=3, max_bytes=100)
    device.ask("held", size=1000)
    for number in range(4):
        device.ask(number, flow=number)
    device.ask("wide", flow="wide", size=60)
    device.ask("wider", flow="wider", size=60)
    device.ask("alone", flow="operator", size=70, kind=None)
    device.end()
    assert device.batches == [["held"], [0, 1, 2], [3, "wide"], ["wider"], ["alone"]]


def test_nothing_overtakes_its_flow_in_a_batch():
    device = Device(max_items=8)
    device.ask("held")
    device.ask("a1", "a2", flow="a")
    device.ask("b", flow="a")
    device.ask("c", flow="c", size=1 << 20)
    device.end()
    assert device.batches == [["held"], ["a1"], ["a2", "b", "c"]]


def test_a_batch_waits_for_company_where_it_was_told_to():
    device = Device(max_items=8, wait_seconds=1.0)
    device.free.set()
    tasks = [Task(job=None, asker=Asker(), steps=[STEP], costs=[1], kind="here") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(device.turns.complete, tasks))
    assert device.batches == [["step", "step"]]


@pytest.mark.parametrize("batching", [{}, {"max_items": 3}])
def test_only_one_has_it_whoever_gives_up_when(batching):
    device, done = Device(**batching), []
    device.free.set()

    def run(flow):
        for patience in (0.0, 1e-5, 1e-4, 60.0) * 25:
            asker = Asker(deadline=time.monotonic() + patience)
            steps = [Step(items=[flow], size=patience == 60.0)] * (flow % 3 + 1)
            costs = [step.cost for step in steps]
            task = Task(job=None, asker=asker, steps=list(steps), costs=costs, flow=flow, kind="here")
            if patience < 1 and device.turns.take():
                device.work([task])
                device.turns.give_back()
            else:
                device.turns.complete(task)
            done.append(task.error is None)

    threads = [threading.Thread(target=run, args=(flow,)) for flow in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert device.most == 1
    assert len(done) == 6 * 100
    assert sum(done) >= 6 * 25
    assert device.turns.waiting_count == 0
    assert device.turns._queue._flows == {}
    assert device.turns.busy_seconds == 0


def test_an_unforeseen_failure_is_that_of_its_batch_and_the_device_goes_on():
    device = Device()
    failure = RuntimeError("unforeseen")

    def fail(tasks):
        raise failure

    device.turns._work = fail
    task = Task(job=None, asker=Asker(), steps=[STEP], costs=[1])
    device.turns.complete(task)
    assert task.error is failure
    device.turns._work = device.work
    device.ask("next")
    device.end()
    assert device.batches == [["next"]]
