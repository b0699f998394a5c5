"""Wasserstein predictive coding against loops with a hand-made derivative; exact distances by trying all orders."""

import itertools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information

rng = np.random.default_rng(0)
A, B = rng.normal(size=(2, 3, 4)).astype(np.float32)


def critic(params, x, y):
    return jnp.tanh(x @ params["a"]) @ (y @ params["b"])


def value_and_slope(x, y, a, b):
    h, v = np.tanh(x @ a), y @ b
    return h @ v, np.sqrt(((a @ ((1 - h**2) * v)) ** 2).sum() + ((b @ h) ** 2).sum())


def oracle(x, y, where, e, weight, one_sided):
    a, b = A.astype(np.float64), B.astype(np.float64)
    kept = list(np.flatnonzero(where))
    terms = np.zeros(len(x))
    for place, i in enumerate(kept):
        scores = [value_and_slope(x[i], y[j], a, b)[0] for j in kept]
        first, second = (kept[(place + step) % len(kept)] for step in (1, 2))
        point = e[i] * x[i] + (1 - e[i]) * x[first], e[i] * y[i] + (1 - e[i]) * y[second]
        excess = value_and_slope(*point, a, b)[1] - 1
        penalty = max(excess, 0) ** 2 if one_sided else excess**2
        terms[i] = np.log(np.mean(np.exp(scores))) - scores[place] + weight * penalty
    return terms


def test_equals_the_loop():
    x, y = rng.normal(size=(2, 6, 3)) * 0.5
    params, key = {"a": jnp.asarray(A), "b": jnp.asarray(B)}, jax.random.key(3)

    @jax.jit
    def run(x, y, where):
        options = [(10.0, False, "none"), (0.5, True, "none"), (0.0, False, "mean")]
        return [
            information.wpc_loss(params, critic, x, y, key=key, penalty_weight=weight, one_sided=one_sided, where=where,
                                 reduction=reduction)
            for weight, one_sided, reduction in options
        ]  # fmt: skip

    e = np.asarray(jax.random.uniform(key, (6,)), np.float64)
    for where in (np.ones(6, bool), np.array([1, 0, 1, 1, 0, 1], bool), np.eye(6, dtype=bool)[2], np.zeros(6, bool)):
        two_sided, one_sided, plain = run(*(jnp.float32(np.where(where[:, None], v, np.nan)) for v in (x, y)), where)
        np.testing.assert_allclose(two_sided, oracle(x, y, where, e, 10, False), rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(one_sided, oracle(x, y, where, e, 0.5, True), rtol=2e-5, atol=2e-6)
        expected = oracle(x, y, where, e, 0, False).sum() / max(where.sum(), 1)
        np.testing.assert_allclose(plain, expected, rtol=2e-5, atol=2e-6)
        scores = np.float32([[value_and_slope(a, b, A, B)[0] for b in y] for a in x])
        bound = information.info_nce_bound(scores, where=where)
        np.testing.assert_allclose(plain, -bound, rtol=2e-5, atol=2e-6)  # without the penalty it is InfoNCE


def test_the_penalty_of_a_linear_critic_is_known():
    a, b = np.array([3.0, 0.0, 4.0]), np.array([12.0, 0.0])
    linear = lambda scale, x, y: scale * (x @ jnp.float32(a) + y @ jnp.float32(b))  # slope 13 scale
    x, y = jnp.float32(rng.normal(size=(2, 4, 3))), jnp.float32(rng.normal(size=(2, 4, 2)))
    penalty = lambda scale, one_sided: information.gradient_penalty(
        scale, linear, x[0], y[0], x[1], y[1], key=jax.random.key(0), one_sided=one_sided
    )
    both = jax.jit(jax.vmap(lambda s: jnp.stack([penalty(s, False), penalty(s, True)])))
    np.testing.assert_allclose(both(jnp.float32([1.0, 0.01])), [[144, 144], [0.87**2, 0]], rtol=1e-5)


@jax.jit
def distances(x, y, where, keys):
    """One program for all tests of the exact distance."""
    return jax.vmap(lambda key: information.wasserstein_dependency(x, y, key=key, where=where))(keys)


KEYS, ROOM = jax.random.split(jax.random.key(1), 8), 64


def test_exact_distance_is_the_best_of_all_assignments():
    x, y = np.full((2, ROOM, 2), np.nan, np.float32)
    where = np.isin(np.arange(ROOM), [3, 20, 21, 40])
    x[where], y[where] = rng.normal(size=(2, 4, 2))
    orders = list(itertools.permutations(range(4)))

    def best(p):
        joint, product = np.c_[x[where], y[where]], np.c_[x[where], y[where][list(p)]]
        return min(np.mean([np.linalg.norm(joint[i] - product[s[i]]) for i in range(4)]) for s in orders)

    possible = np.array([best(p) for p in orders])
    got = np.asarray(distances(x, y, where, KEYS))
    assert np.abs(got[:, None] - possible[None]).min(axis=1).max() < 1e-5 and len(np.unique(got.round(4))) > 3
    assert not np.any(distances(x, y, np.zeros(ROOM, bool), KEYS))


def test_gaussians_lie_between_their_closed_bounds_and_scale_with_the_data():
    """A slope along one axis bounds W1 from below, W2 bounds it from above; information would not see the scale."""
    rho, where = 0.9, np.ones(ROOM, bool)
    z = rng.normal(size=(2, ROOM))
    x, y = z[0], rho * z[0] + np.sqrt(1 - rho**2) * z[1]
    wide = lambda v: np.float32(np.stack([v, 0 * v], axis=1))
    pairs = [(x, y), (7 * x, 7 * y), (x, z[1])]
    related, scaled, independent = (np.asarray(distances(wide(a), wide(b), where, KEYS)) for a, b in pairs)
    widths = np.sqrt([1 + rho, 1 - rho]) - 1
    low, high = np.abs(widths).max() * np.sqrt(2 / np.pi), np.sqrt((widths**2).sum())
    assert low < related.mean() < high + 0.1
    np.testing.assert_allclose(scaled, 7 * related, rtol=1e-4)
    assert independent.mean() < 0.6 * related.mean()
    steep = -np.abs(x[:, None] - y[None, :]) / np.sqrt(2)  # 1-Lipschitz in (x, y)
    bound = information.wasserstein_dual_bound(np.float32(steep))
    others = steep[~np.eye(ROOM, dtype=bool)]
    np.testing.assert_allclose(bound, np.diag(steep).mean() - others.mean(), rtol=1e-5)
    assert 0.3 < bound < related.mean() + 0.02


def test_dual_bound_without_a_second_pair_is_zero():
    scores = jnp.float32(rng.normal(size=(3, 3)))
    one = jax.jit(lambda where: information.wasserstein_dual_bound(scores, where=where))
    assert one(np.array([0, 1, 0], bool)) == 0 and one(np.zeros(3, bool)) == 0


def test_refuses():
    x, key = jnp.ones((4, 3)), jax.random.key(0)
    dot = lambda params, x, y: jnp.vdot(x, y)
    with pytest.raises(ValueError, match="penalty_weight=-1"):
        information.wpc_loss({}, dot, x, x, key=key, penalty_weight=-1.0)
    with pytest.raises(ValueError, match="critic must return a scalar"):
        information.wpc_loss({}, lambda params, x, y: x * y, x, x, key=key)
    with pytest.raises(ValueError, match=r"y has shape \(3, 3\)"):
        information.wpc_loss({}, dot, x, x[:3], key=key)
    with pytest.raises(ValueError, match="y has dtype int32"):
        information.wpc_loss({}, dot, x, x.astype(jnp.int32), key=key)
    with pytest.raises(ValueError, match="x_product has shape"):
        information.gradient_penalty({}, dot, x, x, x[:, :2], x, key=key)
    with pytest.raises(ValueError, match="where has shape"):
        information.wasserstein_dependency(x, x, key=key, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"scores must be \[N, N\]"):
        information.wasserstein_dual_bound(x)


def bilinear(params, x, y):
    return x @ (params @ y)


def dependency(x, y, seed):
    return information.wasserstein_dependency(x, y, key=jax.random.key(seed))


def wpc(x, where, seed, axis_name=None):
    """Pairs of x and twice x, so that the gradient is by both."""
    params, key = jnp.asarray(A[:, :3]), jax.random.key(seed)
    return information.wpc_loss(params, bilinear, x, 2 * x, key=key, where=where, axis_name=axis_name)


def penalty(x, y, where, seed):
    params, key = jnp.asarray(A[:, :3]), jax.random.key(seed)
    return information.gradient_penalty(params, bilinear, x, y, -x, -2 * y, key=key, where=where)


PAIRS = {"x": Arg("embeddings", (6, 3)), "y": Arg("embeddings", (6, 3))}
ARGS = {**PAIRS, "where": Arg("where", (6,)), "seed": Arg("index", (), high=9)}
ROWS = {"x": 0, "y": 0, "where": 0}
CASES = [
    Case(wpc, {name: ARGS[name] for name in ("x", "where", "seed")}, wrt=("x",), rows={"x": 0, "where": 0},
         name="wpc_loss", covers=("information.wpc_loss",)),
    Case(penalty, ARGS, wrt=("x", "y"), rows=ROWS, name="gradient_penalty", covers=("information.gradient_penalty",),
         helper=True),
    Case(dependency, {**PAIRS, "seed": Arg("index", (), high=9)}, wrt=("x", "y"), helper=True,
         name="wasserstein_dependency", covers=("information.wasserstein_dependency",)),
    Case(information.wasserstein_dual_bound, {"scores": Arg("scores", (6, 6)), "where": Arg("where", (6,))},
         wrt=("scores",), helper=True),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
