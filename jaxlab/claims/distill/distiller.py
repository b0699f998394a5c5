"""MI-alpha passes on a teacher's hidden states better than other losses do.

The paper distils BERT on tasks of language; here a small network with 200 labelled digits learns from a wide one that
saw all training digits. Every arm has the labels, the softened predictions and one loss between the last hidden layers,
or none, and chooses its learning rate and the weight of that loss among four pairs on the validation set (without such
a loss, among four rates). Probability of the right class, which is finer than accuracy (secondary).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.distill import bilinear_critic, distillation_loss, feature_loss, mi_alpha_loss
from jaxlab.ops.layers import dense, mlp

LABELLED, BATCH, TEACHER, STUDENT, CRITIC = 200, 50, (128, 128, 128, 128), (32, 32), 32
# Which loss between the hidden layers: one program computes all and this picks, so that it is compiled once.
LOSSES = ("mean squared error", "cosine", "InfoNCE", "MI-alpha")
PAIRS = [(rate, weight) for rate in (1e-3, 3e-3) for weight in (0.1, 1.0)]
ALONE = [(rate, 0.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)]


def network(sizes):
    """Returns functions that draw parameters, and that give the last hidden layer and logits."""
    body, head = mlp(sizes), dense(10)

    def init(key):
        key_body, key_head = jax.random.split(key)
        return {"body": body.init(key_body, 64), "head": head.init(key_head, sizes[-1])}

    def apply(params, x):
        hidden = jax.nn.relu(body.apply(params["body"], x))
        return hidden, head.apply(params["head"], hidden)

    return init, apply


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the probability that the student gives to the right class of a test image."""
    steps = 60 if smoke else 400
    wide = TEACHER[:2] if smoke else TEACHER
    (init_teacher, teacher), (init_student, student) = network(wide), network(STUDENT)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: np.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 4))(jnp.asarray(seeds, jnp.uint32))

    def cross_entropy(params, batch, key):
        del key
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(teacher(params, batch["x"])[1], batch["y"]))

    def fit_teacher(keys, data):
        options = {"optimizer": optax.adam(1e-3), "steps": steps, "batch": BATCH, "key": keys[1]}
        params = train(cross_entropy, init_teacher(keys[0]), data, **options)[0]
        few = {n: v[:LABELLED] for n, v in data.items()}
        hidden, logits = teacher(params, few["x"])
        return {**few, "hidden": hidden, "logits": logits}, judge(teacher(params, data["x"])[1], data["y"])

    def judge(logits, labels):
        sure = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=1)
        return jnp.mean(sure), accuracy(logits, labels)

    def fit_student(chosen, rate, weight, keys, data, val, test):
        def loss(params, batch, key):
            del key
            hidden, logits = student(params["student"], batch["x"])
            target, critic = batch["hidden"], params["critic"]
            losses = jnp.stack(
                [
                    feature_loss(hidden, target, projection=params["projection"]),
                    feature_loss(hidden, target, projection=params["projection"], kind="cosine"),
                    mi_alpha_loss(hidden, target, critic, alpha=1.0),
                    mi_alpha_loss(hidden, target, critic, alpha=0.5),
                ]
            )
            usual = distillation_loss(logits, batch["logits"], batch["y"], soft_weight=0.5)
            return usual + weight * jnp.dot(chosen, losses)

        key_student, key_critic = jax.random.split(keys[2])
        critic = bilinear_critic(CRITIC).init(key_critic, STUDENT[-1], wide[-1])
        projection = jnp.eye(STUDENT[-1], wide[-1])
        start = {"student": init_student(key_student), "critic": critic, "projection": projection}
        options = {"optimizer": optax.adam(rate), "steps": steps, "batch": BATCH, "key": keys[3]}
        params = train(loss, start, data, **options)[0]["student"]
        return [judge(student(params, split["x"])[1], split["y"]) for split in (val, test)]

    seen, (_, taught) = jax.jit(jax.vmap(fit_teacher))(keys, train_set)
    over_seeds = jax.vmap(fit_student, in_axes=(None, None, None, 0, 0, 0, 0))
    over_pairs = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, 0, None, None, None, None)))
    arms, secondary = {}, {"accuracy": {}, "learning rate and weight": {}, "teacher's accuracy in training": taught}
    names = ("MI-alpha", "mean squared error") if smoke else ("MI-alpha", *LOSSES[:3], "none")
    for name in names:
        pairs = ALONE if name == "none" else PAIRS
        pairs = pairs[3:] if smoke else pairs
        rates, weights = jnp.array(pairs).T
        chosen = jnp.array([float(name == other) for other in LOSSES])
        found = over_pairs(chosen, rates, weights, keys, seen, val, test)
        (on_val, _), (sure, right) = jax.tree.map(np.asarray, found)
        best = int(np.argmax(on_val.mean(axis=1)))
        arms[name], secondary["accuracy"][name] = sure[best].tolist(), right[best].tolist()
        secondary["learning rate and weight"][name] = list(pairs[best])
    return Outcome(
        arms=arms,
        learnt={name: float(np.mean(values)) > 0.15 for name, values in arms.items()},
        secondary=secondary,
        data="scikit-learn digits",
    )
