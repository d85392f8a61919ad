"""Hivemind's cost of one exchange: every worker brings a vector and leaves with the mean of all.

There is no server: each worker averages its share of the vector for all of them. A worker is a process with an
averager, a DHT node and a peer-to-peer daemon, processes too, which listen on the loopback interface only. The
vectors are not compressed; the daemons encrypt, which cannot be turned off. A step has two parts, timed apart:
to find the group, which mostly waits by design, and the exchange, from the moment that all workers have found it
to the moment that the last of them has the mean.

    python benchmarks/hivemind.py --quick
"""

from __future__ import annotations

from statistics import fmean, median

import other_systems
from other_systems import MB, Exchange, Message, Role, Roles, System

HIVEMIND = System(
    "hivemind",
    packages=(
        # hivemind takes any torch, and the newest one brings CUDA of several GB where pip finds no other build.
        "torch==2.13.0",
        # The measuring worker reads how far a step has come, which is not part of its documented interface.
        "hivemind==1.1.12",
    ),
    advice=(
        "hivemind needs a wheel with its p2pd daemon (Linux on x86_64) or a Go compiler, and torch a wheel for"
        " this Python: install with a Python and on a machine that have them"
    ),
)


def exchange(roles: Roles, measured: Exchange) -> Message:
    """A swarm of all the workers: the first is whom the others find the swarm by."""
    patience_s = 90 + measured.workers * measured.mb / 5
    workers: list[Role] = []
    peers: list[str] = []
    for rank in range(measured.workers):
        worker = roles.start(
            f"worker {rank}",
            "hivemind_worker.py",
            rank=rank,
            workers=measured.workers,
            size=measured.size,
            rounds=measured.rounds + 1,
            peers=peers,
            scratch=roles.scratch,
        )
        workers.append(worker)
        peers = peers or roles.hear(worker, patience_s)["peers"]
    for rank, worker in enumerate(workers):
        for _ in range(1 if rank == 0 else 2):  # its addresses, its averager
            roles.hear(worker, patience_s)
    rounds = [_round(roles, workers, patience_s) for _ in range(1 + measured.rounds)][1:]
    said = [roles.hear(worker, patience_s) for worker in workers]
    for one in said:
        other_systems.check(HIVEMIND, one["wrong_by"])
    used = [one["usage"] for one in said]
    return other_systems.row(
        HIVEMIND,
        measured,
        [round["seconds"] for round in rounds],
        matchmaking_s=median(round["found_s"] for round in rounds),
        wire_mb=min(round["wire_bytes"] for round in rounds) / MB,
        server_peak_mb=None,
        worker_cpu_s=fmean(round["cpu_s"] for round in rounds),
        worker_peak_mb=max(one["peak_mb"] for one in used),
        worker_pss_mb=max(one["pss_mb"] for one in used),
        versions=said[0]["versions"],
    )


def _round(roles: Roles, workers: list[Role], patience_s: float) -> Message:
    for worker in workers:
        worker.say({})
    found = [roles.hear(worker, patience_s)["found_s"] for worker in workers]
    for worker in workers:
        worker.say({})
    done = [roles.hear(worker, patience_s) for worker in workers]
    return {
        "found_s": max(found),
        "seconds": max(one["end"] for one in done) - min(one["begin"] for one in done),
        "wire_bytes": max(o["sent_after"] for o in done) - min(o["sent_before"] for o in done),
        "cpu_s": fmean(one["cpu_s"] for one in done),
    }


main = other_systems.command(
    HIVEMIND, exchange, "Measure one exchange of vectors with hivemind on this machine."
)

if __name__ == "__main__":
    main()
