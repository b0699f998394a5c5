"""Clusters that are learnt together with the encoder fit the classes better than k-means in a finished one.

The paper clusters MNIST with a convolutional autoencoder for 3000 epochs; here handwritten digits (the part of 60% that
the seed draws) with a small one. Accuracy under the best one-to-one map of clusters to classes. Clustering has no
labels to tune on: both arms have the paper's settings (Adadelta, alpha, weight and step), the same network, the same
initial weights and batches. The baseline is the autoencoder alone and then k-means with ten starts; k-means on the
pixels stands beside them, and so does the inertia of `tell_fit` there, as a multiple of k-means'.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import digits
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import adjusted_rand_index, tell, tell_fit
from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.clustering import kmeans
from jaxlab.ops.layers import mlp
from jaxlab.types import Layer

CLASSES, SIZE = 10, 10
ARMS = ("TELL", "autoencoder, then k-means")


def decoder() -> Layer:
    """Returns the mirror image of the encoder, with pixels in 0 to 1."""
    net = mlp([64, 64])
    return Layer(net.init, lambda params, z: jax.nn.sigmoid(net.apply(params, z)))


def agreement(clusters: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns accuracy under the best one-to-one map of clusters to classes, and the adjusted Rand index."""
    table = jax.nn.one_hot(clusters, CLASSES).T @ jax.nn.one_hot(labels, CLASSES)
    column = linear_assignment(table, maximize=True)
    right = jnp.sum(jnp.take_along_axis(table, column[:, None], axis=1))
    rand = adjusted_rand_index(clusters, labels, num_clusters=CLASSES, num_classes=CLASSES)
    return right / len(labels), rand


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the clustering accuracy of each arm."""
    epochs, steps, batch, rows, starts = (4, 4, 64, 300, 1) if smoke else (300, 4, 256, None, 10)
    splits = [digits(seed)[0] for seed in seeds]
    data = {n: jnp.stack([split[n][:rows] for split in splits]) for n in ("x", "y")}
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(key, data, weight):
        learner = tell(
            mlp([64, SIZE]),
            decoder(),
            optax.adadelta(1.0),
            num_clusters=CLASSES,
            steps_per_epoch=steps,
            weight=weight,
        )
        key_init, key_train, key_means = jax.random.split(key, 3)
        whole = {"x": data["x"]}

        def step(state, key):
            key_rows, key_update = jax.random.split(key)
            chosen = jax.random.randint(key_rows, (batch,), 0, len(data["x"]))
            state, metrics = learner.update(state, {"x": data["x"][chosen]}, key_update)
            return state, metrics["reconstruction"]

        state = learner.init(key_init, whole)
        state, losses = jax.lax.scan(step, state, jax.random.split(key_train, epochs * steps))
        found = learner.predict(state, whole)
        means, _, _ = kmeans(key_means, found["embeddings"], num_clusters=CLASSES, num_starts=starts)
        clusters = jnp.where(weight > 0, found["clusters"], means)
        return *agreement(clusters, data["y"]), losses[-steps:].mean() < losses[:steps].mean()

    def on_pixels(key, data):
        clusters, _, best = kmeans(key, data["x"], num_clusters=CLASSES, num_starts=starts)
        _, _, descent = tell_fit(key, data["x"], num_clusters=CLASSES, num_starts=starts)
        return *agreement(clusters, data["y"]), descent / best

    run = jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
    arms, learnt, secondary = {}, {}, {}
    for name, weight in zip(ARMS, (0.01, 0.0), strict=True):
        accuracy, rand, fell = (np.asarray(r) for r in run(keys, data, np.float32(weight)))
        arms[name] = accuracy.tolist()
        learnt[name] = bool(fell.all() and (smoke or accuracy.min() > 0.3))
        secondary[f"adjusted Rand index of {name}"] = rand.tolist()
    if not smoke:
        pixels, _, ratio = (np.asarray(r) for r in jax.jit(jax.vmap(on_pixels))(keys, data))
        secondary |= {"k-means on pixels": pixels.tolist(), "inertia of tell_fit over k-means": ratio.tolist()}
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, without labels")
