"""How many threads JAX computes with on a CPU: one for each core of the machine, unless it is told before it starts."""

from __future__ import annotations


def variables(count: int) -> dict[str, str]:
    """Environment variables for so many. XLA has no flag for it, but makes as many threads as NPROC says (seen with JAX
    0.4.30 and 0.10.2)."""
    return {"NPROC": str(count), "OMP_NUM_THREADS": str(count)}
