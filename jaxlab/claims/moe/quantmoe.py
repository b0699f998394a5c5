"""At an equal number of bits, a shared expert deserves four bits a weight more than routed experts do.

The paper quantises language models; here a layer of one shared and 8 routed experts, 2 for each example, classifies
handwritten digits, and its experts are quantised by GPTQ, every matrix with the inputs that it sees in training. All
have 2 bits a weight, but the shared expert, as large as two routed ones, has 4; baseline: two random routed experts
have 4 instead (mean over all pairs). The two most used and the two with the largest outlier scores stand beside it, as
do plain rounding and the layer as it was. Accuracy on the test set; nothing is tuned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import moe
from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome

EXPERTS, K, SIZE, HIDDEN, SHARED, BATCH = 8, 2, 32, 16, 32, 64
ROUTER = moe.top_k_router(EXPERTS, K)
PAIRS = np.array(list(itertools.combinations(range(EXPERTS), 2)))


def initial(seed: int) -> dict:
    """Returns the parameters, drawn on the host."""
    rng = np.random.default_rng(seed)
    shapes = {
        "in": (64, SIZE),
        "router": (SIZE, EXPERTS),
        "up": (EXPERTS, SIZE, HIDDEN),
        "down": (EXPERTS, HIDDEN, SIZE),
        "shared_up": (SIZE, SHARED),
        "shared_down": (SHARED, SIZE),
        "out": (SIZE, 10),
    }
    return {n: np.float32(rng.normal(size=s) * s[-2] ** -0.5) for n, s in shapes.items()}


def forward(params, x):
    """Returns logits, the plan, and the inputs of all expert matrices."""
    x = x @ params["in"]
    plan = ROUTER.apply({"w": params["router"]}, x)
    hidden = jax.nn.relu(jnp.einsum("td,edf->tef", x, params["up"]))
    routed = jnp.einsum("te,tef,efd->td", moe.dense_weights(plan), hidden, params["down"])
    common = jax.nn.relu(x @ params["shared_up"])
    return (x + routed + common @ params["shared_down"]) @ params["out"], plan, (x, hidden, common)


def quantised(params, inputs, routed, bits, shared_bits, careful):
    """Returns the parameters with quantised experts: `bits` [E] and `shared_bits`, by GPTQ or by rounding."""
    x, hidden, common = inputs
    none = lambda n: (jnp.zeros((n, n)), jnp.zeros(()))

    def one(w, x, where, bits):
        hessian, _ = moe.update_hessian(*none(w.shape[0]), x, where=where)
        return moe.gptq(w, hessian, bits=bits) if careful else moe.quantize_groups(w, bits=bits)

    everyone = jnp.ones(len(x), bool)
    return {
        **params,
        "up": jax.vmap(one, (0, None, 1, 0))(params["up"], x, routed, bits),
        "down": jax.vmap(one, (0, 1, 1, 0))(params["down"], hidden, routed, bits),
        "shared_up": one(params["shared_up"], x, everyone, shared_bits),
        "shared_down": one(params["shared_down"], common, everyone, shared_bits),
    }


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy after quantisation."""
    steps, pairs = (150, PAIRS[:6]) if smoke else (600, PAIRS)
    splits = [digits(seed) for seed in seeds]
    train_set, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in (0, 2))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(initial(seed) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(params, key, train_set, test):
        def loss(params, batch, key):
            del key
            z, plan, _ = forward(params, batch["x"])
            cross = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))
            return cross + 0.01 * moe.load_balancing_loss(plan)

        optimizer = optax.adam(3e-3)
        params, _ = train(loss, params, train_set, optimizer=optimizer, steps=steps, batch=BATCH, key=key)
        _, plan, inputs = forward(params, train_set["x"])
        routed = moe.dense_weights(plan) > 0
        score = jnp.maximum(moe.outlier_score(params["up"]), moe.outlier_score(params["down"]))
        chosen = [jax.lax.top_k(v, 2)[1] for v in (plan.counts, score)]
        low = jnp.full(EXPERTS, 2)
        more = jax.vmap(lambda ids: low.at[ids].set(4))(jnp.concatenate([jnp.stack(chosen), jnp.asarray(pairs)]))
        bits = jnp.concatenate([low[None], more])
        shared = jnp.full(len(bits), 2).at[0].set(4)

        def measure(careful, bits, shared):
            small = quantised(params, inputs, routed, bits, shared, careful)
            return accuracy(forward(small, test["x"])[0], test["y"])

        by_gptq = jax.lax.map(lambda row: measure(True, *row), (bits, shared))
        whole = accuracy(forward(params, test["x"])[0], test["y"])
        return whole, by_gptq, measure(False, bits[0], shared[0])

    whole, by_gptq, plain = (np.asarray(a) for a in jax.jit(jax.vmap(one))(params, keys, train_set, test))
    arms = {"shared expert": by_gptq[:, 0], "random experts": by_gptq[:, 3:].mean(axis=1)}
    return Outcome(
        arms={n: v.tolist() for n, v in arms.items()},
        learnt={n: bool(whole.min() > 0.7) for n in arms},
        secondary={
            "most used experts": by_gptq[:, 1],
            "largest outliers": by_gptq[:, 2],
            "shared expert, plain rounding": plain,
            "not quantised": whole,
        },
        data="scikit-learn digits",
    )
