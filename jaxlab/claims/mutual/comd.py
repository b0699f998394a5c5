"""A student that competes with its teacher learns more than one that is told who won and learns one way.

The paper distils a language model of images; here a wide network that hardly saw the digits 7 to 9 teaches a small one
that saw ten examples of every digit. Both then see the training digits without labels, which an assessor alone knows:
it scores a network by the probability of the right class. All arms go four rounds of equally many steps and choose one
of two learning rates on the validation set. The baseline learns from the teacher wherever the assessor does not say
that the student won, so that both know as much; one-way and mutual distillation without an assessor are measured
beside. Probability of the right class, which is finer than accuracy (secondary).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.mutual import balance_pool, comd_losses, split_by_gap
from jaxlab.ops.layers import mlp

TEACHER, STUDENT, BATCH, ROUNDS, LABELLED = mlp([128, 10]), mlp([32, 10]), 64, 4, 100
RATES = (1e-3, 3e-3)
ARMS = ("competitive", "one way, judged", "one way", "mutual")


def shift(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns each image moved by up to one pixel."""
    padded = jnp.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    starts = jnp.floor(3 * jax.random.uniform(key, (len(x), 2))).astype(int)
    moved = jax.vmap(lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1]), (8, 8)))(padded, starts)
    return moved.reshape(x.shape)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the probability that the student gives to the right class of a test image."""
    before, steps = (60, 20) if smoke else (300, 100)
    rates = jnp.array(RATES[1:] if smoke else RATES)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: np.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    # Ten labelled examples of every digit for the student; the teacher's draws weigh its rare digits.
    few = np.stack([np.concatenate([np.flatnonzero(y == c)[:10] for c in range(10)]) for y in train_set["y"]])
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 4))(jnp.asarray(seeds, jnp.uint32))

    def sure(net, params, split):
        z = net.apply(params, split["x"])
        return jnp.take_along_axis(jax.nn.softmax(z), split["y"][:, None], axis=1)[:, 0]

    def supervised(net):
        def loss(params, batch, key):
            del key
            terms = optax.softmax_cross_entropy_with_integer_labels(net.apply(params, batch["x"]), batch["y"])
            return jnp.mean(terms * batch["weights"])

        return loss

    def start(keys, data, few):
        """Trains both networks alone."""
        rare = jnp.where(data["y"] >= 7, 0.03, 1.0)
        fit = lambda net, rows, key_init, key: train(
            supervised(net),
            net.init(key_init, 64),
            rows,
            optimizer=optax.adam(3e-3),
            steps=before,
            batch=BATCH,
            key=key,
        )[0]
        labelled = {**{n: v[few] for n, v in data.items()}, "weights": jnp.ones(LABELLED)}
        teacher = fit(TEACHER, {**data, "weights": rare}, keys[0], keys[1])
        return {"teacher": teacher, "student": fit(STUDENT, labelled, keys[0], keys[2])}

    def compete(arm, rate, params, keys, data, val, test):
        """Goes the rounds; `arm` is the number of the arm, so that one program serves all."""
        optimizer, everyone = optax.adam(rate), jnp.ones(data["y"].shape, bool)

        def one_round(carry, key):
            params, opt_state = carry
            key_rows, key_steps = jax.random.split(key)
            gap = sure(TEACHER, params["teacher"], data) - sure(STUDENT, params["student"], data)
            hard, easy, won = split_by_gap(gap)
            chosen = jnp.where(arm == 0, hard, everyone), jnp.where(arm == 0, easy, everyone)
            rows = jnp.maximum(balance_pool(key_rows, *chosen, size=BATCH * steps), 0)
            # The hard half stands first: each batch takes as many of either.
            rows = rows.reshape(2, -1).T.reshape(steps, BATCH)
            # What the student's and the teacher's loss take for the gap.
            told = jnp.where(won, -1.0, 1.0)
            gaps = [jnp.select([arm == 0, arm == 1], [gap, told], 1.0)]
            gaps.append(jnp.select([arm == 0, arm == 3], [gap, -1.0], 1.0))

            def step(carry, inputs):
                params, opt_state = carry
                rows, key = inputs
                x = shift(key, data["x"][rows])

                def loss(params):
                    z, t = STUDENT.apply(params["student"], x), TEACHER.apply(params["teacher"], x)
                    return comd_losses(z, t, gaps[0][rows])[0] + comd_losses(z, t, gaps[1][rows])[1]

                updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            carry, _ = jax.lax.scan(step, (params, opt_state), (rows, jax.random.split(key_steps, steps)))
            return carry, (jnp.mean(hard), jnp.mean(won))

        carry = params, optimizer.init(params)
        (params, _), (hard, won) = jax.lax.scan(one_round, carry, jax.random.split(keys[3], ROUNDS))
        judge = lambda split: jnp.mean(sure(STUDENT, params["student"], split))
        right = accuracy(STUDENT.apply(params["student"], test["x"]), test["y"])
        weak = test["y"] >= 7
        taught = jnp.sum(jnp.where(weak, sure(TEACHER, params["teacher"], test), 0.0)) / jnp.sum(weak)
        return judge(val), judge(test), right, hard, won, taught

    begun = jax.jit(jax.vmap(start))(keys, train_set, few)
    over_seeds = jax.vmap(compete, in_axes=(None, None, 0, 0, 0, 0, 0))
    run = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, None, None, None, None, None)))
    arms, secondary = {}, {n: {} for n in ("accuracy", "learning rate", "hard", "won by the student", "teacher on 7-9")}
    for i, name in enumerate(ARMS[:2] if smoke else ARMS):
        on_val, on_test, right, hard, won, weak = map(np.asarray, run(i, rates, begun, keys, train_set, val, test))
        best = int(np.argmax(on_val.mean(axis=1)))
        arms[name] = on_test[best].tolist()
        secondary["accuracy"][name], secondary["learning rate"][name] = right[best].tolist(), float(rates[best])
        secondary["hard"][name] = hard[best].mean(axis=0).tolist()
        secondary["won by the student"][name] = won[best].mean(axis=0).tolist()
        secondary["teacher on 7-9"][name] = weak[best].tolist()
    return Outcome(
        arms=arms,
        learnt={name: float(np.mean(values)) > 0.15 for name, values in arms.items()},
        secondary=secondary,
        data="scikit-learn digits",
    )
