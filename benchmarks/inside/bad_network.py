"""Connections that go through here are slow, and none lasts. Started by `benchmarks/faults.py`.

    python -m inside.bad_network HERE THERE DELAY_S LIFE_S SEED PORT...

What comes in at HERE goes on to the same port of THERE, and back, later by DELAY_S and up to twice as much more, drawn
anew for each piece; in the order in which it came, as TCP has it. Each connection is reset after a time drawn from an
exponential distribution with the mean LIFE_S.
"""

from __future__ import annotations

import asyncio
import random
import sys
from asyncio import StreamReader, StreamWriter

PIECES = 64
"""Pieces of at most 64 KiB that are on their way, of one direction of one connection."""


class Way:
    """One direction of a connection."""

    def __init__(self, source: StreamReader, to: StreamWriter, delay_s: float, rng: random.Random):
        self._source, self._to, self._delay_s, self._rng = source, to, delay_s, rng
        self._pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES)

    async def go(self) -> None:
        """Carry until one side closes."""
        taker = asyncio.create_task(self._take())
        try:
            now = asyncio.get_running_loop().time
            while True:
                due, data = await self._pieces.get()
                await asyncio.sleep(max(0.0, due - now()))
                if not data:
                    return
                self._to.write(data)
                await self._to.drain()
        finally:
            taker.cancel()

    async def _take(self) -> None:
        now, data = asyncio.get_running_loop().time, b"x"
        while data:
            try:
                data = await self._source.read(1 << 16)
            except OSError:
                data = b""  # a reset ends it too
            await self._pieces.put((now() + self._delay_s * self._rng.uniform(1, 3), data))


async def carry(
    source: StreamReader,
    back: StreamWriter,
    there: str,
    port: int,
    delay_s: float,
    life_s: float,
    rng: random.Random,
) -> None:
    """One connection, for as long as it lasts."""
    try:
        reader, writer = await asyncio.open_connection(there, port)
    except OSError:
        back.transport.abort()
        return
    ways = [Way(source, writer, delay_s, rng), Way(reader, back, delay_s, rng)]
    tasks = [asyncio.create_task(way.go()) for way in ways]
    await asyncio.wait(
        tasks, timeout=rng.expovariate(1 / life_s), return_when=asyncio.FIRST_COMPLETED
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for end in (back, writer):
        end.transport.abort()


async def main() -> None:
    here, there, delay_s, life_s, seed, *ports = sys.argv[1:]
    rng = random.Random(int(seed))
    for port in map(int, ports):

        async def taken(source: StreamReader, back: StreamWriter, port: int = port) -> None:
            await carry(source, back, there, port, float(delay_s), float(life_s), rng)

        await asyncio.start_server(taken, here, port)
    print("carrying", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
