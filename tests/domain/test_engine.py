"""The engine: the same bits in any company, failures of one request alone, an answer for all who wait."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lossd_server.engine import (
    Asker,
    AssignItem,
    AssignJob,
    Batching,
    BufferPool,
    Engine,
    LossItem,
    LossJob,
    evaluator,
)
from lossd_server.errors import (
    CallerGoneError,
    CustomLossError,
    DeadlineError,
    InvalidInputError,
    OutOfMemoryError,
    Reason,
    UnavailableError,
)
from lossd_server.kernels import load_library
from lossd_server.losses import CenternessLoss, EvaluationOptions, FCOSLoss, FocalLoss, LossModule
from lossd_server.targets import FCOSAssigner
from tests.domain.jobs import MAKERS, TYPES, bits_of, cpu_engine, custom_job, random_job
from tests.domain.regions import wait_until

TOGETHER = Batching(together=True)


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    load_library()  # or else all goes by tensors, until something has


class Held(nn.Module):
    """Holds the device until let go."""

    def __init__(self):
        super().__init__()
        self.entered, self.release = threading.Event(), threading.Event()

    def forward(self, pred):
        self.entered.set()
        assert self.release.wait(30)
        return pred.sum()


@contextmanager
def held(engine):
    """Has the device held by another's job; what is asked meanwhile waits."""
    module = Held()
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(engine.compute, custom_job(module))
        assert module.entered.wait(30)
        yield
        module.release.set()
        holding.result(30)


def asked_together(engine, jobs, pool, askers=None):
    """Brings jobs while the device is held, so that they wait for it together."""
    with held(engine):
        futures = []
        for job, asker in zip(jobs, askers or [Asker(flow=n) for n in range(len(jobs))], strict=True):
            futures.append(pool.submit(engine.compute, job, asker))
            wait_until(lambda: engine.waiting_count == len(futures))
    return futures


JOBS = st.builds(
    random_job,
    kind=st.sampled_from(list(MAKERS)),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from(list(TYPES)),
    has_outputs=st.booleans(),
)
LIMITS = st.builds(
    Batching,
    together=st.booleans(),
    max_items=st.integers(1, 8),
    max_bytes=st.sampled_from([1, 2000, 1 << 30]),
)


@settings(deadline=None, max_examples=25)
@given(st.lists(JOBS, min_size=2, max_size=16), LIMITS)
def test_every_item_has_the_bits_that_it_has_alone(jobs, batching):
    with closing(cpu_engine()) as engine, closing(cpu_engine(batching=batching)) as busy:
        alone = [bits_of(engine.compute(job._replace(items=[item]))[0]) for job in jobs for item in job.items]
        with ThreadPoolExecutor(len(jobs)) as pool:
            answers = list(pool.map(lambda n: busy.compute(jobs[n], Asker(flow=n % 3)), range(len(jobs))))
        found = [bits_of([outcome]) for outcomes, _timing in answers for outcome in outcomes]
    assert found == alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@settings(deadline=None, max_examples=10)
@given(st.lists(JOBS, min_size=2, max_size=8))
def test_on_a_gpu_too_every_item_has_the_bits_that_it_has_alone(jobs):
    device = torch.device("cuda", 0)
    with (
        closing(Engine(device, batching=Batching(together=False))) as engine,
        closing(Engine(device)) as busy,
    ):
        alone = [bits_of(engine.compute(job._replace(items=[item]))[0]) for job in jobs for item in job.items]
        with ThreadPoolExecutor(len(jobs)) as pool:
            answers = list(pool.map(lambda n: busy.compute(jobs[n], Asker(flow=n)), range(len(jobs))))
        assert [bits_of([outcome]) for outcomes, _ in answers for outcome in outcomes] == alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_what_a_gpu_has_no_room_for_fails_alone():
    device = torch.device("cuda", 0)
    room = 1 << 28
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(device).total_memory)
    try:
        with closing(Engine(device)) as engine:
            for _ in range(2):
                with pytest.raises(OutOfMemoryError) as caught:
                    engine.compute(focal_job(rows=room))
                assert caught.value.field == "items[0]"
                del caught
                assert engine.compute(focal_job(rows=100))[0][0].loss > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def focal_job(rows):
    """A focal loss of so many rows of one logit."""
    loss = FocalLoss()
    arguments = {"inputs": np.zeros((rows, 1), np.float32), "targets": np.zeros(rows, np.int8)}
    options = EvaluationOptions(gradients=("inputs",))
    return LossJob(
        loss=loss, items=[LossItem(path="items[0]", arguments=loss.prepare(arguments), options=options)]
    )


def test_what_waits_goes_together_and_is_read_at_once(monkeypatch):
    jobs = [random_job("map", [n + 1] * 2, n) for n in range(4)]
    batches, reads, read = [], [], evaluator.read
    monkeypatch.setattr(evaluator, "read", lambda launched: reads.append(len(launched)) or read(launched))
    engine = cpu_engine(batching=TOGETHER, observe=lambda *sizes: batches.append(sizes))
    with closing(engine), ThreadPoolExecutor(4) as pool:
        futures = asked_together(engine, jobs, pool)
        found = [bits_of(future.result(30)[0]) for future in futures]
        assert (batches, reads) == ([(1, 1), (4, 8)], [1, 8])
        assert found == [bits_of(engine.compute(job)[0]) for job in jobs]


def test_a_bad_item_in_a_batch_fails_its_own_request_alone():
    good = [random_job("rows", [3, 4], n) for n in range(2)]
    bad = random_job("rows", [3, 4], 7, strict=True)
    logits = bad.items[1].arguments["inputs"].copy()
    logits[2, 1] = np.nan
    bad.items[1] = bad.items[1]._replace(arguments={**bad.items[1].arguments, "inputs": logits})
    engine = cpu_engine(batching=TOGETHER)
    with closing(engine), ThreadPoolExecutor(3) as pool:
        first, refused, last = asked_together(engine, [good[0], bad, good[1]], pool)
        with pytest.raises(InvalidInputError) as caught:
            refused.result(30)
        assert caught.value.field == "items[1].inputs"
        assert bits_of(first.result(30)[0]) == bits_of(engine.compute(good[0])[0])
        assert bits_of(last.result(30)[0]) == bits_of(engine.compute(good[1])[0])


def test_a_loss_of_the_operators_gives_way_between_its_items():
    engine, batches = cpu_engine(), []
    with closing(engine), ThreadPoolExecutor(2) as pool:
        engine._observe = lambda _jobs, items: batches.append(items)
        for future in asked_together(
            engine, [custom_job(Leaves(99), items=3), random_job("rows", [1] * 2, 1)], pool
        ):
            future.result(30)
    assert batches == [1, 1, 1, 2, 1]  # the one that held the device, then two of each, then the rest


class Hungry(nn.Module):
    """Runs out of memory for more than so many numbers; the first time for any."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        super().__init__()
        self.most, self.error, self.calls = most, error, 0

    def forward(self, pred):
        self.calls += 1
        if self.calls == 1 or len(pred) > self.most:
            raise self.error("too much")
        return pred.sum()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_want_of_memory_that_passes_is_not_noticed(error):
    with closing(cpu_engine()) as engine:
        outcomes, _ = engine.compute(custom_job(Hungry(3, error), items=3))
        assert [float(outcome.loss) for outcome in outcomes] == [1, 2, 3]


def test_an_item_too_large_fails_its_request_by_name_and_the_next_is_fine():
    module = Hungry(2)
    with closing(cpu_engine()) as engine:
        with pytest.raises(OutOfMemoryError) as caught:
            engine.compute(custom_job(module, items=4))
        assert (caught.value.reason, caught.value.field) == (Reason.OUT_OF_MEMORY, "items[2]")
        assert len(engine.compute(custom_job(module, items=2))[0]) == 2


def test_a_batch_too_large_is_taken_apart_and_fails_where_one_is_too_large_alone(monkeypatch):
    jobs = [
        random_job("centerness", [2, 3], 1, "float64"),
        random_job("centerness", [50], 2, "float64"),
        random_job("centerness", [4], 3, "float64"),
    ]
    engine = cpu_engine(batching=TOGETHER)
    launch, held_now = evaluator.Evaluator._launch, []

    def meagre(self, job, item):
        """Has memory for a few rows, until what was launched has been read."""
        rows = len(item.arguments["pred"]) if "target" in item.arguments else 0
        held_now.append(rows)
        if sum(held_now) > 8:
            held_now.clear()
            raise torch.OutOfMemoryError
        return launch(self, job, item)

    read = evaluator.read
    monkeypatch.setattr(evaluator.Evaluator, "_launch", meagre)
    monkeypatch.setattr(evaluator, "read", lambda launched: held_now.clear() or read(launched))
    with closing(engine), ThreadPoolExecutor(3) as pool:
        first, large, last = asked_together(engine, jobs, pool)
        with pytest.raises(OutOfMemoryError) as caught:
            large.result(30)
        assert caught.value.field == "items[0]"
        assert bits_of(first.result(30)[0]) == bits_of(engine.compute(jobs[0])[0])
        assert bits_of(last.result(30)[0]) == bits_of(engine.compute(jobs[2])[0])


def test_a_host_without_memory_is_no_fault_of_the_server(monkeypatch):
    def full(self, job, item):
        raise RuntimeError(
            "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
        )

    monkeypatch.setattr(evaluator.Evaluator, "_launch", full)
    with closing(cpu_engine()) as engine, pytest.raises(OutOfMemoryError):
        engine.compute(random_job("map", [1], 1))


@pytest.mark.parametrize("has_outputs", [False, True])
@pytest.mark.parametrize("kind", ["rows", "boxes", "centerness", "head"])
def test_arrays_are_evaluated_to_the_bit_as_tensors_are(monkeypatch, kind, has_outputs):
    job = random_job(kind, [1, 300, 7_000 if kind == "head" else 70_000], 1, has_outputs=has_outputs)
    with closing(cpu_engine()) as engine:
        monkeypatch.setattr(evaluator.Evaluator, "_by_tensors", None)
        found = engine.compute(job)[0]
        bits = bits_of(found)
        monkeypatch.undo()
        monkeypatch.setattr(type(job.loss), "evaluate_arrays", LossModule.evaluate_arrays)
        assert bits == bits_of(engine.compute(job)[0])
    if has_outputs:
        for outcome, item in zip(found, job.items, strict=True):
            for name in job.loss.differentiable:
                assert outcome.gradients[name][0] is item.outputs[name][0]


@pytest.mark.parametrize("kind", ["rows", "boxes", "centerness", "head"])
def test_gradients_with_places_that_no_kernel_writes_to_go_by_tensors(monkeypatch, kind):
    job = random_job(kind, [5], 1, has_outputs=True)
    (item,) = job.items
    outputs = {name: [place.astype(np.float64) for place in places] for name, places in item.outputs.items()}
    wide = item._replace(options=item.options._replace(gradient_dtype=torch.float64), outputs=outputs)
    with closing(cpu_engine()) as engine:
        (narrow,) = engine.compute(job)[0]
        monkeypatch.setattr(type(job.loss), "evaluate_arrays", None)
        (found,) = engine.compute(job._replace(items=[wide]))[0]
    for name, places in outputs.items():
        for place, gradient, expected in zip(
            places, found.gradients[name], narrow.gradients[name], strict=True
        ):
            assert gradient is place
            np.testing.assert_allclose(place, expected, rtol=1e-6, atol=1e-9)


def test_arrays_are_not_tried_where_there_is_no_kernel_for_the_loss(monkeypatch):
    job = random_job("head", [5], 1)
    job = job._replace(loss=FCOSLoss(3, focal_gamma=1.5, strides=(8,), regress_ranges=((-1, 64),)))
    monkeypatch.setattr(FCOSLoss, "evaluate_arrays", None)
    with closing(cpu_engine()) as engine:
        (outcome,) = engine.compute(job)[0]
    assert np.isfinite(outcome.loss)


def test_a_step_of_which_one_item_needs_tensors_goes_by_tensors_whole():
    job = random_job("rows", [3, 4], 7)
    logits = job.items[1].arguments["inputs"].copy()
    logits[2, 1] = np.inf
    job.items[1] = job.items[1]._replace(arguments={**job.items[1].arguments, "inputs": logits})
    with closing(cpu_engine()) as engine:
        first, second = engine.compute(job)[0]
    assert not first.non_finite
    assert [(found.input, found.count, found.first_index) for found in second.non_finite] == [
        ("inputs", 1, (2, 1))
    ]


def with_a_nan(job):
    """The job with a logit of its one item that is not finite."""
    (item,) = job.items
    logits = item.arguments["inputs"].copy()
    logits[0, 1] = np.nan
    job.items[:] = [item._replace(arguments={**item.arguments, "inputs": logits})]
    return job


def test_what_is_refused_is_not_written_to_its_callers_memory():
    job = with_a_nan(random_job("rows", [4], 1, has_outputs=True, strict=True))
    with closing(cpu_engine()) as engine, pytest.raises(InvalidInputError):
        engine.compute(job)
    assert not job.items[0].outputs["inputs"][0].any()


def test_jobs_of_one_owner_write_in_their_order_in_a_batch_too():
    first = with_a_nan(random_job("rows", [4], 1, has_outputs=True, owner="me"))
    last = random_job("rows", [4], 2, has_outputs=True, owner="me")
    last.items[:] = [last.items[0]._replace(outputs=first.items[0].outputs)]
    engine = cpu_engine(batching=TOGETHER)
    with closing(engine), ThreadPoolExecutor(2) as pool:
        for future in asked_together(engine, [first, last], pool):
            future.result(30)
        written = last.items[0].outputs["inputs"][0].copy()
        engine.compute(last)
    assert written.tobytes() == last.items[0].outputs["inputs"][0].tobytes()


@contextmanager
def held_as_tensors(monkeypatch, engine, job, pool):
    """Has the device held by a job that cannot be evaluated as arrays; yields its future."""
    entered, release, by_tensors = threading.Event(), threading.Event(), evaluator.Evaluator._by_tensors

    def hold(self, tasks):
        entered.set()
        assert release.wait(30)
        by_tensors(self, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "_by_tensors", hold)
        holding = pool.submit(engine.compute, job)
        assert entered.wait(30)
    yield holding
    release.set()
    holding.exception(30)


def test_a_job_that_has_the_device_at_once_keeps_it_from_its_owners_next_to_its_end(monkeypatch):
    first = with_a_nan(random_job("rows", [4], 1, has_outputs=True, owner="me"))
    last = random_job("rows", [4], 2, has_outputs=True, owner="me")
    last.items[:] = [last.items[0]._replace(outputs=first.items[0].outputs)]
    with closing(cpu_engine()) as engine, ThreadPoolExecutor(2) as pool:
        with held_as_tensors(monkeypatch, engine, first, pool):
            future = pool.submit(engine.compute, last)
            wait_until(lambda: engine.waiting_count == 1)
        future.result(30)
        written = last.items[0].outputs["inputs"][0].copy()
        engine.compute(last)
    assert written.tobytes() == last.items[0].outputs["inputs"][0].tobytes()


@pytest.mark.parametrize("why", ["it is closed", "it was given up"])
def test_a_job_that_has_the_device_at_once_is_answered_whatever_becomes_of_others(monkeypatch, why):
    engine, said = cpu_engine(), []
    engine.watch(0.1, said.append)
    job = with_a_nan(random_job("rows", [4], 1))
    with (
        closing(engine),
        ThreadPoolExecutor(1) as pool,
        held_as_tensors(monkeypatch, engine, job, pool) as held,
    ):
        if why == "it is closed":
            engine.close()
        else:
            wait_until(lambda: said == [True])
    (outcome,), timing = held.result()
    assert outcome.non_finite
    assert timing.queue == 0


def test_whoever_has_the_device_at_once_waits_for_nothing_and_is_evaluated_as_arrays_once(monkeypatch):
    evaluate, tried = FocalLoss.evaluate_arrays, []
    monkeypatch.setattr(FocalLoss, "evaluate_arrays", lambda *given: tried.append(given) or evaluate(*given))
    with closing(cpu_engine()) as engine:
        _, timing = engine.compute(with_a_nan(random_job("rows", [4], 1)))
    assert timing.queue == 0
    assert len(tried) == 1


def test_a_refused_job_is_held_by_nobody():
    job = with_a_nan(random_job("rows", [4], 1, strict=True))
    logits = weakref.ref(job.items[0].arguments["inputs"])
    gc.collect()
    gc.disable()
    try:
        with closing(cpu_engine()) as engine:
            with suppress(InvalidInputError):
                engine.compute(job)
            del job
            assert logits() is None
    finally:
        gc.enable()


def test_every_batch_is_observed_those_that_fail_too():
    observed = []
    engine = Engine(torch.device("cpu"), observe=lambda *batch: observed.append(batch))
    with closing(engine):
        engine.compute(random_job("rows", [4, 5], 1))
        with pytest.raises(DeadlineError):
            engine.compute(random_job("rows", [4], 1), Asker(deadline=time.monotonic() - 1))
        engine.compute(random_job("rows", [4], 1, "float64"))
    assert observed == [(1, 2), (1, 1), (1, 1)]


def test_targets_and_weights_in_float64_make_no_tensor(monkeypatch):
    monkeypatch.setattr(evaluator.Evaluator, "_by_tensors", None)
    loss, rows = CenternessLoss(), np.array([0.0, 0.5, 1.0])
    arguments = loss.prepare({"pred": rows.astype(np.float32), "target": rows, "weights": rows})
    item = LossItem(path="items[0]", arguments=arguments, options=EvaluationOptions(gradients=("pred",)))
    with closing(cpu_engine()) as engine:
        (outcome,), _ = engine.compute(LossJob(loss=loss, items=[item]))
    assert np.isfinite(outcome.loss)


def test_room_is_made_where_there_is_none_for_a_gradient(monkeypatch):
    allocate, calls = BufferPool.allocate, []

    def meagre(self, size):
        calls.append(size)
        if len(calls) == 1:
            raise MemoryError
        return allocate(self, size)

    job = random_job("rows", [9], 1)
    with closing(cpu_engine()) as engine:
        expected = bits_of(engine.compute(job)[0])
        monkeypatch.setattr(BufferPool, "allocate", meagre)
        assert bits_of(engine.compute(job)[0]) == expected


class Leaves(nn.Module):
    """Its caller is gone once it has been asked so often."""

    def __init__(self, most):
        super().__init__()
        self.most, self.calls = most, 0

    def forward(self, pred):
        self.calls += 1
        return pred.sum()

    def is_gone(self):
        return self.calls >= self.most


def test_an_evaluation_is_cut_short_between_items_when_its_caller_leaves():
    module = Leaves(2)
    with closing(cpu_engine()) as engine:
        with pytest.raises(CallerGoneError):
            engine.compute(custom_job(module, items=5), Asker(is_gone=module.is_gone))
        assert module.calls == 2


def test_an_assignment_is_cut_short_between_items_when_its_caller_leaves(monkeypatch):
    done, assign = [], FCOSAssigner.assign_objects
    monkeypatch.setattr(
        FCOSAssigner, "assign_objects", lambda *given, **named: done.append(1) or assign(*given, **named)
    )
    assigner = FCOSAssigner(strides=(8,), regress_ranges=((-1.0, 64.0),))
    item = AssignItem(path="items[0]", objects=assigner.read([]), levels=assigner.pyramid_of([(4, 4)]))
    with closing(cpu_engine()) as engine:
        with pytest.raises(CallerGoneError):
            engine.assign(
                AssignJob(assigner=assigner, max_positives=9, items=[item] * 5),
                Asker(is_gone=lambda: len(done) == 2),
            )
        assert len(done) == 2
        with pytest.raises(DeadlineError):
            engine.assign(
                AssignJob(assigner=assigner, max_positives=9, items=[item]),
                Asker(deadline=time.monotonic() - 1),
            )
        assert len(done) == 2


@pytest.mark.parametrize("who", [Asker(deadline=0.0), Asker(is_gone=lambda: True)])
def test_nothing_is_computed_for_whoever_is_gone(who):
    module = Leaves(99)
    with closing(cpu_engine()) as engine:
        with pytest.raises((DeadlineError, CallerGoneError)):
            engine.compute(custom_job(module), who)
        assert module.calls == 0


def test_a_caller_that_leaves_at_its_deadline_was_late():
    soon = Asker(deadline=time.monotonic() + 0.05, is_gone=lambda: True)
    assert isinstance(soon.problem(), DeadlineError)
    early = Asker(deadline=time.monotonic() + 60, is_gone=lambda: True)
    assert isinstance(early.problem(), CallerGoneError)
    assert Asker(deadline=time.monotonic() + 60).problem() is None


def test_jobs_on_one_owners_memory_are_done_in_the_order_of_asking_whoever_brings_them():
    # A call that was tried twice, over two connections: the first must not write after the second's answer.
    order = []

    class Writes(nn.Module):
        def forward(self, pred):
            order.append(len(pred))
            return pred.sum()

    first, second = custom_job(Writes(), items=3, owner="owner"), custom_job(Writes(), owner="owner")
    engine = cpu_engine(batching=Batching(max_items=1))
    with closing(engine), ThreadPoolExecutor(2) as pool:
        for future in asked_together(engine, [first, second], pool):
            future.result(30)
    assert order == [1, 2, 3, 1]


def test_who_waits_when_the_engine_closes_is_told_that_it_stops():
    engine, module = cpu_engine(), Held()
    with ThreadPoolExecutor(3) as pool:
        holding = pool.submit(engine.compute, custom_job(module))
        assert module.entered.wait(30)
        waiting = [
            pool.submit(engine.compute, job) for job in (random_job("rows", [1], 1), custom_job(module))
        ]
        wait_until(lambda: engine.waiting_count == 2)
        engine.close()
        for future in waiting:
            with pytest.raises(UnavailableError) as caught:
                future.result(30)
            assert caught.value.reason is Reason.DRAINING
        module.release.set()
        assert len(holding.result(30)[0]) == 1


def test_a_job_whose_thread_was_let_go_is_told_that_the_engine_stops():
    engine = cpu_engine()
    engine._torch_thread.shutdown()
    with pytest.raises(UnavailableError) as caught:
        engine.compute(custom_job(Leaves(9)))
    assert caught.value.reason is Reason.DRAINING


def test_a_device_that_does_not_come_back_turns_work_away_until_it_does():
    engine, said = cpu_engine(), []
    engine.watch(0.2, said.append)
    with closing(engine), ThreadPoolExecutor(1) as pool:
        with held(engine):
            waiting = pool.submit(engine.compute, random_job("rows", [1], 1))
            with pytest.raises(UnavailableError) as caught:
                waiting.result(30)
            assert caught.value.reason is Reason.DEVICE_WEDGED
            assert engine.is_wedged
            with pytest.raises(UnavailableError):
                engine.compute(random_job("rows", [1], 1))
        wait_until(lambda: said == [True, False])
        assert not engine.is_wedged
        assert len(engine.compute(random_job("rows", [1], 1))[0]) == 1


class Crashes(nn.Module):
    """What an error of a GPU's kernel looks like."""

    def forward(self, pred):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.skipif(
    not hasattr(torch, "AcceleratorError"), reason="this torch has no error of its own for it"
)
@pytest.mark.parametrize("is_lost", [True, False])
def test_a_device_that_is_lost_turns_work_away_for_good_and_one_that_answers_goes_on(monkeypatch, is_lost):
    def synchronize(_device):
        if is_lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    engine, said = cpu_engine(), []
    engine.watch(5.0, said.append)
    with closing(engine):
        with pytest.raises(CustomLossError):
            engine.compute(custom_job(Crashes()))
        if is_lost:
            wait_until(lambda: said == [True])
            with pytest.raises(UnavailableError) as caught:
                engine.compute(random_job("rows", [1], 1))
            assert caught.value.reason is Reason.DEVICE_WEDGED
        else:
            assert len(engine.compute(random_job("rows", [1], 1))[0]) == 1
            assert said == []


def test_nothing_is_watched_where_none_is_to_be():
    engine = cpu_engine()
    engine.watch(0, pytest.fail)
    with closing(engine):
        assert engine._watchdog is None
