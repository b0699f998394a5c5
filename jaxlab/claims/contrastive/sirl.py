"""Rewards learnt on a representation of similarity answers order new behaviours better than on one of preferences.

The paper lets simulated and real people teach a robot arm; here a behaviour is a synthetic path of ten points in the
plane with two coordinates that do not matter, and what matters are its mean distances to three objects and its mean
height. Arms: SIRL from 500 similarity queries of three behaviours; preferences over the same 1500 behaviours in pairs,
for ten people with rewards of their own at once; and an autoencoder of the same behaviours. All have one network of six
outputs and choose among three learning rates on validation people. Metric: accuracy on held-out preferences of rewards
that logistic regression finds in 50 preferences, the mean over 50 new people; the error of predicting the true features
stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import (
    feature_prediction_error,
    odd_one_out,
    preference_accuracy,
    preference_loss,
    similarity_query_loss,
)
from jaxlab.ops.layers import mlp

POINTS, SIZE, TASKS = 10, 6, 10
INPUTS = POINTS * 4
NET, DECODER = mlp([128, 128, SIZE]), mlp([128, INPUTS])
ARMS = ("SIRL", "multi-task preferences", "autoencoder")
RATES = (3e-4, 1e-3, 3e-3)


def behaviours(key: jax.Array, objects: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns paths [count, 40], bent lines with two random walks beside them, and their true features [count, 4]."""
    key_ends, key_bend, key_walk = jax.random.split(key, 3)
    ends = jax.random.uniform(key_ends, (count, 2, 1, 2))
    time = jnp.linspace(0.0, 1.0, POINTS)[None, :, None]
    bend = 0.3 * jax.random.normal(key_bend, (count, 1, 2)) * jnp.sin(jnp.pi * time)
    places = (1 - time) * ends[:, 0] + time * ends[:, 1] + bend
    walk = 0.3 * jnp.cumsum(jax.random.normal(key_walk, places.shape), axis=1)
    away = jnp.linalg.norm(places[:, :, None, :] - objects[None, None, :, :], axis=-1)
    features = jnp.concatenate([away.mean(axis=1), places[:, :, 1].mean(axis=1)[:, None]], axis=1)
    return jnp.concatenate([places, walk], axis=2).reshape(count, INPUTS), features


def standard(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns x with the mean and standard deviation of the reference brought to 0 and 1."""
    return (x - reference.mean(axis=0, keepdims=True)) / (reference.std(axis=0, keepdims=True) + 1e-6)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the accuracy on held-out preferences of rewards learnt from a few."""
    steps, queries, people, fit_steps = (30, 100, 5, 30) if smoke else (400, 500, 50, 200)

    def one(arm, rate, key):
        key_objects, key_paths, key_people, key_init, key_train, key_judge = jax.random.split(key, 6)
        objects = jax.random.uniform(key_objects, (3, 2))
        # Behind those to learn from, for validation and for test people each: 100 to ask about and 700 to judge by.
        total = 3 * queries
        paths, features = behaviours(key_paths, objects, total + 2 * 800)
        paths, features = standard(paths, paths[:total]), standard(features, features[:total])
        x, psi = paths[:total], features[:total]
        wishes = jax.random.normal(key_people, (TASKS + 2 * people, features.shape[1]))
        taught = psi @ wishes[:TASKS].T
        key_net, key_decoder, key_heads = jax.random.split(key_init, 3)
        params = {
            "net": NET.init(key_net, INPUTS),
            "heads": 0.1 * jax.random.normal(key_heads, (TASKS, SIZE)),
            "decoder": DECODER.init(key_decoder, SIZE),
        }
        optimizer = optax.adam(rate)

        def similarity(params, key):
            rows = jax.random.randint(key, (64,), 0, queries)
            phi = NET.apply(params["net"], x.reshape(queries, 3, INPUTS)[rows])
            return similarity_query_loss(phi, odd_one_out(psi.reshape(queries, 3, -1)[rows]))

        def preferences(params, key):
            rows = jax.random.randint(key, (96,), 0, total // 2)
            phi, person = NET.apply(params["net"], x.reshape(-1, 2, INPUTS)[rows]), rows % TASKS
            reward = jnp.sum(phi * params["heads"][person][:, None, :], axis=2)
            truth = jnp.take_along_axis(taught.reshape(-1, 2, TASKS)[rows], person[:, None, None], axis=2)[:, :, 0]
            return preference_loss(reward[:, 0], reward[:, 1], (truth[:, 0] > truth[:, 1]).astype(jnp.int32))

        def reconstruction(params, key):
            chosen = x[jax.random.randint(key, (192,), 0, total)]
            return jnp.mean(jnp.square(DECODER.apply(params["decoder"], NET.apply(params["net"], chosen)) - chosen))

        def step(carry, key):
            params, state = carry
            # One program serves all arms, of which each run takes one branch; a batch is 192 behaviours in each.
            branches = [jax.value_and_grad(f) for f in (similarity, preferences, reconstruction)]
            value, grads = jax.lax.switch(arm, branches[:2] if smoke else branches, params, key)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(key_train, steps)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        phi = NET.apply(params["net"], paths)
        phi = standard(phi, phi[:total])

        def judged(phi, rewards, key):
            """Mean over people of the accuracy of the reward that logistic regression finds in 50 preferences."""
            asked = phi[:100].reshape(50, 2, SIZE)
            pairs = jax.random.randint(key, (500, 2), 0, 700)

            def person(reward):
                answers = reward[:100].reshape(50, 2)
                labels = (answers[:, 0] > answers[:, 1]).astype(jnp.int32)
                fit = optax.adam(0.05)

                def update(carry, _):
                    w, state = carry
                    score = lambda w: preference_loss(asked[:, 0] @ w, asked[:, 1] @ w, labels) + 1e-3 * jnp.sum(w * w)
                    updates, state = fit.update(jax.grad(score)(w), state)
                    return (w + updates, state), None

                w = jnp.zeros(SIZE)
                (w, _), _ = jax.lax.scan(update, (w, fit.init(w)), length=fit_steps)
                return preference_accuracy(phi[100:] @ w, reward[100:], pairs)

            return jnp.mean(jax.vmap(person)(rewards.T))

        held = phi[total:].reshape(2, 800, SIZE)
        rewards = jnp.einsum(
            "bnk,bpk->bnp", features[total:].reshape(2, 800, -1), wishes[TASKS:].reshape(2, people, -1)
        )
        on_val, on_test = jax.vmap(judged)(held, rewards, jax.random.split(key_judge))
        error = feature_prediction_error(phi[:total], psi, phi[-800:], features[-800:])
        fell = losses[-(steps // 4) :].mean() < losses[: steps // 4].mean()
        return on_val, on_test, error, fell

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    rates = jnp.asarray(RATES[1:2] if smoke else RATES)
    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, None, 0)), in_axes=(None, 0, None)))
    arms, learnt, secondary = {}, {}, {}
    for arm, name in enumerate(ARMS[:2] if smoke else ARMS):
        on_val, on_test, error, fell = (np.asarray(r) for r in run(arm, rates, keys))
        best = int(on_val.mean(axis=1).argmax())
        arms[name] = on_test[best].tolist()
        learnt[name] = bool(fell[best].all() and on_test[best].min() > 0.55)
        secondary[name] = {"rate": float(rates[best]), "feature prediction error": error[best].tolist()}
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="synthetic paths in the plane")
