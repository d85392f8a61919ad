"""What compressing a model costs, and from which bandwidth on it does not pay.

Each chunk of a vector of normally distributed float32 is encoded and decoded, by one thread, as a worker and the
parameter server do it. Compression pays on a link on which the bytes that it saves take longer than that: the table
says up to which bandwidth.

    python benchmarks/encodings.py
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import click
import measure
import numpy as np
from rich.console import Console
from rich.table import Table

from esync import cli
from esync.compression import COMPRESSIONS, Compressor, Decoder, Encoding
from esync.tensors import CHUNK_ELEMENTS, DELTA, Layout, Leaf

GBIT = 10.0
"""The bandwidth that the ratio in the table is for."""


def cost(encoding: Encoding, mb: float, rounds: int) -> dict[str, Any]:
    """Median seconds to encode and to decode `mb` MB, and the bytes that are left."""
    random = np.random.default_rng(0)
    count = max(1, round(mb * 1e6 / 4 / CHUNK_ELEMENTS))
    chunks = [random.normal(size=CHUNK_ELEMENTS).astype(np.float32) for _ in range(count)]
    layout = Layout((Leaf(DELTA, "w", (count * CHUNK_ELEMENTS,), "float32"),))
    sender, receiver = Compressor(encoding, layout, (0, 0)), Decoder(encoding, layout)
    encode, decode = [], []
    for round_ in range(rounds + 1):
        began = time.perf_counter()
        sent = [sender.encode(i, x, round_) for i, x in enumerate(chunks)]
        encoded = time.perf_counter()
        for i, (name, payload) in enumerate(sent):
            receiver.decode(name, i, memoryview(payload))
        if round_:
            encode.append(encoded - began)
            decode.append(time.perf_counter() - encoded)
    size = sum(payload.nbytes for _, payload in sent)
    saved = sum(x.nbytes for x in chunks) - size
    seconds = statistics.median(encode) + statistics.median(decode)
    return {
        "encoding": encoding.name,
        "mb": sum(x.nbytes for x in chunks) / 1e6,
        "encoded_mb": size / 1e6,
        "encode_s": statistics.median(encode),
        "decode_s": statistics.median(decode),
        "saved_s": saved * 8 / (GBIT * 1e9),
        "pays_up_to_gbit": saved * 8 / seconds / 1e9,
    }


@click.command()
@click.option("--quick", is_flag=True, help="4 MB, three rounds.")
@click.option("--mb", type=float, default=None, help="MB of float32 [45].")
@click.option("--rounds", type=click.IntRange(min=1), default=None, help="Counted rounds [9].")
@click.option("--json", "file", type=click.File("w", lazy=True), help="Write the figures here too.")
def main(quick: bool, mb: float | None, rounds: int | None, file: Any) -> None:
    """Seconds to encode and decode, beside the seconds that the saved bytes take on a wire."""
    cli.keep_memory()  # as esync-ps and esync-worker do
    mb, rounds = mb or (4.0 if quick else 45.0), rounds or (3 if quick else 9)
    rows = [
        cost(COMPRESSIONS[name](share), mb, rounds)
        for name, share in (("bf16", 0.0), ("int8", 0.0), ("topk", 0.01))
    ]
    table = Table(title=f"{rows[0]['mb']:.0f} MB of float32, one thread", title_justify="left")
    for column in (
        "compression",
        "MB left",
        "encode ms",
        "decode ms",
        f"saved at {GBIT:g} Gbit/s, ms",
        "pays up to Gbit/s",
    ):
        table.add_column(column, justify="left" if column == "compression" else "right")
    for row in rows:
        table.add_row(
            row["encoding"],
            f"{row['encoded_mb']:.1f}",
            f"{row['encode_s'] * 1e3:.1f}",
            f"{row['decode_s'] * 1e3:.1f}",
            f"{row['saved_s'] * 1e3:.1f}",
            f"{row['pays_up_to_gbit']:.0f}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    if file:
        json.dump({"environment": measure.environment(), "rows": rows}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
