"""The gradient contract over vmap, pmap and shard_map, with replication tracked and not."""

import functools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab import ops

N, ROWS, D = 8, 2, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(N * ROWS, D)).astype(np.float32)
W = rng.normal(size=(D,)).astype(np.float32)
E = rng.normal(size=(N, D)).astype(np.float32)  # one "expert" a shard


def pair_loss(params, x, axis_name):
    """A loss that couples all rows, and one sharded leaf that scales the rows of its own shard."""
    z = jnp.tanh(x @ params["w"]) + jnp.sin(x @ params["e"])
    rows = ops.gather_rows(z, axis_name)
    return ops.global_mean(jnp.mean((z[:, None] - rows[None, :]) ** 2, axis=1), axis_name=axis_name)


def oracle(w, e):
    """The same loss over all rows, in float64 by explicit loops."""
    x = X.astype(np.float64)
    z = np.array([np.tanh(x[i] @ w) + np.sin(x[i] @ e[i // ROWS]) for i in range(N * ROWS)])
    return np.mean([(a - b) ** 2 for a in z for b in z])


def finite_differences():
    w, e, h = W.astype(np.float64), E.astype(np.float64), 1e-6
    gw = [(oracle(w + h * np.eye(D)[i], e) - oracle(w - h * np.eye(D)[i], e)) / (2 * h) for i in range(D)]
    ge = np.zeros_like(e)
    for i in np.ndindex(e.shape):
        d = np.zeros_like(e)
        d[i] = h
        ge[i] = (oracle(w, e + d) - oracle(w, e - d)) / (2 * h)
    return oracle(w, e), np.array(gw), ge


def step(w, e, x, sharded):
    params = {"w": w, "e": e.reshape(D)}
    run = ops.value_and_grad(
        functools.partial(pair_loss, axis_name="data"), axis_name="data", sharded={"w": False, "e": sharded}
    )
    value, grads = run(params, x)
    return value.reshape(1), grads["w"].reshape(1, D), grads["e"].reshape(1, D)


def inside(mode, mesh):
    f = functools.partial(step, sharded=True)
    if mode == "vmap":
        v, gw, ge = jax.jit(jax.vmap(f, in_axes=(None, 0, 0), axis_name="data"))(W, E, X.reshape(N, ROWS, D))
    elif mode == "pmap":
        v, gw, ge = jax.pmap(f, in_axes=(None, 0, 0), axis_name="data")(W, E, X.reshape(N, ROWS, D))
    else:
        specs = (P(), P("data"), P("data"))
        out = (P("data"),) * 3
        mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=mode == "checked")
        v, gw, ge = jax.jit(mapped)(W, E, X)
    return np.ravel(v), np.reshape(gw, (N, D)), np.reshape(ge, (N, D))


@pytest.mark.parametrize("mode", ["vmap", "pmap", "checked", "unchecked"])
def test_gradient_inside_the_map_is_the_global_one(mode, mesh8):
    value, gw, ge = finite_differences()
    v, got_w, got_e = inside(mode, mesh8)
    np.testing.assert_allclose(v, value, rtol=1e-5)
    np.testing.assert_allclose(got_w, np.tile(gw, (N, 1)), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(got_e, ge, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["vmap", "checked", "unchecked"])
def test_gradient_outside_the_map_is_the_global_one(mode, mesh8):
    _, gw, ge = finite_differences()

    def local(w, e, x):
        return pair_loss({"w": w, "e": e.reshape(D)}, x, "data")

    def total(w, e):
        if mode == "vmap":
            mapped = jax.vmap(local, in_axes=(None, 0, 0), axis_name="data")
            return jnp.mean(mapped(w, e, X.reshape(N, ROWS, D)))
        specs = (P(), P("data"), P("data"))
        return jax.shard_map(local, mesh=mesh8, in_specs=specs, out_specs=P(), check_vma=mode == "checked")(w, e, X)

    got_w, got_e = jax.jit(jax.grad(total, argnums=(0, 1)))(W, E)
    np.testing.assert_allclose(got_w, gw, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(got_e, ge, rtol=2e-4, atol=1e-6)


def test_has_aux_and_no_axis():
    (value, aux), grad = ops.value_and_grad(lambda w: (w * w, "aux"), has_aux=True)(3.0)
    assert (value, aux, grad) == (9.0, "aux", 6.0)


def test_global_mean_counts_kept_terms_of_all_shards():
    terms = jnp.arange(8.0).reshape(4, 2).at[0, 0].set(jnp.nan)
    where = jnp.ones((4, 2), bool).at[0, 0].set(False)
    got = jax.vmap(lambda t, w: ops.global_mean(t, w, axis_name="i"), axis_name="i")(terms, where)
    np.testing.assert_allclose(got, np.full(4, 4.0))
    grad = jax.grad(lambda t: ops.global_mean(t, jnp.zeros(2, bool)))(jnp.array([jnp.nan, 1.0]))
    assert grad.tolist() == [0.0, 0.0]


def spread_gradient(x, *, axis_name=None):
    """Every collective at work: the gradient, inside the map, of a global loss that couples all rows."""

    def loss(w):
        everyone, share = ops.gather_rows(x * w, axis_name), (1 + ops.axis_index(axis_name)) / ops.axis_size(axis_name)
        part = ops.match_varying(jnp.sum(x * w * jnp.mean(everyone, axis=0)[None, :]) * share, x)[0]
        return ops.all_sum(part, axis_name) + ops.all_mean(jnp.sum(x * w) * 0.1, axis_name)

    value, grad = ops.value_and_grad(loss, axis_name=axis_name)(jnp.ones((), x.dtype))
    return value + grad


CASES = [
    Case(
        spread_gradient,
        {"x": Arg("activations", (6, 4))},
        wrt=("x",),
        rows={"x": 0},
        covers=tuple(f"ops.{name}" for name in ("all_mean", "all_sum", "axis_index", "axis_size", "gather_rows",
                                               "match_varying", "value_and_grad")),
        skip={"shard_map": "a sum over shards of unequal terms; the tests above compare every mode with differences",
              "dtype": "arithmetic in the dtype of the input, on purpose"},
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
