"""The grouped product against a loop over rows in float64: every pattern of empty groups, values and both gradients."""

import functools
import itertools
import sys

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab._compat import races_found, tpu_interpreter
from jaxlab.kernels import grouped_matmul
from jaxlab.kernels._grouped_pallas import FORMS

rng = np.random.default_rng()
M, K, N, E = 13, 3, 5, 6
MODULE = "jaxlab.kernels.grouped_matmul"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(sys.modules[MODULE], "_TILES", (4, 2))


def oracle(lhs, rhs, sizes, g):
    """Value and both gradients of sum(g * y)."""
    y, d_lhs, d_rhs = np.zeros((len(lhs), rhs.shape[2])), np.zeros(lhs.shape), np.zeros(rhs.shape)
    row = 0
    for e, size in enumerate(sizes):
        for _ in range(size):
            if row < len(lhs):
                y[row] = lhs[row] @ rhs[e]
                d_lhs[row] = rhs[e] @ g[row]
                d_rhs[e] += np.outer(lhs[row], g[row])
            row += 1
    return y, d_lhs, d_rhs


def patterns():
    """All 2^6 patterns of empty groups, all rows in one group, too many and too few rows, random sizes."""
    for kept in itertools.product((0, 1), repeat=E):
        yield np.array(kept) * rng.integers(1, 4, E)
    yield from (np.array([0, 0, M, 0, 0, 0]), np.array([9, 0, 9, 0, 3, 0]), np.zeros(E, int))
    yield from (rng.multinomial(M, rng.dirichlet(np.full(E, 0.3))) for _ in range(16))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_every_pattern_of_groups(implementation, transpose):
    lhs, rhs, g = rng.normal(size=(M, K)), rng.normal(size=(E, K, N)), rng.normal(size=(M, N))
    turned = np.swapaxes(rhs, 1, 2) if transpose else rhs

    @jax.jit
    def run(lhs, rhs, sizes):
        form = lambda a, b: grouped_matmul(a, b, sizes, transpose_rhs=transpose, implementation=implementation)
        y, pull = jax.vjp(form, lhs, rhs)
        return y, *pull(jnp.float32(g))

    for sizes in patterns():
        poisoned = np.where(np.arange(M)[:, None] < sizes.sum(), lhs, np.nan)
        got = run(jnp.float32(poisoned), jnp.float32(turned), jnp.asarray(sizes, jnp.int32))
        y, d_lhs, d_rhs = oracle(lhs, rhs, sizes, g)
        d_rhs = np.swapaxes(d_rhs, 1, 2) if transpose else d_rhs
        for name, a, b in zip(("y", "d_lhs", "d_rhs"), got, (y, d_lhs, d_rhs), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=f"{name} for {sizes}")


def test_vmap_with_shared_weights_and_with_shared_rows():
    lhs, rhs = jnp.float32(rng.normal(size=(2, M, K))), jnp.float32(rng.normal(size=(2, E, K, N)))
    sizes = jnp.array([[3, 0, 4, 1, 0, 5], [0, 13, 0, 0, 0, 0]])

    def both(lhs, rhs, sizes):
        return jax.value_and_grad(lambda a, b: jnp.sum(jnp.sin(grouped_matmul(a, b, sizes))), (0, 1))(lhs, rhs)

    for axes in ((0, None, 0), (None, 0, 0), (0, 0, None), (None, None, 0)):
        args = [a if axis == 0 else a[0] for a, axis in zip((lhs, rhs, sizes), axes, strict=True)]
        got = jax.jit(jax.vmap(both, in_axes=axes))(*args)
        for i in range(2):
            one = both(*(a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)))
            jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5), got, one)


def test_bfloat16_errs_by_its_rounding_alone():
    """Each entry is a sum of K products of rounded numbers, rounded once: 2^-8 of the sum of their sizes."""
    lhs, rhs = (jnp.bfloat16(rng.normal(size=s)) for s in ((M, K), (E, K, N)))
    sizes = np.array([3, 2, 0, 4, 1, 3])
    wide = [np.asarray(a, np.float64) for a in (lhs, rhs)]
    y = grouped_matmul(lhs, rhs, jnp.asarray(sizes))
    exact = oracle(*wide, sizes, np.zeros((M, N)))[0]
    sizes_of_terms = oracle(*map(np.abs, wide), sizes, np.zeros((M, N)))[0]
    assert y.dtype == jnp.bfloat16
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= 2.0**-8 * sizes_of_terms + 1e-6)


@pytest.mark.optimised
def test_temporary_bytes_do_not_grow_with_the_groups():
    sys.modules[MODULE]._TILES = (512, 128, 64, 32)

    def bytes_of(groups):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1024, 64), (groups, 64, 128))]
        sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
        loss = lambda a, b, sizes: jnp.sum(grouped_matmul(a, b, sizes) ** 2)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, sizes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(32) <= 1.2 * bytes_of(4)


def test_errors():
    lhs, rhs, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 2])
    for message, args, keywords in [
        (r"lhs and rhs must be \[M, K\] and \[E, K, N\]", (lhs[:, :2], rhs, sizes), {}),
        (r"\[E, N, K\]", (lhs, rhs, sizes), {"transpose_rhs": True}),
        (r"group_sizes has shape \(1,\), expected \(2,\)", (lhs, rhs, sizes[:1]), {}),
        (r"implementation='fast' of grouped_matmul must be one of", (lhs, rhs, sizes), {"implementation": "fast"}),
    ]:
        with pytest.raises(ValueError, match=message):
            grouped_matmul(*args, **keywords)
    assert grouped_matmul(lhs[:0], rhs, sizes * 0).shape == (0, 5)


def test_a_named_kernel_that_cannot_run_here_raises():
    with pytest.raises(Exception, match="platform"):
        jax.jit(lambda a, b, s: grouped_matmul(a, b, s, implementation="pallas"))(
            jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 2])
        )


def test_auto_is_no_kernel_where_the_compiler_spreads_the_program():
    """No hand-written kernel can be partitioned; in a map over all axes each device runs its own."""
    args = jnp.ones((8, 3)), jnp.ones((2, 3, 5)), jnp.array([4, 4])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def spread(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return grouped_matmul(*args)

    by_hand = jax.shard_map(grouped_matmul, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))
    programs = {"alone": grouped_matmul, "spread": spread, "by hand": by_hand}
    found = {name: "pallas_call" in str(jax.make_jaxpr(function)(*args)) for name, function in programs.items()}
    assert found == {"alone": True, "spread": False, "by hand": True}


@pytest.mark.parametrize("platform", sorted(FORMS))
def test_kernels_in_their_interpreter_equal_the_loop(platform):
    """Small blocks, so that tiles are shared by groups, groups span tiles, and every size is no multiple of a block."""
    interpret = tpu_interpreter(detect_races=True) if platform == "tpu" else True
    options = {"tiles": (16, 16, 16), "interpret": interpret}
    product, outer = FORMS[platform]
    rows, inner, columns = 41, 18, 21
    lhs, rhs, g = rng.normal(size=(rows, inner)), rng.normal(size=(E, inner, columns)), rng.normal(size=(rows, columns))

    @functools.partial(jax.jit, static_argnames="turned")
    def run(lhs, rhs, g, sizes, turned=False):
        y = product(lhs, rhs, sizes, transpose_rhs=turned, **options)
        return y if turned else (y, outer(lhs, g, sizes, dtype=jnp.float32, **options))

    for sizes in (np.array([5, 0, 17, 1, 9, 0]), np.array([0, 0, rows, 0, 0, 0]), np.zeros(E, int)):
        behind = np.arange(rows)[:, None] >= sizes.sum()
        args = [jnp.float32(np.where(behind, np.nan, a)) for a in (lhs, g)]
        y, _, d_rhs = oracle(lhs, rhs, sizes, np.where(behind, 0, g))
        sizes = jnp.asarray(sizes, jnp.int32)
        got, got_outer = run(args[0], jnp.float32(rhs), args[1], sizes)
        np.testing.assert_allclose(got, y, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(got_outer, d_rhs, rtol=2e-5, atol=2e-5)
    sizes = np.array([5, 0, 17, 1, 9, 0])
    turned = run(jnp.float32(lhs), jnp.float32(np.swapaxes(rhs, 1, 2)), args[1], jnp.asarray(sizes), turned=True)
    np.testing.assert_allclose(turned, oracle(lhs, rhs, sizes, g)[0], rtol=2e-5, atol=2e-5)
    assert platform != "tpu" or not races_found()


def grouped(lhs, rhs):
    return grouped_matmul(lhs, rhs, jnp.array([2, 0, 3]))


CASES = [
    Case(grouped, {"lhs": Arg("activations", (6, 3)), "rhs": Arg("activations", (3, 3, 4))}, wrt=("lhs", "rhs"),
         covers=("kernels.grouped_matmul",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
