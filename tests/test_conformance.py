"""The suite itself is tested: what it must let pass, and wrong functions that it must catch."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import ops

ARGS = {"x": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))}
ROWS = {"x": 0, "where": 0}


def right(x, *, where=None, axis_name=None):
    """Mean squared length of the kept rows."""
    x = ops.zero_where_false(x, where)
    terms = jnp.sum(jnp.square(x.astype(ops.compute_dtype(x))), axis=-1)
    return ops.global_mean(terms, where, axis_name=axis_name).astype(x.dtype)


def case(function, **changes):
    return Case(function, **{"args": ARGS, "wrt": ("x",), "rows": ROWS, "symmetry": "invariant", **changes})


def test_a_right_function_passes_within_the_budget():
    conformance.run_case(case(right))


def test_too_many_executables_are_caught(monkeypatch):
    monkeypatch.setattr(conformance, "MAX_EXECUTABLES", 7)
    with pytest.raises(AssertionError, match="8 executables, 7 are allowed"):
        conformance.run_case(case(right))


def leaks_mask(x, *, where=None):
    return jnp.mean(jnp.sum(x * x, axis=-1)).astype(x.dtype)


def multiplies_mask(x, *, where=None):
    terms = jnp.sum(x.astype(jnp.float32) ** 2, axis=-1) * where
    return (jnp.sum(terms) / jnp.maximum(jnp.sum(where), 1)).astype(x.dtype)


def masks_after_square_root(x, *, where=None):
    norm = jnp.sqrt(jnp.sum(ops.zero_where_false(x, where) ** 2, axis=-1))
    return ops.masked_mean(norm, where).astype(x.dtype)


def divides_by_count(x, *, where=None):
    return (ops.masked_sum(jnp.sum(ops.zero_where_false(x, where) ** 2, -1)) / jnp.sum(where)).astype(x.dtype)


def promotes(x, *, where=None):
    return right(x.astype(jnp.float32), where=where)[None]


def demotes_float64(x, *, where=None):
    return right(x.astype(jnp.float32), where=where).astype(jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32)


def sums_in_bfloat16(x, *, where=None):
    big = jnp.broadcast_to(ops.zero_where_false(x, where)[None] ** 2, (600, *x.shape)).reshape(-1)
    total = jax.lax.fori_loop(0, big.size, lambda i, t: t + big[i], jnp.zeros((), x.dtype))
    return total / 600


def depends_on_order(x, *, where=None):
    rows = jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]
    return right((x * rows).astype(x.dtype), where=where)


def forgets_stop_gradient(x, *, where=None):
    return right(x, where=where)


@jax.custom_vjp
def wrong_square(x):
    return x * x


wrong_square.defvjp(lambda x: (x * x, x), lambda x, g: (g * x,))


def wrong_derivative(x, *, where=None):
    return ops.masked_mean(jnp.sum(wrong_square(ops.zero_where_false(x, where)), -1), where).astype(x.dtype)


def local_mean(x, *, where=None, axis_name=None):
    value = right(x, where=where)
    return value if axis_name is None else jax.lax.pmean(value, axis_name)


calls = []


def side_effect(x, *, where=None):
    calls.append(1)
    return right(x, where=where) * len(calls)


def depends_on_tracing(x, *, where=None):
    return right(x, where=where) * (1.0 if isinstance(x, jax.core.Tracer) else 2.0)


def reads_concrete(x, *, where=None):
    return right(x, where=where) * (1.0 if float(jnp.sum(x)) > 0 else 2.0)


WRONG = [
    (leaks_mask, "masked", {}),
    (multiplies_mask, "masked", {}),
    (masks_after_square_root, "extremes", {}),
    (divides_by_count, "extremes", {}),
    (promotes, "dtype", {"skip": {"permutation": "not the point", "shard_map": "not the point"}}),
    (demotes_float64, "gradient", {}),
    (sums_in_bfloat16, "dtype", {}),
    (depends_on_order, "permutation", {}),
    (forgets_stop_gradient, "frozen", {"wrt": (), "frozen": ("x",), "reason": "x is a constant"}),
    (wrong_derivative, "gradient", {}),
    (local_mean, "shard_map", {}),
    (side_effect, "jit", {}),
    (depends_on_tracing, "jit", {"eager": True}),
]


@pytest.mark.parametrize("function, invariant, changes", WRONG, ids=[f.__name__ for f, _, _ in WRONG])
def test_a_wrong_function_is_caught(function, invariant, changes):
    runner = conformance.Runner(case(function, **changes))
    with pytest.raises((AssertionError, ValueError)):
        conformance.CHECKS[invariant](runner)


def test_concrete_reads_are_caught():
    with pytest.raises(jax.errors.ConcretizationTypeError):
        conformance.run_case(case(reads_concrete))


def test_key_reuse_and_unused_keys_are_caught():
    args = {"key": Arg("key"), "x": Arg("embeddings", (4, 3))}

    def reuses(key, x):
        return x + jax.random.normal(key, x.shape) + jax.random.uniform(key, x.shape)

    def ignores(key, x):
        return x

    def uses(key, x):
        return x + jax.random.normal(key, x.shape, x.dtype)

    for function in (reuses, ignores):
        with pytest.raises((AssertionError, jax.errors.KeyReuseError)):
            conformance.check_key(conformance.Runner(Case(function, args, wrt=("x",))))
    conformance.check_key(conformance.Runner(Case(uses, args, wrt=("x",))))


def test_a_skip_needs_a_known_name_and_a_reason():
    with pytest.raises(ValueError, match="unknown invariants"):
        conformance.run_case(case(right, skip={"everything": "because"}))
    with pytest.raises(ValueError, match="needs a reason"):
        conformance.run_case(case(right, skip={"jit": ""}))


def test_draws_follow_their_roles():
    probabilities = conformance.draw(Arg("probabilities", (3, 5)), 0)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
    assert conformance.draw(Arg("labels", (50,), high=4), 0).max() == 3
    with pytest.raises(ValueError, match="unknown role"):
        conformance.draw(Arg("vibes", (3,)), 0)
