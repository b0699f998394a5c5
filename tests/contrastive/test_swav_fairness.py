"""SwAV's loss and assignment against Sinkhorn's iteration as published, and the protocol for groups against loops."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    effective_robustness,
    group_gaps,
    harmful_association_rate,
    hit_at_k,
    regnet_widths,
    same_attribute_precision,
    sinkhorn_codes,
    swav_loss,
)

rng = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def codes_oracle(scores, epsilon, iterations):
    """The published iteration on exp(scores / epsilon), prototypes as rows."""
    Q = np.exp(scores / epsilon).T
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(iterations):
        for k in range(K):
            Q[k] /= Q[k].sum() * K
        for b in range(B):
            Q[:, b] /= Q[:, b].sum() * B
    return (Q * B).T


def loss_oracle(views, prototypes, num_assign, temperature, epsilon, iterations):
    scores = unit(views) @ unit(prototypes).T
    terms = np.zeros(views.shape[1])
    pairs = 0
    for i in range(num_assign):
        Q = codes_oracle(scores[i], epsilon, iterations)
        for v in range(len(views)):
            if v != i:
                pairs += 1
                p = np.exp(scores[v] / temperature)
                terms += -(Q * np.log(p / p.sum(1, keepdims=True))).sum(1)
    return terms / pairs


@pytest.mark.parametrize(("num_assign", "iterations"), [(2, 3), (1, 10)])
def test_loss_equals_the_published_iteration(num_assign, iterations):
    """Four crops of seven images, of which the third does not exist and holds NaN; prototypes of any length."""
    views, prototypes = rng.normal(size=(4, 7, 5)), 3 * rng.normal(size=(6, 5))
    where = np.arange(7) != 2
    dirty = jnp.float32(np.where(where[None, :, None], views, np.nan))
    options = {"num_assign": num_assign, "iterations": iterations, "temperature": 0.2, "epsilon": 0.1}
    run = jax.jit(lambda v, c: [swav_loss(v, c, where=where, reduction=r, **options) for r in ("none", "mean")])
    rows, mean = run(dirty, jnp.float32(prototypes))
    expected = np.zeros(7)
    expected[where] = loss_oracle(views[:, where], prototypes, num_assign, 0.2, 0.1, iterations)
    np.testing.assert_allclose(rows, expected, rtol=2e-5)
    np.testing.assert_allclose(mean, expected[where].mean(), rtol=2e-5)


def test_codes_equal_the_published_iteration_and_balance_the_prototypes():
    scores = rng.uniform(-1, 1, (9, 4))
    run = jax.jit(lambda s: [sinkhorn_codes(s, epsilon=0.3, iterations=n) for n in (3, 200)])
    few, many = (np.asarray(x) for x in run(jnp.float32(scores)))
    np.testing.assert_allclose(few, codes_oracle(scores, 0.3, 3), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(few.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(many.sum(0), 9 / 4, rtol=1e-4)


def test_scores_that_would_overflow_and_equal_scores():
    """exp(1 / 0.001) is no float32, and its logarithm has few digits; equal scores share every prototype equally."""
    run = jax.jit(lambda s: sinkhorn_codes(s, epsilon=0.001, iterations=3))
    sharp = run(jnp.float32([[1, -1, 0], [0.9, -1, 0.1], [-1, 0.5, 1]]))
    np.testing.assert_allclose(sharp.sum(1), 1, rtol=1e-4)
    np.testing.assert_allclose(run(jnp.ones((3, 3))), 1 / 3, rtol=1e-5)


def test_order_of_prototypes_does_not_matter_and_agreement_costs_nothing():
    views, prototypes = rng.normal(size=(2, 6, 4)), rng.normal(size=(3, 4))
    loss = jax.jit(lambda v, c: swav_loss(v, c, temperature=0.01))
    first = loss(jnp.float32(views), jnp.float32(prototypes))
    np.testing.assert_allclose(first, loss(jnp.float32(views), jnp.float32(prototypes[[2, 0, 1]])), rtol=1e-5)
    agreeing = jnp.float32(np.tile(np.eye(3, 4), (2, 2, 1)))
    assert first > 1 and abs(float(loss(agreeing, jnp.float32(np.eye(3, 4))))) < 1e-4


def test_widths_are_those_of_known_networks():
    """RegNetX-200MF, and the depths of the RegNetY-128GF of SEER (whose widths grouping rounds once more)."""
    assert regnet_widths(13, initial=24, slope=36.44, multiplier=2.49) == ((24, 56, 152, 368), (1, 1, 4, 7))
    widths, depths = regnet_widths(27, initial=456, slope=160.83, multiplier=2.52)
    assert widths == (456, 1152, 2896, 7296) and depths == (2, 7, 17, 1)


def test_protocol_equals_loops():
    values, groups = rng.uniform(size=12), rng.integers(-1, 3, 12)
    groups[groups == 1] = 2  # nobody is in group 1
    where = np.arange(12) < 10
    probs, harmful = rng.dirichlet(np.full(6, 0.3), 12), np.array([0, 1, 0, 0, 1, 0], bool)
    relevant, x, attributes = rng.uniform(size=(12, 6)) < 0.3, rng.normal(size=(12, 3)), rng.integers(0, 2, 12)

    @jax.jit
    def run(values, probs, x):
        options = {"num_groups": 3, "where": where}
        return (
            group_gaps(values, groups, **options),
            harmful_association_rate(probs, jnp.asarray(harmful), groups, k=2, **options),
            hit_at_k(probs, relevant, k=2),
            same_attribute_precision(x, attributes, groups, k=4, **options),
            effective_robustness(values[:3], values[3:6], slope=0.8, intercept=-0.3),
        )

    dirty = jnp.float32(np.where(where, values, np.nan)), jnp.float32(np.where(where[:, None], x, np.nan))
    gaps, rate, hit, share, robust = run(dirty[0], jnp.float32(probs), dirty[1])
    by_group = lambda v: [np.mean([v[i] for i in range(10) if groups[i] == g]) if g != 1 else 0 for g in range(3)]
    mean = by_group(values)
    np.testing.assert_allclose(gaps["mean"], mean, rtol=1e-5)
    low, high = sorted((mean[0], mean[2]))
    np.testing.assert_allclose(
        [gaps["worst"], gaps["gap"], gaps["relative_gap"]], [low, high - low, 1 - low / high], rtol=1e-5
    )
    top = [np.argsort(-p)[:2] for p in probs]
    np.testing.assert_allclose(hit, [relevant[i, top[i]].any() for i in range(12)])
    blamed = [any(harmful[c] and probs[i, c] >= 0.1 for c in top[i]) for i in range(12)]
    np.testing.assert_allclose(rate, by_group(blamed), rtol=1e-5)
    cosine = unit(x[:10]) @ unit(x[:10]).T
    near = [[j for j in np.argsort(-cosine[i]) if j != i][:4] for i in range(10)]
    np.testing.assert_allclose(
        share, by_group([np.mean(attributes[n] == attributes[i]) for i, n in enumerate(near)]), rtol=1e-5
    )
    line = 0.8 * np.log(values[:3] / (1 - values[:3])) - 0.3
    np.testing.assert_allclose(robust, values[3:6] - 1 / (1 + np.exp(-line)), rtol=1e-4, atol=1e-6)


def test_refuses():
    views, x, index = jnp.ones((2, 3, 4)), jnp.ones((3, 4)), jnp.zeros(3, int)
    with pytest.raises(ValueError, match="V >= 2"):
        swav_loss(views[:1], x)
    with pytest.raises(ValueError, match="prototypes has shape"):
        swav_loss(views, x[:, :2])
    with pytest.raises(ValueError, match="num_assign=3"):
        swav_loss(views, x, num_assign=3)
    with pytest.raises(ValueError, match="temperature=0"):
        swav_loss(views, x, temperature=0)
    with pytest.raises(ValueError, match="epsilon=0"):
        swav_loss(views, x, epsilon=0)
    with pytest.raises(ValueError, match=r"scores must be \[B, K\]"):
        sinkhorn_codes(views)
    with pytest.raises(ValueError, match="multiplier=1"):
        regnet_widths(3, initial=8, slope=8, multiplier=1)
    with pytest.raises(ValueError, match="one shape"):
        group_gaps(x, index, num_groups=2)
    with pytest.raises(ValueError, match="k=9 must be between 1 and the 4 labels"):
        hit_at_k(x, x > 0, k=9)
    with pytest.raises(ValueError, match="one shape"):
        hit_at_k(x, x[:2] > 0)
    with pytest.raises(ValueError, match="probs, harmful and groups"):
        harmful_association_rate(x, x > 0, index, num_groups=2)
    with pytest.raises(ValueError, match="embeddings, attributes and groups"):
        same_attribute_precision(x, index[:2], index, num_groups=2)
    with pytest.raises(ValueError, match="k=0"):
        same_attribute_precision(x, index, index, num_groups=2, k=0)
    with pytest.raises(ValueError, match="one shape"):
        effective_robustness(x, index)


def protocol_case(values, probs, embeddings, groups):
    """The measures of the protocol in one program."""
    classes = jnp.arange(4) < 2
    return (
        group_gaps(values, groups, num_groups=3),
        harmful_association_rate(probs, classes, groups, num_groups=3, k=2),
        hit_at_k(probs, jnp.broadcast_to(classes[None], probs.shape), k=2),
        same_attribute_precision(embeddings, groups % 2, groups, num_groups=3, k=2),
        effective_robustness(values, values),
    )


CASES = [
    Case(
        swav_loss,
        {
            "views": Arg("embeddings", (3, 6, 4)),
            "prototypes": Arg("embeddings", (5, 4)),
            "where": Arg("where", (6,)),
        },
        static={"temperature": 0.5, "epsilon": 0.5},
        wrt=("views", "prototypes"),
        rows={"views": 1, "where": 0},
        symmetry="invariant",
        grad_oracle=lambda views, prototypes, where: gradient_with_constant_codes(views, prototypes),
    ),
    Case(
        sinkhorn_codes,
        {"scores": Arg("scores", (6, 4)), "where": Arg("where", (6,))},
        reason="assignments are constants",
        helper=True,
    ),
    Case(
        protocol_case,
        {
            "values": Arg("probabilities", (6,)),
            "probs": Arg("probabilities", (6, 4)),
            "embeddings": Arg("embeddings", (6, 3)),
            "groups": Arg("labels", (6,)),
        },
        reason="measures of what was predicted",
        helper=True,
        covers=tuple(
            f"contrastive.{f.__name__}"
            for f in (group_gaps, harmful_association_rate, hit_at_k, same_attribute_precision, effective_robustness)
        ),
    ),
    Case(regnet_widths, {}, static={"depth": 5, "initial": 8, "slope": 8.0, "multiplier": 2.0}, host=True),
]
test_conformance = conformance.conformance_tests(CASES)


def gradient_with_constant_codes(views, prototypes, step=1e-6):
    """Central differences of the cross entropy while the codes stay what they were."""
    scores = unit(views) @ unit(prototypes).T
    codes = [codes_oracle(scores[i], 0.5, 3) for i in range(2)]

    def loss(views, prototypes):
        logits = unit(views) @ unit(prototypes).T / 0.5
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -sum((codes[i] * log_p[v]).sum() for i in range(2) for v in range(3) if v != i) / (2 * 2 * 6)

    grads = {}
    for name, x in {"views": views, "prototypes": prototypes}.items():
        grads[name] = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            ends = []
            for sign in (1, -1):
                moved = {"views": views, "prototypes": prototypes}
                moved[name] = x.copy()
                moved[name][place] += sign * step
                ends.append(loss(**moved))
            grads[name][place] = (ends[0] - ends[1]) / (2 * step)
    return grads
