"""State-space models in two orders find instances that only count together better than attention pooling alone.

The paper's slides are out of reach: here bags of 32 handwritten digits (16 principal components of the training images,
scaled to variance 1) are positive if both a three and a seven are among them; half of the negative bags hold one of the
two. Area under the ROC curve of test bags. All arms make 300 steps on batches of 8 bags, project to 16 features, have
one layer (with 8 states), and choose among three learning rates on the validation bags.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import mil
from jaxlab.claims.common import digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.claims.mil.bags import bag_loss, score

FEATURES, WIDTH = 16, 16
RATES = (1e-3, 3e-3, 1e-2)
ENCODER = mil.instance_encoder(WIDTH, dropout=0.25)


def mamba(kind: str):
    """Returns the paper's model at small width."""
    return mil.mamba_mil(2, features=WIDTH, layers=1, hidden=WIDTH, states=8, kind=kind)


NETS = {
    "SR-Mamba": mamba("sr"),
    "ABMIL": mil.with_encoder(ENCODER, mil.abmil(2, hidden=WIDTH)),
    "Mamba": mamba("mamba"),
    "mean pooling": mil.with_encoder(ENCODER, mil.mean_mil(2)),
}


def bags_of_two(seed: int, sizes: Sequence[int], length: int) -> list[dict[str, np.ndarray]]:
    """Returns train, validation and test bags `x` [B, length, 16] and `y` [B], from disjoint images."""
    rng = np.random.default_rng([seed, 185])
    splits = digits(seed)
    centre = splits[0]["x"].mean(0)
    _, values, axes = np.linalg.svd(splits[0]["x"] - centre, full_matrices=False)
    project = axes[:FEATURES].T / values[:FEATURES] * len(splits[0]["x"]) ** 0.5
    made = []
    for images, number in zip(splits, sizes, strict=True):
        x, labels = (images["x"] - centre) @ project, images["y"]
        others = np.flatnonzero((labels != 3) & (labels != 7))
        rows = others[rng.integers(0, len(others), (number, length))]
        kind = np.arange(number) % 4  # 0: neither, 1 and 3: both, 2: one of them
        places = np.argsort(rng.random((number, length)), axis=1)
        first = rng.permutation([3, 7])[rng.integers(0, 2, number)]
        for bag in range(number):
            for place, digit in zip(
                places[bag], (first[bag], 10 - first[bag])[: (0, 2, 1, 2)[kind[bag]]], strict=False
            ):
                rows[bag, place] = rng.choice(np.flatnonzero(labels == digit))
        made.append({"x": x[rows].astype(np.float32), "y": (kind % 2).astype(np.int32)})
    return made


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the AUC of test bags of each arm; the smoke form has the first two."""
    steps, sizes, length = (20, (32, 32, 32), 8) if smoke else (300, (200, 200, 400), 32)
    rates = RATES[2:] if smoke else RATES
    drawn = [bags_of_two(seed, sizes, length) for seed in seeds]
    train_set, val, test = ({n: jnp.asarray(np.stack([d[i][n] for d in drawn])) for n in ("x", "y")} for i in range(3))
    arms, chosen, learnt, gap = {}, {}, {}, {}
    for name, net in list(NETS.items())[: 2 if smoke else None]:

        def one(rate, seed, bags, net=net):
            key_init, key_train = jax.random.split(jax.random.key(seed))
            setting = {"optimizer": optax.adam(rate), "steps": steps, "batch": 8, "key": key_train}
            params, losses = train(bag_loss(net), net.init(key_init, FEATURES), bags, **setting)
            return params, jnp.mean(losses[-10:]) < jnp.mean(losses[:10])

        def auc(params, bags, net=net):
            return mil.bag_auc(score(net.apply(params, bags["x"])), bags["y"])

        run = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None)))
        measure = jax.jit(jax.vmap(jax.vmap(auc), (0, None)))
        params, fell = run(jnp.asarray(rates), np.asarray(seeds, np.uint32), train_set)
        on_train, on_val, on_test = (np.asarray(measure(params, split)) for split in (train_set, val, test))
        best = int(on_val.mean(axis=1).argmax())
        arms[name], chosen[name] = on_test[best].tolist(), rates[best]
        gap[name] = float((on_train - on_test)[best].mean())
        learnt[name] = bool(fell[best].all() if smoke else on_test[best].mean() > 0.6)
    return Outcome(
        arms=arms,
        learnt=learnt,
        secondary={"learning rate": chosen, "train AUC less test AUC": gap},
        data="bags of 32 scikit-learn digits, 16 principal components",
    )
