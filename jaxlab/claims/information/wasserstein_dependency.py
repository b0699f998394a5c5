"""Held to be 1-Lipschitz, the critic of predictive coding keeps more of the factors that a small batch cannot tell.

The paper's SpatialMNIST with handwritten digits of 8 x 8 pixels: x and y are canvases of nine digits, other exemplars
of the same nine classes, so that their information is 9 log 10 and a batch of 32 can show log 32 of it. An encoder
learns from pairs alone; a linear probe then reads every digit. Both losses choose among the same four learning rates by
canvases of validation digits. With one digit a canvas (secondary) there is little to lose.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.information import ridge_probe, wasserstein_dependency, wpc_loss
from jaxlab.ops.layers import mlp

CLASSES, BATCH = 10, 32
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ARMS = {"WPC": 10.0, "CPC": 0.0}


def by_class(split: dict[str, np.ndarray], room: int = 112) -> tuple[np.ndarray, int]:
    """Returns the digits as [10, room, 64], as many of each class as the rarest has, and how many that are."""
    each = [split["x"][split["y"] == label] for label in range(CLASSES)]
    count = min(len(x) for x in each)
    return np.stack([np.pad(x[:count], ((0, room - count), (0, 0))) for x in each]), count


def canvases(uniform: jax.Array, pool: jax.Array, count: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns canvases [N, slots * 64] of the digits [N, slots], for each the exemplar that a uniform number names."""
    return pool[labels, (uniform * count).astype(jnp.int32)].reshape(labels.shape[0], -1)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the mean accuracy of linear probes for the digits of test canvases."""
    steps, probed, rates = (100, 150, RATES[2:3]) if smoke else (600, 1000, RATES)
    splits = [[by_class(s) for s in digits(seed)] for seed in seeds]
    pools = jnp.asarray([[pool for pool, _ in split] for split in splits])
    counts = jnp.asarray([[count for _, count in split] for split in splits])
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    net = mlp([32] if smoke else [128, 128])

    def critic(params, x, y):
        return jnp.vdot(net.apply(params["x"], x), net.apply(params["y"], y))

    def one(rate, key, pools, counts, weight, slots):
        key_x, key_y, key_train, key_probe = jax.random.split(key, 4)
        params = {"x": net.init(key_x, slots * 64), "y": net.init(key_y, slots * 64)}

        def loss(params, batch, key):
            del batch
            u = jax.random.uniform(key, (3, BATCH, slots))
            labels = (u[0] * CLASSES).astype(jnp.int32)
            x, y = (canvases(v, pools[0], counts[0], labels) for v in u[1:])
            return wpc_loss(params, critic, x, y, key=jax.random.fold_in(key, 0), penalty_weight=weight)

        optimizer, nothing = optax.adam(rate), {"x": jnp.zeros((1, 1))}
        params, _ = train(loss, params, nothing, optimizer=optimizer, steps=steps, batch=1, key=key_train)

        def read(uniform, pool, count):
            labels = (uniform[0] * CLASSES).astype(jnp.int32)
            return labels, net.apply(params["x"], canvases(uniform[1], pool, count, labels))

        labels, z = jax.vmap(read)(jax.random.uniform(key_probe, (3, 2, probed, slots)), pools, counts)
        targets = jax.nn.one_hot(labels[0], CLASSES).reshape(probed, -1)
        scores = ridge_probe(z[0], targets, z[1:].reshape(2 * probed, -1)).reshape(2, probed, slots, CLASSES)
        return jnp.mean((jnp.argmax(scores, axis=-1) == labels[1:]).astype(jnp.float32), axis=(1, 2))

    results = {}
    for slots in (2,) if smoke else (9, 1):

        def over_seeds(rate, weight, *by_seed, slots=slots):
            return jax.vmap(lambda *a: one(rate, *a, weight, slots))(*by_seed)

        # A weight of 0 that is known beforehand saves the penalty; the short form has one program for both.
        run = jax.jit(over_seeds) if smoke else jax.jit(over_seeds, static_argnums=1)
        for name, weight in ARMS.items():
            found = np.asarray([run(jnp.float32(rate), weight, keys, pools, counts) for rate in rates])
            # Axes: learning rate, seed, validation or test.
            best = int(found[..., 0].mean(axis=1).argmax())
            results[slots, name] = found[best, :, 1].tolist(), rates[best]
    most = max(slots for slots, _ in results)
    arms = {name: results[most, name][0] for name in ARMS}
    learnt = {name: min(values) > 0.2 for name, values in arms.items()}
    secondary = {
        "learning rate": {f"{name}, {slots} digits": rate for (slots, name), (_, rate) in results.items()},
        "accuracy with one digit": {name: results[1, name][0] for name in ARMS if (1, name) in results},
    }
    if not smoke:
        secondary["dependency of correlated Gaussians"] = gaussians(keys)
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="canvases of scikit-learn digits")


def gaussians(keys: jax.Array, count: int = 256) -> dict[str, dict[str, float]]:
    """Returns mean and deviation over the seeds of the exact dependency on a sample, and W2, which bounds its limit."""

    @jax.jit
    @jax.vmap
    def estimate(key):
        key_data, key_order = jax.random.split(key)
        x, noise = jax.random.normal(key_data, (2, count, 1))
        draw = lambda rho: wasserstein_dependency(x, rho * x + (1 - rho**2) ** 0.5 * noise, key=key_order)
        return jax.vmap(draw)(jnp.array([0.0, 0.5, 0.9]))

    values = np.asarray(estimate(keys))
    table = {}
    for rho, column in zip((0.0, 0.5, 0.9), values.T, strict=True):
        above = ((1 + rho) ** 0.5 - 1) ** 2 + ((1 - rho) ** 0.5 - 1) ** 2
        table[f"rho {rho}"] = {"mean": column.mean(), "deviation": column.std(ddof=1), "upper bound W2": above**0.5}
    return table
