"""How the parameter server's process keeps its memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FOUR_THREADS = """
import ctypes, sys, threading
from esync import cli

cli.keep_memory(one_arena=sys.argv[1] == "one")
libc, together = ctypes.CDLL(None), threading.Barrier(4)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p

def take():
    together.wait()
    libc.malloc(1000)
    together.wait()

threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system has no glibc")
def test_threads_take_from_one_arena_where_that_is_asked_for():
    def arenas(how):
        command = [sys.executable, "-c", FOUR_THREADS, how]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.count(
            "<heap"
        )

    assert arenas("one") == 1
    assert arenas("several") > 1
