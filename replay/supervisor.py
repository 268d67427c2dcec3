"""Keeps one redis-server alive exactly as long as the process that asked for it.

Run as a script in its own session (`python -I -S supervisor.py BINARY CONFIG PARENT_PID LOCK_FD`), standard
library only. It starts the server, starts it again after a crash (clients ride that out; the append-only file
keeps the data), and ends it when told to (SIGTERM) or when the parent is gone: the parent id changes even
after a SIGKILL of the parent, and polling it is immune to descriptors leaked into forked children. If this
process itself is killed, the kernel ends the server (parent-death signal, Linux). The lock descriptor stays
open here and in the server, so a second server on the same folder waits until both are gone.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

POLL_S = 0.1
GRACE_S = 10.0
RAPID_CRASH_S = 5.0
MAX_RAPID_CRASHES = 3
PR_SET_PDEATHSIG = 1


def _die_with_supervisor() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def main(binary: str, config: str, parent: int, lock: int) -> int:
    """Returns 0 after an orderly end, 1 when the server cannot be kept up."""
    told_to_stop = False

    def stop(signum: int, frame: object) -> None:
        nonlocal told_to_stop
        told_to_stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    crashes = 0
    while True:
        started = time.monotonic()
        server = subprocess.Popen(
            [binary, config],
            stdin=subprocess.DEVNULL,
            pass_fds=[lock],
            preexec_fn=_die_with_supervisor,  # safe: this process has one thread
        )
        while server.poll() is None:
            if told_to_stop or os.getppid() != parent:
                _end(server)
                return 0
            time.sleep(POLL_S)
        if server.returncode == 0:
            return 0
        crashes = crashes + 1 if time.monotonic() - started < RAPID_CRASH_S else 1
        if crashes > MAX_RAPID_CRASHES or told_to_stop or os.getppid() != parent:
            return 1
        time.sleep(POLL_S * crashes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
