"""Grids, GPTQ, scores and bit plans against loops."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)


def grid_oracle(x, bits, symmetric, shrink=1.0):
    top = x.dtype.type(2**bits - 1)
    low, high = min(0.0, x.min()) * shrink, max(0.0, x.max()) * shrink
    if symmetric:
        high = max(abs(low), high)
        low = -high
    if low == high == 0:
        low, high = -top / top, top / top
    scale = (high - low) / top
    return scale, (top + 1) / 2 if symmetric else np.round(-low / scale)


def rounded(x, scale, zero, bits):
    return scale * (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero)


def groups_oracle(w, bits, group, symmetric, search=False):
    out = np.zeros(w.shape)
    for column in range(w.shape[1]):
        for start in range(0, len(w), group):
            x = w[start : start + group, column]
            grids = [grid_oracle(x, bits, symmetric, 1 - i / 100) for i in range(80 if search else 1)]
            errors = [np.sum(np.abs(rounded(x, *g, bits) - x) ** 2.4) for g in grids]
            out[start : start + group, column] = rounded(x, *grids[int(np.argmin(errors))], bits)
    return out


def gptq_oracle(w, hessian, bits, group, symmetric, damping=0.01):
    w, h = w.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    for i in range(len(h)):
        if h[i, i] == 0:
            h[i, i], w[i] = 1, 0
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    out, grids = np.zeros(w.shape), None
    for j in range(len(w)):
        if j % group == 0:
            grids = [grid_oracle(w[j : j + group, c], bits, symmetric) for c in range(w.shape[1])]
        for c in range(w.shape[1]):
            out[j, c] = rounded(w[j, c], *grids[c], bits)
        error = (w[j] - out[j]) / upper[j, j]
        for later in range(j + 1, len(w)):
            w[later] -= upper[j, later] * error
    return out


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_and_gptq_equal_the_loops(symmetric):
    """Groups that do not divide the inputs, dead inputs, columns of zeros and of one sign, several bits at once."""
    x, mix = rng.normal(size=(40, 10)), rng.normal(size=(10, 10))
    x = x @ mix
    x[:, 3] = 0
    w = rng.normal(size=(10, 4)).astype(np.float32)
    w[:, 1], w[:, 2] = 0, np.abs(w[:, 2])
    hessian = np.float32(2 * x.T @ x / 40)
    bits = np.array([2, 3, 8])

    def run(bits):
        options = {"bits": bits, "group_size": 4, "symmetric": symmetric}
        return moe.quantize_groups(w, **options), moe.gptq(w, hessian, **options)

    plain, careful = jax.jit(jax.vmap(run))(bits)
    for i, b in enumerate(bits):
        expected = groups_oracle(w, b, 4, symmetric)
        # The largest weight of a symmetric grid lies half-way between two levels: either is right.
        np.testing.assert_allclose(np.abs(plain[i] - w), np.abs(expected - w), atol=1e-5)
        if not symmetric:
            np.testing.assert_allclose(plain[i], expected, atol=1e-5)
            np.testing.assert_allclose(careful[i], gptq_oracle(w, hessian, b, 4, symmetric), atol=2e-3)
    errors = np.abs(plain - w[None]).mean((1, 2))
    assert errors[0] > errors[1] > errors[2]
    for i in range(2):  # GPTQ changes the outputs less than rounding does
        change = [np.linalg.norm(x @ (w - q[i])) for q in (np.asarray(careful), np.asarray(plain))]
        assert change[0] < change[1]


def test_search_shrinks_to_the_least_error():
    w = np.float32(np.random.default_rng(3).standard_t(2, size=(6, 3)))
    got = jax.jit(lambda w: moe.quantize_groups(w, bits=2, group_size=3, search=True))(w)
    np.testing.assert_allclose(got, groups_oracle(w.astype(np.float64), 2, 3, True, search=True), atol=1e-4)


def test_a_quantised_matrix_stays_and_independent_inputs_change_nothing():
    w = np.float32(rng.normal(size=(8, 3)))

    def run(w):
        scale, zero = moe.quantization_grid(w, bits=3)
        once = moe.fake_quantize(w, scale, zero, bits=3)
        diagonal = jnp.diag(jnp.arange(1.0, 9.0))
        return scale, once, moe.fake_quantize(once, scale, zero, bits=3), moe.gptq(w, diagonal, bits=3), diagonal

    scale, once, twice, careful, _ = jax.jit(run)(w)
    np.testing.assert_array_equal(once, twice)
    np.testing.assert_allclose(careful, once, atol=1e-5)
    inside = w < np.asarray(scale) * 3.5  # the largest level lies half a step below the largest weight
    assert np.all((np.abs(once - w) <= scale / 2 + 1e-6) | ~inside)


def test_hessians_of_batches_add_up():
    x, where = rng.normal(size=(3, 5, 4)).astype(np.float32), rng.random((3, 5)) < 0.7
    dirty = np.where(where[:, :, None], x, np.nan).astype(np.float32)
    step = jax.jit(lambda h, n, x, w: moe.update_hessian(h, n, x, where=w))
    state = jnp.zeros((4, 4)), jnp.zeros(())
    for batch, keep in zip(dirty, where, strict=True):
        state = step(*state, batch, keep)
    real = x[where]
    np.testing.assert_allclose(state[0], 2 * real.T @ real / len(real), rtol=1e-4, atol=1e-5)
    assert int(state[1]) == len(real)


def test_scores():
    w = rng.normal(size=(2, 6, 5))
    expected = [max(np.abs(row).max() / np.abs(row).mean() for row in m) for m in w]
    got = jax.jit(moe.outlier_score)
    np.testing.assert_allclose(got(np.float32(w)), expected, rtol=1e-5)
    np.testing.assert_allclose(got(np.float32(1e30 * w)), expected, rtol=1e-5)
    single = np.zeros((2, 6, 5), np.float32)
    single[:, 2, 1] = 3
    assert got(single).tolist() == [5, 5] and got(0 * single).tolist() == [0, 0]
    x, y, where = *rng.normal(size=(2, 6, 4)), np.arange(6) < 4
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x[:4], y[:4], strict=True)]
    np.testing.assert_allclose(moe.block_cosine(np.float32(x), np.float32(y), where=where), np.mean(cosines), rtol=1e-5)


def test_the_predictor_is_its_formula():
    net = moe.block_predictor(7)
    params, x = net.init(jax.random.key(0), 4), rng.normal(size=(5, 4)).astype(np.float32)
    expected = np.tanh(np.maximum(x @ params["up"], 0) @ params["down"])[:, 0]
    np.testing.assert_allclose(jax.jit(net.apply)(params, x), expected, rtol=1e-5, atol=1e-6)


def test_bits_stay_in_the_budget():
    sizes, scores = rng.integers(1, 50, 12), rng.random(12)
    for budget in (2.0, 2.5, 3.3, 4.0):
        bits = moe.allocate_bits(scores, sizes, budget=budget)
        assert moe.average_bits(list(bits), list(sizes)) <= budget + 1e-9
        left = (budget - 2) * sizes.sum() - 2 * sizes[bits == 4].sum()
        assert all(2 * size > left + 1e-9 for size in sizes[bits == 2]), "another one would have fitted"
    assert set(bits) == {4}
    usage = np.array([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    plan = moe.moe_bit_plan(usage, attention=8, first_blocks=1, top_experts=1)
    assert plan["experts"].tolist() == [[4, 4, 4], [4, 2, 2], [2, 2, 4]] and plan["attention"].tolist() == [8] * 3
    weights = {"attention": np.array([10, 10, 10]), "shared": np.array([4, 4, 4]), "experts": np.full((3, 3), 5)}
    expected = (8 * 30 + 4 * 12 + 5 * (4 * 3 + 8 + 8)) / (30 + 12 + 45)
    np.testing.assert_allclose(moe.average_bits(plan, weights), expected)
    assert moe.average_bits({"a": 4, "b": 4}, {"a": 1, "b": 7}) == 4


def test_refuses():
    w = jnp.ones((4, 2))
    for make, match in (
        (lambda: moe.gptq(w, jnp.eye(3), bits=2), "w and hessian must be"),
        (lambda: moe.gptq(w, jnp.eye(4), bits=0), "bits=0"),
        (lambda: moe.gptq(w, jnp.eye(4), bits=2, damping=0.0), "damping=0.0"),
        (lambda: moe.quantize_groups(w[0], bits=2), "w must be"),
        (lambda: moe.quantize_groups(w, bits=17), "bits=17"),
        (lambda: moe.quantize_groups(w, bits=2, group_size=0), "group_size=0"),
        (lambda: moe.update_hessian(jnp.eye(3), jnp.zeros(()), w), "hessian and x must be"),
        (lambda: moe.outlier_score(jnp.ones(3)), "w must be"),
        (lambda: moe.block_cosine(w, w[:2]), "x and y must both"),
        (lambda: moe.block_predictor(0), "hidden=0"),
        (lambda: moe.allocate_bits([1.0], [1, 2], budget=3), "scores and sizes"),
        (lambda: moe.allocate_bits([1.0], [1], budget=1), "budget=1"),
        (lambda: moe.moe_bit_plan(np.ones(3)), "usage must be"),
        (lambda: moe.moe_bit_plan(np.ones((2, 3)), top_experts=4), "top_experts=4"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def quantised(w, hessian):
    scale, zero = moe.quantization_grid(w, bits=4)
    plain = moe.fake_quantize(w, scale.astype(w.dtype), zero.astype(w.dtype), bits=4)
    square = jnp.matmul(hessian.T, hessian) + jnp.eye(4, dtype=w.dtype)
    return plain, moe.quantize_groups(w, bits=4), moe.gptq(w, square / jnp.max(jnp.abs(square)), bits=4)


def measured(x, y, where):
    hessian, _ = moe.update_hessian(jnp.zeros((3, 3), x.dtype), jnp.zeros((), x.dtype), x, where=where)
    net = moe.block_predictor(4)
    params = {"up": jnp.ones((3, 4), jnp.promote_types(x.dtype, jnp.float32)), "down": jnp.ones((4, 1), x.dtype)}
    return moe.block_cosine(x, y, where=where), net.apply(params, x), moe.outlier_score(x), hessian


def bits(scores):
    sizes = np.arange(1, 7)
    chosen = moe.allocate_bits(scores, sizes, budget=3.0)
    plan = moe.moe_bit_plan(np.stack([scores, scores]), top_experts=2)
    return chosen, plan["experts"], np.asarray(moe.average_bits(list(chosen), list(sizes)))


CASES = [
    Case(lambda x, y, where: moe.block_cosine(x, y, where=where), wrt=("x", "y"), name="block_cosine",
         args={"x": Arg("activations", (6, 3)), "y": Arg("activations", (6, 3)), "where": Arg("where", (6,))},
         rows={"x": 0, "y": 0, "where": 0}, symmetry="invariant", covers=("moe.block_cosine",)),
    Case(measured, {"x": Arg("activations", (6, 3)), "y": Arg("activations", (6, 3)), "where": Arg("where", (6,))},
         reason="statistics; the predictor is two products", helper=True,
         covers=("moe.update_hessian", "moe.block_predictor", "moe.outlier_score")),
    Case(quantised, {"w": Arg("activations", (4, 3)), "hessian": Arg("activations", (4, 4))}, helper=True,
         reason="rounding has no gradient", bfloat16_tolerance=0.6,
         covers=("moe.gptq", "moe.quantize_groups", "moe.quantization_grid", "moe.fake_quantize")),
    Case(bits, {"scores": Arg("weights", (6,))}, host=True,
         covers=("moe.allocate_bits", "moe.average_bits", "moe.moe_bit_plan")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
