"""Weights of negatives against differences of the loop's loss; the batch-size protocol against NumPy's fit."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information

rng = np.random.default_rng(0)


def cosines(z, mu):
    return z @ mu.T / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(mu, axis=1)[None]


def loss_of(logits, i, others, negatives):
    """-log p(k=1) of row i from its similarities over the temperature."""
    e = np.exp(logits)
    return -np.log(e[i] / (e[i] + (e[others].mean() if negatives == "mean" else e[others].sum())))


@pytest.mark.parametrize("negatives", ["mean", "sum"])
def test_weights_are_the_derivative_and_sum_to_what_is_missing(negatives):
    z, mu = rng.normal(size=(2, 6, 4))
    where = np.array([1, 1, 0, 1, 1, 0], bool)
    with jax.enable_x64(True):
        dirty = [np.where(where[:, None], v, np.nan) for v in (z, mu)]
        run = jax.jit(
            lambda z, mu: information.contrastive_weights(z, mu, temperature=0.4, negatives=negatives, where=where)
        )
        got = np.asarray(run(*dirty))
    logits, expected, missing = cosines(z, mu) / 0.4, np.zeros((6, 6)), np.zeros(6)
    kept = np.flatnonzero(where)
    for i in kept:
        others = [j for j in kept if j != i]
        for j in others:
            step = np.eye(6)[j] * 1e-6
            up, down = (loss_of(logits[i] + s * step, i, others, negatives) for s in (1, -1))
            expected[i, j] = (up - down) / 2e-6
        missing[i] = 1 - np.exp(-loss_of(logits[i], i, others, negatives))
    np.testing.assert_allclose(got, expected, atol=1e-8)
    np.testing.assert_allclose(got.sum(1), missing, rtol=1e-9)


def test_the_expected_negative_does_not_depend_on_the_batch():
    """Over random similarities the mean form's loss stays near where it was, that of the sum grows as log N."""
    z = np.float32(rng.normal(size=(2, 64, 64, 3)))
    loss = lambda size, negatives: jnp.mean(
        jax.vmap(lambda z, mu: information.cmim_contrastive_loss(z, mu, temperature=1.0, negatives=negatives))(
            *(v[:, :size] for v in z)
        )
    )
    run = jax.jit(lambda: [loss(size, negatives) for negatives in ("mean", "sum") for size in (8, 64)])
    few, many, few_summed, many_summed = (float(v) for v in run())
    assert abs(many - few) < 0.05
    assert abs(many_summed - few_summed - np.log(63 / 7)) < 0.3


def test_protocol():
    calls = []

    def evaluate(size, seed):
        calls.append((size, seed))
        return 0.5 + 0.02 * np.log2(size) * (seed + 1) + 0.001 * (size == 16)

    found = information.batch_size_sensitivity(evaluate, sizes=(4, 16, 64), seeds=(0, 2))
    assert calls == [(size, seed) for size in (4, 16, 64) for seed in (0, 2)]
    values = np.array([[0.5 + 0.02 * np.log2(b) * (s + 1) + 0.001 * (b == 16) for s in (0, 2)] for b in (4, 16, 64)])
    np.testing.assert_allclose(found["values"], values)
    np.testing.assert_allclose(found["slope"], np.polyfit([2, 4, 6], values, 1)[0], rtol=1e-9)
    np.testing.assert_allclose(found["spread"], np.ptp(values, axis=0))
    np.testing.assert_allclose(found["mean"], values.mean(1))
    np.testing.assert_allclose(found["std"], values.std(1, ddof=1))
    alone = information.batch_size_sensitivity(lambda size, seed: float("nan"), sizes=(1, 2), seeds=(0,))
    assert np.isnan(alone["slope"]).all() and not alone["std"].any()


def test_refuses():
    z = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="codes and mean must have one shape"):
        information.contrastive_weights(z, z[:3])
    with pytest.raises(ValueError, match="where has shape"):
        information.contrastive_weights(z, z, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="temperature=0"):
        information.contrastive_weights(z, z, temperature=0.0)
    with pytest.raises(ValueError, match="negatives='max'"):
        information.contrastive_weights(z, z, negatives="max")
    with pytest.raises(ValueError, match="two different sizes"):
        information.batch_size_sensitivity(lambda size, seed: 0.0, sizes=(4, 4))
    with pytest.raises(ValueError, match="at least one seed"):
        information.batch_size_sensitivity(lambda size, seed: 0.0, seeds=())


def weights(codes, mean, where):
    return information.contrastive_weights(codes, mean, where=where)


def protocol(scores):
    found = information.batch_size_sensitivity(lambda size, seed: scores[size, seed], sizes=(1, 2), seeds=(0, 1, 2))
    return found["slope"], found["spread"]


ARGS = {"codes": Arg("embeddings", (6, 4)), "mean": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))}
CASES = [
    Case(weights, ARGS, wrt=("codes", "mean"), rows=dict.fromkeys(ARGS, 0), name="contrastive_weights",
         covers=("information.contrastive_weights",), skip={
             "padding": "columns are rows, too: a short input has fewer of them",
             "permutation": "rows and columns are both permuted"}),
    Case(protocol, {"scores": Arg("scores", (3, 3))}, host=True, covers=("information.batch_size_sensitivity",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
