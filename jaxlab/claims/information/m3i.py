"""Several targets at once serve better than the best one of them, over whole images and their parts.

The paper pre-trains a billion parameters on millions of images; that claim is untested here. Handwritten digits as 16
patches of 2 x 2 pixels, a tenth of them labelled, and a small network: M3I (mixtures; dense features of an averaged
encoder, another view, the label) against supervised, contrastive and masked pre-training alone. The figure is the mean
of two probes on test digits: the class from all features, with ten labels a class, and from the features of each patch
whether it holds ink. The baseline is the single target that is best on the validation digits. Both choose among six
settings: two learning rates and three targets, or three weights of the dense one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits
from jaxlab.claims.harness import Outcome
from jaxlab.information import m3i_loss, patch_mix, ridge_probe, special_case
from jaxlab.ops.layers import dense, mlp
from jaxlab.ops.trees import ema_update

BATCH, PATCHES, SIZE, CLASSES = 64, 16, 8, 10
RATES = (1e-3, 3e-3)
BODY = mlp([64, PATCHES * SIZE])
HEADS = {"pixels": 4, "first": SIZE, "second": SIZE, "class": CLASSES, "global": 32, "global second": 32}
SINGLE = {"supervised": (1.0, 0.0, 0.0), "contrastive": (0.0, 1.0, 0.0), "masked": (0.0, 0.0, 1.0)}


def patches(x: jax.Array) -> jax.Array:
    """Returns the pixels of each patch, [N, 16, 4]."""
    return jnp.moveaxis(x.reshape(-1, 4, 2, 4, 2), 3, 2).reshape(-1, PATCHES, 4)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the mean accuracy of both probes on test digits."""
    steps, rates, strengths = (40, RATES[1:], (1.0,)) if smoke else (300, RATES, (0.3, 1.0, 3.0))
    splits = [digits(seed) for seed in seeds]
    rows = (300, 100, 100) if smoke else (None, None, None)
    train_set, val, test = ({n: np.stack([s[i][n][: rows[i]] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    inputs = {name: SIZE if name in ("pixels", "first", "second") else PATCHES * SIZE for name in HEADS}

    def features(params, x):
        return jax.nn.relu(BODY.apply(params["body"], x)).reshape(-1, PATCHES, SIZE)

    def head(params, name, z):
        z = z if inputs[name] == SIZE else z.reshape(len(z), -1)
        return dense(HEADS[name]).apply(params[name], z)

    def view(key, x):
        return x + 0.2 * jax.random.normal(key, x.shape)

    def loss(params, average, x, y, key, weights):
        keys = jax.random.split(key, 5)
        seen, other = view(keys[0], x), view(keys[1], x)
        z, goal = features(params, seen), features(average, other)
        supervised = m3i_loss([head(params, "class", z)], [y], special_case("supervised"))
        target = head(average, "global", goal)
        contrastive = m3i_loss([head(params, "global", z)], [target], special_case("contrastive"))
        hidden, kept = patch_mix(seen.reshape(-1, 8, 8), jnp.zeros((len(x), 8, 8)), key=keys[2], patch=2)
        told = head(params, "pixels", features(params, hidden.reshape(-1, 64)))
        masks = [~kept.reshape(-1, PATCHES)]
        masked = m3i_loss([told], [patches(x)], special_case("mim"), masks=masks)
        # M3I: each image with the next one of the batch; both are predicted from the mixture.
        turn = lambda v: jnp.roll(v, 1, axis=0)
        mix, mine = patch_mix(seen.reshape(-1, 8, 8), turn(seen).reshape(-1, 8, 8), key=keys[3], patch=2)
        z, mine, ours = features(params, mix.reshape(-1, 64)), mine.reshape(-1, PATCHES), []
        dense_weight, *single = weights
        for dense_head, global_head, goal_here, target_here, own in (
            ("first", "global", goal, target, mine),
            ("second", "global second", turn(goal), turn(target), ~mine),
        ):
            fine, coarse, _ = special_case("m3i")
            ours.append(
                dense_weight * m3i_loss([head(params, dense_head, z)], [goal_here], [fine], masks=[own])
                + m3i_loss([head(params, global_head, z)], [target_here], [coarse])
            )
        both = sum(ours) / 2 + supervised
        alone = jnp.stack([supervised, contrastive, masked])
        return jnp.where(dense_weight > 0, both, jnp.sum(jnp.stack(single) * alone))

    def one(setting, key, train_set, val, test):
        rate, *weights = setting
        key_init, key_train, key_label = jax.random.split(key, 3)
        made = {"body": BODY.init(key_init, 64)}
        for number, name in enumerate(HEADS):
            made[name] = dense(HEADS[name]).init(jax.random.fold_in(key_init, number), inputs[name])
        labelled = jax.random.uniform(key_label, train_set["y"].shape) < 0.1
        labels = jnp.where(labelled, train_set["y"], -1)
        optimizer = optax.adam(rate)

        def step(carry, key):
            params, average, opt_state = carry
            key_rows, key_loss = jax.random.split(key)
            rows = jax.random.randint(key_rows, (BATCH,), 0, len(labels))
            value, grads = jax.value_and_grad(loss)(
                params, average, train_set["x"][rows], labels[rows], key_loss, weights
            )
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, ema_update(average, params, decay=0.99), opt_state), value

        (params, _, _), _ = jax.lax.scan(step, (made, made, optimizer.init(made)), jax.random.split(key_train, steps))
        z = [features(params, split["x"]) for split in (train_set, val, test)]
        # Ten labels a class: the first ten of each.
        order = jnp.argsort(train_set["y"], stable=True)
        place = jnp.arange(len(order)) - jnp.searchsorted(train_set["y"][order], train_set["y"][order])
        few = jnp.zeros(len(order), bool).at[order].set(place < 10)
        held = jnp.concatenate(z[1:])
        targets, count = jax.nn.one_hot(train_set["y"], CLASSES), len(val["y"])
        classes = ridge_probe(z[0].reshape(len(z[0]), -1), targets, held.reshape(len(held), -1), penalty=0.1, where=few)
        ink = lambda x: jnp.mean(patches(x), axis=-1).reshape(-1) > 0.3
        truth = ink(train_set["x"]).astype(jnp.float32)[:, None]
        scores = ridge_probe(z[0].reshape(-1, SIZE), truth, held.reshape(-1, SIZE))[:, 0] > 0.5
        found = []
        for part, split in ((slice(0, count), val), (slice(count, None), test)):
            right = scores.reshape(-1, PATCHES)[part].reshape(-1) == ink(split["x"])
            found.append(jnp.stack([accuracy(classes[part], split["y"]), jnp.mean(right.astype(jnp.float32))]))
        return jnp.stack(found)

    settings = {"M3I": [(rate, strength, 0.0, 0.0, 0.0) for rate in rates for strength in strengths]}
    settings |= {name: [(rate, 0.0, *weights) for rate in rates] for name, weights in SINGLE.items()}
    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)), in_axes=(0, None, None, None, None)))
    everything = [(name, setting) for name, several in settings.items() for setting in several]
    found = np.asarray(run(jnp.asarray([s for _, s in everything]), keys, train_set, val, test))
    on_val, on_test = found[:, :, 0].mean(axis=(1, 2)), found[:, :, 1]  # [setting, seed, probe] after the split
    groups = {"M3I": ["M3I"], "best single target": list(SINGLE), **{name: [name] for name in SINGLE}}
    best = {
        group: max((i for i, (name, _) in enumerate(everything) if name in members), key=lambda i: on_val[i])
        for group, members in groups.items()
    }
    told = {group: on_test[i].mean(axis=1).tolist() for group, i in best.items()}
    arms = {group: told[group] for group in list(groups)[:2]}
    return Outcome(
        arms=arms,
        learnt={name: min(values) > 0.4 for name, values in arms.items()},
        secondary={
            "setting": {group: [everything[i][0], *everything[i][1]] for group, i in best.items()},
            "class, ink": {group: on_test[i].mean(axis=0).tolist() for group, i in best.items()},
            "single targets": {name: told[name] for name in SINGLE},
        },
        data="scikit-learn digits, a tenth labelled",
    )
