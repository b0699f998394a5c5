"""Batches of self-mined clusters train a better retriever than random batches of the same size.

The paper trains multimodal language models on MMEB; the proxy is drawn: 240 meanings in 24 topics, each with four pairs
of a query and its candidate, two nonlinear and noisy views of the meaning. Other pairs of the same meaning are false
negatives, as rare as in the paper's data. Two small towers are trained with random batches; then, for as many steps
again, with batches of eight clusters of eight pairs: mined by the model itself (`saha_clusters`), with the retrieved
negatives as they come, or random. Recall at 1 among the candidates of new pairs of the same meanings, where a candidate
of the query's meaning is right. Every arm chooses from the same six pairs of learning rate and temperature on
validation pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import train
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import cluster_info_nce_loss, false_negative_rate, saha_clusters
from jaxlab.ops.layers import mlp
from jaxlab.ops.masked import safe_normalize

TOPICS, MEANINGS, PAIRS, LATENT, VIEW = 24, 240, 4, 12, 32
QUERY, CANDIDATE = mlp([64, 16]), mlp([64, 16])
CONFIGURATIONS = [(rate, temperature) for rate in (3e-4, 1e-3) for temperature in (0.02, 0.05, 0.1)]
MINING = {"SaHa": {}, "retrieved": {"by_query": False, "pool_factor": 1}}
K = 7


def pairs(seed: int) -> list[dict[str, np.ndarray]]:
    """Returns training, validation and test pairs: `query` and `candidate` [N, 32] and the meaning, `label` [N]."""
    rng = np.random.default_rng([seed, 208])
    topics = rng.normal(size=(TOPICS, LATENT))
    meanings = topics[np.arange(MEANINGS) % TOPICS] + 0.5 * rng.normal(size=(MEANINGS, LATENT))
    views = rng.normal(size=(2, LATENT, VIEW)) / LATENT**0.5
    splits = []
    for count in (PAIRS, 1, 1):
        label = rng.permutation(np.repeat(np.arange(MEANINGS), count))
        told = [meanings[label] + 0.2 * rng.normal(size=(len(label), LATENT)) for _ in range(2)]
        query, candidate = (
            (np.tanh(2 * t @ view) + 0.2 * rng.normal(size=(len(label), VIEW))).astype(np.float32)
            for t, view in zip(told, views, strict=True)
        )
        splits.append({"query": query, "candidate": candidate, "label": label.astype(np.int32)})
    return splits


def embed(params, split):
    """Returns unit embeddings of queries and candidates."""
    q, c = QUERY.apply(params["query"], split["query"]), CANDIDATE.apply(params["candidate"], split["candidate"])
    return safe_normalize(q), safe_normalize(c)


def recall(params, split):
    """Returns the share of queries whose nearest candidate has their meaning."""
    q, c = embed(params, split)
    nearest = jnp.argmax(jnp.matmul(q, c.T), axis=1)
    return jnp.mean((split["label"][nearest] == split["label"]).astype(jnp.float32))


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns recall at 1 of test queries."""
    warm, steps, batch, configurations = (40, 10, 2, CONFIGURATIONS[4:5]) if smoke else (200, 200, 8, CONFIGURATIONS)
    drawn = [pairs(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([d[i][n] for d in drawn]) for n in drawn[0][i]} for i in range(3))
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)))

    def fit(params, clusters, pairs, rate, temperature, key, steps):
        """Trains on batches of clusters of the pairs, -1 being no pair."""

        def loss(params, chosen, key):
            index = chosen["cluster"]
            rows = {n: v[jnp.maximum(index, 0).reshape(-1)] for n, v in pairs.items()}
            q, c = (x.reshape(*index.shape, -1) for x in embed(params, rows))
            return cluster_info_nce_loss(q, c, index=index, where=index >= 0, temperature=temperature)

        data = {"cluster": clusters}
        return train(loss, params, data, optimizer=optax.adam(rate), steps=steps, batch=batch, key=key)[0]

    def start(keys, pairs, test):
        key_query, key_candidate = jax.random.split(keys[0])
        params = {"query": QUERY.init(key_query, VIEW), "candidate": CANDIDATE.init(key_candidate, VIEW)}
        order = jax.random.permutation(keys[1], jnp.tile(jnp.arange(MEANINGS * PAIRS), 4)).reshape(-1, K + 1)
        params = fit(params, order, pairs, 3e-3, 0.05, keys[1], warm)
        return params, embed(params, pairs), order, recall(params, test)

    started, (query, candidates), order, before = jax.jit(jax.vmap(start))(keys, train_set, test)
    clusters = {"random": [np.asarray(o) for o in order]}
    own = np.arange(MEANINGS * PAIRS)
    for arm, options in MINING.items():
        clusters[arm] = [
            saha_clusters(np.asarray(q), np.asarray(c), own, k=K, **options)[0]
            for q, c in zip(query, candidates, strict=True)
        ]

    def one(rate, temperature, params, clusters, key, train_set, val, test):
        params = fit(params, clusters, train_set, rate, temperature, key, steps)
        return recall(params, val), recall(params, test)

    over_seeds = jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0, 0, 0))
    run = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, *[None] * 6)))
    arms, secondary = {}, {"recall before": np.asarray(before).tolist()}
    # Every list is filled to one length by beginning it again, so that one program serves all.
    length = len(order[0])
    for arm in (*MINING, "random"):
        filled = jnp.asarray(np.stack([np.resize(c, (length, K + 1)) for c in clusters[arm]]))
        settings = jnp.array(configurations).T
        on_val, on_test = (np.asarray(r) for r in run(*settings, started, filled, keys[:, 2], train_set, val, test))
        best = int(on_val.mean(axis=1).argmax())
        arms[arm] = on_test[best].tolist()
        rates = [false_negative_rate(c, t) for c, t in zip(filled, train_set["label"], strict=True)]
        secondary[arm] = {
            "rate and temperature": configurations[best],
            "recall at each": on_test.mean(axis=1).tolist(),
            "clusters": [len(c) for c in clusters[arm]],
            "false negatives": float(np.mean(rates)),
        }
    # One of 240 candidates is right; a random one would have 0.004.
    learnt = {arm: bool(min(values) > 0.1) for arm, values in arms.items()}
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="drawn: 960 training pairs of 240 meanings")
