"""A contrastive loss that keeps only the hardest negatives gives better embeddings than the softmax over all of them.

The paper trains ResNet-18 on CIFAR and others; here a small network learns from handwritten digits without labels, from
two noisy and masked views of each. Accuracy of a vote of the 20 nearest neighbours. Both losses choose from the same
four temperatures on the validation set. What the paper finds on the way, the uniformity that falls and the tolerance
that rises with the temperature, is recorded beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.contrastive.groco import views
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import hard_contrastive_loss, tolerance, uniformity
from jaxlab.ops.layers import mlp
from jaxlab.ops.neighbours import weighted_knn

NET = mlp([128, 32])
TEMPERATURES = (0.07, 0.2, 0.5, 1.0)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the 20-nearest-neighbour accuracy on the test set after training without labels."""
    steps, batch, temperatures = (60, 64, TEMPERATURES[1:2]) if smoke else (300, 128, TEMPERATURES)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    @jax.jit
    def run(alpha_is_one, temperatures, keys, train_set, val, test):
        def one(temperature, key, train_set, val, test):
            def loss(params, batch, key):
                a, b = jax.vmap(lambda view: NET.apply(params, view))(views(key, batch["x"]))
                # Both directions, of either loss: one program serves the two arms.
                hard, plain = (
                    hard_contrastive_loss(a, b, alpha=alpha, temperature=temperature)
                    + hard_contrastive_loss(b, a, alpha=alpha, temperature=temperature)
                    for alpha in (0.1, 1.0)
                )
                return jnp.where(alpha_is_one, plain, hard) / 2

            key_init, key_train = jax.random.split(key)
            params, _ = train(
                loss,
                NET.init(key_init, 64),
                {"x": train_set["x"]},
                optimizer=optax.adam(3e-3),
                steps=steps,
                batch=batch,
                key=key_train,
            )
            bank, both = NET.apply(params, train_set["x"]), jnp.concatenate([val["x"], test["x"]])
            z = NET.apply(params, both)
            votes = weighted_knn(z, bank, train_set["y"], num_classes=10)
            half = len(val["x"])
            metrics = uniformity(z[half:]), tolerance(z[half:], test["y"])
            return accuracy(votes[:half], val["y"]), accuracy(votes[half:], test["y"]), *metrics

        over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
        return jax.vmap(over_seeds, in_axes=(0, None, None, None, None))(temperatures, keys, train_set, val, test)

    arms, learnt, secondary = {}, {}, {}
    for name, plain in {"hard": False, "InfoNCE": True}.items():
        results = run(plain, jnp.asarray(temperatures), keys, train_set, val, test)
        on_val, on_test, uniform, tolerant = (np.asarray(r) for r in results)
        best = int(on_val.mean(axis=1).argmax())
        # Neighbours in a collapsed embedding are nearly those of the pixels, so accuracy alone does not show learning.
        spread = smoke or bool(uniform[best].max() < -0.1)
        arms[name], learnt[name] = on_test[best].tolist(), spread and bool(on_test[best].min() > 0.5)
        secondary[name] = {
            "temperature": temperatures[best],
            "accuracy at each temperature": on_test.mean(axis=1).tolist(),
            "uniformity at each temperature": uniform.mean(axis=1).tolist(),
            "tolerance at each temperature": tolerant.mean(axis=1).tolist(),
        }
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, without labels")
