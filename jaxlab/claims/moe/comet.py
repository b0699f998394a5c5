"""Trees that settle on k experts give better mixtures than binary codes, and than choosing the k largest.

The paper trains recommenders, image and language models; here 8 linear experts, two of them for each example, fit a
function that is another linear one in each of 8 clusters of its inputs (synthetic). In testing every gate has to live
with that budget: its two largest weights, divided by their sum. Each gate chooses from eight configurations on the
validation set: COMET and DSelect-k among two learning rates, two widths of the smooth step and two weights of the
entropy; Top-k among four rates and two weights of the balance loss. The floor is one linear function, by least squares.

The history holds a first try on handwritten digits with the same rule, gates and configurations. It was invalid: there
one linear classifier is as good as any of the mixtures, so that gates cannot be told apart.
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

EXPERTS, K, BATCH, SIZE, CLUSTERS = 8, 2, 128, 16, 8
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
# Of each gate: how it is built for each of its widths, its learning rates, the weights of its regulariser.
GATES = {
    "COMET": ([lambda w=w: moe.comet_gate(EXPERTS, K, width=w) for w in (1.0, 5.0)], RATES[1:3], (1e-3, 3e-2)),
    "DSelect-k": (
        [lambda w=w: moe.dselect_k_router(EXPERTS, K, width=w) for w in (1.0, 5.0)],
        RATES[1:3],
        (1e-3, 3e-2),
    ),
    "Top-k": ([lambda: moe.top_k_router(EXPERTS, K)], RATES, (0.0, 1e-2)),
}


def problem(seed: int) -> tuple[dict[str, np.ndarray], ...]:
    """Returns train, validation and test (1200, 400 and 400 rows); targets have variance 1."""
    rng = np.random.default_rng(seed)
    centres, slopes = rng.normal(size=(CLUSTERS, SIZE)), rng.normal(size=(CLUSTERS, SIZE)) * SIZE**-0.5
    cluster = rng.integers(0, CLUSTERS, 2000)
    x = centres[cluster] + 0.5 * rng.normal(size=(2000, SIZE))
    y = np.sum(slopes[cluster] * x, axis=1) + rng.normal(size=CLUSTERS)[cluster] + 0.1 * rng.normal(size=2000)
    y = (y - y.mean()) / y.std()
    data = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    return tuple({n: v[rows] for n, v in data.items()} for rows in (slice(1200), slice(1200, 1600), slice(1600, None)))


def least_squares(data: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> float:
    """Returns the share of the test variance that the best linear function explains."""
    wide = lambda x: np.concatenate([x, np.ones((len(x), 1))], axis=1)
    fit = wide(test["x"]) @ np.linalg.lstsq(wide(data["x"]), data["y"], rcond=None)[0]
    return float(1 - np.mean((fit - test["y"]) ** 2) / test["y"].var())


def initial(seed: int) -> dict[str, np.ndarray]:
    """Returns the experts that every gate starts with, drawn on the host."""
    w = np.random.default_rng([seed, 1]).uniform(-0.4, 0.4, (SIZE, EXPERTS))
    return {"w": w.astype(np.float32), "b": np.zeros(EXPERTS, np.float32)}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the share of the variance explained on the test set with two experts for each example."""
    steps = 200 if smoke else 600
    splits = [problem(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    experts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(initial(seed) for seed in seeds))
    best, chosen, active = {}, {}, {}
    for name, (makers, rates, strengths) in GATES.items():
        results = []
        for width, make in enumerate(makers[:1] if smoke else makers):
            gate = make()
            run = jax.jit(jax.vmap(jax.vmap(one(gate, name, steps), (None, None, 0, 0, 0, 0, 0)), (0, 0, *[None] * 5)))
            grid = [(rate, strength) for rate in rates[-1:] for strength in strengths[:1]] if smoke else None
            grid = grid or [(rate, strength) for rate in rates for strength in strengths]
            out = run(*(jnp.asarray(column) for column in zip(*grid, strict=True)), keys, experts, train_set, val, test)
            on_val, on_test, number = (np.asarray(a) for a in out)
            for i, pair in enumerate(grid):
                results.append((on_val[i].mean(), (*pair, width), on_test[i], number[i].mean()))
        _, chosen[name], best[name], active[name] = max(results, key=lambda r: r[0])
    return Outcome(
        arms={name: best[name].tolist() for name in GATES},
        floor=[least_squares(split[0], split[2]) for split in splits],
        learnt={name: bool(best[name].mean() > 0.2) for name in GATES},
        secondary={"rate, regulariser, width": chosen, "active experts before the cut": active},
        data="synthetic: 8 clusters with a linear function each, 16 features",
    )


def one(gate, name, steps):
    """Returns the training of one gate as a function of its learning rate and of its regulariser's weight."""

    def gates(params, x):
        """Returns the weights [N, E] of the experts and the regulariser."""
        plan = gate.apply(params["gate"], x)
        if name == "Top-k":
            return moe.dense_weights(plan), moe.load_balancing_loss(plan)
        return plan.scores, moe.selector_entropy(plan)

    def output(params, x, weights):
        return jnp.sum(weights * (x @ params["w"] + params["b"][None]), axis=1)

    def run(rate, strength, key, experts, train_set, val, test):
        def loss(params, batch, key):
            del key
            weights, regulariser = gates(params, batch["x"])
            return jnp.mean((output(params, batch["x"], weights) - batch["y"]) ** 2) + strength * regulariser

        key_gate, key_train = jax.random.split(key)
        params = {"gate": gate.init(key_gate, SIZE), **experts}
        params, _ = train(loss, params, train_set, optimizer=optax.adam(rate), steps=steps, batch=BATCH, key=key_train)

        def measure(split):
            scores, _ = gates(params, split["x"])
            kept, ids = jax.lax.top_k(scores, K)
            weights = jnp.sum(kept[:, :, None] * jax.nn.one_hot(ids, EXPERTS), axis=1)
            weights = weights / jnp.sum(weights, axis=1, keepdims=True)
            error = jnp.mean((output(params, split["x"], weights) - split["y"]) ** 2)
            return 1 - error / jnp.var(split["y"]), jnp.mean(jnp.sum(scores > 1e-5, axis=1))

        return measure(val)[0], *measure(test)

    return run
