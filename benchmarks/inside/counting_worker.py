"""A worker whose every local step adds 1 to all of its model: so the model tells which updates are in it.

Before a step ends it is written down: round and steps of it. Started by `benchmarks/faults.py`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

import esync
from esync import cli

SIZE = 200_000


def main() -> None:
    state, name, rank, step_s, log = sys.argv[1:]
    cli.interrupt_on_sigterm()
    with open(log, "a") as file, esync.Worker(state, name=name, rank=int(rank)) as worker:

        def write(event: str, **fields: Any) -> None:
            file.write(json.dumps({"t": time.time(), "event": event, **fields}) + "\n")
            file.flush()

        worker.on_round(lambda row: write("round", **row))
        params = worker.start({"w": np.zeros(SIZE, np.float32)})
        steps = 0
        while not worker.stopped:
            worker.pause(float(step_s))
            steps += 1
            write("step", round=worker.round, steps=steps)
            trained = params["w"] + np.float32(1)
            params = worker.step({"w": trained})
            if params["w"] is not trained:  # another model, which may have the same number
                steps = 0


if __name__ == "__main__":
    main()
