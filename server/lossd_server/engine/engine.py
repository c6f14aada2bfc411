"""The engine: one evaluation at a time on the device, none once it drains."""

import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import structlog
import torch
from torch import Tensor

from lossd_server.engine.affinity import leaves_torch_asleep
from lossd_server.engine.buffers import BufferPool
from lossd_server.engine.custom import CustomLoss
from lossd_server.engine.transfer import all_to_host, from_host, numbers_to_host, to_device, to_host
from lossd_server.engine.turn import Turn
from lossd_server.engine.work import (
    Array,
    AssignJob,
    AssignResults,
    LossItem,
    LossJob,
    LossOutcome,
    LossResults,
    Timing,
)
from lossd_server.errors import (
    CustomLossError,
    DeadlineError,
    InvalidInputError,
    OutOfMemoryError,
    Reason,
    UnavailableError,
    errors_within,
)
from lossd_server.kernels import load_library
from lossd_server.losses import (
    CenternessLoss,
    Evaluation,
    EvaluationOptions,
    FCOSLoss,
    FocalLoss,
    GIoULoss,
    LossModule,
)
from lossd_server.losses.evaluation import find_non_finite
from lossd_server.losses.gpu import compile_programs

_HOST = torch.device("cpu")

_MAX_IDLE_BYTES = 1 << 30
"""Most memory that is kept for the gradients of later requests."""

_log = structlog.get_logger()


class Engine:
    """Evaluates jobs on one device.

    Attributes:
        device: Where losses are evaluated. Targets are assigned on the host.
        custom_losses: The operator's losses by name.
    """

    def __init__(self, device: torch.device, custom_losses: Mapping[str, CustomLoss] | None = None) -> None:
        self.device = device
        self.custom_losses = dict(custom_losses or {})
        self._turn = Turn()
        # Torch keeps a team of helpers for every thread that ever woke them: this one may.
        self._torch_thread = ThreadPoolExecutor(1, thread_name_prefix="lossd-device")
        self._buffers = BufferPool(_MAX_IDLE_BYTES)
        self._draining = threading.Event()
        for loss in self.custom_losses.values():
            loss.to(device)

    def compute(self, job: LossJob, deadline: float | None = None) -> LossResults:
        """Evaluates a batch, all of it or none.

        Args:
            job: Prepared work.
            deadline: On the clock of `time.monotonic`; None waits without end.

        Raises:
            UnavailableError: The engine drains.
            DeadlineError: The deadline passed while waiting for the device.
            InvalidInputError: An item holds NaN or infinity, and the job is strict.
            CustomLossError: The operator's module failed.
            OutOfMemoryError: The device has not the memory.
        """
        self._refuse_when_draining()
        arrived = time.monotonic()
        patience = threading.TIMEOUT_MAX if deadline is None else max(deadline - arrived, 0)
        if not self._turn.acquire(min(patience, threading.TIMEOUT_MAX)):
            raise DeadlineError(Reason.DEADLINE_EXCEEDED, "the deadline passed in the queue")
        try:
            if self.device.type == "cpu" and leaves_torch_asleep(job):
                return self._run(job, arrived)
            return self._torch_thread.submit(self._run, job, arrived).result()
        finally:
            self._turn.release()

    def assign(self, job: AssignJob) -> AssignResults:
        """Assigns targets; on the host and without waiting for the device.

        Raises:
            UnavailableError: The engine drains.
            InvalidInputError: Level sizes do not go with the strides, or too many locations are positive.
        """
        self._refuse_when_draining()
        began = time.monotonic()
        assignments, room = [], job.max_positives
        for item in job.items:
            with errors_within(item.path):
                found = job.assigner.assign_objects(item.objects, item.sizes, max_positives=room)
            room -= len(found.location)
            assignments.append(found)
        return assignments, Timing(queue=0.0, compute=time.monotonic() - began)

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

    def drain(self) -> None:
        """Refuses work from now on; what runs goes on to its end."""
        self._draining.set()

    def close(self) -> None:
        """Drains, and lets the thread go when it is done."""
        self.drain()
        self._torch_thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: LossJob, arrived: float) -> LossResults:
        """Evaluates a job; one at a time."""
        began = time.monotonic()
        outcomes = [self._evaluate(job, item) for item in job.items]
        return outcomes, Timing(queue=began - arrived, compute=time.monotonic() - began)

    def _refuse_when_draining(self) -> None:
        if self._draining.is_set():
            raise UnavailableError(Reason.DRAINING, "the server is stopping")

    def _evaluate(self, job: LossJob, item: LossItem) -> LossOutcome:
        with errors_within(item.path), _memory_errors():
            if job.strict:
                _refuse_non_finite(item.arguments)
            arguments = {name: to_device(value, self.device) for name, value in item.arguments.items()}
            with torch.no_grad():
                evaluation = job.loss.evaluate(arguments, self._options(item))
            non_finite = [] if job.strict else find_non_finite(arguments, evaluation.finite_inputs)
            if evaluation.preset is None:  # a custom loss may make NaN of finite inputs
                non_finite += find_non_finite({"loss": evaluation.loss})
                if job.strict and non_finite:
                    raise CustomLossError(
                        Reason.CUSTOM_LOSS_FAILED, "the loss is NaN or infinite", value="nan or inf"
                    )
            return replace(_on_host(evaluation, item), non_finite=non_finite)

    def _options(self, item: LossItem) -> EvaluationOptions:
        """Returns the item's options with where gradients go."""
        on_host = self.device.type == "cpu"
        outputs = {name: list(map(from_host, arrays)) for name, arrays in item.outputs.items() if on_host}
        return replace(item.options, allocate=self._buffers.allocate, outputs=outputs)


def _refuse_non_finite(arguments: Mapping[str, object]) -> None:
    """Raises `InvalidInputError` for the first argument that holds NaN or infinity, read on the host."""
    found = find_non_finite({name: to_device(value, _HOST) for name, value in arguments.items()})
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


def _on_host(evaluation: Evaluation, item: LossItem) -> LossOutcome:
    """Returns the evaluation on the host, with the gradients in the order in which they were asked for."""
    components = evaluation.components
    numbers = numbers_to_host(
        [
            *(component.value for component in components),
            *evaluation.raw_sums.values(),
            evaluation.negative_side_count,
        ]
    )
    values, sums, (negative_sides,) = (
        numbers[: len(components)],
        numbers[len(components) : -1],
        numbers[-1],
    )
    levels = zip(*(row.tolist() for row in sums), strict=True)
    gradients = {name: evaluation.gradients[name] for name in item.options.gradients}
    return LossOutcome(
        loss=to_host(evaluation.loss),
        components=[(c.name, float(v[0]), c.weight) for c, v in zip(components, values, strict=True)],
        gradients={
            name: _placed(gradient if isinstance(gradient, list) else [gradient], item.outputs.get(name))
            for name, gradient in gradients.items()
        },
        raw_sums=[dict(zip(evaluation.raw_sums, level, strict=True)) for level in levels],
        preset=evaluation.preset,
        kept_rows=None if evaluation.kept_rows is None else to_host(evaluation.kept_rows),
        negative_side_count=int(negative_sides),
        nonzero_rows=evaluation.nonzero_rows,
    )


def _placed(gradients: Sequence[Tensor], outputs: Sequence[Array] | None) -> list[Array]:
    """Returns gradients as arrays on the host: those that they are to be written to, where there are any."""
    if outputs is None:
        return all_to_host(gradients)
    for gradient, output in zip(gradients, outputs, strict=True):
        place = from_host(output)
        if gradient.data_ptr() != place.data_ptr():  # a GPU's, or made by autograd
            place.copy_(gradient)
    return list(outputs)


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(Reason.OUT_OF_MEMORY, "the device has not the memory for this item") from error


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
