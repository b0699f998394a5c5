"""Representations learnt from arbitrary pairs of classes carry over to new classes better than those of one class.

The paper trains ResNet-50 and vision transformers on ImageNet and probes them on other data sets. Here a small encoder
with a projector learns from the labels of the digits 0 to 4; a linear probe (ridge regression on the encoder's output)
then tells the digits 5 to 9 apart, which it never saw. Arms: gated arbitrary pairs; pairs of one class without gates,
which is supervised contrastive learning; and arbitrary pairs without gates. All see the same noisy and masked views
and choose among the same two learning rates and two temperatures on the validation set.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.linalg import cho_factor, cho_solve

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.contrastive.mmcr import views
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import class_relations, effective_rank, pair_contrastive_loss, pair_gate, sample_partners
from jaxlab.ops.layers import mlp

SIZE = 32
ENCODER, PROJECTOR, GATE = mlp([128, 64]), mlp([64, SIZE]), pair_gate(5, embedding=16, hidden=64)
ARMS = ("gated pairs", "one class", "pairs without gates")
RATES, TEMPERATURES = (1e-3, 3e-3), (0.1, 0.3)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy of a linear probe on the classes that training did not see."""
    steps, batch = (30, 32) if smoke else (300, 128)
    splits = [digits(seed) for seed in seeds]

    def chosen(part, new):
        """Returns the part's rows of the old or the new classes, as many for every seed."""
        rows = [{n: split[part][n][(split[part]["y"] >= 5) == new] for n in ("x", "y")} for split in splits]
        size = 64 if smoke else min(len(r["y"]) for r in rows)
        return {n: jnp.stack([r[n][:size] for r in rows]) for n in ("x", "y")}

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    data = {"train": chosen(0, False), "bank": chosen(0, True), "val": chosen(1, True), "test": chosen(2, True)}

    def one(arm, rate, temperature, key, data):
        def loss(params, batch, key):
            key_views, key_partners = jax.random.split(key)
            hidden = jax.nn.relu(ENCODER.apply(params["encoder"], views(key_views, batch["x"], 2)))
            a, b = PROJECTOR.apply(params["projector"], hidden)
            y = batch["y"]
            partners = jnp.where(arm == 1, y, sample_partners(key_partners, y))
            gates = jnp.where(arm == 0, GATE.apply(params["gate"], y, partners), 1.0)
            return pair_contrastive_loss(a, b, y, partners, gates, temperature=temperature)

        key_encoder, key_projector, key_gate, key_train = jax.random.split(key, 4)
        params = {
            "encoder": ENCODER.init(key_encoder, 64),
            "projector": PROJECTOR.init(key_projector, 64),
            "gate": GATE.init(key_gate, SIZE),
        }
        params, losses = train(
            loss, params, data["train"], optimizer=optax.adam(rate), steps=steps, batch=batch, key=key_train
        )
        embed = lambda x: jax.nn.relu(ENCODER.apply(params["encoder"], x))
        # The linear probe: ridge regression onto one-hot labels, features centred on the bank's mean.
        bank = embed(data["bank"]["x"])
        mean = bank.mean(axis=0, keepdims=True)
        centred = bank - mean
        gram = centred.T @ centred
        ridge = 1e-3 * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
        targets = jax.nn.one_hot(data["bank"]["y"] - 5, 5) - 0.2
        weights = cho_solve(cho_factor(gram + ridge), centred.T @ targets)
        probe = lambda split: accuracy((embed(split["x"]) - mean) @ weights, split["y"] - 5)
        fell = losses[-(steps // 4) :].mean() < losses[: steps // 4].mean()
        if smoke:  # each of the two is a program of its own
            return probe(data["val"]), probe(data["test"]), fell, fell, fell[None]
        relations = class_relations(GATE, params["gate"], num_classes=5)
        return probe(data["val"]), probe(data["test"]), fell, effective_rank(centred), relations

    @jax.jit
    def run(arms, rates, temperatures, keys, data):
        over_seeds = jax.vmap(one, in_axes=(None, None, None, 0, 0))
        return jax.vmap(over_seeds, in_axes=(0, 0, 0, None, None))(arms, rates, temperatures, keys, data)

    grid = [(rate, t) for rate in RATES for t in TEMPERATURES][-1 if smoke else 0 :]
    arm, rate, temperature = (
        jnp.asarray(c) for c in zip(*((i, *g) for i in range(len(ARMS)) for g in grid), strict=True)
    )
    results = run(arm, rate, temperature, keys, data)
    on_val, on_test, fell, rank, relations = (
        np.asarray(r).reshape(len(ARMS), len(grid), len(seeds), *r.shape[2:]) for r in results
    )
    arms, learnt, secondary = {}, {}, {}
    for i, name in enumerate(ARMS):
        best = int(on_val[i].mean(axis=1).argmax())
        arms[name] = on_test[i, best].tolist()
        # Without gates arbitrary pairs contradict each other, so that the third arm need not learn.
        if i < 2:
            learnt[name] = bool(fell[i, best].all() and on_test[i, best].min() > 0.5)
        secondary[name] = {"rate and temperature": grid[best], "effective rank": rank[i, best].tolist()}
        if name == "gated pairs":
            secondary["share of dimensions open to each pair"] = relations[i, best].mean(axis=0).tolist()
    return Outcome(
        arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, 0 to 4 to learn, 5 to 9 to probe"
    )
