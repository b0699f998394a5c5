"""Clustering and linearising at once finds the digits better than clustering features learnt before.

The paper's image sets with handwritten digits, without labels: a small network learns by the total coding rate from
two noisy views; then its head is copied for the clusters, and both heads learn by MLC for as many steps again. The test
digits are clustered by the spectrum of their membership. The baseline learns by the total coding rate for all of the
steps, and its features are clustered by k-means. Normalised mutual information of clusters and digits; accuracy under
the best assignment is secondary. Each chooses one of two learning rates by the validation digits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.information import mlc_loss, mlc_membership, spectral_clustering, total_coding_rate_loss
from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.clustering import kmeans
from jaxlab.ops.layers import dense, mlp

BATCH, CLASSES, SIZE = 100, 10, 32
RATES = (1e-3, 3e-3)


def agreement(labels: jax.Array, truth: jax.Array, *, assign: bool = True) -> jax.Array:
    """Returns the normalised mutual information, and the share of rows right under the best assignment (or 0)."""
    joint = jnp.einsum("nk,nc->kc", jax.nn.one_hot(labels, CLASSES), jax.nn.one_hot(truth, CLASSES)) / len(truth)
    entropy = lambda p: -jnp.sum(jax.scipy.special.xlogy(p, p))
    one, other = entropy(jnp.sum(joint, axis=1)), entropy(jnp.sum(joint, axis=0))
    shared = 2 * (one + other - entropy(joint)) / (one + other)
    if not assign:
        return jnp.stack([shared, jnp.zeros_like(shared)])
    return jnp.stack([shared, jnp.sum(joint[jnp.arange(CLASSES), linear_assignment(joint, maximize=True)])])


def views(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns two views [2, N, 64]: a fifth of the pixels off, a little noise."""
    key_drop, key_noise = jax.random.split(key)
    kept = x[None] * (jax.random.uniform(key_drop, (2, *x.shape)) > 0.2)
    return kept + 0.1 * jax.random.normal(key_noise, kept.shape)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the normalised mutual information of clusters and digits, on test digits."""
    steps, batch, width, starts, rates = (20, 30, 16, 1, RATES[1:]) if smoke else (300, BATCH, 128, 10, RATES)
    splits = [digits(seed) for seed in seeds]
    rows = (200, 60, 60) if smoke else (None, None, None)
    train_set, val, test = ({n: np.stack([s[i][n][: rows[i]] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    body, head = mlp([width, width]), dense(SIZE)

    def features(params, x, which="features"):
        return head.apply(params[which], jax.nn.relu(body.apply(params["body"], x)))

    def spread(params, batch, key):
        seen = views(key, batch["x"])
        return total_coding_rate_loss(jax.vmap(lambda x: features(params, x))(seen))

    def joint(params, batch, key):
        del key
        return mlc_loss(features(params, batch["x"]), features(params, batch["x"], "clusters"))

    def one(rate, key, train_set, val, test):
        key_body, key_head, key_first, key_second, key_means = jax.random.split(key, 5)
        params = {"body": body.init(key_body, 64), "features": head.init(key_head, width)}
        data = {"x": train_set["x"]}
        options = {"optimizer": optax.adam(rate), "steps": steps, "batch": batch}
        params, _ = train(spread, params, data, key=key_first, **options)
        longer = params if smoke else train(spread, params, data, key=key_second, **options)[0]
        params, _ = train(joint, {**params, "clusters": params["features"]}, data, key=key_second, **options)

        def clusters(x):
            member = mlc_membership(features(params, x, "clusters"))
            ours = spectral_clustering(member, num_clusters=CLASSES, key=key_means, num_starts=starts)
            means = lambda z: kmeans(key_means, z, num_clusters=CLASSES, num_starts=starts, max_steps=50)[0]
            z = features(longer, x)
            z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
            return jnp.stack([ours, means(z)] if smoke else [ours, means(z), means(x)])

        held = {n: jnp.stack([val[n], test[n]]) for n in ("x", "y")}
        labels = jax.vmap(clusters)(held["x"])
        told = functools.partial(agreement, assign=not smoke)
        return jax.vmap(jax.vmap(told, in_axes=(0, None)))(labels, held["y"])

    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)), in_axes=(0, None, None, None, None)))
    found = np.asarray(run(jnp.asarray(rates), keys, train_set, val, test))  # rate, seed, split, method, measure
    best = found[:, :, 0, :, 0].mean(axis=1).argmax(axis=0)
    names = ("MLC", "k-means of features", "k-means of pixels")[: found.shape[3]]
    told = {name: found[best[i], :, 1, i, 0].tolist() for i, name in enumerate(names)}
    arms = {name: told[name] for name in names[:2]}
    return Outcome(
        arms=arms,
        learnt={name: min(values) > 0.2 for name, values in arms.items()},
        secondary={
            "learning rate": {name: rates[best[i]] for i, name in enumerate(names[:2])},
            "k-means of pixels": told.get("k-means of pixels"),
            "accuracy": {name: found[best[i], :, 1, i, 1].tolist() for i, name in enumerate(names)},
        },
        data="scikit-learn digits, without labels",
    )
