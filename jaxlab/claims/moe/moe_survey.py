"""At equal active parameters a sparse mixture fits more than a dense network.

The statement that the survey collects from language models, here in another task: a function that is another linear
one in each of 8 clusters of its inputs (synthetic). 2 of 8 experts with 8 hidden units each against one dense network
of 16; the router's weights are all that the mixture has in addition. Both choose from the same four learning rates on
the validation set; the mixture has a balance loss of weight 0.01. What the load looks like without that loss stands
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import moe
from jaxlab.claims.common import train
from jaxlab.claims.harness import Outcome

EXPERTS, K, HIDDEN, SIZE, CLUSTERS, BATCH = 8, 2, 8, 16, 8, 128
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
ROUTER = moe.top_k_router(EXPERTS, K)


def problem(seed: int) -> tuple[dict[str, np.ndarray], ...]:
    """Returns train, validation and test (1200, 400 and 400 rows); targets have variance 1."""
    rng = np.random.default_rng([seed, 11])
    centres, slopes = rng.normal(size=(CLUSTERS, SIZE)), rng.normal(size=(CLUSTERS, SIZE)) * SIZE**-0.5
    cluster = rng.integers(0, CLUSTERS, 2000)
    x = centres[cluster] + 0.5 * rng.normal(size=(2000, SIZE))
    y = np.sum(slopes[cluster] * x, axis=1) + rng.normal(size=CLUSTERS)[cluster] + 0.1 * rng.normal(size=2000)
    data = {"x": x.astype(np.float32), "y": ((y - y.mean()) / y.std()).astype(np.float32)}
    return tuple({n: v[rows] for n, v in data.items()} for rows in (slice(1200), slice(1200, 1600), slice(1600, None)))


def initial(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters of both arms, drawn on the host."""
    rng = np.random.default_rng([seed, 12])
    normal = lambda *shape: np.float32(rng.normal(size=shape) * shape[-2] ** -0.5)
    return {
        "mixture": {
            "router": normal(SIZE, EXPERTS),
            "up": normal(EXPERTS, SIZE, HIDDEN),
            "bias": np.zeros((EXPERTS, HIDDEN), np.float32),
            "down": normal(EXPERTS, HIDDEN, 1),
        },
        "dense": {
            "up": normal(SIZE, K * HIDDEN),
            "bias": np.zeros(K * HIDDEN, np.float32),
            "down": normal(K * HIDDEN, 1),
        },
    }


def mixture(p, x):
    """Returns the output [N] and the plan."""
    plan = ROUTER.apply({"w": p["router"]}, x)
    hidden = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["up"]) + p["bias"][None])
    return jnp.einsum("te,tef,ef->t", moe.dense_weights(plan), hidden, p["down"][:, :, 0]), plan


def dense(p, x):
    """Returns the output [N]."""
    return (jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"])[:, 0]


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the share of the test variance that is explained."""
    steps = 200 if smoke else 600
    splits = [problem(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(initial(seed) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def run(rate, params, key, train_set, val, test):
        def fit(loss, params):
            optimizer = optax.adam(rate)
            return train(loss, params, train_set, optimizer=optimizer, steps=steps, batch=BATCH, key=key)[0]

        def sparse(strength):
            def loss(p, batch, key):
                y, plan = mixture(p, batch["x"])
                return jnp.mean((y - batch["y"]) ** 2) + strength * moe.load_balancing_loss(plan)

            return loss

        # Both strengths in one loop over the steps.
        both = jax.vmap(lambda strength: fit(sparse(strength), params["mixture"]))(jnp.array([0.01, 0.0]))
        plain = fit(lambda p, b, key: jnp.mean((dense(p, b["x"]) - b["y"]) ** 2), params["dense"])

        def measure(part):
            explained = lambda y: 1 - jnp.mean((y - part["y"]) ** 2) / jnp.var(part["y"])
            y, plans = jax.vmap(mixture, (0, None))(both, part["x"])
            return explained(y[0]), explained(dense(plain, part["x"])), jax.vmap(moe.router_health)(plans).load_entropy

        return measure(val)[:2], measure(test)

    rates = jnp.asarray(RATES[2:3] if smoke else RATES)
    over = jax.vmap(jax.vmap(run, (None, 0, 0, 0, 0, 0)), (0, *[None] * 5))
    on_val, on_test = jax.tree.map(np.asarray, jax.jit(over)(rates, params, keys, train_set, val, test))
    best = [int(v.mean(axis=1).argmax()) for v in on_val]
    arms = {n: on_test[i][best[i]].tolist() for i, n in enumerate(("2 of 8 experts", "dense"))}
    entropy = on_test[2][best[0]]
    return Outcome(
        arms=arms,
        learnt={n: bool(np.mean(v) > 0.2) for n, v in arms.items()},
        secondary={
            "rate": {n: float(rates[best[i]]) for i, n in enumerate(arms)},
            "load entropy with and without the balance loss": entropy.mean(axis=0),
        },
        data="synthetic: 8 clusters with a linear function each, 16 features",
    )
