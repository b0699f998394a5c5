"""A signal is heard inside work that Python cannot interrupt, and the grace ends what does not end by itself."""

import signal
import subprocess
import sys
import time

import pytest

from jaxlab.engine.signals import Stop

# LAPACK, like a compiler, comes back to Python only when it is done.
STUCK = """
import numpy as np
from jaxlab.engine.signals import Stop
matrix = np.random.default_rng(0).normal(size=(3500, 3500))
with Stop({grace}) as stop:
    print("in", flush=True)
    np.linalg.svd(matrix)
print("stop requested" if stop.requested else "nothing heard")
"""


def start(grace):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(grace=grace)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    return process


def test_the_watchdog_leaves_with_75_while_the_main_thread_is_stuck():
    process = start(0.5)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75 and out == "" and "0.5 s of grace are over" in err


def test_handlers_are_put_back_and_a_second_interrupt_leaves_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop(grace=30) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1
