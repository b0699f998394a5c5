"""One encoder with an expert for each field is as good as an encoder for each field, and smaller than those.

The paper's fields are biomedical, its pairs abstracts that are cited together. Here (another task) the same
handwritten digits stand in four fields that disagree about what is related: in each, the ten digits fall into five
random pairs. All start from one dense encoder, trained on all fields at once, and go on for as many steps with the same
number of pairs of each field: the dense encoder as it is (the floor), four encoders apart, and one whose feed-forward
network is copied to four experts. Every arm chooses from the same three learning rates on the validation set. Largest
F1 over all thresholds of the cosine, mean over the fields; what is saved is parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import moe
from jaxlab.claims.common import digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import info_nce_loss
from jaxlab.ops.masked import safe_normalize

FIELDS, SIZE, HIDDEN, OUT, BATCH = 4, 32, 32, 16, 32
RATES = (3e-3, 1e-2, 3e-2)
ROUTER = moe.enforced_router(FIELDS)


def fields(seed: int) -> np.ndarray:
    """Returns the topic [FIELDS, 10] of every digit in every field: five pairs of digits each."""
    rng = np.random.default_rng([seed, 7])
    return np.stack([np.argsort(rng.permutation(10)) // 2 for _ in range(FIELDS)])


def initial(seed: int) -> dict[str, np.ndarray]:
    """Returns the dense encoder that every arm starts from, drawn on the host."""
    rng = np.random.default_rng([seed, 1])
    shapes = {
        "in": (64, SIZE),
        "gate": (SIZE, HIDDEN),
        "up": (SIZE, HIDDEN),
        "down": (HIDDEN, SIZE),
        "out": (SIZE, OUT),
    }
    return {n: np.float32(rng.normal(size=s) * s[0] ** -0.5) for n, s in shapes.items()}


def embed(params: dict, x: jax.Array, field: jax.Array) -> jax.Array:
    """Returns unit embeddings of rows [N, 64], all of one field; a network without experts does not look at it."""
    h = x @ params["in"]
    if params["gate"].ndim == 2:
        h = h + (jax.nn.silu(h @ params["gate"]) * (h @ params["up"])) @ params["down"]
    else:
        plan = ROUTER.apply({}, h, ids=jnp.full(len(h), field))
        each = jax.nn.silu(jnp.einsum("td,edf->tef", h, params["gate"])) * jnp.einsum("td,edf->tef", h, params["up"])
        h = h + jnp.einsum("te,tef,efd->td", moe.dense_weights(plan), each, params["down"])
    return safe_normalize(h @ params["out"])


def pairs_of(topic: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    """Returns for each row a random other row of the same topic."""
    score = jax.random.uniform(key, (len(y), len(y)))
    same = topic[y][:, None] == topic[y][None, :]
    return jnp.argmax(jnp.where(same & ~jnp.eye(len(y), dtype=bool), score, -1.0), axis=1)


def ranking(params, batch, topics, weights):
    """Returns the ranking loss, negatives of the own field only, as a weighted mean over the fields."""

    def one(i):
        a, b = batch["x"], batch["x"][pairs_of(topics[i], batch["y"], batch["key"])]
        return info_nce_loss(embed(params, a, i), embed(params, b, i), temperature=1 / 20)

    return jnp.sum(weights * jax.vmap(one)(jnp.arange(FIELDS)))


def scores(params, x, y, topics):
    """Returns for each field the largest F1 of "related" over all pairs of neighbouring rows."""

    def one(i):
        z, topic = embed(params, x, i), topics[i][y]
        cosines = jnp.concatenate([jnp.sum(z * jnp.roll(z, s, axis=0), axis=1) for s in range(1, 9)])
        related = jnp.concatenate([topic == jnp.roll(topic, s) for s in range(1, 9)])
        return moe.f1_max(cosines, related)[0]

    return jax.vmap(one)(jnp.arange(FIELDS))


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the mean F1 on the test set."""
    steps = 40 if smoke else 200
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(initial(seed) for seed in seeds))
    topics = jnp.stack([jnp.asarray(fields(seed)) for seed in seeds])
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    rates = jnp.asarray(RATES[1:2] if smoke else RATES)

    def run(rate, params, key, topics, train_set, val, test):
        def fit(params, weights, key):
            def loss(params, batch, key):
                return ranking(params, {**batch, "key": key}, topics, weights)

            return train(loss, params, train_set, optimizer=optax.adam(rate), steps=steps, batch=BATCH, key=key)[0]

        keys = jax.random.split(key, 2)
        alike = jnp.full(FIELDS, 1 / FIELDS)
        start = fit(params, alike, keys[0])
        copied = {**start, **moe.upcycle({n: start[n] for n in ("gate", "up", "down")}, FIELDS)}
        # One dense encoder for all fields, and one for each.
        dense = jax.vmap(lambda weights: fit(start, weights, keys[1]))(jnp.concatenate([alike[None], jnp.eye(FIELDS)]))
        enforced = fit(copied, alike, keys[1])
        x, y = jnp.stack([val["x"], test["x"]]), jnp.stack([val["y"], test["y"]])
        each = jax.vmap(lambda x, y: jax.vmap(lambda p: scores(p, x, y, topics))(dense))(x, y)
        spread = jax.vmap(lambda x, y: scores(enforced, x, y, topics))(x, y)
        found = {
            "enforced MoE": jnp.mean(spread, axis=1),
            "separate encoders": jnp.mean(jax.vmap(jnp.diagonal)(each[:, 1:]), axis=1),
            "dense": jnp.mean(each[:, 0], axis=1),
        }
        return tuple({n: v[i] for n, v in found.items()} for i in (0, 1))

    over = jax.jit(jax.vmap(jax.vmap(run, (None, 0, 0, 0, 0, 0, 0)), (0, *[None] * 6)))
    on_val, on_test = jax.tree.map(np.asarray, over(rates, params, keys, topics, train_set, val, test))
    best = {n: int(v.mean(axis=1).argmax()) for n, v in on_val.items()}
    arms = {n: on_test[n][best[n]].tolist() for n in on_test}
    count = lambda tree: sum(leaf[0].size for leaf in jax.tree.leaves(tree))
    network = count({n: params[n] for n in ("gate", "up", "down")})
    whole = count(params)
    return Outcome(
        arms={n: arms[n] for n in ("enforced MoE", "separate encoders")},
        floor=arms["dense"],
        learnt={n: bool(np.mean(arms[n]) > 0.4) for n in ("enforced MoE", "separate encoders")},
        saving=1 - (whole + (FIELDS - 1) * network) / (FIELDS * whole),
        secondary={"rate": {n: float(rates[i]) for n, i in best.items()}},
        data="scikit-learn digits in 4 fields of 5 random pairs of digits",
    )
