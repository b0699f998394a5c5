"""Group ordering gives better nearest neighbours than the softmax of NT-Xent.

The paper trains ResNet-50 on ImageNet; here a small network learns from handwritten digits without labels, from two
noisy and masked views of each. Accuracy of a vote of the 20 nearest neighbours. Both losses choose from four
configurations on the validation set: GroCo among four learning rates, NT-Xent among two rates and two temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import groco_multiview_loss, nt_xent_loss
from jaxlab.ops.layers import mlp
from jaxlab.ops.neighbours import weighted_knn

NET = mlp([128, 32])
CONFIGURATIONS = {
    "GroCo": [(rate, 0.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
    "NT-Xent": [(rate, temperature) for rate in (1e-3, 3e-3) for temperature in (0.1, 0.5)],
}


def views(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns two views [2, N, 64]: shifted by up to a pixel, a fifth of the pixels off, a little noise."""

    def one(key):
        key_shift, key_drop, key_noise = jax.random.split(key, 3)
        shift = jax.random.randint(key_shift, (len(x), 2), 0, 3)
        padded = jnp.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
        moved = jax.vmap(lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1]), (8, 8)))(padded, shift)
        kept = moved.reshape(len(x), 64) * jax.random.bernoulli(key_drop, 0.8, x.shape)
        return kept + 0.1 * jax.random.normal(key_noise, x.shape)

    return jnp.stack([one(k) for k in jax.random.split(key)])


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the 20-nearest-neighbour accuracy on the test set after training without labels."""
    steps, batch = (40, 48) if smoke else (300, 256)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def votes(embed, bank, split):
        return accuracy(weighted_knn(embed(split["x"]), embed(bank["x"]), bank["y"], num_classes=10), split["y"])

    arms, chosen, learnt = {}, {}, {}
    for name, configurations in CONFIGURATIONS.items():
        configurations = configurations[-1:] if smoke else configurations

        def loss(params, batch, key, temperature, name=name):
            z = jax.vmap(lambda view: NET.apply(params, view))(views(key, batch["x"]))
            return groco_multiview_loss(z) if name == "GroCo" else nt_xent_loss(z, temperature=temperature)

        def one(rate, key, train_set, val, test, temperature, loss=loss):
            key_init, key_train = jax.random.split(key)
            params, _ = train(
                lambda p, b, k: loss(p, b, k, temperature),
                NET.init(key_init, 64),
                {"x": train_set["x"]},
                optimizer=optax.adam(rate),
                steps=steps,
                batch=batch,
                key=key_train,
            )
            embed = lambda x: NET.apply(params, x)
            return votes(embed, train_set, val), votes(embed, train_set, test)

        results = []
        for temperature in sorted({t for _, t in configurations}):
            rates = jnp.array([r for r, t in configurations if t == temperature])
            over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0, 0, None))
            run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None, None)))
            on_val, on_test = (np.asarray(a) for a in run(rates, keys, train_set, val, test, temperature))
            results += [(v.mean(), (float(r), temperature), t) for v, r, t in zip(on_val, rates, on_test, strict=True)]
        _, chosen[name], on_test = max(results, key=lambda r: r[0])
        arms[name] = on_test.tolist()
        learnt[name] = bool(on_test.min() > 0.5)
    pixels = jax.vmap(lambda bank, split: votes(lambda x: x, bank, split))(train_set, test)
    return Outcome(
        arms=arms,
        learnt=learnt,
        secondary={"rate and temperature": chosen, "20-NN on raw pixels": np.asarray(pixels).tolist()},
        data="scikit-learn digits, without labels",
    )
