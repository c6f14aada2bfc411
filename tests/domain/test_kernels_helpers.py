"""The threads that kernels share their work with: each may run wherever its caller may."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

import lossd_server.kernels
from lossd_server.kernels.compiler import find_compiler
from tests.domain.support import needs_a_compiler

pytestmark = [
    needs_a_compiler,
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not say which cores"),
]

TASKS = 12

PROGRAM = """
#include "tasks.h"
#include <unistd.h>

typedef struct { int32_t thread, cores, runs; } note;

static void run(void *work, int64_t task) {
    note *n = (note *)work + task;
    cpu_set_t cores;
    sched_getaffinity(0, sizeof cores, &cores);
    n->thread = gettid(), n->cores = CPU_COUNT(&cores), n->runs++;
    usleep(20000); /* there is some left for whoever comes late */
}

void note_tasks(note *notes, int64_t count, int32_t threads) { run_tasks(run, notes, count, threads); }
"""


class Note(ctypes.Structure):
    _fields_ = (("thread", ctypes.c_int32), ("cores", ctypes.c_int32), ("runs", ctypes.c_int32))


@pytest.fixture(scope="module")
def note_tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("helpers")
    source, library = directory / "notes.c", directory / "notes.so"
    source.write_text(PROGRAM)
    headers = str(Path(lossd_server.kernels.__file__).parent)
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-shared", "-fPIC", "-pthread", "-I", headers]
    subprocess.run([find_compiler(), *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).note_tasks
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)

    def run(threads):
        notes = (Note * TASKS)()
        function(ctypes.addressof(notes), TASKS, threads)
        return notes

    return run


@pytest.fixture
def on_one_core():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("threads", [1, 2, 5, 100])
def test_every_task_is_run_once_by_so_many_threads_that_may_run_where_their_caller_may(note_tasks, threads):
    before = os.sched_getaffinity(0)
    notes = note_tasks(threads)
    assert [note.runs for note in notes] == [1] * TASKS
    assert min(threads, 2) <= len({note.thread for note in notes}) <= min(threads, TASKS)
    assert {note.cores for note in notes} == {len(before)}
    assert os.sched_getaffinity(0) == before


@pytest.mark.usefixtures("on_one_core")
def test_helpers_of_a_caller_with_one_core_stay_there(note_tasks):
    notes = note_tasks(3)
    assert [note.runs for note in notes] == [1] * TASKS
    assert {note.cores for note in notes} == {1}
