"""Flower's cost of one exchange: every worker sends a vector, the server forms the mean, every worker receives it.

It is Flower's quickest way: one gRPC stream for each client, FedAvg, no training, no evaluation. Server and
workers are processes of their own on the loopback interface. The time is the server's, of a whole round: the
mean of the last round goes to all, their vectors come, the next mean is formed.

    python benchmarks/flower.py --quick
"""

from __future__ import annotations

from statistics import fmean

import other_systems
from other_systems import HOST, MB, Exchange, Message, Roles, System

FLOWER = System(
    "flower",
    # start_server and start_client are deprecated: a later release may be without them.
    packages=("flwr==1.42.0",),
    variables=(("FLWR_TELEMETRY_ENABLED", "0"),),
)


def exchange(roles: Roles, measured: Exchange) -> Message:
    """A run of the server with all its workers."""
    port = other_systems.free_port()
    config = {
        "address": f"{HOST}:{port}",
        "workers": measured.workers,
        "size": measured.size,
        "rounds": measured.rounds + 1,
    }
    server = roles.start("server", "flower_server.py", **config)
    roles.await_port(server, port, timeout_s=60)
    workers = [
        roles.start(f"worker {rank}", "flower_client.py", rank=rank, **config)
        for rank in range(measured.workers)
    ]
    said = roles.hear(server, 120 + (1 + measured.rounds) * measured.workers * measured.mb / 5)
    other_systems.check(FLOWER, said["wrong_by"])
    used = [roles.hear(worker, 30)["usage"] for worker in workers]
    rounds = said["rounds"][1:]
    return other_systems.row(
        FLOWER,
        measured,
        [round["seconds"] for round in rounds],
        wire_mb=min(round["wire_bytes"] for round in rounds) / MB,
        server_cpu_s=fmean(round["cpu_s"] for round in rounds),
        server_peak_mb=said["usage"]["peak_mb"],
        worker_peak_mb=max(worker["peak_mb"] for worker in used),
        versions=said["versions"],
    )


main = other_systems.command(
    FLOWER, exchange, "Measure one exchange of vectors with Flower on this machine."
)

if __name__ == "__main__":
    main()
