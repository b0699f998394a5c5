"""Grouped routing balances the devices by construction, and costs no accuracy.

The paper trains language models on accelerators; here 16 experts, 4 for each example, classify handwritten digits. MoGE
with 4 groups and plain top-4 routing have the same balance loss and choose from the same learning rates and weights of
it. What it saves is time on the busiest of 4 devices: 1 - (mean load / largest load) of top-4, over test batches of 60.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import moe
from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome

EXPERTS, K, DEVICES, SIZE, HIDDEN, BATCH, TEST_BATCH = 16, 4, 4, 32, 16, 64, 60
CONFIGURATIONS = [(rate, balance) for rate in (3e-3, 1e-2) for balance in (1e-3, 1e-2)]
ROUTERS = {
    "MoGE": moe.moge_router(EXPERTS, K, groups=DEVICES),
    "top-k": moe.top_k_router(EXPERTS, K, renormalize=False),
}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy, and what the busiest device saves."""
    steps = 120 if smoke else 400
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    draws = [initial(seed) for seed in seeds]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    grid = CONFIGURATIONS[-1:] if smoke else CONFIGURATIONS
    rates, balances = (jnp.asarray(column) for column in zip(*grid, strict=True))
    arms, chosen, scores, longest = {}, {}, {}, {}
    for name, router in ROUTERS.items():
        over_seeds = jax.vmap(one(router, steps), in_axes=(None, None, 0, 0, 0, 0, 0))
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, *[None] * 5)))
        on_val, on_test, score, most = (np.asarray(a) for a in run(rates, balances, params, keys, train_set, val, test))
        best = int(on_val.mean(axis=1).argmax())
        arms[name], chosen[name] = on_test[best].tolist(), grid[best]
        scores[name], longest[name] = float(score[best].mean()), float(most[best].mean())
    return Outcome(
        arms=arms,
        learnt={name: min(values) > 0.7 for name, values in arms.items()},
        saving=1 - longest["MoGE"] / longest["top-k"],
        secondary={"rate and balance": chosen, "imbalance score": scores, "largest over mean load": longest},
        data="scikit-learn digits, 4 simulated devices",
    )


def initial(seed: int) -> dict:
    """Returns parameters that both arms start from, drawn on the host."""
    rng = np.random.default_rng(seed)
    shapes = {
        "in": (64, SIZE),
        "router": (SIZE, EXPERTS),
        "up": (EXPERTS, SIZE, HIDDEN),
        "down": (EXPERTS, HIDDEN, SIZE),
        "out": (SIZE, 10),
    }
    return {n: np.float32(rng.normal(size=s) * s[-2] ** -0.5) for n, s in shapes.items()}


def one(router, steps):
    """Returns the training with one router as a function of learning rate and weight of the balance loss."""

    def forward(params, x):
        x = x @ params["in"]
        gate = {"w": params["router"], "scale": params["scale"]}
        plan = router.apply({n: gate[n] for n in jax.eval_shape(lambda k: router.init(k, SIZE), jax.random.key(0))}, x)
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, params["up"]))
        y = jnp.einsum("te,tef,efd->td", moe.dense_weights(plan), hidden, params["down"])
        return (x + y) @ params["out"], plan

    def run(rate, balance, params, key, train_set, val, test):
        def loss(params, batch, key):
            del key
            z, plan = forward(params, batch["x"])
            cross = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))
            return cross + balance * moe.load_balancing_loss(plan)

        params = {**params, "scale": jnp.ones(EXPERTS)}
        params, _ = train(loss, params, train_set, optimizer=optax.adam(rate), steps=steps, batch=BATCH, key=key)

        def load(x):
            plan = forward(params, x)[1]
            counts = plan.counts.reshape(DEVICES, -1).sum(1)
            return moe.imbalance_score(plan, num_devices=DEVICES), jnp.max(counts) / jnp.mean(counts)

        score, most = jax.vmap(load)(test["x"].reshape(-1, TEST_BATCH, 64))
        on_val, on_test = (accuracy(forward(params, s["x"])[0], s["y"]) for s in (val, test))
        return on_val, on_test, jnp.mean(score), jnp.mean(most)

    return run
