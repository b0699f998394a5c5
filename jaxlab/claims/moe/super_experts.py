"""Without the experts of the largest outputs a mixture loses more than without as many random ones.

The paper prunes 3 of 6144 experts of a language model and it breaks; a model of this size has no massive activations,
so that only the direction can be seen: two layers of 8 experts, 2 for each example, classify handwritten digits, and 2
of the 16 experts are pruned while the routers stay as they are. Outputs are profiled on the training set. Primary: the
rise of the test cross entropy; the baseline is its mean over 40 random pairs. The two least and the two most used
experts stand beside it, the latter because an expert that sees more tokens has more chances of a large output.
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

LAYERS, EXPERTS, K, SIZE, HIDDEN, BATCH, PRUNED, DRAWS = 2, 8, 2, 32, 16, 64, 2, 40
ROUTER = moe.top_k_router(EXPERTS, K)


def initial(seed: int) -> dict:
    """Returns the parameters, drawn on the host."""
    rng = np.random.default_rng(seed)
    stack = (LAYERS, EXPERTS)
    shapes = {
        "in": (64, SIZE),
        "router": (LAYERS, SIZE, EXPERTS),
        "gate": (*stack, SIZE, HIDDEN),
        "up": (*stack, SIZE, HIDDEN),
        "down": (*stack, HIDDEN, SIZE),
        "out": (SIZE, 10),
    }
    return {n: np.float32(rng.normal(size=s) * s[-2] ** -0.5) for n, s in shapes.items()}


def forward(params, x, pruned):
    """Returns logits, balance loss, and of each layer the largest outputs and loads, without the experts `pruned`."""
    x = x @ params["in"]

    def layer(x, own):
        p, gone = own
        h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-6)
        plan = ROUTER.apply({"w": p["router"]}, h)
        each = jax.nn.silu(jnp.einsum("td,edf->tef", h, p["gate"])) * jnp.einsum("td,edf->tef", h, p["up"])
        each = jnp.einsum("tef,efd->ted", each, p["down"])
        profile = moe.profile_outputs(each[plan.token, plan.expert], plan.expert, EXPERTS)
        y = jnp.einsum("te,ted->td", moe.dense_weights(moe.prune_experts(plan, gone)), each)
        return x + y, (moe.load_balancing_loss(plan), profile.maximum, plan.counts)

    stacked = {n: params[n] for n in ("router", "gate", "up", "down")}
    x, (balance, maxima, counts) = jax.lax.scan(layer, x, (stacked, pruned))
    return x @ params["out"], jnp.mean(balance), maxima, counts


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns how much the test cross entropy rises."""
    steps = 150 if smoke else 600
    splits = [digits(seed) for seed in seeds]
    train_set, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in (0, 2))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(initial(seed) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    nobody = jnp.zeros((LAYERS, EXPERTS), bool)

    def chosen(order):
        return nobody.reshape(-1).at[order[:PRUNED]].set(True).reshape(LAYERS, EXPERTS)

    def one(params, key, train_set, test):
        def loss(params, batch, key):
            del key
            z, balance, _, _ = forward(params, batch["x"], nobody)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"])) + 0.01 * balance

        key_train, key_draw = jax.random.split(key)
        optimizer = optax.adam(3e-3)
        params, _ = train(loss, params, train_set, optimizer=optimizer, steps=steps, batch=BATCH, key=key_train)
        _, _, maxima, counts = forward(params, train_set["x"], nobody)
        draws = jax.vmap(lambda key: chosen(jax.random.permutation(key, LAYERS * EXPERTS)))
        masks = jnp.concatenate(
            [
                jnp.stack([nobody, *(chosen(jnp.argsort(v.reshape(-1))) for v in (-maxima, counts, -counts))]),
                draws(jax.random.split(key_draw, DRAWS)),
            ]
        )

        def measure(mask):
            z = forward(params, test["x"], mask)[0]
            loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, test["y"]))
            return loss, accuracy(z, test["y"])

        return jax.lax.map(measure, masks)

    losses, accuracies = (np.asarray(a) for a in jax.jit(jax.vmap(one))(params, keys, train_set, test))
    rise = losses - losses[:, :1]
    arms = {"largest outputs": rise[:, 1], "random": rise[:, 4:].mean(axis=1)}
    return Outcome(
        arms={n: v.tolist() for n, v in arms.items()},
        learnt={n: bool(accuracies[:, 0].min() > 0.7) for n in arms},
        secondary={
            "least used": rise[:, 2],
            "most used": rise[:, 3],
            "accuracy whole and without the largest": accuracies[:, :2],
        },
        data="scikit-learn digits",
    )
