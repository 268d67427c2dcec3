"""Real signals to real processes: held while somebody else installs handlers, echoes ignored, children left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

HEAD = """
import os, signal, subprocess, sys, time
from trainer.run.signals import Interrupted, StopSignals
signals = StopSignals()
signals.install()
"""


def run(body: str, *, group: bool = False, times: int = 1, gap_s: float = 0.0) -> tuple[int, str]:
    """Run `body` after HEAD, signal it when it says `ready`; exit status and output."""
    process = subprocess.Popen([sys.executable, "-c", HEAD + textwrap.dedent(body)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(times):
        os.killpg(process.pid, signal.SIGTERM) if group else process.send_signal(signal.SIGTERM)
        time.sleep(gap_s)
    out, _ = process.communicate(timeout=30)
    return process.returncode, out


def test_the_first_signal_raises_while_nothing_can_be_stopped() -> None:
    body = """
    try:
        print("ready", flush=True)
        time.sleep(20)
    except Interrupted as error:
        sys.exit(error.status)
    """
    assert run(body) == (143, "")


def test_a_signal_that_comes_while_handlers_are_replaced_is_ours() -> None:
    """What Ray does: its own handler, and threads, while the signal arrives."""
    body = """
    try:
        with signals.held():
            signal.signal(signal.SIGTERM, lambda *_: os.abort())
            print("ready", flush=True)
            time.sleep(0.5)
            print("still held", flush=True)
    except Interrupted as error:
        sys.exit(error.status)
    """
    assert run(body) == (143, "still held\n")


@pytest.mark.parametrize(("times", "gap_s", "found"), [(2, 0.05, "1 echo"), (2, 1.3, "aborted")])
def test_a_second_signal_aborts_and_an_echo_does_not(times: int, gap_s: float, found: str) -> None:
    """`timeout` sends two at once: to its child, and to the group."""
    body = """
    signals.raising = False
    try:
        print("ready", flush=True)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            time.sleep(0.01)
        print(signals.count, "echo")
    except Interrupted as error:
        print(error)
    """
    assert run(body, times=times, gap_s=gap_s) == (0, f"{found}\n")


def test_processes_that_ray_starts_are_not_signalled_with_the_group_and_can_be_ended() -> None:
    body = """
    signals.raising = False
    with signals.held():
        child = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: None)
    print("ready", flush=True)
    while not signals.count:
        time.sleep(0.01)
    print("child", child.poll())
    child.terminate()
    print("ended", child.wait(5))
    """
    assert run(body, group=True) == (0, "child None\nended -15\n")


def test_nothing_interrupts_the_clean_up() -> None:
    body = """
    signals.closing()
    print("ready", flush=True)
    time.sleep(0.5)
    print("cleaned")
    """
    assert run(body) == (0, "cleaned\n")
