"""Profiles, the rule, pruning and the sink score against loops and NumPy."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)


def rule_oracle(maxima, include, quantile, times, floor, where):
    layers = round(include * len(maxima))
    values = [maxima[i, e] for i in range(layers) for e in range(maxima.shape[1]) if where[i, e]]
    found = np.zeros(maxima.shape, bool)
    if not values:
        return found
    limit = max(values) // times if floor else max(values) / times
    percentile = np.percentile(values, quantile)
    for i in range(layers):
        for e in range(maxima.shape[1]):
            found[i, e] = where[i, e] and maxima[i, e] > percentile and maxima[i, e] > limit
    return found


@pytest.mark.parametrize("floor, include, quantile", [(False, 0.75, 99.5), (True, 1.0, 80.0)])
def test_the_rule_equals_the_loop(floor, include, quantile):
    options = {"include_layers": include, "quantile": quantile, "floor": floor}
    run = jax.jit(jax.vmap(lambda m, w: moe.super_expert_mask(m, where=w, **options)))
    maxima = np.float32(np.exp(2 * rng.normal(size=(6, 8, 12))))
    where = rng.random((6, 8, 12)) < 0.8
    where[0], where[1] = True, False
    got = run(maxima, where)
    for m, w, g in zip(maxima.astype(np.float64), where, got, strict=True):
        np.testing.assert_array_equal(g, rule_oracle(m, include, quantile, 10.0, floor, w))


def test_a_planted_expert_is_found_ranked_and_pruned():
    """One expert of one layer has a gain of 1000 on one channel; batches may come in any order."""
    layers, experts, tokens, size = 4, 8, 64, 6
    weights = rng.normal(size=(layers, experts, size, size)).astype(np.float32)
    weights[1, 5, :, 2] *= 1000
    x = rng.normal(size=(layers, tokens, size)).astype(np.float32)
    ids = rng.integers(0, experts - 1, (layers, tokens)).astype(np.int32)  # the last expert gets nothing
    ids[:, 7] = experts  # nor does an unused row count
    outputs = np.einsum("ltd,ltdf->ltf", x, weights[np.arange(layers)[:, None], np.minimum(ids, experts - 1)])
    profile = jax.jit(jax.vmap(lambda o, e: moe.profile_outputs(o, e, experts)))
    whole = profile(outputs, ids)
    halves = [profile(outputs[:, s], ids[:, s]) for s in (slice(40), slice(40, None))]
    merged = moe.merge_profiles(*halves)
    jax.tree.map(np.testing.assert_array_equal, whole, merged)
    for i in range(layers):
        for e in range(experts):
            mine = np.abs(outputs[i][ids[i] == e])
            np.testing.assert_allclose(whole.maximum[i, e], mine.max() if len(mine) else 0, rtol=1e-6)
            assert whole.channel[i, e] == (np.unravel_index(mine.argmax(), mine.shape)[1] if len(mine) else -1)
    assert whole.channel[1, 5] == 2
    mask = moe.super_expert_mask(whole.maximum, quantile=90.0)
    indices, values = moe.rank_super_experts(whole.maximum, mask, count=3)
    assert indices.tolist() == [[1, 5], [-1, -1], [-1, -1]] and values[1:].tolist() == [0, 0]
    assert np.argwhere(mask).tolist() == [[1, 5]]


def test_pruning_leaves_the_other_weights_alone():
    plan = moe.top_k_router(4, 2).apply({"w": rng.normal(size=(3, 4)).astype(np.float32)}, jnp.eye(3))
    dense = np.asarray(moe.dense_weights(plan))
    mask = np.array([0, 1, 1, 0], bool)
    pruned = moe.prune_experts(plan, jnp.asarray(mask))
    np.testing.assert_array_equal(moe.dense_weights(pruned), np.where(mask[None], 0, dense))
    np.testing.assert_array_equal(pruned.counts, plan.counts)
    assert not np.any(moe.dense_weights(moe.prune_experts(plan, jnp.ones(4, bool))))


def test_sinks_and_massive_activations():
    length = 7
    uniform = np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]
    first = np.zeros((length, length))
    first[:, 0] = 1
    random = np.tril(rng.random((length, length)))
    maps = np.float32([uniform, np.eye(length), first, random])
    where = np.arange(length) < 5
    whole, part, rate = jax.jit(
        lambda a: (moe.attention_sink_score(a), moe.attention_sink_score(a, where=where), moe.sink_rate(a[:3]))
    )(maps)
    for h, attention in enumerate(maps.astype(np.float64)):
        for j in range(length):
            np.testing.assert_allclose(whole[h, j], attention[j:, j].mean(), rtol=1e-5)
            np.testing.assert_allclose(part[h, j], attention[j:5, j].mean() if j < 5 else 0, rtol=1e-5)
    np.testing.assert_allclose(whole[0, 0], sum(1 / n for n in range(1, length + 1)) / length, rtol=1e-5)
    np.testing.assert_allclose(rate, 2 / 3, rtol=1e-6)  # the harmonic number over the length is 0.37 here
    hidden = rng.normal(size=(5, 6)).astype(np.float32)
    hidden[2, 3], hidden[4, 1] = -5000, 90
    assert np.argwhere(moe.massive_activations(hidden)).tolist() == [[2, 3]]
    assert not np.any(moe.massive_activations(hidden * 100, times=1e6))


def test_kurtosis_equals_its_definition():
    x, where = rng.normal(size=(3, 9)), rng.random((3, 9)) < 0.8
    x[2] = 1.5
    expected = []
    for row, keep in zip(x, where, strict=True):
        centred = row[keep] - row[keep].mean()
        expected.append(np.mean(centred**4) / np.mean(centred**2) ** 2 - 3 if np.ptp(row[keep]) else 0)
    got = jax.jit(moe.fisher_kurtosis)(np.float32(np.where(where, x, np.nan)), where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_refuses():
    ones, plan = jnp.ones((2, 3)), moe.plan_from_weights(jnp.ones((2, 3)))
    for make, match in (
        (lambda: moe.super_expert_mask(ones[0]), "maxima must be"),
        (lambda: moe.super_expert_mask(ones, include_layers=0.0), "include_layers=0.0"),
        (lambda: moe.super_expert_mask(ones, where=jnp.ones(3, bool)), "where has shape"),
        (lambda: moe.profile_outputs(ones, jnp.ones(3, int), 2), r"must be \[A, d\] and \[A\]"),
        (lambda: moe.profile_outputs(ones, jnp.ones(2, int), 0), "num_experts=0"),
        (lambda: moe.rank_super_experts(ones, ones > 0, count=7), "count=7"),
        (lambda: moe.rank_super_experts(ones, ones[0] > 0, count=1), "must both be"),
        (lambda: moe.prune_experts(plan, jnp.ones(2, bool)), "mask has shape"),
        (lambda: moe.massive_activations(ones[0]), "x must be"),
        (lambda: moe.attention_sink_score(ones), "attention must be"),
        (lambda: moe.attention_sink_score(jnp.eye(3), where=jnp.ones(2, bool)), "where has shape"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def pruned(scores, where):
    plan = moe.plan_from_weights(jax.nn.relu(scores), where=where)
    return moe.dense_weights(moe.prune_experts(plan, jnp.arange(4) == 2)).astype(scores.dtype)


def found(outputs, expert):
    profile = moe.merge_profiles(moe.profile_outputs(outputs, expert, 4), moe.profile_outputs(-outputs, expert, 4))
    maxima = jnp.stack([profile.maximum, profile.maximum / 2])
    mask = moe.super_expert_mask(maxima, quantile=50.0)
    return mask, moe.rank_super_experts(maxima, mask, count=2)[0], moe.massive_activations(outputs)


def sinks(scores):
    attention = jax.nn.softmax(scores)
    return moe.attention_sink_score(attention), moe.sink_rate(attention)


CASES = [
    Case(pruned, {"scores": Arg("scores", (6, 4)), "where": Arg("where", (6,))}, wrt=("scores",),
         rows={"scores": 0, "where": 0}, symmetry="equivariant", covers=("moe.prune_experts",)),
    Case(found, {"outputs": Arg("activations", (6, 3)), "expert": Arg("index", (6,), high=5)}, reason="a choice",
         helper=True, covers=("moe.profile_outputs", "moe.merge_profiles", "moe.super_expert_mask",
                              "moe.rank_super_experts", "moe.massive_activations", "moe.OutputProfile")),
    Case(sinks, {"scores": Arg("scores", (2, 4, 4))}, wrt=("scores",), helper=True,
         covers=("moe.attention_sink_score", "moe.sink_rate")),
    Case(moe.fisher_kurtosis, {"x": Arg("activations", (5,)), "where": Arg("where", (5,))}, wrt=("x",), helper=True),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
