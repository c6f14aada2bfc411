"""Whose turn at the device it is, and what goes along."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from lossd_server.engine.asker import Asker
from lossd_server.engine.batching import Batching
from lossd_server.engine.calling import LOOK_SECONDS, Waiting
from lossd_server.engine.queue import FairQueue
from lossd_server.engine.steps import Step
from lossd_server.engine.work import LossJob
from lossd_server.errors import LossdError
from lossd_server.losses import LossOutcome


@dataclass(kw_only=True, slots=True, eq=False)
class Task(Waiting):
    """A job in the engine; the thread that brought it waits, or does the work.

    It is called when it is the task's turn, or when it is done.

    Attributes:
        job: The job.
        asker: Whoever brought it.
        steps: Those still to be taken.
        kind: Tasks of one kind may go together; None goes alone.
        outcomes: What was found so far, one for each item.
        error: Why it ended, if not well.
        seconds: How long it was worked on.
        is_done: Whether nothing more happens to it.
    """

    job: LossJob
    asker: Asker
    steps: list[Step]
    kind: Hashable = None
    outcomes: list[LossOutcome] = field(default_factory=list)
    error: BaseException | None = None
    seconds: float = 0.0
    is_done: bool = False

    def result(self) -> list[LossOutcome]:
        """Returns the outcomes; raises the error where there is one, and lets go of it."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # whose traceback leads back to here, and to the memory of the request
        return self.outcomes

    def end(self, error: BaseException | None = None) -> None:
        """Marks it done and calls its thread."""
        self.error = self.error or error
        self.is_done = True
        self.call.release()


class Turns:
    """Hands the device from thread to thread, in the order of a fair queue.

    The thread whose task is next takes its step, and those of other tasks that go along; then it calls
    the next one. A call that was tried twice never writes to its caller's memory after the second was
    answered: both are of one flow, whose tasks go one after the other.

    Args:
        work: Takes the next step of each of some tasks: adds to their outcomes, or sets their errors.
        batching: How much goes together of different tasks; None lets each go alone.
    """

    def __init__(self, work: Callable[[Sequence[Task]], None], batching: Batching | None = None) -> None:
        self._work = work
        self._batching = batching
        self._mutex = threading.Lock()
        self._queue: FairQueue[Task] = FairQueue()
        self._is_taken = False
        self._leader: Task | None = None
        self._began: float | None = None
        self._refusal: Callable[[], LossdError] | None = None

    @property
    def waiting_count(self) -> int:
        """Tasks that wait for the device."""
        return len(self._queue)

    @property
    def busy_seconds(self) -> float:
        """How long what is at the device has been there; 0 when nothing is."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def take(self) -> bool:
        """Takes the device for a single step if nobody has it, and nothing is to go along.

        Then `give_back` is to be called. That is fair to within that step: when nobody waits, no flow has had
        less than another.
        """
        with self._mutex:
            if self._refusal is not None:
                raise self._refusal()
            if self._is_taken or self._batching is not None:
                return False
            self._is_taken = True
            self._began = time.monotonic()
        return True

    def give_back(self) -> None:
        """Gives back the device, and calls who is next."""
        with self._mutex:
            self._is_taken = False
            self._began = None
            self._call_next()

    def complete(self, task: Task) -> None:
        """Has all steps of a task taken, by this thread or another; what ends it early is its error."""
        with self._mutex:
            if self._refusal is not None:
                raise self._refusal()
            self._queue.join(task)
            self._call_next()
        while not task.is_done:
            self._await_call(task)
            if self._leader is task:
                self._lead(task)

    def refuse(self, refusal: Callable[[], LossdError]) -> None:
        """Turns away whoever waits, and whoever comes until they are admitted again."""
        with self._mutex:
            self._refusal = refusal
            for task in self._queue:
                self._queue.leave(task)
                task.end(refusal())

    def admit(self) -> None:
        """Lets tasks come again."""
        with self._mutex:
            self._refusal = None

    def _await_call(self, task: Task) -> None:
        """Waits for the task's turn or its end; ends it where nobody waits for its answer any more."""
        patience = task.asker.patience(LOOK_SECONDS)
        while not task.call.acquire(timeout=patience):
            problem = task.asker.problem()
            if problem is not None and self._withdraw(task, problem):
                return
            patience = LOOK_SECONDS if problem else task.asker.patience(LOOK_SECONDS)

    def _withdraw(self, task: Task, problem: LossdError) -> bool:
        """Takes a task out of the queue; returns whether it was still waiting there."""
        with self._mutex:
            if not task.is_waiting:
                return False
            self._queue.leave(task)
            task.end(problem)
            return True

    def _call_next(self) -> None:
        """Calls the task that is next, if the device is free."""
        if not self._is_taken and self._queue:
            self._is_taken = True
            self._leader = self._queue.take()
            self._leader.call.release()

    def _lead(self, task: Task) -> None:
        """Takes the task's step, and those that go along, and calls the next."""
        batch = self._gather(task)
        self._began = time.monotonic()
        try:
            self._work(batch)
        except BaseException as error:  # noqa: BLE001  # it is raised where the tasks came from
            for each in batch:
                each.error = each.error or error
        self._settle(batch, time.monotonic() - self._began)

    def _gather(self, leader: Task) -> list[Task]:
        """Returns the tasks whose next steps are taken together."""
        batch = [leader]
        if self._batching is not None and leader.kind is not None:
            is_full = self._fill(batch, self._batching)
            if self._batching.wait_seconds and not is_full:
                time.sleep(self._batching.wait_seconds)
                self._fill(batch, self._batching)
        return batch

    def _fill(self, batch: list[Task], limits: Batching) -> bool:
        """Adds those that are next as long as there is room; returns whether there is none left."""
        items = sum(len(task.steps[0].items) for task in batch)
        size = sum(task.steps[0].size for task in batch)
        with self._mutex:
            while (task := self._queue.first()) is not None and _goes_along(task, batch):
                step = task.steps[0]
                items, size = items + len(step.items), size + step.size
                if items > limits.max_items or size > limits.max_bytes:
                    return True
                batch.append(self._queue.take())
        return items == limits.max_items

    def _settle(self, batch: Sequence[Task], seconds: float) -> None:
        """Ends the tasks that are done, lets the others wait for their next step, and calls who is next."""
        with self._mutex:
            self._is_taken = False
            self._leader = self._began = None
            for task in batch:
                task.seconds += seconds
                del task.steps[0]
                if task.steps and task.error is None:
                    self._queue.rejoin(task)
                else:
                    self._queue.leave(task)
                    task.end()
            self._call_next()


def _goes_along(task: Task, batch: Sequence[Task]) -> bool:
    """Whether a task may join a batch: it is of its kind, and overtakes nothing of its flow."""
    return task.kind == batch[0].kind and not any(
        other.flow == task.flow and len(other.steps) > 1 for other in batch
    )
