"""Pairs by transitivity teach more than the two kinds of edges that they come from, used side by side.

The paper mines tracks from a hundred thousand videos and trains VGG16; here an object is a handwritten digit without
label, its track four views (the image itself and three rotations by up to 40 degrees with shifts and contrast), and
inter edges join each image with its five nearest neighbours by the pixels of the untouched images. A small network
learns from pairs of one arm each, with the triplet loss against the four hardest unrelated views of the batch; every
arm chooses among the same four learning rates on the validation set. Accuracy on rotated test images of a vote of the
five nearest of a hundred rotated images with labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import batch_hard_triplet_loss, neighbour_edges, transitive_pairs
from jaxlab.ops.layers import mlp
from jaxlab.ops.neighbours import weighted_knn

NET = mlp([128, 32])
ARMS = {"transitive": "transitive", "multi-task": "both", "inter only": "inter", "intra only": "intra"}
RATES, NUM_VIEWS = (3e-4, 1e-3, 3e-3, 1e-2), 4


def turned(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Returns each image [N, 64] rotated by up to 40 degrees, shifted by up to a pixel, with another contrast."""
    count = len(x)
    angle, shift = np.deg2rad(rng.uniform(-40, 40, count)), rng.uniform(-1, 1, (count, 2))
    row, column = (grid - 3.5 for grid in np.mgrid[:8, :8])
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    r = cos * row - sin * column + 3.5 + shift[:, 0, None, None]
    c = sin * row + cos * column + 3.5 + shift[:, 1, None, None]
    padded = np.pad(x.reshape(count, 8, 8), ((0, 0), (4, 4), (4, 4)))
    r, c = np.clip(r + 4, 0, 14.999), np.clip(c + 4, 0, 14.999)
    top, left = r.astype(int), c.astype(int)
    down, right = r - top, c - left
    image = np.arange(count)[:, None, None]
    mixed = (1 - down) * ((1 - right) * padded[image, top, left] + right * padded[image, top, left + 1])
    mixed += down * ((1 - right) * padded[image, top + 1, left] + right * padded[image, top + 1, left + 1])
    return (mixed.reshape(count, 64) * rng.uniform(0.6, 1.2, (count, 1))).astype(np.float32)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the accuracy on rotated test images of neighbours among a few rotated images with labels."""
    steps, batch, objects = (30, 24, 60) if smoke else (400, 64, 300)
    data = {name: [] for name in ("views", "bank", "bank_y", "val", "val_y", "test", "test_y")}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        train_set, val, test = digits(seed)
        rows = rng.permutation(len(train_set["x"]))
        x, y = train_set["x"][rows], train_set["y"][rows]
        first = x[:objects]
        data["views"].append(np.stack([first, *(turned(rng, first) for _ in range(NUM_VIEWS - 1))], axis=1))
        few = np.concatenate([objects + np.flatnonzero(y[objects:] == c)[:10] for c in range(10)])
        few = {"x": x[few], "y": y[few]}
        for name, part, copies in (("bank", few, 1), ("val", val, 3), ("test", test, 3)):
            data[name].append(np.concatenate([turned(rng, part["x"]) for _ in range(copies)]))
            data[f"{name}_y"].append(np.tile(part["y"], copies))
    data = {name: jnp.asarray(np.stack(values)) for name, values in data.items()}
    owner, anchors = jnp.repeat(jnp.arange(objects), NUM_VIEWS), jnp.tile(jnp.arange(NUM_VIEWS) == 0, objects)

    @jax.jit
    @jax.vmap
    def graphs_of(x):
        inter = neighbour_edges(x, k=5)
        pairs = [transitive_pairs(inter, owner, anchors=anchors, kind=kind) for kind in ARMS.values()]
        # An arm knows its own edges only: relatives, who are no negatives, are those of one object or of an edge.
        return jnp.stack(pairs), jnp.stack(
            [jnp.zeros_like(inter) if kind == "intra" else inter for kind in ARMS.values()]
        )

    graphs, related = graphs_of(data["views"][:, :, 0])
    lists = [[np.argwhere(graph) for graph in arms] for arms in np.asarray(graphs)]
    most = max(len(pairs) for arms in lists for pairs in arms)
    # Lists of one length, repeated from the start: a draw from it is a draw from the pairs.
    pairs = jnp.asarray(np.stack([[np.resize(pairs, (most, 2)) for pairs in arms] for arms in lists]), jnp.int32)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(rate, pairs, related, key, data):
        images = data["views"].reshape(-1, 64)

        def loss(params, batch, key):
            del key
            rows = batch["pair"].T.ravel()  # all first views, then all second ones
            size = len(rows)
            object_of = rows // NUM_VIEWS
            relative = related[object_of][:, object_of] | (object_of[:, None] == object_of[None, :])
            positive = (jnp.arange(size)[:, None] - jnp.arange(size)[None, :]) % size == size // 2
            return batch_hard_triplet_loss(NET.apply(params, images[rows]), positive, ~relative & ~positive)

        key_init, key_train = jax.random.split(key)
        params, losses = train(
            loss,
            NET.init(key_init, 64),
            {"pair": pairs},
            optimizer=optax.adam(rate),
            steps=steps,
            batch=batch,
            key=key_train,
        )
        z = NET.apply(params, jnp.concatenate([data["val"], data["test"]]))
        votes = weighted_knn(z, NET.apply(params, data["bank"]), data["bank_y"], num_classes=10, k=5)
        half = len(data["val"])
        fell = losses[-(steps // 4) :].mean() < losses[: steps // 4].mean()
        return accuracy(votes[:half], data["val_y"]), accuracy(votes[half:], data["test_y"]), fell

    @jax.jit
    def run(rates, pairs, related, keys, data):
        over_arms = jax.vmap(one, in_axes=(None, 0, 0, None, None))
        over_seeds = jax.vmap(over_arms, in_axes=(None, 0, 0, 0, 0))
        return jax.vmap(over_seeds, in_axes=(0, None, None, None, None))(rates, pairs, related, keys, data)

    rates = RATES[1:2] if smoke else RATES
    on_val, on_test, fell = (np.asarray(r) for r in run(jnp.asarray(rates), pairs, related, keys, data))
    arms, learnt, secondary = {}, {}, {}
    for i, name in enumerate(ARMS):
        best = int(on_val[:, :, i].mean(axis=1).argmax())
        arms[name] = on_test[best, :, i].tolist()
        learnt[name] = bool(fell[best, :, i].all() and on_test[best, :, i].min() > 0.2)
        secondary[name] = {"rate": rates[best], "accuracy at each rate": on_test[:, :, i].mean(axis=1).tolist()}
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, rotated, without labels")
