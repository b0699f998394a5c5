"""The selective scan against explicit loops in float64, forward and backward, in both forms."""

import sys

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.kernels import selective_scan

rng = np.random.default_rng()
BATCH, L, D, N = 2, 7, 3, 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlab.kernels.selective_scan"], "_CHUNK", 3)


def draw(length=L):
    u, B, C = (rng.normal(size=(BATCH, length, n)) for n in (D, N, N))
    return {
        "u": u,
        "delta": np.log1p(np.exp(rng.normal(size=(BATCH, length, D)))),
        "A": -np.exp(rng.normal(size=(D, N))),
        "B": B,
        "C": C,
        "D": rng.normal(size=D),
        "initial_state": rng.normal(size=(BATCH, D, N)),
    }


def oracle(u, delta, A, B, C, D, initial_state, where=None, reverse=False):
    y, state = np.zeros(u.shape), initial_state.copy()
    steps = range(u.shape[1])
    for b, d in np.ndindex(u.shape[0], u.shape[2]):
        for t in reversed(steps) if reverse else steps:
            if where is not None and not where[b, t]:
                continue
            for n in range(A.shape[1]):
                decay = np.exp(delta[b, t, d] * A[d, n])
                state[b, d, n] = decay * state[b, d, n] + delta[b, t, d] * B[b, t, n] * u[b, t, d]
            y[b, t, d] = C[b, t] @ state[b, d] + D[d] * u[b, t, d]
    return y, state


def weighed(out, weights):
    return sum(np.sum(w * o) for w, o in zip(weights, out, strict=True))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_loop(implementation, reverse):
    args = draw()
    where = rng.random((BATCH, L)) > 0.3
    poisoned = {n: np.where(where[:, :, None], a, np.nan) if a.shape[:2] == (BATCH, L) else a for n, a in args.items()}
    weights = [rng.normal(size=(BATCH, L, D)), rng.normal(size=(BATCH, D, N))]

    def total(args):
        out = selective_scan(**args, where=where, reverse=reverse, return_state=True, implementation=implementation)
        return sum(jnp.sum(w * o) for w, o in zip(map(jnp.float32, weights), out, strict=True)), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(jax.tree.map(jnp.float32, poisoned))
    expected = oracle(**args, where=where, reverse=reverse)
    for got, want in zip(out, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    for name, gradient in grads.items():
        direction, step = rng.normal(size=args[name].shape), 1e-5
        if gradient.shape[:2] == (BATCH, L):
            direction = direction * where[:, :, None]
            assert not np.any(np.asarray(gradient)[~where])
        ends = [
            weighed(oracle(**{**args, name: args[name] + s * step * direction}, where=where, reverse=reverse), weights)
            for s in (1, -1)
        ]
        slope, got = (ends[0] - ends[1]) / (2 * step), np.sum(np.asarray(gradient, np.float64) * direction)
        scale = max(1.0, np.sum(np.abs(gradient * direction)))
        assert abs(slope - got) < 2e-4 * scale, (name, slope, got)


@pytest.mark.parametrize("length", [1, 2, 6, 8])
def test_any_length_and_no_step(length):
    args = jax.tree.map(jnp.float32, draw(length))
    want = selective_scan(**args, return_state=True, implementation="reference")
    got = selective_scan(**args, return_state=True, implementation="xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    y, state = selective_scan(**jax.tree.map(jnp.float32, draw(0)), return_state=True)
    assert y.shape == (BATCH, 0, D) and state.shape == (BATCH, D, N)


def test_two_halves_make_the_whole():
    args = jax.tree.map(jnp.float32, draw())
    whole, last = selective_scan(**args, return_state=True)
    cut = lambda part: {n: a[:, part] if a.shape[:2] == (BATCH, L) else a for n, a in args.items()}
    first, state = selective_scan(**cut(slice(None, 4)), return_state=True)
    second, end = selective_scan(**{**cut(slice(4, None)), "initial_state": state}, return_state=True)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-5)


@pytest.mark.optimised
def test_the_backward_keeps_no_states():
    """Temporary bytes are a seventh of what automatic differentiation of the plain scan keeps."""
    sys.modules["jaxlab.kernels.selective_scan"]._CHUNK = 64
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 2048, 64), (2, 2048, 64), (64, 16), (2, 2048, 16))]

    def bytes_of(implementation):
        def loss(u, delta, A, B):
            return jnp.sum(selective_scan(u, delta, A, B, B, implementation=implementation))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of("xla") * 7 <= bytes_of("reference")


def test_errors():
    u, A, B = jnp.ones((1, 3, 2)), jnp.ones((2, 4)), jnp.ones((1, 3, 4))
    cases = [
        (r"u and delta must both be \[B, L, D\]", (u, u[:, :2], A, B, B), {}),
        (r"A has shape \(3, 4\), expected \(2, N\)", (u, u, jnp.ones((3, 4)), B, B), {}),
        (r"C has shape \(1, 3, 3\), expected \(1, 3, 4\)", (u, u, A, B, B[..., :3]), {}),
        (r"D has shape \(3,\), expected \(2,\)", (u, u, A, B, B, jnp.ones(3)), {}),
        (r"where has shape \(3,\)", (u, u, A, B, B), {"where": jnp.ones(3, bool)}),
        (r"initial_state has shape \(2, 4\)", (u, u, A, B, B), {"initial_state": A}),
        (r"no pallas implementation of selective_scan", (u, u, A, B, B), {"implementation": "pallas"}),
    ]
    for message, args, keywords in cases:
        with pytest.raises(ValueError, match=message):
            selective_scan(*args, **keywords)


def scanned(u, delta, A, B, C):
    """Step sizes and decays as Mamba makes them, so that nothing grows without bound."""
    return selective_scan(u, jax.nn.sigmoid(delta), -jax.nn.softplus(A), B, C)


def masked(u, where=None):
    """Row by row along time: what is not kept takes no part."""
    ones = jnp.ones((1, u.shape[0], 2), u.dtype)
    half = jnp.full((1, *u.shape), 0.5, u.dtype)
    A = -jnp.ones((u.shape[1], 2), u.dtype)
    return selective_scan(u[None], half, A, ones, ones, where=None if where is None else where[None])[0]


CASES = [
    Case(
        scanned,
        {"u": Arg("activations", (4, 5, 3)), "delta": Arg("activations", (4, 5, 3)), "A": Arg("activations", (3, 2)),
         "B": Arg("probabilities", (4, 5, 2)), "C": Arg("probabilities", (4, 5, 2))},
        wrt=("u", "delta", "A", "B", "C"),
        rows={"u": 0, "delta": 0, "B": 0, "C": 0},
        symmetry="equivariant",
        covers=("kernels.selective_scan",),
    ),
    Case(masked, {"u": Arg("activations", (6, 3)), "where": Arg("where", (6,))}, wrt=("u",),
         rows={"u": 0, "where": 0}, symmetry="equivariant", skip={"permutation": "time has an order"}),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
