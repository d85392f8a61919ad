"""One worker of hivemind's: a peer with a DHT node and an averager, which does one step of averaging when told."""

from __future__ import annotations

import time
from typing import Any

import hivemind
import numpy as np
import role
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import AveragingStage
from hivemind.compression import NoCompression
from hivemind.p2p import P2P

PATIENCE_S = 60.0


def vector(rank: int, size: int) -> torch.Tensor:
    """What this worker brings to every round: float32 of shape (size,)."""
    return torch.from_numpy(np.random.default_rng(rank).standard_normal(size, np.float32))


def main() -> None:
    script = role.Script()
    config = script.hear()
    # Sockets of the peer-to-peer daemon lie in /tmp by default, and stay there when it is killed.
    P2P._UNIX_SOCKET_PREFIX = f"/unix{config['scratch']}/"
    dht = hivemind.DHT(
        initial_peers=config["peers"] or None,
        start=True,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        # All of these look for peers, routers or relays outside this machine.
        use_ipfs=False,
        auto_nat=False,
        nat_port_map=False,
        use_relay=False,
        use_auto_relay=False,
    )
    script.say({"peers": [str(address) for address in dht.get_visible_maddrs()]})
    own = vector(config["rank"], config["size"])
    averager = DecentralizedAverager(
        [own.clone()],
        dht,
        start=True,
        prefix="benchmark",
        target_group_size=config["workers"],
        min_group_size=config["workers"],
        compression=NoCompression(),
        allow_state_sharing=False,
    )
    script.say({})
    for _ in range(config["rounds"]):
        script.hear()
        with averager.get_tensors() as (tensor,):
            tensor.copy_(own)
        step, found_s = find(averager)
        script.say({"found_s": found_s})
        script.hear()
        script.say(average(step))
    with averager.get_tensors() as (tensor,):
        mean = tensor.clone()
    used = role.usage()
    expected = torch.stack([vector(r, config["size"]) for r in range(config["workers"])]).mean(0)
    script.say(
        {
            "usage": used,
            "wrong_by": float((mean - expected).abs().max()),
            "versions": role.versions("hivemind", "torch", "protobuf", "numpy"),
        }
    )
    averager.shutdown()
    dht.shutdown()
    script.hear()


def find(averager: DecentralizedAverager) -> tuple[Any, float]:
    """Look for the group to average with, up to the moment in which averaging could begin.

    Raises:
        RuntimeError: no group within a minute.
    """
    begin = time.monotonic()
    step = averager.step(wait=False, require_trigger=True, timeout=PATIENCE_S)
    while step.stage != AveragingStage.AWAITING_TRIGGER:
        if step.done() or time.monotonic() - begin > PATIENCE_S:
            raise RuntimeError(f"no group of all workers within {PATIENCE_S:g} s; see above")
        time.sleep(0.005)
    return step, time.monotonic() - begin


def average(step: Any) -> dict[str, float]:
    """The exchange itself; its times are of the machine's monotonic clock, the same for all workers."""
    sent_before, cpu_before = role.loopback_bytes(), role.cpu_s()
    begin = time.monotonic()
    step.allow_allreduce()
    step.result(PATIENCE_S)
    end = time.monotonic()
    return {
        "begin": begin,
        "end": end,
        "cpu_s": role.cpu_s() - cpu_before,
        "sent_before": sent_before,
        "sent_after": role.loopback_bytes(),
    }


if __name__ == "__main__":
    main()
