"""Routing against explicit loops in float64, in both forms."""

import functools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab.kernels import plan_from_top_k, top_k_routing

T, E = 7, 8
rng = np.random.default_rng()
OPTIONS = {
    "plain": {"k": 3},
    "all": {"k": E, "renormalize": True},
    "raw": {"k": 2, "score_function": "none", "renormalize": True},
    "biased": {"k": 2, "bias": True, "score_function": "sigmoid", "renormalize": True},
    "groups_kept": {"k": 3, "bias": True, "groups": 4, "groups_kept": 2, "score_function": "sigmoid"},
    "groups_kept_plain": {"k": 4, "groups": 2, "groups_kept": 1},
    "per_group": {"k": 4, "groups": 2, "per_group": True, "renormalize": True},
}


def probabilities(s, score_function):
    """float64 [E] of one token; NaN gives 0."""
    p = np.zeros(len(s))
    known = [e for e in range(len(s)) if not np.isnan(s[e])]
    if score_function == "softmax" and known:
        top = max(s[e] for e in known)
        total = sum(np.exp(s[e] - top) for e in known)
    for e in known:
        if score_function == "softmax":
            p[e] = np.exp(s[e] - top) / total
        else:
            p[e] = 1 / (1 + np.exp(-s[e])) if score_function == "sigmoid" else s[e]
    return p


def oracle(scores, k, bias=None, groups=None, groups_kept=None, per_group=False, renormalize=False,
           score_function="softmax", where=None):  # fmt: skip
    scores = scores.astype(np.float64)
    tokens, experts = scores.shape
    ids, weights = np.zeros((tokens, k), int), np.zeros((tokens, k))
    probs = np.zeros((tokens, experts))
    for t in range(tokens):
        if where is not None and not where[t]:
            ids[t] = experts
            continue
        s, p = scores[t], probabilities(scores[t], score_function)
        probs[t] = p
        value = [-np.inf if np.isnan(s[e]) else p[e] + (0 if bias is None else float(bias[e])) for e in range(experts)]
        choice = value if bias is not None else [-np.inf if np.isnan(x) else x for x in s]

        def best(candidates, n, by):
            return sorted(candidates, key=lambda candidate: (-by[candidate], candidate))[:n]

        size = experts // (groups or 1)
        if per_group:
            row = [e for g in range(groups) for e in best(range(g * size, (g + 1) * size), k // groups, choice)]
            row = best(sorted(row), k, choice)
        elif groups_kept:
            strength = [sum(sorted(value[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
            kept = best(range(groups), groups_kept, strength)
            row = best([e for e in range(experts) if e // size in kept], k, choice)
        else:
            row = best(range(experts), k, choice)
        ids[t] = row
        w = p[row]
        weights[t] = (w / w.sum() if w.sum() else 0 * w) if renormalize else w
    counts = np.array([(ids == e).sum() for e in range(experts)])
    order = sorted(range(tokens * k), key=lambda a: (ids.reshape(-1)[a], a))
    return ids, weights, counts, np.array(order), probs


@functools.partial(jax.jit, static_argnames=("option", "implementation"))
def route(scores, bias, where, option, implementation):
    options = dict(OPTIONS[option])
    bias = bias if options.pop("bias", False) else None
    return top_k_routing(scores, bias=bias, where=where, implementation=implementation, **options)


def draw():
    scores = rng.normal(size=(T, E)).astype(np.float32)
    scores[1] = scores[1].round()  # ties
    scores[2, 3] = np.nan
    scores[3] = np.nan
    scores[4, 1:] = np.nan
    scores[5] = np.where(np.arange(E) % 2, 0.0, -0.0)
    return scores, rng.normal(size=E).astype(np.float32), np.array([1, 1, 1, 1, 1, 1, 0], bool)


def check(got, expected):
    for name, value in zip(("ids", "weights", "counts", "order", "probs"), expected, strict=True):
        np.testing.assert_allclose(np.asarray(getattr(got, name)), value, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_loops(option, implementation):
    for _ in range(3):
        scores, bias, where = draw()
        if option.startswith("groups_kept"):  # the loops know no order among groups that hold NaN
            scores = np.where(np.isnan(scores), np.float32(0.3), scores)
        poisoned = scores.copy()
        poisoned[~where] = np.nan
        got = route(poisoned, bias, where, option, implementation)
        assert (got.ids.dtype, got.counts.dtype, got.order.dtype) == (jnp.int32,) * 3
        assert (got.weights.dtype, got.probs.dtype) == (jnp.float32,) * 2
        options = dict(OPTIONS[option])
        check(got, oracle(poisoned, where=where, **{**options, "bias": bias if options.get("bias") else None}))


@pytest.mark.parametrize("option", ["plain", "raw", "biased", "per_group"])
def test_gradients_are_those_of_the_fixed_choice(option):
    scores, bias, where = draw()
    options = dict(OPTIONS[option])
    uses_bias = bool(options.pop("bias", False))
    if options["score_function" if "score_function" in options else "k"] == "none":
        scores = np.abs(scores) + np.float32(0.5)  # sums of raw weights far from 0
    poisoned = np.where(where[:, None], scores, np.float32(np.nan))
    a, b = rng.normal(size=(T, options["k"])), rng.normal(size=(T, E))

    def loss(scores, bias):
        got = route(scores, bias, where, option, "xla")
        return (got.weights * a.astype(np.float32)).sum() + (got.probs * b.astype(np.float32)).sum()

    got, got_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(poisoned, bias)
    ids = oracle(poisoned, where=where, bias=bias if uses_bias else None, **options)[0]

    def exact(scores):
        probs = np.stack([probabilities(s, options.get("score_function", "softmax")) for s in scores]) * where[:, None]
        w = np.take_along_axis(probs, np.minimum(ids, E - 1), axis=1) * where[:, None]
        if options.get("renormalize"):
            total = w.sum(1, keepdims=True)
            w = np.divide(w, total, out=np.zeros_like(w), where=total != 0)
        return (w * a).sum() + (probs * b).sum()

    base = poisoned.astype(np.float64)
    expected = np.zeros_like(base)
    for index in np.ndindex(base.shape):
        if np.isnan(base[index]):
            assert got[index] == 0
            continue
        step = np.zeros_like(base)
        step[index] = 1e-6
        expected[index] = (exact(base + step) - exact(base - step)) / 2e-6
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(got_bias)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nan_never_captures_a_slot(implementation):
    inf, nan = np.inf, np.nan
    scores = np.array([[nan, -inf, inf, 1], [nan, nan, nan, -inf], [nan] * 4, [inf, inf, 0, nan]], np.float32)
    got = top_k_routing(scores, 2, implementation=implementation)
    assert got.ids.tolist() == [[2, 3], [3, 0], [0, 1], [0, 1]]
    np.testing.assert_array_equal(got.weights, [[1, 0], [1, 0], [0, 0], [0.5, 0.5]])
    biased = top_k_routing(scores[:, :], 2, bias=jnp.array([9.0, 0, 0, nan]), implementation=implementation)
    assert biased.ids[0].tolist() == [2, 1]
    grouped = top_k_routing(scores, 2, groups=2, groups_kept=1, implementation=implementation)
    assert grouped.ids.tolist() == [[2, 3], [3, 2], [0, 1], [0, 1]]
    gradient = jax.grad(lambda s: top_k_routing(s, 2, implementation=implementation).weights[:, 0].sum())(scores)
    assert np.isfinite(gradient).all() and not gradient[np.isnan(scores)].any()


def test_saturated_scores_do_not_tie():
    scores = jnp.array([[20.0, 30.0, 40.0]])
    assert top_k_routing(scores, 1, score_function="sigmoid").ids.tolist() == [[2]]
    assert top_k_routing(-10 * scores, 2).ids.tolist() == [[0, 1]]


def test_low_precision_is_routed_in_float32():
    scores = jnp.asarray(rng.normal(size=(T, E)), jnp.bfloat16)
    check(top_k_routing(scores, 2), oracle(np.asarray(scores, np.float32), 2))


def test_plan():
    scores, _, where = draw()
    chosen = top_k_routing(scores, 2, where=where)
    plan = plan_from_top_k(chosen, scores)
    ids, weights = np.asarray(chosen.ids), np.asarray(chosen.weights)
    rows = sorted((ids[t, j], t * 2 + j) for t in range(T) for j in range(2))
    assert plan.expert.tolist() == [e for e, _ in rows] and plan.expert.tolist()[-2:] == [E, E]
    assert plan.token.tolist() == [a // 2 for _, a in rows]
    assert plan.weight.tolist() == [weights.reshape(-1)[a] for _, a in rows] and not np.any(plan.weight[-2:])
    assert plan.counts.sum() == 12 and plan.dropped == 0 and plan.num_experts == chosen.num_experts == E
    np.testing.assert_array_equal(plan.scores, chosen.probs)
    np.testing.assert_array_equal(plan.logits, scores)


def test_transformations_and_no_retrace(mesh8):
    traces = []

    def f(scores):
        traces.append(None)
        chosen = top_k_routing(scores, 2, renormalize=True)
        return plan_from_top_k(chosen, scores)

    jitted = jax.jit(f)
    batch = rng.normal(size=(8, T, E)).astype(np.float32)
    loop = [jitted(scores) for scores in batch]
    assert len(traces) == 1
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    compare = functools.partial(jax.tree.map, lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7))
    compare(jax.jit(jax.vmap(f))(batch), expected)

    def local(scores):
        return jax.tree.map(lambda leaf: leaf[None], f(scores[0]))

    compare(jax.jit(jax.shard_map(local, mesh=mesh8, in_specs=P("data"), out_specs=P("data")))(batch), expected)


def test_errors():
    scores = jnp.zeros((2, 8))
    cases = [
        (r"k=9 must be between 1 and num_experts=8", {"k": 9}),
        (r"k=0 must be between 1 and num_experts=8", {"k": 0}),
        (r"groups=3 must divide num_experts=8", {"k": 2, "groups": 3, "per_group": True}),
        (r"groups is needed with groups_kept or per_group", {"k": 2, "per_group": True}),
        (r"groups needs exactly one of groups_kept and per_group", {"k": 2, "groups": 2}),
        (r"k=3 must be a multiple of groups=2 with per_group", {"k": 3, "groups": 2, "per_group": True}),
        (r"groups_kept=3 must be between 1 and groups=2", {"k": 3, "groups": 2, "groups_kept": 3}),
        (r"k=5 must be at most groups_kept \* experts per group = 4", {"k": 5, "groups": 2, "groups_kept": 1}),
        (r"score_function='tanh' must be one of 'softmax', 'sigmoid', 'none'", {"k": 1, "score_function": "tanh"}),
        (r"bias has shape \(3,\), expected \(8,\)", {"k": 1, "bias": jnp.zeros(3)}),
        (r"where has shape \(3,\), expected \(2,\)", {"k": 1, "where": jnp.ones(3, bool)}),
        (r"implementation='fast' of top_k_routing must be one of", {"k": 1, "implementation": "fast"}),
        (
            r"no pallas implementation of top_k_routing yet on any platform; use 'auto', 'reference' or 'xla'",
            {"k": 1, "implementation": "pallas"},
        ),
    ]
    for message, keywords in cases:
        with pytest.raises(ValueError, match=message):
            top_k_routing(scores, **keywords)
    with pytest.raises(ValueError, match=r"scores must be \[tokens, experts\], got shape \(8,\)"):
        top_k_routing(scores[0], 1)
    with pytest.raises(ValueError, match=r"logits has shape \(2, 7\), expected \(2, 8\)"):
        plan_from_top_k(top_k_routing(scores, 1), scores[:, :7])


def test_environment_names_the_default(monkeypatch):
    scores = jnp.zeros((2, 8))
    monkeypatch.setenv("JAXLAB_KERNELS", "pallas")
    with pytest.raises(ValueError, match="no pallas implementation of top_k_routing"):
        top_k_routing(scores, 1)
    top_k_routing(scores, 1, implementation="xla")
    monkeypatch.setenv("JAXLAB_KERNELS", "quick")
    with pytest.raises(ValueError, match="JAXLAB_KERNELS='quick' of top_k_routing must be one of"):
        top_k_routing(scores, 1)
    monkeypatch.setenv("JAXLAB_KERNELS", "reference")
    assert top_k_routing(scores, 1).ids.tolist() == [[0], [0]]


def routed(scores, *, where=None):
    """Ids, weights and probabilities row by row, and the same weights as the plan lists them, by token."""
    chosen = top_k_routing(scores, 2, where=where, renormalize=True)
    plan = plan_from_top_k(chosen, scores)
    by_token = jnp.zeros(scores.shape, plan.weight.dtype).at[plan.token, plan.expert].add(plan.weight, mode="drop")
    weights, probs, by_token = (a.astype(scores.dtype) for a in (chosen.weights, chosen.probs, by_token))
    return chosen.ids, weights, probs, by_token


CASES = [
    Case(
        routed,
        {"scores": Arg("scores", (6, 5)), "where": Arg("where", (6,))},
        wrt=("scores",),
        rows={"scores": 0, "where": 0},
        symmetry="equivariant",
        covers=("kernels.top_k_routing", "kernels.plan_from_top_k"),
    ),
]
test_conformance = conformance.conformance_tests(CASES)
