"""A judge's scores, as filter of hard negatives and then as soft targets, each improve retrieval.

The paper trains multimodal language models on MMEB with another one as the judge. The proxy here: a query is a
handwritten digit, its positive one other digit of its class, and the 50 candidates nearest to it in pixels, most of
which are of its class as well: false negatives. The judge is a vote of the neighbours among labelled digits that no arm
sees; its score of a candidate is the probability that both show the same digit. Mean average precision at 10 of test
digits among the training digits. Three arms, the paper's steps: softmax against the 8 retrieved first, against 8 that
the judge lets pass, and alignment with the judge's scores on these. Each chooses from the same six pairs of learning
rate and temperature on the validation set.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import (
    judge_alignment_loss,
    listwise_rerank_loss,
    mean_average_precision,
    mine_hard_negatives,
    prefix_search,
)
from jaxlab.ops.layers import mlp
from jaxlab.ops.masked import safe_normalize
from jaxlab.ops.neighbours import weighted_knn

NET = mlp([64, 32])
CONFIGURATIONS = [(rate, temperature) for rate in (1e-3, 3e-3) for temperature in (0.03, 0.1, 0.3)]
ARMS = {"UniME-V2": (1, 1), "filtered negatives": (0, 1), "retrieved negatives": (0, 0)}  # soft targets, filter
POOL, NEGATIVES, LABELLED = 50, 8, 400


def mined(key: jax.Array, x: jax.Array, y: jax.Array, judge: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns each query with `mined` and `retrieved` candidates [N, 9] (positive first) and the judge's scores."""
    key_positive, key_mine = jax.random.split(key)
    rows = jnp.arange(len(y))
    others = (y[:, None] == y[None, :]) & (rows[:, None] != rows[None, :])
    positive = jnp.argmax(jnp.where(others, jax.random.uniform(key_positive, others.shape), -1.0), axis=1)
    # The query itself and its positive are among the nearest, or else the last two of 52 are left out.
    near = prefix_search(x, x, dim=x.shape[1], k=POOL + 2)
    own = (near == rows[:, None]) | (near == positive[:, None])
    near = jnp.take_along_axis(near, jnp.argsort(own, axis=1), axis=1)[:, :POOL]
    belief = weighted_knn(x, judge["x"], judge["y"], num_classes=10)
    score = lambda index: jnp.einsum("nc,nkc->nk", belief, belief[index])
    chosen, _ = mine_hard_negatives(score(near), score(positive[:, None])[:, 0], num_negatives=NEGATIVES, key=key_mine)
    result = {"x": x}
    for name, negative in {
        "mined": jnp.take_along_axis(near, chosen, axis=1),
        "retrieved": near[:, :NEGATIVES],
    }.items():
        index = jnp.concatenate([positive[:, None], negative], axis=1)
        result |= {name: index, f"{name} scores": score(index)}
        result[f"{name} same class"] = jnp.mean((y[index[:, 1:]] == y[:, None]).astype(jnp.float32), axis=1)
    return result


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the mean average precision at 10 on the test set."""
    steps, batch, configurations = (20, 16, CONFIGURATIONS[3:4]) if smoke else (200, 48, CONFIGURATIONS)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(setting, key, train_set, val, test):
        rate, temperature, soft, filtered = setting
        key_mine, key_init, key_train = jax.random.split(key, 3)
        judge = {n: v[:LABELLED] for n, v in train_set.items()}
        x, y = (train_set[n][LABELLED:] for n in ("x", "y"))
        data = mined(key_mine, x, y, judge)
        pick = lambda name: jnp.where(filtered > 0, data[f"mined{name}"], data[f"retrieved{name}"])

        def loss(params, batch, key):
            query, candidates = NET.apply(params, batch["x"]), NET.apply(params, x[batch["index"]])
            aligned = judge_alignment_loss(query, candidates, batch["scores"], temperature=temperature)
            cosines = jnp.einsum("bd,bcd->bc", safe_normalize(query), safe_normalize(candidates))
            hard = listwise_rerank_loss(cosines / temperature, jnp.zeros(len(query), jnp.int32))
            return jnp.where(soft > 0, aligned, hard)  # one program serves all arms

        params, _ = train(
            loss,
            NET.init(key_init, 64),
            {"x": x, "index": pick(""), "scores": pick(" scores")},
            optimizer=optax.adam(rate),
            steps=steps,
            batch=batch,
            key=key_train,
        )
        bank, both = NET.apply(params, x), NET.apply(params, jnp.concatenate([val["x"], test["x"]]))
        found, half = y[prefix_search(both, bank, dim=32, k=10)], len(val["y"])
        precision = [mean_average_precision(f, s["y"]) for f, s in ((found[:half], val), (found[half:], test))]
        return *precision, jnp.mean(pick(" same class"))

    settings = jnp.array([(*c, *flags) for flags in ARMS.values() for c in configurations])
    over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
    results = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None)))(settings, keys, train_set, val, test)
    results = [np.asarray(r).reshape(len(ARMS), len(configurations), -1) for r in results]
    arms, secondary = {}, {"rates and temperatures": configurations}
    for arm, on_val, on_test, same in zip(ARMS, *results, strict=True):
        best = int(on_val.mean(axis=1).argmax())
        arms[arm] = on_test[best].tolist()
        secondary[arm] = {
            "rate and temperature": configurations[best],
            "precision at each": on_test.mean(axis=1).tolist(),
            "negatives of the query's class": float(same.mean()),
        }
    # Ten classes: without any order the precision would be near 0.02.
    learnt = {arm: bool(min(values) > 0.2) for arm, values in arms.items()}
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, a judge from 400 of them")
