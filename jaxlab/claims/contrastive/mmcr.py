"""Without comparing pairs, MMCR gives embeddings within two points of those that NT-Xent gives.

The paper trains ResNet-50 on ImageNet with two to eight views; here a small encoder with a projector learns from
handwritten digits without labels, from four noisy and masked views of each. Accuracy of a vote of the 20 nearest
neighbours in the encoder's output. Both losses see the same views and choose from four configurations on the validation
set: MMCR among four learning rates, NT-Xent among two rates and two temperatures. What is saved are the numbers that a
loss has to form at once: images times dimensions against all pairs of views. MMCR with two of the four views, at the
same number of steps, stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import effective_rank, mmcr_loss, nt_xent_loss
from jaxlab.ops.layers import mlp
from jaxlab.ops.neighbours import weighted_knn

NUM_VIEWS, SIZE = 4, 32
ENCODER, PROJECTOR = mlp([128, 64]), mlp([64, SIZE])
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
# Pairs of learning rate and temperature.
CONFIGURATIONS = {
    "MMCR": [(rate, 1.0) for rate in RATES],
    "NT-Xent": [(rate, temperature) for rate in (1e-3, 3e-3) for temperature in (0.1, 0.5)],
    "MMCR, two views": [(rate, 1.0) for rate in RATES],
}


def views(key: jax.Array, x: jax.Array, count: int) -> jax.Array:
    """Returns `count` views [count, N, 64]: shifted by up to a pixel, a fifth of the pixels off, a little noise."""
    key_shift, key_drop, key_noise = jax.random.split(key, 3)
    shift = jax.random.randint(key_shift, (count, len(x), 2), 0, 3)
    padded = jnp.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    move = jax.vmap(lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1]), (8, 8)))
    moved = jax.vmap(move, in_axes=(None, 0))(padded, shift).reshape(count, len(x), 64)
    kept = moved * jax.random.bernoulli(key_drop, 0.8, moved.shape)
    return kept + 0.1 * jax.random.normal(key_noise, moved.shape)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the 20-nearest-neighbour accuracy on the test set after training without labels."""
    steps, batch, most = (16, 16, 200) if smoke else (150, 128, None)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n][:most] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(arm, rate, temperature, key, train_set, val, test):
        def loss(params, batch, key):
            hidden = jax.nn.relu(ENCODER.apply(params["encoder"], views(key, batch["x"], NUM_VIEWS)))
            z = PROJECTOR.apply(params["projector"], hidden)
            # One program serves all arms, of which each run takes one branch.
            losses = [mmcr_loss, lambda z: nt_xent_loss(z, temperature=temperature), lambda z: mmcr_loss(z[:2])]
            return jax.lax.switch(arm, losses[:2] if smoke else losses, z)

        key_encoder, key_projector, key_train = jax.random.split(key, 3)
        params = {"encoder": ENCODER.init(key_encoder, 64), "projector": PROJECTOR.init(key_projector, 64)}
        params, losses = train(
            loss, params, {"x": train_set["x"]}, optimizer=optax.adam(rate), steps=steps, batch=batch, key=key_train
        )
        bank, z = (
            ENCODER.apply(params["encoder"], x) for x in (train_set["x"], jnp.concatenate([val["x"], test["x"]]))
        )
        votes = weighted_knn(z, bank, train_set["y"], num_classes=10)
        half = len(val["x"])
        rank = jnp.zeros(()) if smoke else effective_rank(z[half:])
        fell = losses[-(steps // 4) :].mean() < losses[: steps // 4].mean()
        return accuracy(votes[:half], val["y"]), accuracy(votes[half:], test["y"]), rank, fell

    over_seeds = jax.vmap(one, in_axes=(None, None, None, 0, 0, 0, 0))
    run = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, 0, None, None, None, None)))
    arms, learnt, secondary = {}, {}, {}
    for arm, name in enumerate(list(CONFIGURATIONS)[: 2 if smoke else 3]):
        configurations = CONFIGURATIONS[name][2:3] if smoke else CONFIGURATIONS[name]
        rates, temperatures = np.float32(configurations).T
        results = run(arm, rates, temperatures, keys, train_set, val, test)
        on_val, on_test, rank, fell = (np.asarray(r) for r in results)
        best = int(on_val.mean(axis=1).argmax())
        # Neighbours in an untrained encoder are nearly those of the pixels, so accuracy alone does not show learning.
        arms[name], learnt[name] = on_test[best].tolist(), bool(fell[best].all() and on_test[best].min() > 0.5)
        secondary[name] = {"rate and temperature": configurations[best], "effective rank": rank[best].tolist()}
    return Outcome(
        arms=arms,
        learnt=learnt,
        saving=1 - batch * SIZE / (NUM_VIEWS * batch) ** 2,
        secondary=secondary,
        data="scikit-learn digits, without labels",
    )
