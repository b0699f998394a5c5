"""Softmax pooling of ragged bags against a loop over bags in float64, in both forms."""

import sys

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.kernels import attention_pool

rng = np.random.default_rng()
MODULE = "jaxlab.kernels.attention_pool"
T, D, BAGS = 11, 3, 4


def oracle(values, scores, ids, bags):
    heads = scores if scores.ndim == 2 else scores[:, None]
    pooled, weights = np.zeros((bags, heads.shape[1], values.shape[1])), np.zeros(heads.shape)
    for b, k in np.ndindex(bags, heads.shape[1]):
        mine = [i for i in range(len(ids)) if ids[i] == b]
        if mine:
            e = np.exp(heads[mine, k] - max(heads[mine, k]))
            weights[mine, k] = e / e.sum()
            pooled[b, k] = sum(w * values[i] for w, i in zip(e / e.sum(), mine, strict=True))
    return (pooled, weights) if scores.ndim == 2 else (pooled[:, 0], weights[:, 0])


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("form", ["reference", "xla", "xla by segments"])
def test_equals_the_loop(form, heads, monkeypatch):
    monkeypatch.setattr(sys.modules[MODULE], "_CHUNK", 4)
    monkeypatch.setattr(sys.modules[MODULE], "_MEMBERS", 0 if form == "xla by segments" else 512)
    values = rng.normal(size=(T, D))
    scores = rng.normal(size=(T,) if heads is None else (T, heads)) * 3
    ids = rng.choice([-1, 0, 2, 3, BAGS], size=T).astype(np.int32)  # bag 1 is empty, two kinds of padding
    ids[:2] = [-1, 3]
    gone = (ids < 0) | (ids >= BAGS)
    poison = lambda a: jnp.float32(np.where(gone.reshape(-1, *[1] * (a.ndim - 1)), np.nan, a))
    g, h = (rng.normal(size=a.shape) for a in oracle(values, scores, ids, BAGS))

    def total(values, scores):
        out = attention_pool(values, scores, ids, BAGS, return_weights=True, implementation=form.split()[0])
        return jnp.sum(out[0] * jnp.float32(g)) + jnp.sum(out[1] * jnp.float32(h)), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(poison(values), poison(scores))
    for got, want in zip(out, oracle(values, scores, ids, BAGS), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for i, gradient in enumerate(grads):
        assert not np.any(np.asarray(gradient)[gone])
        direction, step = rng.normal(size=gradient.shape), 1e-5
        direction[gone] = 0
        ends = []
        for s in (1, -1):
            moved = [values, scores]
            moved[i] = moved[i] + s * step * direction
            ends.append(sum(np.sum(a * w) for a, w in zip(oracle(*moved, ids, BAGS), (g, h), strict=True)))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-4, atol=2e-4)


def test_no_instance_and_a_bag_of_infinitely_low_scores_give_zero():
    assert not np.any(attention_pool(jnp.ones((0, 2)), jnp.ones(0), jnp.zeros(0, int), 3))
    low = jnp.full(2, -jnp.inf)
    value, grad = jax.value_and_grad(lambda s: attention_pool(jnp.ones((2, 1)), s, jnp.zeros(2, int), 1).sum())(low)
    assert value == 0 and not np.any(grad)


@pytest.mark.optimised
def test_temporary_bytes_do_not_grow_with_the_width_of_the_values():
    def bytes_of(size):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((100_000, size), (100_000,))]
        ids = jax.ShapeDtypeStruct((100_000,), jnp.int32)

        def both(v, s, ids):
            return jax.value_and_grad(lambda v, s: jnp.sum(attention_pool(v, s, ids, 16) ** 2), (0, 1))(v, s)

        return jax.jit(both).lower(*shapes, ids).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(512) <= 24 * 2**20
    assert bytes_of(512) <= bytes_of(64) + 16 * 2**20  # a weighted copy of the values would be 171 MiB more


def test_errors():
    v, s, ids = jnp.ones((3, 2)), jnp.ones(3), jnp.zeros(3, int)
    for message, args, keywords in [
        (r"values and segment_ids must be \[T, D\] and \[T\]", (v, s, ids[:2], 1), {}),
        (r"scores has shape \(2,\), expected \(3,\) or \(3, K\)", (v, s[:2], ids, 1), {}),
        (r"num_segments=0 must be at least 1", (v, s, ids, 0), {}),
        (r"no pallas implementation of attention_pool", (v, s, ids, 1), {"implementation": "pallas"}),
    ]:
        with pytest.raises(ValueError, match=message):
            attention_pool(*args, **keywords)


def pooled(values, scores, ids, where=None):
    return attention_pool(values, scores, ids if where is None else jnp.where(where, ids, -1), 3)


ARGS = {"values": Arg("embeddings", (6, 3)), "scores": Arg("scores", (6,)), "ids": Arg("index", (6,), high=3),
        "where": Arg("where", (6,))}  # fmt: skip
CASES = [
    Case(pooled, ARGS, wrt=("values", "scores"), rows=dict.fromkeys(ARGS, 0), symmetry="invariant",
         covers=("kernels.attention_pool",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
