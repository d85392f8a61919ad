"""Flower's server with FedAvg, which takes the time of each round."""

from __future__ import annotations

import time
from typing import Any

import flwr as fl
import numpy as np
import role
from flower_client import LONGEST_MESSAGE, vector


class Timed(fl.server.strategy.FedAvg):
    """FedAvg that needs every worker, and notes when a round begins and ends.

    A round sends the mean of the last one to every worker, receives their vectors and forms the mean of those.
    """

    def __init__(self, workers: int, size: int) -> None:
        super().__init__(
            fraction_evaluate=0.0,
            min_fit_clients=workers,
            min_available_clients=workers,
            accept_failures=False,
            initial_parameters=fl.common.ndarrays_to_parameters([np.zeros(size, np.float32)]),
        )
        self.workers = workers
        self.rounds: list[dict[str, float]] = []
        self.mean: Any = None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        instructions = super().configure_fit(server_round, parameters, client_manager)
        self.rounds.append(
            {"begin": time.monotonic(), "sent": role.loopback_bytes(), "cpu": time.process_time()}
        )
        return instructions

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if failures or len(results) != self.workers:
            raise RuntimeError(
                f"round {server_round} has {len(results)} of {self.workers} vectors; failures: {failures}"
            )
        self.mean, metrics = super().aggregate_fit(server_round, results, failures)
        begun = self.rounds[-1]
        self.rounds[-1] = {
            "seconds": time.monotonic() - begun["begin"],
            "wire_bytes": role.loopback_bytes() - begun["sent"],
            "cpu_s": time.process_time() - begun["cpu"],
        }
        return self.mean, metrics


def main() -> None:
    script = role.Script()
    config = script.hear()
    workers, size = config["workers"], config["size"]
    strategy = Timed(workers, size)
    fl.server.start_server(
        server_address=config["address"],
        config=fl.server.ServerConfig(num_rounds=config["rounds"]),
        strategy=strategy,
        grpc_max_message_length=LONGEST_MESSAGE,
    )
    used = role.usage()
    (mean,) = fl.common.parameters_to_ndarrays(strategy.mean)
    expected = sum(vector(rank, size) for rank in range(workers)) / np.float32(workers)
    script.say(
        {
            "rounds": strategy.rounds,
            "usage": used,
            "wrong_by": float(np.abs(mean - expected).max()),
            "versions": role.versions("flwr", "grpcio", "protobuf", "numpy"),
        }
    )
    script.hear()


if __name__ == "__main__":
    main()
