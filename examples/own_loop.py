"""A training loop of one's own: a small network in plain JAX learns a curve, on as many machines as join.

esync-run examples/clusters/own_loop.toml          all of it on this machine, or by hand:

esync-state --model own --workers 2 --batch-size 32 --duration 10 &
esync-ps &
python examples/own_loop.py & python examples/own_loop.py
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import esync

SIZES = (1, 64, 64, 1)


def new_params(seed):
    random = np.random.default_rng(seed)
    pairs = itertools.pairwise(SIZES)
    return [
        {"w": jnp.asarray(random.normal(size=(n, m)) / n**0.5, jnp.float32), "b": jnp.zeros(m)}
        for n, m in pairs
    ]


def loss_of(params, x, y):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2)


@jax.jit
def train_step(params, x, y, lr):
    loss, grads = jax.value_and_grad(loss_of)(params, x, y)
    return jax.tree_util.tree_map(lambda p, g: p - lr * g, params, grads), loss


def main():
    x = np.linspace(-3, 3, 4096, dtype=np.float32)[:, None]
    y = np.sin(3 * x) * np.exp(-0.2 * x**2)
    params = new_params(seed=0)
    print(f"loss of the initial model: {loss_of(params, x, y):.4f}")

    with esync.Worker(say=print) as worker:
        params = worker.start(params)  # the cluster's model
        for batch in worker.batches((x, y)):  # this worker's share
            params, loss = train_step(params, *batch, worker.config.lr)
            params = worker.step(params, loss=loss)  # trains on, or synchronises when told to

    print(f"loss of the final model: {loss_of(params, x, y):.4f}, {worker.totals.steps} steps here")


if __name__ == "__main__":
    main()
