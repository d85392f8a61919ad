"""One worker of Flower's: it answers every model with the same vector, at once."""

from __future__ import annotations

from typing import Any

import flwr as fl
import numpy as np
import role

LONGEST_MESSAGE = 2**31 - 1
"""Bytes; gRPC and protobuf go no further."""


def vector(rank: int, size: int) -> Any:
    """What this worker sends: float32 of shape (size,)."""
    return np.random.default_rng(rank).standard_normal(size, np.float32)


class Client(fl.client.NumPyClient):
    """No training: what comes is read, what goes is ready."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, Any]:
        if parameters[0].shape != self.own.shape or parameters[0].dtype != self.own.dtype:
            raise RuntimeError(
                f"the mean is {parameters[0].dtype}{parameters[0].shape},"
                f" expected {self.own.dtype}{self.own.shape}"
            )
        return [self.own], 1, {}


def main() -> None:
    script = role.Script()
    config = script.hear()
    client = Client(vector(config["rank"], config["size"]))
    fl.client.start_client(
        server_address=config["address"],
        client=client.to_client(),
        grpc_max_message_length=LONGEST_MESSAGE,
    )
    script.say({"usage": role.usage()})
    script.hear()


if __name__ == "__main__":
    main()
