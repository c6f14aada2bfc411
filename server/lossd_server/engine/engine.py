"""The engine: what is done on the device or for it, and nothing once it drains."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import structlog
import torch

from lossd_server.engine.affinity import ELSEWHERE, HERE, leaves_torch_asleep
from lossd_server.engine.asker import Asker
from lossd_server.engine.batching import Batching
from lossd_server.engine.buffers import BufferPool
from lossd_server.engine.cores import Cores
from lossd_server.engine.custom import CustomLoss
from lossd_server.engine.evaluator import Evaluator
from lossd_server.engine.home import Home
from lossd_server.engine.resources import granted_cores
from lossd_server.engine.steps import Load
from lossd_server.engine.turns import Task, Turns
from lossd_server.engine.watchdog import Watchdog
from lossd_server.engine.work import (
    AssignJob,
    AssignResults,
    Evaluable,
    LossItem,
    LossJob,
    LossResults,
    Timing,
)
from lossd_server.errors import Reason, UnavailableError, errors_within
from lossd_server.kernels import load_library
from lossd_server.losses import (
    CenternessLoss,
    EvaluationOptions,
    FCOSLoss,
    FocalLoss,
    GIoULoss,
    LossModule,
    LossOutcome,
)
from lossd_server.losses.gpu import compile_programs

_ANYONE = Asker()

_ITEM_BY_ITEM = Batching(max_items=1)
"""For losses of the operator's, of which nobody knows how long they take."""

_log = structlog.get_logger()

_CHEAP = 1000
"""An assignment of that cost, some ten images or a thousand boxes, takes a core for about a millisecond."""


class Engine:
    """Evaluates jobs on one device.

    Args:
        device: Where losses are evaluated. Targets are assigned on the host.
        custom_losses: The operator's losses by name.
        batching: How much is evaluated in one go.
        observe: Told of every batch, of how many jobs and of how many items it is.
        home: The core of the threads that bring small jobs; large ones are done on all.

    Attributes:
        device: As above.
        custom_losses: As above.
    """

    def __init__(
        self,
        device: torch.device,
        custom_losses: Mapping[str, CustomLoss] | None = None,
        batching: Batching | None = None,
        observe: Callable[[int, int], None] | None = None,
        home: Home | None = None,
    ) -> None:
        self.device = device
        self._is_host = device.type == "cpu"
        self.custom_losses = dict(custom_losses or {})
        self._batching = batching or Batching()
        self._observe = observe
        self._home = home or Home()
        self._evaluator = Evaluator(device)
        self._turns = Turns(self._take_steps, self._batching if self._batching.is_on(device) else None)
        # Torch keeps a team of helpers for every thread that ever woke them: this one may.
        self._torch_thread = ThreadPoolExecutor(
            1, thread_name_prefix="lossd-device", initializer=self._home.leave
        )
        self._cores = Cores(granted_cores(), cheap=_CHEAP, home=self._home)
        self._watchdog: Watchdog | None = None
        self._is_draining = False
        for loss in self.custom_losses.values():
            loss.to(device)

    @property
    def buffers(self) -> BufferPool:
        """Host memory for gradients, and for requests, used again."""
        return self._evaluator.buffers

    @property
    def waiting_count(self) -> int:
        """Jobs that wait for the device."""
        return self._turns.waiting_count

    @property
    def is_wedged(self) -> bool:
        """Whether the device does not come back from an evaluation; see `watch`."""
        return self._watchdog is not None and self._watchdog.is_wedged

    def load_of(self, job: LossJob) -> Load:
        """Returns what a job asks of the device."""
        return Load.of(job.items, self._batching if isinstance(job.loss, LossModule) else _ITEM_BY_ITEM)

    def compute(self, job: LossJob, asker: Asker = _ANYONE, load: Load | None = None) -> LossResults:
        """Evaluates a batch, all of it or none.

        Args:
            job: The batch.
            asker: Whoever waits for it.
            load: What `load_of` says of it, where that is known.

        Raises:
            UnavailableError: The engine drains, or the device does not come back.
            DeadlineError: The deadline passed before all was done.
            CallerGoneError: Nobody waits for the answer any more.
            InvalidInputError: An item holds NaN or infinity, and the job is strict.
            CustomLossError: The operator's module failed.
            OutOfMemoryError: The device has not the memory for an item.
        """
        self._refuse_when_draining()
        arrived = time.monotonic()
        load = load or self.load_of(job)
        kind = self._kind_of(job.loss, load)
        if kind == HERE and len(load.steps) == 1 and self._turns.take():
            outcomes = self._take_at_once(job, load.steps[0][1], asker)
            return outcomes, Timing(queue=0.0, compute=time.monotonic() - arrived)
        steps = load.cut(job.items)
        task = Task(
            job=job,
            asker=asker,
            steps=steps,
            costs=[step.cost for step in steps],
            flow=asker.flow if job.owner is None else job.owner,
            kind=kind,
        )
        self._turns.complete(task)
        outcomes = task.result()
        waited = max(time.monotonic() - arrived - task.seconds, 0.0)
        return outcomes, Timing(queue=waited, compute=task.seconds)

    def assign(self, job: AssignJob, asker: Asker = _ANYONE) -> AssignResults:
        """Assigns targets; on the host and without waiting for the device, on a core an item.

        Raises:
            UnavailableError: The engine drains.
            DeadlineError: The deadline passed before all was done.
            CallerGoneError: Nobody waits for the answer any more.
            InvalidInputError: Level sizes do not go with the strides, or too many locations are positive.
        """
        self._refuse_when_draining()
        arrived, seconds = time.monotonic(), 0.0
        assignments, room = [], job.max_positives
        for item in job.items:
            asker.check()
            with self._cores.turn(asker, item.cost):
                began = time.monotonic()
                with errors_within(item.path):
                    found = job.assigner.assign_objects(item.objects, item.levels, max_positives=room)
                seconds += time.monotonic() - began
            room -= found.positive_count
            assignments.append(found)
        return assignments, Timing(queue=time.monotonic() - arrived - seconds, compute=seconds)

    def warm_up(self) -> None:
        """Loads or compiles the kernels and evaluates every loss once: no caller pays for first-time work."""
        with warnings.catch_warnings(record=True) as caught:
            load_library() if self.device.type == "cpu" else compile_programs(self.device)
        for warning in caught:
            _log.warning(str(warning.message))
        for loss, arguments in _samples():
            options = EvaluationOptions(gradients=loss.differentiable)
            item = LossItem(path="warm-up", arguments=loss.prepare(arguments), options=options)
            self.compute(LossJob(loss=loss, items=[item]))

    def watch(self, seconds: float, notify: Callable[[bool], None]) -> None:
        """Turns work away while one evaluation takes longer than so many seconds, or the device is lost.

        Args:
            seconds: How long it may take; 0 for as long as it likes.
            notify: Called with true then, and with false once it has ended after all.
        """
        if seconds:
            self._watchdog = Watchdog(self._turns, lambda: self._evaluator.is_lost, seconds, notify)

    def drain(self) -> None:
        """Refuses work from now on; what runs or waits goes on to its end."""
        self._is_draining = True

    def close(self) -> None:
        """Refuses what waits too, and lets the thread go when it is done."""
        self.drain()
        if self._watchdog is not None:
            self._watchdog.stop()
        self._turns.refuse(_stopping)
        self._torch_thread.shutdown(wait=False, cancel_futures=True)

    def _kind_of(self, loss: Evaluable, load: Load) -> str | None:
        """Returns what a job may go together with: ours with ours, the operator's with nothing."""
        if not isinstance(loss, LossModule):
            return None
        return HERE if self._is_host and leaves_torch_asleep(loss, load) else ELSEWHERE

    def _take_at_once(self, job: LossJob, size: int, asker: Asker) -> list[LossOutcome]:
        """Takes a job of one step and the kind `HERE`, whose turn it is, and gives the device back."""
        try:
            if self._observe is not None:
                self._observe(1, len(job.items))
            with self._home.away(size):
                return self._evaluator.take_job(job, asker)
        finally:
            self._turns.give_back()

    def _take_steps(self, tasks: Sequence[Task]) -> None:
        """Takes the next steps of some tasks of one kind; one batch at a time."""
        items, size = 0, 0
        for task in tasks:
            step = task.steps[0]
            items, size = items + len(step.items), size + step.size
        if self._observe is not None:
            self._observe(len(tasks), items)
        if tasks[0].kind == HERE:
            with self._home.away(size):
                self._evaluator.take_steps(tasks)
            return
        try:
            future = self._torch_thread.submit(self._evaluator.take_steps, tasks)
        except RuntimeError as error:  # it was let go
            raise _stopping() from error
        try:
            future.result()
        except CancelledError as error:
            raise _stopping() from error

    def _refuse_when_draining(self) -> None:
        if self._is_draining:
            raise _stopping()


def _stopping() -> UnavailableError:
    return UnavailableError(Reason.DRAINING, "the server is stopping")


def _samples() -> list[tuple[LossModule, dict[str, object]]]:
    """Returns every loss with a small input of its own."""
    logits = np.zeros((1, 2, 4, 4), np.float32)
    boxes = np.array([[0, 0, 8, 8]], np.float32)
    head = {
        "cls_preds": [logits],
        "reg_preds": [np.ones((1, 4, 4, 4), np.float32)],
        "centerness_preds": [np.zeros((1, 1, 4, 4), np.float32)],
    }
    objects = [{"boxes": boxes, "labels": np.zeros(1, np.int64)}]
    return [
        (FocalLoss(), {"inputs": logits, "targets": np.zeros((1, 4, 4), np.int64)}),
        (GIoULoss(), {"pred_boxes": boxes, "target_boxes": boxes}),
        (CenternessLoss(), {"pred": np.zeros(4, np.float32), "target": np.ones(4, np.float32)}),
        (
            FCOSLoss(2, strides=(8,), regress_ranges=((-1, 64),)),
            {**head, "ground_truth": objects},
        ),
    ]
