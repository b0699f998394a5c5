"""An energy term keeps clusters from being cut where the data are dense.

The paper's toy, smaller: two moons and two circles, two clusters, a small network, an augmented point being the point
with a little noise. Normalised mutual information with the classes on held-out points, mean over both sets, of
clustering with the energy term against clustering alone (the same loss without it). Both choose from the same four
configurations on validation points: two learning rates and two weights of invariance.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import clustering_scores, draw_from_buffer, energy, gedi_loss, langevin
from jaxlab.ops.layers import mlp

NET = mlp([64, 64, 2])
CONFIGURATIONS = [(rate, invariance) for rate in (1e-3, 3e-3) for invariance in (10.0, 50.0)]
ARMS = {"GEDI": 1.0, "clustering alone": 0.0}


def points(seed: int, count: int, kind: str) -> dict[str, np.ndarray]:
    """Returns noisy points `x` [count, 2] within [-1, 1] and their class `y`."""
    rng = np.random.default_rng([seed, 16, len(kind)])
    y = np.arange(count) % 2
    angle = rng.uniform(size=count) * np.pi * (1 if kind == "moons" else 2)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if kind == "moons":
        x = np.where(y[:, None] == 0, circle, np.array([1.0, 0.5]) - circle)
        x = (x - np.array([0.5, 0.25])) / 1.75
    else:
        x = 0.8 * circle * np.where(y == 0, 1.0, 0.5)[:, None]
    x = x + 0.03 * rng.normal(size=x.shape)
    return {"x": x.astype(np.float32), "y": y.astype(np.int32)}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the mean over moons and circles of the NMI on test points."""
    steps, chain, batch, configurations = (40, 1, 64, CONFIGURATIONS[2:3]) if smoke else (600, 5, 64, CONFIGURATIONS)
    kinds = ("moons", "circles")
    drawn = [[points(seed, 1200, kind) for kind in kinds] for seed in seeds]
    data = {n: jnp.stack([jnp.stack([d[n] for d in of_seed]) for of_seed in drawn]) for n in ("x", "y")}
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(rate, invariance, key, x, y, *, generative):
        key_init, key_buffer, key_train, key_far = jax.random.split(key, 4)
        optimizer = optax.adam(rate)

        def step(carry, key):
            params, state, buffer = carry
            key_rows, key_noise, key_draw, key_chain = jax.random.split(key, 4)
            rows = x[jax.random.randint(key_rows, (batch,), 0, 400)]
            near = rows + 0.03 * jax.random.normal(key_noise, rows.shape)
            sampled = None
            if generative:
                start, index = draw_from_buffer(buffer, key_draw, count=batch)
                sampled = langevin(lambda x: energy(NET.apply(params, x)), start, key_chain, steps=chain, noise=0.03)
                sampled = jnp.clip(sampled, -1.5, 1.5)
                buffer = buffer.at[index].set(sampled)

            def loss(params):
                model = None if sampled is None else NET.apply(params, sampled)
                images = NET.apply(params, rows), NET.apply(params, near)
                return gedi_loss(*images, model, generative=generative, invariance=invariance)

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state, buffer), None

        params = NET.init(key_init, 2)
        buffer = jax.random.uniform(key_buffer, (1000, 2), minval=-1.0, maxval=1.0)
        carry = params, optimizer.init(params), buffer
        (params, _, _), _ = jax.lax.scan(step, carry, jax.random.split(key_train, steps))
        logits = NET.apply(params, x)
        cluster = jnp.argmax(logits, axis=1)
        nmi = [
            clustering_scores(cluster[part], y[part], num_clusters=2, num_classes=2)["nmi"]
            for part in (slice(400, 800), slice(800, 1200))
        ]
        share = jnp.mean(cluster[800:].astype(jnp.float32))
        far = energy(NET.apply(params, jax.random.uniform(key_far, (400, 2), minval=-1.0, maxval=1.0)))
        apart = jnp.mean((far[:, None] > energy(logits[800:])[None, :]).astype(jnp.float32))
        return *nmi, jnp.minimum(share, 1 - share), apart

    arms, learnt, secondary = {}, {}, {}
    rates, weights = jnp.array(configurations).T
    for arm, generative in ARMS.items():
        over_sets = jax.vmap(
            lambda *args, generative=generative: one(*args, generative=generative), in_axes=(None, None, None, 0, 0)
        )
        over_seeds = jax.vmap(over_sets, in_axes=(None, None, 0, 0, 0))
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None, None, None)))
        on_val, on_test, share, apart = (np.asarray(r) for r in run(rates, weights, keys, data["x"], data["y"]))
        best = int(on_val.mean(axis=(1, 2)).argmax())
        arms[arm] = on_test[best].mean(axis=1).tolist()
        learnt[arm] = smoke or bool(share[best].min() > 0.1)
        secondary[arm] = {
            "rate and invariance": configurations[best],
            "NMI of moons and circles": on_test[best].mean(axis=0).tolist(),
            "NMI at each": on_test.mean(axis=(1, 2)).tolist(),
            "smaller cluster": share[best].min(axis=0).tolist(),
            "AUROC of energy against uniform points": apart[best].mean(axis=0).tolist(),
        }
    return Outcome(
        arms=arms, learnt=learnt, secondary=secondary, data="drawn: two moons and two circles, 400 points each"
    )
