"""Contrasting routers lets the task-wise gate tell new tasks apart.

The paper trains transformers on histories of reinforcement learning; here (another task) a small network without
attention reads random walks in a room of 7 x 7 squares, whose reward falls with the distance from a goal that it does
not see, and learns the best action of every step from the step and the mean of the history so far, through the paper's
two mixtures. 32 goals are for training, 17 for testing. Primary: cosine of the task router's representations of two
walks to one goal, minus that of walks to different goals, on test goals. Baseline: the same network without the loss
that contrasts routers. Both choose from the same three learning rates by the accuracy of actions on validation walks to
the training goals; the accuracy for test goals stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import moe
from jaxlab.claims.harness import Outcome
from jaxlab.ops.masked import safe_normalize
from jaxlab.ops.trees import ema_update

ROOM, STEPS, SIZE, TASKS, TRAIN_GOALS = 7, 16, 32, 16, 32
RATES = (1e-3, 3e-3, 1e-2)
MOVES = jnp.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
FFN = moe.t2mir_ffn(token_experts=4, task_experts=8, token_width=64, task_width=128)
ROUTERS = {"token": moe.noisy_top_k_router(4, 2, hidden=True), "task": moe.noisy_top_k_router(8, 2, hidden=True)}


def walks(key: jax.Array, goals: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns features [N, STEPS, 15] of random walks to the goals [N, 2], and the best action of each step."""
    key_start, key_move = jax.random.split(key)
    start = jax.random.randint(key_start, goals.shape, 0, ROOM)
    moves = MOVES[jax.random.randint(key_move, (STEPS, len(goals)), 0, len(MOVES))]
    step = lambda place, move: (jnp.clip(place + move, 0, ROOM - 1), place)
    places = jnp.moveaxis(jax.lax.scan(step, start, moves)[1], 0, 1)
    reward = -jnp.sum(jnp.abs(places - goals[:, None]), axis=2) / ROOM
    squares = jax.nn.one_hot(places, ROOM).reshape(len(goals), STEPS, -1)
    after = jnp.clip(places[:, :, None] + MOVES[None, None], 0, ROOM - 1)
    best = jnp.argmin(jnp.sum(jnp.abs(after - goals[:, None, None]), axis=3), axis=2)
    return jnp.concatenate([squares, reward[:, :, None]], axis=2), best


def forward(params, x, key=None):
    """Returns logits of actions [N, STEPS, 5], and the plans and router inputs of all tokens."""
    own = x @ params["step"]
    # What a step meant: squares and reward together; a step sees the mean over those up to itself.
    meant = jax.nn.relu(x @ params["meaning"]) @ params["context"]
    history = jnp.cumsum(meant, axis=1) / jnp.arange(1, STEPS + 1)[None, :, None]
    h = jax.nn.relu(own + history).reshape(-1, SIZE)
    unit = h * jax.lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + 1e-6)
    noisy = {"key": key, "train": key is not None}
    plans, halves = {}, []
    for name, router in ROUTERS.items():
        p = params["ffn"][name]
        plans[name] = router.apply(p["router"], unit, **(noisy if name == "token" else {}))
        # What FFN computes, every expert on every token: small ones are faster so.
        hidden = jnp.einsum("td,edf->tef", unit, p["experts"]["up"]) + p["experts"]["up_bias"][None]
        each = jnp.einsum("tef,efd->ted", jax.nn.leaky_relu(hidden), p["experts"]["down"])
        each = each + p["experts"]["down_bias"][None]
        halves.append(jnp.einsum("te,ted->td", moe.dense_weights(plans[name]), each))
    z = ((h + jnp.concatenate(halves, axis=1)) @ params["out"]).reshape(*x.shape[:2], -1)
    return z, plans, unit


def representation(logits, number):
    """Returns the task router's view [number, E] of each walk."""
    return moe.router_representation(logits.reshape(number, STEPS, -1))


def draw(seed: int) -> tuple[np.ndarray, dict]:
    """Returns the goals, those for training first, and the parameters, drawn on the host."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: np.float32(rng.normal(size=shape) * shape[-2] ** -0.5)
    shapes = jax.eval_shape(lambda key: FFN.init(key, SIZE), jax.random.key(0))
    squares = np.stack(np.meshgrid(np.arange(ROOM), np.arange(ROOM), indexing="ij"), axis=2).reshape(-1, 2)
    params = {
        "step": normal(2 * ROOM + 1, SIZE),
        "meaning": normal(2 * ROOM + 1, 2 * SIZE),
        "context": normal(2 * SIZE, SIZE),
        "ffn": jax.tree.map(lambda a: normal(*a.shape), shapes),
        "out": normal(SIZE, len(MOVES)),
        "contrast": np.float32(rng.normal(size=(8, 8))),
    }
    for name in ROUTERS:
        own = params["ffn"][name]
        own["router"]["noise"] = np.zeros_like(own["router"]["noise"])
        own["experts"] |= {n: np.zeros_like(own["experts"][n]) for n in ("up_bias", "down_bias")}
    return squares[rng.permutation(len(squares))], params


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns how much closer walks to one goal are than walks to different ones."""
    steps = 60 if smoke else 300

    def run(rate, contrast, goals, params, key):
        key_steps, key_measure = jax.random.split(key)
        optimizer = optax.adamw(rate, weight_decay=1e-4)

        def step(carry, key):
            params, slow, state = carry
            key_goal, key_walk, key_noise = jax.random.split(key, 3)
            chosen = (jax.random.randint(key_goal, (), 0, TRAIN_GOALS) + jnp.arange(TASKS)) % TRAIN_GOALS
            x, best = walks(key_walk, goals[jnp.concatenate([chosen, chosen])])

            def loss(params):
                z, plans, unit = forward(params, x, key_noise)
                policy = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, best))
                balance = moe.importance_loss(plans["token"]) + moe.load_loss(plans["token"])
                target = jnp.tanh(unit @ slow["w"]) @ slow["v"]
                both = [representation(z, 2 * TASKS).reshape(2, TASKS, -1) for z in (plans["task"].logits, target)]
                return policy + 0.1 * balance + contrast * moe.router_contrastive_loss(*both, params["contrast"])

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, ema_update(slow, params["ffn"]["task"]["router"], decay=0.995), state), None

        start = (params, params["ffn"]["task"]["router"], optimizer.init(params))
        (params, _, _), _ = jax.lax.scan(step, start, jax.random.split(key_steps, steps))

        x, best = walks(key_measure, jnp.concatenate([goals, goals]))
        z, plans, _ = forward(params, x)
        right = jnp.mean((jnp.argmax(z, axis=2) == best).astype(jnp.float32), axis=1).reshape(2, -1)
        unit = safe_normalize(representation(plans["task"].logits, len(x))).reshape(2, len(goals), -1)[:, TRAIN_GOALS:]
        cosine = unit[0] @ unit[1].T
        own, number = jnp.trace(cosine), len(cosine)
        apart = own / number - (jnp.sum(cosine) - own) / (number * (number - 1))
        return jnp.mean(right[:, :TRAIN_GOALS]), apart, jnp.mean(right[:, TRAIN_GOALS:])

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    rates, contrasts = jnp.asarray(RATES[1:2] if smoke else RATES), jnp.array([0.01, 0.0])
    goals, params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(draw(seed) for seed in seeds))
    over = jax.vmap(jax.vmap(run, (None, None, 0, 0, 0)), (0, *[None] * 4))
    over = jax.jit(jax.vmap(over, (None, 0, None, None, None)))
    on_val, apart, accurate = (np.asarray(a) for a in over(rates, contrasts, goals, params, keys))
    best = on_val.mean(axis=2).argmax(axis=1)
    names = ("contrasted routers", "without contrast")
    return Outcome(
        arms={name: apart[i, best[i]].tolist() for i, name in enumerate(names)},
        learnt={name: bool(on_val[i, best[i]].mean() > 0.4) for i, name in enumerate(names)},
        secondary={
            "rate": {name: float(rates[best[i]]) for i, name in enumerate(names)},
            "accuracy of actions for new goals": {name: accurate[i, best[i]] for i, name in enumerate(names)},
        },
        data="synthetic: random walks in a room of 7 x 7 squares",
    )
