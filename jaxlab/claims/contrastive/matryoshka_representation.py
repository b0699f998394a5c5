"""One network whose prefixes are all trained is as good at every size as a network trained for that size alone.

The paper trains ResNet-50 on ImageNet; here a small network classifies handwritten digits from embeddings of 2 to 64
features. The baseline is six networks, each of one size; both choose their learning rate from the same values on the
validation set, the baseline for each size by itself. Saved are five of the six networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import matryoshka_head
from jaxlab.ops.layers import mlp
from jaxlab.ops.neighbours import weighted_knn

DIMS = (2, 4, 8, 16, 32, 64)
RATES = (1e-3, 3e-3)
NET, HEAD = mlp([128, DIMS[-1]]), matryoshka_head(10, dims=DIMS)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy, averaged over the sizes of the embedding."""
    steps, rates = (60, RATES[1:]) if smoke else (300, RATES)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(weights, rate, key, train_set, val, test):
        """Trains with these weights of the sizes: all of them, or a single one, which is a network of that size."""

        def loss(params, batch, key):
            del key
            logits = HEAD.apply(params["head"], NET.apply(params["net"], batch["x"]))
            labels = jnp.broadcast_to(batch["y"], logits.shape[:2])
            terms = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.sum(weights * jnp.mean(terms, axis=1))

        key_net, key_head, key_train = jax.random.split(key, 3)
        params = {"net": NET.init(key_net, 64), "head": HEAD.init(key_head, DIMS[-1])}
        params, _ = train(loss, params, train_set, optimizer=optax.adam(rate), steps=steps, batch=64, key=key_train)
        z = NET.apply(params["net"], jnp.concatenate([val["x"], test["x"]]))
        half, logits = len(val["x"]), HEAD.apply(params["head"], z)
        on_val = jax.vmap(lambda z: accuracy(z, val["y"]))(logits[:, :half])
        on_test = jax.vmap(lambda z: accuracy(z, test["y"]))(logits[:, half:])
        bank = NET.apply(params["net"], train_set["x"])
        nearest = lambda m: weighted_knn(z[half:, :m], bank[:, :m], train_set["y"], num_classes=10, k=1)
        return on_val, on_test, jnp.stack([accuracy(nearest(m), test["y"]) for m in DIMS])

    weights = jnp.concatenate([jnp.ones((1, len(DIMS))), jnp.eye(len(DIMS))])
    run = jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))
    run = jax.jit(jax.vmap(jax.vmap(run, in_axes=(None, 0, *[None] * 4)), in_axes=(0, *[None] * 5)))
    # Each [weights, rates, seeds, sizes].
    on_val, on_test, nearest = (np.asarray(a) for a in run(weights, jnp.asarray(rates), keys, train_set, val, test))
    best = int(on_val[0].mean(axis=(1, 2)).argmax())
    alone, rates_alone = [], []
    for i in range(len(DIMS)):
        rate = int(on_val[1 + i, :, :, i].mean(axis=1).argmax())
        alone.append(on_test[1 + i, rate, :, i])
        rates_alone.append(rates[rate])
    together, alone = on_test[0, best], np.stack(alone, axis=1)
    arms = {"MRL": together.mean(axis=1).tolist(), "a network for each size": alone.mean(axis=1).tolist()}
    secondary = {
        "sizes": DIMS,
        "learning rates": {"MRL": rates[best], "a network for each size": rates_alone},
        "accuracy at each size": {"MRL": together.mean(axis=0), "a network for each size": alone.mean(axis=0)},
        "nearest neighbour at each size": {
            "MRL": nearest[0, best].mean(axis=0),
            "the largest network, cut": nearest[-1, rates.index(rates_alone[-1])].mean(axis=0),
        },
    }
    learnt = {name: bool(np.min(values) > 0.2) for name, values in arms.items()}
    saving = 1 - 1 / len(DIMS)
    return Outcome(arms=arms, learnt=learnt, saving=saving, secondary=secondary, data="scikit-learn digits")
