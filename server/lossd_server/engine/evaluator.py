"""Evaluates items on the device: launched one after another, and waited for once."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, dropwhile, islice
from typing import Any, TypeVar, cast

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from lossd.gpu_memory import GpuArray
from lossd_server.engine.asker import Asker
from lossd_server.engine.buffers import BufferPool
from lossd_server.engine.outcome import Launched, Reading, read
from lossd_server.engine.steps import Step
from lossd_server.engine.transfer import as_tensor, to_device
from lossd_server.engine.turns import Task
from lossd_server.engine.work import LossItem, LossJob
from lossd_server.errors import InvalidInputError, OutOfMemoryError, Reason, errors_within
from lossd_server.kernels import loaded_library
from lossd_server.losses import EvaluationOptions, LossModule, LossOutcome
from lossd_server.losses.arrays import are_places, gradient_dtype
from lossd_server.losses.evaluation import FiniteCheck, find_non_finite

T = TypeVar("T")

_HOST = torch.device("cpu")

_MAX_IDLE_BYTES = 1 << 30
"""Most memory that is kept for later requests and their gradients."""

_FULL = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")
"""What torch says in a plain `RuntimeError` where the host has no memory left, or none to be pinned."""

_DeviceError: type[Exception] = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
"""What torch raises for an error of a GPU, from version 2.8 on."""

_log = structlog.get_logger()


class Evaluator:
    """Takes the steps of tasks on one device; what goes wrong with one task is that task's error alone.

    Each item is evaluated by itself and reduced in a fixed order: its bits do not depend on its company.

    Attributes:
        is_lost: Whether the device will answer nothing any more. A kernel that fails takes the whole context
            of a GPU with it, for as long as the process lives.
        buffers: Host memory for gradients, emptied where memory is short.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_lost = False
        self._device = device
        self.buffers = BufferPool(_MAX_IDLE_BYTES)

    def take_steps(self, tasks: Sequence[Task]) -> None:
        """Evaluates the next step of each task: adds to its outcomes, or sets its error.

        Where the memory does not suffice for all together, each item is tried alone.
        """
        if self._device.type == "cpu":
            tasks = [*dropwhile(self._goes_by_arrays, tasks)]  # in their order: two may be of one owner
        if tasks:
            self._by_tensors(tasks)

    def take_job(self, job: LossJob, asker: Asker) -> list[LossOutcome]:
        """Returns what comes of all items of a job that the compiled kernels do all of, on the host."""
        found = self._by_arrays(job, job.items, asker)
        if found is not None:
            return found
        task = Task(job=job, asker=asker, steps=[Step(job.items, 0)], costs=[0])
        self._by_tensors([task])
        return task.result()

    def _goes_by_arrays(self, task: Task) -> bool:
        """Takes the step of a task without a tensor, and returns whether that was possible."""
        loss = task.job.loss
        if not isinstance(loss, LossModule) or not loss.has_kernels or loaded_library() is None:
            return False
        try:
            found = self._by_arrays(task.job, task.steps[0].items, task.asker)
        except Exception as error:  # noqa: BLE001  # it is the error of this task alone
            task.error = error
            return True
        task.outcomes += found or []
        return found is not None

    def _by_arrays(self, job: LossJob, items: Sequence[LossItem], asker: Asker) -> list[LossOutcome] | None:
        """Evaluates items without a tensor; None where that is not possible."""
        loss, outcomes = cast("LossModule", job.loss), []
        for item in items:
            asker.check()
            # What may be refused is not written to a caller's memory.
            if item.outputs and (job.strict or not _writes_arrays(item)):
                return None
            try:
                found = loss.evaluate_arrays(item.arguments, item.options, partial(self._places, item))
            except MemoryError:
                return None
            if found is None:
                return None
            outcomes.append(found)
        return outcomes

    def _places(self, item: LossItem, name: str) -> list[NDArray[Any]]:
        """Returns the arrays that the gradient of an input is written to, one or one a level."""
        if name in item.outputs:
            given: Any = item.outputs[name]
            return [*given]
        wanted = item.options.gradient_dtype
        return [self._empty_like(like, wanted) for like in _levels(item.arguments[name])]

    def _empty_like(self, array: NDArray[Any], wanted: torch.dtype | None) -> NDArray[Any]:
        dtype = gradient_dtype(array.dtype, wanted)
        memory = self.buffers.allocate(array.size * dtype.itemsize)
        return np.empty(array.shape, dtype) if memory is None else memory.view(dtype).reshape(array.shape)

    def _by_tensors(self, tasks: Sequence[Task]) -> None:
        found = self._together(tasks)
        if found is None:
            self._make_room()
            found = [_attempted(task, partial(self._one_by_one, task)) for task in tasks]
        for task, outcomes in zip(tasks, found, strict=True):
            task.outcomes += outcomes
            if task.error is not None and self._device.type == "cuda" and _writes_to_a_gpu(task):
                self._wait()
        if any(map(_is_of_device, tasks)):
            self.is_lost = not self._answers()

    def _together(self, tasks: Sequence[Task]) -> list[list[LossOutcome]] | None:
        """Returns what came of each task; None where it is worth trying each item alone."""
        try:
            launched = [_attempted(task, partial(self._launch_step, task)) for task in tasks]
            readings = iter(read(list(chain(*launched))))
            return [
                _attempted(task, partial(_outcomes, task, some, readings))
                for task, some in zip(tasks, launched, strict=True)
            ]
        except Exception as error:  # noqa: BLE001  # it is the error of a task, or found again
            if len(tasks) == 1 and not _is_out_of_memory(error):
                tasks[0].error = error
                return [[]]
            _log.warning("trying again item by item", error=type(error).__name__, device=str(self._device))
            return None

    def _launch_step(self, task: Task) -> list[Launched]:
        launched = []
        for item in task.steps[0].items:
            task.asker.check()
            with errors_within(item.path):
                launched.append(self._launch(task.job, item))
        return launched

    def _one_by_one(self, task: Task) -> list[LossOutcome]:
        """Evaluates each item of a step and waits for it; raises `OutOfMemoryError` for what is too large."""
        outcomes = []
        for item in task.steps[0].items:
            task.asker.check()
            try:
                with errors_within(item.path):
                    launched = [self._launch(task.job, item)]
                outcomes += _outcomes(task, launched, iter(read(launched)))
            except Exception as error:
                if _is_out_of_memory(error):
                    raise _too_large(item) from error
                raise
        return outcomes

    def _launch(self, job: LossJob, item: LossItem) -> Launched:
        """Begins an evaluation; on a CPU, and for a loss of the operator's, it is done then."""
        if job.strict:
            _refuse_non_finite(item.arguments)
        arguments = to_device(item.arguments, self._device)
        evaluation = job.loss.evaluate(arguments, self._options(item))
        check = None if job.strict else FiniteCheck.begin(arguments, evaluation.finite_inputs)
        return Launched(item=item, evaluation=evaluation, check=check)

    def _options(self, item: LossItem) -> EvaluationOptions:
        """Returns the item's options with where gradients go."""
        options = item.options._replace(allocate=self.buffers.allocate)
        here = {name: list(map(as_tensor, arrays)) for name, arrays in item.outputs.items()}
        return options._replace(
            outputs={
                name: tensors
                for name, tensors in here.items()
                if all(tensor.device == self._device for tensor in tensors)
            }
        )

    def _make_room(self) -> None:
        """Gives back what is kept for later."""
        self.buffers.let_go()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        """Waits for what was launched before something failed: it may write to a caller's memory."""
        with contextlib.suppress(RuntimeError):  # which a lost device raises, and writes no more
            torch.cuda.current_stream(self._device).synchronize()

    def _answers(self) -> bool:
        """Whether the device still does what it is told."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True


def _outcomes(task: Task, launched: Sequence[Launched], readings: Iterator[Reading]) -> list[LossOutcome]:
    outcomes = []
    ours = list(islice(readings, len(launched)))  # whatever becomes of them: those of others come after
    for each, (numbers, arrays) in zip(launched, ours, strict=True):
        with errors_within(each.item.path):
            outcomes.append(each.outcome(numbers, arrays, strict=task.job.strict))
    return outcomes


def _attempted(task: Task, work: Callable[[], list[T]]) -> list[T]:
    """Returns what comes of work for a task, nothing where it fails, or failed before.

    Only a want of memory is raised; anything else is the task's error.
    """
    try:
        return [] if task.error else work()
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        task.error = error
        return []


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def _writes_arrays(item: LossItem) -> bool:
    """Whether each gradient that has a place can be written there by compiled code."""
    wanted = item.options.gradient_dtype
    return all(
        are_places(places, _levels(item.arguments[name]), wanted) for name, places in item.outputs.items()
    )


def _levels(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _writes_to_a_gpu(task: Task) -> bool:
    places = (place for item in task.steps[0].items for places in item.outputs.values() for place in places)
    return any(isinstance(place, GpuArray) for place in places)


def _is_of_device(task: Task) -> bool:
    """Whether a task failed for what a GPU reported, in a loss of the operator's or in ours."""
    error = task.error
    return isinstance(error, _DeviceError) or isinstance(error and error.__cause__, _DeviceError)


def _too_large(item: LossItem) -> OutOfMemoryError:
    return OutOfMemoryError(
        Reason.OUT_OF_MEMORY, "the device has not the memory for this item", field=item.path
    )


def _refuse_non_finite(arguments: Mapping[str, Any]) -> None:
    """Raises `InvalidInputError` for the first argument that holds NaN or infinity, read where it lies."""
    found = find_non_finite(to_device(arguments, _HOST))
    if found:
        first = found[0]
        raise InvalidInputError(
            Reason.NOT_FINITE,
            f"{first.count} values are NaN or infinite, the first at {list(first.first_index)}",
            field=first.input,
            value="nan or inf",
            count=first.count,
            position=list(first.first_index),
        )
