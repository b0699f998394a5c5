"""Modules that learnt from a teacher's modules make a mixture of experts a better start than drawing it.

The paper trains vision transformers on ImageNet; here residual networks of three modules learn handwritten digits from
300 labelled examples. The teacher has two dense blocks of width 64 a module, the meta network one of width 32, the
student a mixture of 4 experts, one for each example, in every module, of the meta network's width (so that only the
teacher needs stitches, which belong to its own training). Teacher and meta network are trained first; the student's
modules then learn by m2mKD, and the student is trained as a whole for 150 steps. Baseline: the same 150 steps from
scratch. Both choose from the same four learning rates on the validation set. What 150 steps more from scratch give
(those that the modules took side by side) stands beside it, as does the assembled student before the last part.
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
from jaxlab.types import Layer

MODULES, SIZE, WIDE, EXPERTS, HIDDEN, LABELLED, BATCH = 3, 32, 64, 4, 16, 300, 64
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ROUTER = moe.top_k_router(EXPERTS, 1, renormalize=False)


def draw(seed: int, modules: int) -> dict:
    """Returns the parameters of all networks, drawn on the host."""
    rng = np.random.default_rng([seed, 4])
    normal = lambda *shape: np.float32(rng.normal(size=shape) * shape[-2] ** -0.5)
    module = lambda width, blocks: {"up": normal(blocks, SIZE, width), "down": normal(blocks, width, SIZE)}
    ends = lambda: {"in": normal(64, SIZE), "out": normal(SIZE, 10)}
    mixture = lambda: {
        "router": normal(SIZE, EXPERTS),
        "up": normal(EXPERTS, SIZE, HIDDEN),
        "down": normal(EXPERTS, HIDDEN, SIZE),
    }
    named = lambda make: {f"module_{i}": make() for i in range(modules)}
    return {
        "teacher": {**ends(), **named(lambda: module(WIDE, 2))},
        "meta": {**ends(), **named(lambda: module(SIZE, 1))},
        "student": {**ends(), **named(mixture)},
    }


def unit(h):
    """Returns rows of mean square 1."""
    return h * jax.lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + 1e-6)


def blocks(p, h):
    """Returns h after the residual blocks of one module."""
    for i in range(p["up"].shape[0]):
        h = h + jax.nn.relu(unit(h) @ p["up"][i]) @ p["down"][i]
    return h


def mixture(p, h):
    """Returns h after one mixture, and its plan."""
    x = unit(h)
    plan = ROUTER.apply({"w": p["router"]}, x)
    each = jnp.einsum("tef,efd->ted", jax.nn.relu(jnp.einsum("td,edf->tef", x, p["up"])), p["down"])
    return h + jnp.einsum("te,ted->td", moe.dense_weights(plan), each), plan


def whole(params, module):
    """Returns the K functions of a network; the first takes pixels, the last gives logits."""
    number = len(params) - 2

    def stage(i):
        def apply(h):
            h = h @ params["in"] if i == 0 else h
            out = module(params[f"module_{i}"], h)
            h, plan = out if isinstance(out, tuple) else (out, None)
            h = unit(h) @ params["out"] if i == number - 1 else h
            return h if plan is None else (h, plan)

        return apply

    return [stage(i) for i in range(number)]


def student_layer(i):
    """Returns module i of the student with the stem or the head that belongs to it."""

    def apply(p, h):
        h, plan = mixture(p, h @ p["in"] if "in" in p else h)
        return unit(h) @ p["out"] if "out" in p else h, plan

    return Layer(lambda key, size: {}, apply)


def parts(params):
    """Returns the student's parameters module by module."""
    each = [dict(params[f"module_{i}"]) for i in range(len(params) - 2)]
    each[0]["in"], each[-1]["out"] = params["in"], params["out"]
    return each


def logits(each, x):
    """Returns logits and the balance loss of the student, given module by module."""
    inner = [{n: own[n] for n in ("router", "up", "down")} for own in each]
    step = lambda h, p: (lambda h, plan: (h, moe.load_balancing_loss(plan)))(*mixture(p, h))
    h, balance = jax.lax.scan(step, x @ each[0]["in"], jax.tree.map(lambda *leaves: jnp.stack(leaves), *inner))
    return unit(h) @ each[-1]["out"], jnp.sum(balance)


def sureness(z, y):
    """Returns the mean probability of the right class."""
    return jnp.mean(jnp.take_along_axis(jax.nn.softmax(z, axis=1), y[:, None], axis=1))


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the mean probability of the right class on the test set after the last part."""
    steps, modules = (40, 2) if smoke else (150, MODULES)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    train_set = {n: v[:, :LABELLED] for n, v in train_set.items()}
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(draw(seed, modules) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    cross = lambda z, y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y))

    def dense_logits(p, x):
        for stage in whole(p, blocks):
            x = stage(x)
        return x

    def prepare(params, key, train_set, test):
        # Adam goes by entries, so that two networks in one loop learn apart.
        loss = lambda p, b, key: sum(cross(dense_logits(p[n], b["x"]), b["y"]) for n in p)
        options = {"optimizer": optax.adam(3e-3), "steps": 2 * steps, "batch": BATCH, "key": key}
        trained, _ = train(loss, {n: params[n] for n in ("teacher", "meta")}, train_set, **options)
        return trained, sureness(dense_logits(trained["teacher"], test["x"]), test["y"])

    def run(rate, frozen, start, key, train_set, val, test):
        key_modules, key_whole = jax.random.split(key)
        fit = lambda each, steps: train(
            lambda p, b, key: (lambda z, balance: cross(z, b["y"]) + 0.01 * balance)(*logits(p, b["x"])),
            each, train_set, optimizer=optax.adam(rate), steps=steps, batch=BATCH, key=key_whole,
        )[0]  # fmt: skip
        learner = moe.m2mkd(
            [student_layer(i) for i in range(modules)],
            whole(frozen["meta"], blocks),
            whole(frozen["teacher"], blocks),
            optax.adam(rate),
            widths=[SIZE] * modules,
        )
        batch = {n: v[:BATCH] for n, v in train_set.items()}
        state = learner.init(key, batch)
        own = {f"module_{i}": {"module": p} for i, p in enumerate(parts(start))}
        state = type(state)(own, {}, optax.adam(rate).init(own), state.step)

        def step(state, key):
            rows = jax.random.randint(key, (BATCH,), 0, LABELLED)
            return learner.update(state, {n: v[rows] for n, v in train_set.items()}, key)[0], None

        state, _ = jax.lax.scan(step, state, jax.random.split(key_modules, steps))
        assembled = moe.assemble(state.params)
        stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        starts = stack(assembled, parts(start))
        models = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), jax.vmap(lambda p: fit(p, steps))(starts), starts)
        names = ["m2mKD", "from scratch", "assembled", "drawn"]
        if not smoke:
            longer = fit(parts(start), 2 * steps)
            models = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), models, longer)
            names.append("from scratch, twice as long")

        def score(part):
            return jax.vmap(lambda p: sureness(logits(p, part["x"])[0], part["y"]))(models)

        return {n: (score(val)[i], score(test)[i]) for i, n in enumerate(names)}

    frozen, taught = jax.jit(jax.vmap(prepare))(params, keys, train_set, test)
    rates = jnp.asarray(RATES[2:3] if smoke else RATES)
    over = jax.jit(jax.vmap(jax.vmap(run, (None, 0, 0, 0, 0, 0, 0)), (0, *[None] * 6)))
    out = jax.tree.map(np.asarray, over(rates, frozen, params["student"], keys, train_set, val, test))
    on_val, on_test = ({n: v[i] for n, v in out.items()} for i in (0, 1))
    best = {n: int(v.mean(axis=1).argmax()) for n, v in on_val.items()}
    found = {n: on_test[n][best[n]] for n in on_test}
    arms = {n: found[n].tolist() for n in ("m2mKD", "from scratch")}
    return Outcome(
        arms=arms,
        learnt={n: bool(np.min(v) > 0.3) for n, v in arms.items()},
        secondary={"all": found, "teacher": np.asarray(taught), "rate": {n: float(rates[i]) for n, i in best.items()}},
        data="scikit-learn digits, 300 labelled",
    )
