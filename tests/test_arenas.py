"""How the parameter server's process keeps its memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from click.testing import CliRunner

from esync import cli
from esync.ps.cli import main

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
        usual = {
            k: v for k, v in os.environ.items() if k not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
        }
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=usual)
        return done.stdout.count("<heap")

    assert arenas("one") == 1
    assert arenas("several") > 1


def test_a_parameter_server_asks_for_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(cli, "keep_memory", lambda **how: asked.append(how))
    CliRunner().invoke(main, ["--config", str(tmp_path / "none.toml")])
    assert asked == [{"one_arena": True}]
