"""Kernels compile for every target; none of this runs without JAXLAB_TEST_AOT=1, and then nothing may be skipped."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxlab.kernels import aot, expert_ffn, grouped_matmul
from jaxlab.kernels._grouped_pallas import FORMS
from jaxlab.types import RoutingPlan

M, K, N, E = 4096, 512, 1024, 8
SIZES = jax.ShapeDtypeStruct((E,), jnp.int32)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


@pytest.mark.aot
@pytest.mark.parametrize("target", aot.TARGETS)
def test_grouped_matmul_and_its_gradients_compile(target):
    """The public function picks the kernels by itself: one in the forward, two more in the backward."""

    def both(lhs, rhs, sizes, dy):
        y, pull = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes), lhs, rhs)
        return y, *pull(dy)

    report = aot.compile_report(both, (shape(M, K), shape(E, K, N), SIZES, shape(M, N)), target)
    assert report.kernels == 3
    if target.startswith("tpu"):
        assert 0.9 <= report.flops / (3 * 2 * M * K * N) <= 1.2


@pytest.mark.aot
@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:tpu7x", "gpu:h100"])  # its kernels are those of every target above
def test_expert_ffn_and_its_gradients_compile(target):
    """Three products; in the backward three by weights, three for the rows, and two again, which both passes share."""

    def both(x, weights, plan, dy):
        y, pull = jax.vjp(lambda x, weights: expert_ffn(x, weights, plan), x, weights)
        return y, *pull(dy)

    tokens, size, hidden, rows = 2048, 512, 1024, M
    weights = {"up": shape(E, size, hidden), "gate": shape(E, size, hidden), "down": shape(E, hidden, size)}
    ids, scores = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((tokens, E), jnp.float32)
    scalar, weight = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    plan = RoutingPlan(ids, ids, weight, SIZES, scores, scores, scalar)
    report = aot.compile_report(both, (shape(tokens, size), weights, plan, shape(tokens, size)), target)
    assert report.kernels == 3 + 3 + 3
    if target.startswith("tpu"):
        assert 0.9 <= report.flops / (9 * 2 * rows * size * hidden) <= 1.2


@pytest.mark.aot
@pytest.mark.parametrize("platform, target", [("tpu", "tpu:v5e"), ("cuda", "gpu:h100")])
def test_float32_and_ragged_sizes_compile(platform, target):
    product, outer = FORMS[platform]
    lhs, rhs, dy = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((300, 96), (E, 96, 200), (300, 200)))
    aot.compile_report(functools.partial(product, transpose_rhs=False), (lhs, rhs, SIZES), target)
    aot.compile_report(functools.partial(outer, dtype=jnp.float32), (lhs, dy, SIZES), target)


@pytest.mark.aot
def test_a_silent_fall_back_is_an_error():
    with pytest.raises(RuntimeError, match="holds no hand-written kernel"):
        aot.compile_report(lambda x: x + 1, (shape(8, 128),), "tpu:v5e")


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match="target='tpu:v9' must be one of tpu:v4, "):
        aot.compile_report(jnp.sin, (shape(8, 128),), "tpu:v9")
    assert "core_count: 132" in aot.gpu_config("h100") and "major: 10" in aot.gpu_config("b200")
