"""Two specialists put together by the mean of their logits predict a mixed text better than either of them.

The paper trains transformers on text in two languages and tests knowledge; here (another task) small networks predict
the next of 96 characters from the eight before, through one frozen embedding of code points: one learns code, one
prose, both from Python's own library (statements, and documentation strings). Bits per character on a test text that is
half of each, negated; the baseline is the better of the two specialists. The mean of their parameters and one network
that was trained on both texts for as many steps stand beside it, as do the bits after each of three stages of growth on
the mixed text. All choose from the same two learning rates on validation text.
"""

from __future__ import annotations

import ast
import io
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import moe
from jaxlab.claims.harness import Outcome

MODULES = ("argparse", "ast", "datetime", "decimal", "difflib", "doctest", "inspect", "mailbox", "pickle", "pdb",
           "tarfile", "threading", "turtle", "typing", "zipfile", "statistics")  # fmt: skip
CONTEXT, SIZE, HIDDEN, CHARACTERS, BATCH = 8, 24, 96, 96, 128
RATES = (3e-3, 1e-2)
EMBEDDING = moe.codepoint_embedding(np.append(np.arange(32, 127), 10), SIZE)


def texts(modules: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the code and the prose of modules of Python's library as characters 0 .. 95."""
    code, prose = [], []
    for name in modules:
        for file in (f"{name}.py", f"{name}/__init__.py", f"_py{name}.py"):
            path = Path(sysconfig.get_path("stdlib")) / file
            if not path.exists():
                continue
            source = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    prose.append(ast.get_docstring(node) or "")
            words = list(tokenize.generate_tokens(io.StringIO(source).readline))
            kept = [
                t.string for t in words if t.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.NEWLINE)
            ]
            code.append(" ".join(kept).replace("\n ", "\n"))
    table = np.full(128, -1)
    table[32:127], table[10] = np.arange(95), 95
    result = {}
    for kind, parts in (("code", code), ("prose", prose)):
        raw = np.frombuffer("\n".join(parts).encode("ascii", "ignore"), np.uint8)
        ids = table[raw]
        result[kind] = ids[ids >= 0].astype(np.int32)
    return result


def initial(seed: int, blocks: int) -> dict:
    """Returns a model, drawn on the host."""
    rng = np.random.default_rng([seed, blocks])
    width = CONTEXT * SIZE
    block = lambda: {
        "up": np.float32(rng.normal(size=(width, HIDDEN)) * width**-0.5),
        "down": np.float32(rng.normal(size=(HIDDEN, width)) * HIDDEN**-0.5),
    }
    return {
        "head": np.float32(rng.normal(size=(width, CHARACTERS)) * width**-0.5),
        "blocks": {f"block_{i}": block() for i in range(blocks)},
    }


def forward(params, x):
    """Returns logits of the next character of contexts [N, CONTEXT]."""
    h = jnp.asarray(EMBEDDING)[x].reshape(len(x), -1) * CONTEXT**0.5
    for i in range(len(params["blocks"])):
        block = params["blocks"][f"block_{i}"]
        unit = h * jax.lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + 1e-6)
        h = h + jax.nn.relu(unit @ block["up"]) @ block["down"]
    return (h * jax.lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + 1e-6)) @ params["head"]


def bits(z, y):
    """Returns the mean bits per character."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y)) / jnp.log(2.0)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns minus the bits per character of the mixed test text."""
    steps, rows, rows_train = (60, 400, 4000) if smoke else (300, 3000, 30_000)
    text = texts(MODULES[:2] if smoke else MODULES)
    starts = {n: np.random.default_rng(9).permutation(len(ids) - CONTEXT - 1) for n, ids in text.items()}
    cut = lambda n, rows: (
        np.stack([text[n][rows + i] for i in range(CONTEXT)], axis=1), text[n][rows + CONTEXT]
    )  # fmt: skip
    part = lambda n, seed, a, b: cut(n, np.random.default_rng([seed, 3]).permutation(starts[n])[a:b])

    def split(seed):
        joined = lambda a, b: tuple(
            np.concatenate(pair) for pair in zip(*(part(n, seed, a, b) for n in text), strict=True)
        )
        own = [part("code", seed, 0, rows_train), part("prose", seed, 0, rows_train), joined(0, rows_train // 2)]
        own = tuple(np.stack(arrays) for arrays in zip(*own, strict=True))
        return own, joined(rows_train, rows_train + rows), joined(rows_train + rows, rows_train + 2 * rows)

    own, val, test = (jax.tree.map(lambda *a: jnp.stack(a), *parts) for parts in zip(*map(split, seeds), strict=True))
    stacked = lambda blocks: jax.tree.map(lambda *a: jnp.stack(a), *(initial(seed, blocks) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def fit(params, data, key, optimizer):
        def step(carry, key):
            params, state = carry
            at = jax.random.randint(key, (BATCH,), 0, len(data[1]))
            loss = lambda p: bits(forward(p, data[0][at]), data[1][at])
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]

    def run(rate, params, single, own, val, test, key):
        optimizer = optax.adam(rate)
        three = jax.vmap(lambda data: fit(params, data, key, optimizer))(own)
        models = {n: jax.tree.map(lambda leaf, i=i: leaf[i], three) for i, n in enumerate(("code", "prose", "both"))}
        pair = moe.compose_experts([models["code"], models["prose"]])
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), pair)
        grown, stages = single, {}
        for stage in range(0 if smoke else 3):
            if stage:
                fresh = jax.tree.map(lambda leaf: leaf, params["blocks"][f"block_{stage - 1}"])
                grown = moe.grow(grown, fresh, zero_outputs=["down"])
            active = moe.train_active(optimizer, moe.active_mask(grown))
            grown = fit(grown, jax.tree.map(lambda leaf: leaf[2], own), key, active)
            stages[f"grown to {stage + 1}"] = grown

        def measure(part):
            z = jax.vmap(forward, (0, None))(three, part[0])
            result = {n: bits(z[i], part[1]) for i, n in enumerate(models)}
            result["mean of logits"] = bits(moe.average_logits(z[:2]), part[1])
            others = {"mean of parameters": mean, **stages}
            return {**result, **{n: bits(forward(p, part[0]), part[1]) for n, p in others.items()}}

        return measure(val), measure(test)

    rates = jnp.asarray(RATES[1:] if smoke else RATES)
    over = jax.vmap(jax.vmap(run, (None, 0, 0, 0, 0, 0, 0)), (0, *[None] * 6))
    on_val, on_test = jax.tree.map(np.asarray, jax.jit(over)(rates, stacked(2), stacked(1), own, val, test, keys))
    best = {n: int(v.mean(axis=1).argmin()) for n, v in on_val.items()}
    found = {n: on_test[n][best[n]] for n in on_test}
    better = min(("code", "prose"), key=lambda n: on_val[n][best[n]].mean())
    arms = {"mean of logits": (-found["mean of logits"]).tolist(), "better specialist": (-found[better]).tolist()}
    return Outcome(
        arms=arms,
        learnt={n: bool(np.mean(v) > -5.8) for n, v in arms.items()},
        secondary={"bits": found, "rate": {n: float(rates[i]) for n, i in best.items()}, "better specialist": better},
        data="documentation and statements of Python's standard library",
    )
