"""Two stored distances teach a student more about mixed synthetic images than hard labels do.

The paper distils ImageNet to 10 images a class; here handwritten digits, with a small convolutional teacher that ends
in a mean over positions. Of every digit the ten training images of which the teacher is least sure are refined where
they do not matter, and a fresh student is trained on CutMix of these hundred: with the mixed hard labels alone, with
the two distances in addition, or with the teacher's whole predictions. Every arm chooses among the same two learning
rates on the validation set. Images of 8 x 8 are too small for crops, so each is one patch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.distill import (
    class_activation_map,
    cutmix,
    distance_loss,
    distillation_loss,
    label_distances,
    refine_non_critical,
    select_patches,
    statistics_loss,
)

CHANNELS, CLASSES, PER_CLASS, BATCH = (16, 32), 10, 10, 50
RATES = (3e-3, 1e-2)
# Weight of the statistics, small because the teacher has no normalisation, and size of the steps on pixels.
BALANCE, ETA = 1e-4, 0.02
# Weights of the hard labels, of the distances and of the whole predictions.
ARMS = {"distances": (1.0, 1.0, 0.0), "hard labels": (1.0, 0.0, 0.0), "whole predictions": (0.0, 0.0, 1.0)}


def convolve(w, x):
    """Returns a 3 x 3 convolution as one product, which is fast under vmap."""
    h, v = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + h, j : j + v] for i in range(3) for j in range(3)], axis=-1) @ w


def initial(key):
    """Returns the parameters: two convolutions, the classifier, and the statistics of the layers."""
    shapes = [(9, CHANNELS[0]), (9 * CHANNELS[0], CHANNELS[1]), (CHANNELS[1], CLASSES)]
    sizes = np.cumsum([np.prod(shape) for shape in shapes])
    draws = jnp.split(jax.random.normal(key, (sizes[-1],)), sizes[:-1])
    made = [d.reshape(shape) * (2 / shape[0]) ** 0.5 for d, shape in zip(draws, shapes, strict=True)]
    return dict(zip(("first", "second", "classifier"), made, strict=True))


def features(params, x):
    """Returns the last convolution's output and both layers' sums before the nonlinearity."""
    first = convolve(params["first"], x)
    second = convolve(params["second"], jax.nn.relu(first))
    return jax.nn.relu(second), (first, second)


def predict(params, x):
    """Returns the logits of images [N, 8, 8, 1]."""
    return jnp.mean(features(params, x)[0], axis=(1, 2)) @ params["classifier"]


def moments(layers):
    """Returns mean and variance of each layer's channels."""
    return [(jnp.mean(a, axis=(0, 1, 2)), jnp.var(a, axis=(0, 1, 2))) for a in layers]


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy of the students."""
    steps, moves = (100, 20) if smoke else (600, 100)
    rates = RATES[1:] if smoke else RATES
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = (
        {"x": jnp.stack([s[i]["x"].reshape(-1, 8, 8, 1) for s in splits]), "y": jnp.stack([s[i]["y"] for s in splits])}
        for i in range(3)
    )
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 4))(jnp.asarray(seeds, jnp.uint32))

    def teach(key, data):
        def loss(params, batch, key):
            del key
            z = predict(params, batch["x"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))

        start, optimizer = initial(key), optax.adam(1e-2)
        return train(loss, start, data, optimizer=optimizer, steps=300 if smoke else 800, batch=BATCH, key=key)[0]

    def condense(params, data):
        """Returns the refined images of all classes, in order, and the unrefined ones."""
        seen, layers = features(params, data["x"])
        sure = jax.nn.softmax(predict(params, data["x"]))
        where_seen = class_activation_map(seen, params["classifier"], data["y"], size=(8, 8))

        def of_class(c):
            activation, confidence = jnp.mean(where_seen, axis=(1, 2))[:, None], sure[:, c][:, None]
            return select_patches(activation, confidence, top=1, count=PER_CLASS, where=data["y"] == c)

        rows = jax.vmap(of_class)(jnp.arange(CLASSES)).reshape(-1)
        x, labels, running = data["x"][rows], data["y"][rows], moments(layers)

        def loss(x):
            ce = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(predict(params, x), labels))
            return ce + BALANCE * len(rows) * statistics_loss(moments(features(params, x)[1]), running)

        return refine_non_critical(x, where_seen[rows], loss, steps=moves, learning_rate=ETA), x, labels

    def student(x, labels, teacher, key, rate, weights):
        hard_weight, distance_weight, soft_weight = weights

        def loss(params, batch, key):
            key_mix, key_order = jax.random.split(key)
            order = jnp.argsort(jax.random.uniform(key_order, (BATCH,)))
            other = batch["y"][order]
            mixed, share = cutmix(key_mix, batch["x"], batch["x"][order])
            told, z = predict(teacher, mixed), predict(params, mixed)
            each = optax.softmax_cross_entropy_with_integer_labels
            hard = jnp.mean(share * each(z, batch["y"]) + (1 - share) * each(z, other))
            stored = label_distances(told, batch["y"], other)
            value = hard_weight * hard + distance_weight * distance_loss(z, batch["y"], other, stored)
            return value + soft_weight * distillation_loss(z, told, temperature=1.0, soft_weight=1.0)

        data, optimizer = {"x": x, "y": labels}, optax.adam(rate)
        return train(loss, initial(key), data, optimizer=optimizer, steps=steps, batch=BATCH, key=key)[0]

    teacher = jax.jit(jax.vmap(teach))(keys[:, 0], train_set)
    refined, real, labels = jax.jit(jax.vmap(condense))(teacher, train_set)
    fit = jax.jit(jax.vmap(student, in_axes=(0, 0, 0, 0, None, None)))
    right = jax.jit(jax.vmap(lambda params, split: accuracy(predict(params, split["x"]), split["y"])))
    arms, chosen = {}, {}
    for name, weights in ARMS.items():
        found = [fit(refined, labels, teacher, keys[:, 2], rate, jnp.asarray(weights)) for rate in rates]
        best = int(np.argmax([right(params, val).mean() for params in found]))
        arms[name], chosen[name] = np.asarray(right(found[best], test)).tolist(), rates[best]
    plain = fit(real, labels, teacher, keys[:, 2], chosen["distances"], jnp.asarray(ARMS["distances"]))
    return Outcome(
        arms=arms,
        learnt={name: min(values) > 0.2 for name, values in arms.items()},
        secondary={
            "learning rate": chosen,
            "teacher": np.asarray(right(teacher, test)).tolist(),
            "distances without refinement": np.asarray(right(plain, test)).tolist(),
        },
        data="scikit-learn digits, ten images a class",
    )
