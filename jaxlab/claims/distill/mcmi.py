"""A teacher that says more within each class lets a student recognise a class it never saw.

The paper's zero-shot study on CIFAR-10, with handwritten digits: a student learns from a teacher's predictions alone
(T = 4), and all images of one digit are left out. What it gives to that digit on that digit's test images is averaged
over the ten digits (its recall, which is coarser, is secondary). The teacher is trained by maximum likelihood and then
fine-tuned for as long once more, with information of weight 0.2 or of weight 0, each at the better of two learning
rates by the validation images.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.distill import class_centroids, conditional_mutual_information, distillation_loss, mcmi_loss
from jaxlab.ops.layers import mlp

TEACHER, STUDENT, BATCH, CLASSES = mlp([128, 128, 10]), mlp([32, 10]), 64, 10
RATES = (0.01, 0.03)
ARMS = {"MCMI teacher": 0.2, "maximum likelihood teacher": 0.0}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the probability that students give to the omitted digit, on its images."""
    steps, rounds = (100, 1) if smoke else (300, 3)
    rates = RATES[:1] if smoke else RATES
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3 + rounds))(jnp.asarray(seeds, jnp.uint32))

    def fit(params, data, key, weight, rate):
        """Q-step on the whole training set, then an epoch or so of the network."""
        probs = jax.nn.softmax(TEACHER.apply(params, data["x"]))
        q = class_centroids(probs, data["y"], num_classes=CLASSES)

        def loss(params, batch, key):
            del key
            z = TEACHER.apply(params, batch["x"])
            ce = mcmi_loss(z, batch["y"], q, weight=0.0)
            return ce - weight * conditional_mutual_information(z, batch["y"], centroids=q)

        optimizer = optax.sgd(rate, momentum=0.9)
        return train(loss, params, data, optimizer=optimizer, steps=steps, batch=BATCH, key=key)[0]

    def recall(params, data, val, test, key):
        """Trains a student without each digit; returns its probability for it and its recall, validation and test."""
        data = {**data, "z": TEACHER.apply(params, data["x"])}

        def one(digit):
            def loss(params, batch, key):
                del key
                z = STUDENT.apply(params, batch["x"])
                return distillation_loss(z, batch["z"], soft_weight=1.0, where=batch["y"] != digit)

            start, optimizer = STUDENT.init(key, 64), optax.adam(3e-3)
            student, _ = train(loss, start, data, optimizer=optimizer, steps=2 * steps, batch=BATCH, key=key)
            found = []
            for split in (val, test):
                own = split["y"] == digit
                z = STUDENT.apply(student, split["x"])
                for hit in (jax.nn.softmax(z)[:, digit], (jnp.argmax(z, axis=-1) == digit).astype(jnp.float32)):
                    found.append(jnp.sum(jnp.where(own, hit, 0.0)) / jnp.sum(own))
            return jnp.stack(found)

        return jnp.mean(jax.vmap(one)(jnp.arange(CLASSES)), axis=0)

    def told(params, data):
        z = TEACHER.apply(params, data["x"])
        return conditional_mutual_information(z, data["y"]), accuracy(z, data["y"])

    fit = jax.jit(jax.vmap(fit, in_axes=(0, 0, 0, None, None)))
    recall, told = jax.jit(jax.vmap(recall)), jax.jit(jax.vmap(told))
    start = jax.jit(jax.vmap(lambda key: TEACHER.init(key, 64)))(keys[:, 0])
    for _ in range(3):
        start = fit(start, train_set, keys[:, 1], 0.0, 0.1)
    arms, secondary = (
        {},
        {"recall": {}, "learning rate": {}, "information of the teacher": {}, "accuracy of the teacher": {}},
    )
    for name, weight in ARMS.items():
        results = []
        for rate in rates:
            params = start
            for i in range(rounds):
                params = fit(params, train_set, keys[:, 3 + i], weight, rate)
            on_val, _, on_test, recalled = np.asarray(recall(params, train_set, val, test, keys[:, 2])).T
            results.append((on_val.mean(), rate, on_test, recalled, params))
        _, rate, on_test, recalled, params = max(results, key=lambda r: r[0])
        secondary["recall"][name] = recalled.tolist()
        arms[name], secondary["learning rate"][name] = on_test.tolist(), rate
        secondary["information of the teacher"][name] = np.asarray(told(params, train_set)[0]).tolist()
        secondary["accuracy of the teacher"][name] = np.asarray(told(params, test)[1]).tolist()
    right = secondary["accuracy of the teacher"]
    return Outcome(
        arms=arms,
        learnt={name: min(right[name]) > 0.7 for name in ARMS},
        secondary=secondary,
        data="scikit-learn digits, one digit left out of the student's data",
    )
