"""Signals that end the server are heard whenever they come; in a process whose main thread waits."""

import subprocess
import sys

PROGRAM = """
import os, signal, sys, threading
from lossd_server.cli.signals import on_every_end

heard = threading.Semaphore(0)
on_every_end(heard.release)
due = threading.Semaphore(0)


def spin():
    while True:
        pass


def send():
    while due.acquire():
        os.kill(os.getpid(), signal.SIGTERM)


sys.setswitchinterval(1e-5)
for work in (spin, spin, send):
    threading.Thread(target=work, daemon=True).start()
for _ in range(3000):
    due.release()
    heard.acquire()
print("all were heard")
"""


def test_no_signal_waits_for_another():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "all were heard\n"
