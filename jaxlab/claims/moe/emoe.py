"""Neurons that are clustered by their keys keep more of a dense network than random groups of the same size.

The paper tunes pretrained transformers; this is what it builds on, in small: a residual network of two dense layers of
128 neurons learns handwritten digits, and then, without any tuning, every example uses in each layer the 8 of 16
experts whose mean key it fits best. Experts are clusters of the keys or, the baseline, random groups (mean over five
draws); gates, k and weights are alike. Accuracy on the test set. Half of the neurons, drawn once for all examples, and
the whole network stand beside it.
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

LAYERS, SIZE, NEURONS, EXPERTS, K, BATCH, DRAWS = 2, 32, 128, 16, 8, 64, 5


def initial(seed: int) -> dict:
    """Returns the dense network, drawn on the host."""
    rng = np.random.default_rng(seed)
    shapes = {"in": (64, SIZE), "up": (LAYERS, SIZE, NEURONS), "down": (LAYERS, NEURONS, SIZE), "out": (SIZE, 10)}
    return {n: np.float32(rng.normal(size=s) * s[-2] ** -0.5) for n, s in shapes.items()}


def forward(params, x, feed_forward):
    """Returns logits, with `feed_forward(layer parameters, h)` in every layer."""
    x = x @ params["in"]
    for i in range(LAYERS):
        h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-6)
        x = x + feed_forward({"up": params["up"][i], "down": params["down"][i]}, h, i)
    return x @ params["out"]


def dense(p, h, layer):
    """Returns the dense feed-forward network."""
    del layer
    return jax.nn.relu(h @ p["up"]) @ p["down"]


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy with half of the neurons for each example."""
    steps = 150 if smoke else 600
    splits = [digits(seed) for seed in seeds]
    train_set, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in (0, 2))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(initial(seed) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def fit(params, key, train_set):
        def loss(params, batch, key):
            del key
            z = forward(params, batch["x"], dense)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))

        optimizer = optax.adamw(3e-3, weight_decay=0.01)
        return train(loss, params, train_set, optimizer=optimizer, steps=steps, batch=BATCH, key=key)[0]

    params = jax.jit(jax.vmap(fit))(params, keys, train_set)
    up = np.asarray(params["up"])
    clusters = np.stack([[moe.balanced_kmeans(up[s, i].T, EXPERTS) for i in range(LAYERS)] for s in range(len(seeds))])
    rng = [np.random.default_rng([seed, 3]) for seed in seeds]
    equal = np.repeat(np.arange(EXPERTS), NEURONS // EXPERTS)
    draws = np.stack([[[r.permutation(equal) for _ in range(LAYERS)] for r in rng] for _ in range(DRAWS)])
    halves = np.stack([[r.permutation(NEURONS) < NEURONS // 2 for _ in range(LAYERS)] for r in rng])
    layers = jax.tree.map(np.asarray, {n: params[n] for n in ("up", "down")})

    def experts(labels):
        """Returns the experts of every seed and layer for labels [seeds, LAYERS, NEURONS]."""
        parts = [
            [moe.dense_to_emoe({n: w[s, i] for n, w in layers.items()}, own, k=K) for i, own in enumerate(both)]
            for s, both in enumerate(labels)
        ]
        stacked = [jax.tree.map(lambda *leaves: np.stack(leaves), *both) for both in parts]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *stacked)

    groups = [experts(labels) for labels in (clusters, *draws)]
    groups = jax.tree.map(lambda *leaves: np.stack(leaves), *groups)
    ffn = moe.emoe_ffn(K, activation=jax.nn.relu, noise=0.0)

    def measure(params, groups, half, test):
        kinds = (
            lambda p, h, i: ffn.apply(jax.tree.map(lambda leaf: leaf[i], groups), h)[0],
            dense,
            lambda p, h, i: (half[i][None] * jax.nn.relu(h @ p["up"])) @ p["down"],
        )
        return tuple(accuracy(forward(params, test["x"], kind), test["y"]) for kind in kinds)

    over = jax.jit(jax.vmap(jax.vmap(measure, (0, 0, 0, 0)), (None, 0, None, None)))
    kept, whole, fixed = (np.asarray(a) for a in over(params, groups, halves, test))
    return Outcome(
        arms={"clusters of keys": kept[0].tolist(), "random groups": kept[1:].mean(axis=0).tolist()},
        learnt={"clusters of keys": bool(whole[0].min() > 0.7)},
        secondary={"whole network": whole[0], "half of the neurons for all": fixed[0]},
        data="scikit-learn digits",
    )
