"""Experts that are merged around the most used ones, aligned and by use, lose less than plain means of the same groups.

The paper merges language models' experts after fine-tuning; here a layer of 8 experts, one for each example, has learnt
handwritten digits from experts that were copies of one (as in the paper's models), and is merged to 3 without training.
Accuracy on the test set right after. Baseline: the plain mean of the same groups without alignment. Random groups,
aligned and by use, and the whole mixture stand beside it. Nothing is chosen on validation or test sets; calibration
tokens are 256 of the training set.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import moe
from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome

EXPERTS, GROUPS, SIZE, HIDDEN, BATCH, CALIBRATION = 8, 3, 32, 32, 64, 256
ROUTER = moe.top_k_router(EXPERTS, 1, renormalize=False)


def initial(seed: int) -> dict:
    """Returns the mixture whose experts are copies of one with a little noise, drawn on the host."""
    rng = np.random.default_rng(seed)
    shapes = {
        "in": (64, SIZE),
        "router": (SIZE, EXPERTS),
        "up": (SIZE, HIDDEN),
        "down": (HIDDEN, SIZE),
        "out": (SIZE, 10),
    }
    params = {n: rng.normal(size=s) * s[0] ** -0.5 for n, s in shapes.items()}
    for name in ("up", "down"):
        copies = np.repeat(params[name][None], EXPERTS, axis=0)
        params[name] = copies + 0.1 * copies.std() * rng.normal(size=copies.shape)
    return {n: np.float32(w) for n, w in params.items()}


def forward(params, x, labels=None):
    """Returns logits and the router's plan; with `labels` the experts are those of the groups."""
    x = x @ params["in"]
    routed = ROUTER.apply({"w": params["router"]}, x)
    plan = routed if labels is None else moe.merge_plan(routed, labels, num_groups=GROUPS)
    each = jnp.einsum("tef,efd->ted", jax.nn.relu(jnp.einsum("td,edf->tef", x, params["up"])), params["down"])
    return (x + jnp.einsum("te,ted->td", moe.dense_weights(plan), each)) @ params["out"], routed


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy right after merging."""
    steps = 120 if smoke else 600
    splits = [digits(seed) for seed in seeds]
    train_set, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in (0, 2))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(initial(seed) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def fit(params, key, train_set):
        def loss(params, batch, key):
            del key
            z, plan = forward(params, batch["x"])
            cross = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))
            return cross + 0.01 * moe.load_balancing_loss(plan)

        optimizer = optax.adam(3e-3)
        params, _ = train(loss, params, train_set, optimizer=optimizer, steps=steps, batch=BATCH, key=key)
        plan = forward(params, train_set["x"][:CALIBRATION])[1]
        return params, moe.expert_load(plan) / EXPERTS, moe.router_similarity(plan.logits)

    params, usage, similarity = jax.jit(jax.vmap(fit))(params, keys, train_set)
    near = np.stack(
        [
            moe.group_experts(u, s, num_groups=GROUPS)[0]
            for u, s in zip(np.asarray(usage), np.asarray(similarity), strict=True)
        ]
    )
    random = np.stack([np.random.default_rng([seed, 5]).permutation(EXPERTS) % GROUPS for seed in seeds])

    def measure(params, usage, near, random, test):
        experts = {n: params[n] for n in ("up", "down")}

        def merged(labels, usage, align):
            small = moe.merge_experts(experts, labels, usage, num_groups=GROUPS, align=align)
            return accuracy(forward({**params, **small}, test["x"], labels)[0], test["y"])

        return {
            "M-SMoE": merged(near, usage, True),
            "plain mean": merged(near, jnp.ones_like(usage), False),
            "random groups": merged(random, usage, True),
            "whole": accuracy(forward(params, test["x"])[0], test["y"]),
        }

    out = {n: np.asarray(v) for n, v in jax.jit(jax.vmap(measure))(params, usage, near, random, test).items()}
    arms = {n: out[n].tolist() for n in ("M-SMoE", "plain mean")}
    return Outcome(
        arms=arms,
        learnt={n: bool(out["whole"].min() > 0.7) for n in arms},
        secondary={"random groups": out["random groups"], "whole": out["whole"], "usage": np.asarray(usage)},
        data="scikit-learn digits",
    )
