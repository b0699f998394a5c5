"""Projection keeps a normalised network able to learn through many changes of the task.

The paper memorises random labels of CIFAR-10 through 200 redraws; here a network with two hidden layers of 64 units
memorises random labels of 256 handwritten digits, drawn anew every 200 steps, 25 times, with Adam. Every arm chooses
its learning rate from the same values on other digits with other labels. Layer norm without projection is the baseline;
the same network without norms is shown beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits
from jaxlab.claims.harness import Outcome
from jaxlab.norm import effective_learning_rate, normalize_and_project, normalized_mlp, record_norms
from jaxlab.ops.layers import mlp

SIZES = [64, 64, 10]
RATES = (3e-4, 1e-3, 3e-3)
FREE = ("out",)
EXAMPLES, BATCH = 256, 32


def lifetime(net, tx, rate, x, key, *, phases: int, steps: int):
    """Returns the training accuracy at the end of every phase [phases] and the trained parameters with the first."""
    key_init, key_phases = jax.random.split(key)
    start = net.init(key_init, 64)

    def phase(carry, key):
        key_labels, key_steps = jax.random.split(key)
        labels = jax.random.randint(key_labels, (len(x),), 0, 10)

        def step(carry, rows):
            params, state = carry

            def loss(params):
                logits = net.apply(params, x[rows])
                return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]))

            updates, state = tx(rate).update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, carry, jax.random.randint(key_steps, (steps, BATCH), 0, len(x)))
        return carry, accuracy(net.apply(carry[0], x), labels)

    carry = (start, tx(rate).init(start))
    (params, _), reached = jax.lax.scan(phase, carry, jax.random.split(key_phases, phases))
    return reached, start, params


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the mean training accuracy over the ends of the last five phases."""
    phases, steps, last = (2, 100, 1) if smoke else (25, 200, 5)
    splits = [digits(seed)[0]["x"] for seed in seeds]
    tune, test = (jnp.stack([x[i * EXAMPLES : (i + 1) * EXAMPLES] for x in splits]) for i in range(2))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    normed = normalized_mlp(SIZES)
    nets = {
        "NaP": (normed, lambda rate: optax.chain(optax.adam(rate), normalize_and_project(exclude=FREE))),
        "layer norm": (normed, optax.adam),
        "no norm": (mlp(SIZES), optax.adam),
    }
    arms, secondary, learnt = {}, {}, {}
    for name, (net, tx) in nets.items():
        if smoke and name == "no norm":
            continue

        def one(rate, key, tune, test, net=net, tx=tx):
            results = []
            for x, k in zip((tune, test), jax.random.split(key), strict=True):
                reached, start, params = lifetime(net, tx, rate, x, k, phases=phases, steps=steps)
                results.append(reached)
            free = FREE if "out" in start else (f"dense_{len(SIZES) - 1}",)
            norms = record_norms(start, exclude=free)
            rates = jax.tree.leaves(effective_learning_rate(1.0, params, norms, power=1))
            return *results, jnp.mean(jnp.stack(rates))

        over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0))
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None)))
        on_tune, on_test, kept = (np.asarray(a) for a in run(jnp.asarray(RATES), keys, tune, test))
        best = int(on_tune[:, :, -last:].mean(axis=(1, 2)).argmax())
        reached = on_test[best]
        if name != "no norm":
            arms[name] = reached[:, -last:].mean(axis=1).tolist()
            learnt[name] = bool(reached.max(axis=1).min() > 0.2)
        secondary[name] = {
            "learning rate": RATES[best],
            "accuracy at the end of each phase": reached.mean(axis=0).round(4).tolist(),
            "share of the effective learning rate left": kept[best].mean().round(4),
        }
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits with random labels")
