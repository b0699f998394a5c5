"""Gradients of tokens, confounding masks, pruning and distillation against loops."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import distill

rng = np.random.default_rng(0)
log_softmax = lambda z: z - z.max() - np.log(np.sum(np.exp(z - z.max())))


def kl_oracle(s, t, where, temperature, shift):
    terms = []
    for b, i in np.ndindex(*where.shape):
        counts = (i + 1 < where.shape[1] and where[b, i + 1]) if shift else where[b, i]
        if counts:
            p, q = log_softmax(s[b, i] / temperature), log_softmax(t[b, i, : s.shape[-1]] / temperature)
            terms.append(temperature**2 * np.sum(np.exp(q) * (q - p)))
    return np.mean(terms)


@pytest.mark.parametrize("shift", [True, False])
def test_distillation_equals_the_loop(shift):
    s, t = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 6))
    where = np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]], bool)
    got = distill.token_distillation_loss(jnp.float32(s), jnp.float32(t), where=where, temperature=2.0, shift=shift)
    np.testing.assert_allclose(got, kl_oracle(s, t, where, 2.0, shift), rtol=1e-5)
    p, q, kept = rng.normal(size=(3, 4, 4)), rng.normal(size=(3, 4, 6)), rng.random((3, 4)) > 0.4
    both = distill.leaf_loss(
        *map(jnp.float32, (s, t, p, q)), where=where, pruned_where=jnp.asarray(kept), weight=0.3, shift=shift
    )
    expected = 0.3 * kl_oracle(s, t, where, 1.0, shift) + 0.7 * kl_oracle(p, q, kept, 1.0, shift)
    np.testing.assert_allclose(both, expected, rtol=1e-5)


def test_norms_of_a_linear_classifier_of_the_bag_have_a_closed_form():
    """With logits W mean(a_i e_i) the gradient at token i is a_i / n times W^T (p - y), so its norm goes as |a_i|."""
    e, a, W = rng.normal(size=(6, 3)), rng.normal(size=6), rng.normal(size=(4, 3))
    where = np.arange(6) != 2
    loss = lambda e: -jax.nn.log_softmax(jnp.float32(W) @ jnp.mean(jnp.float32(a)[:, None] * e, axis=0))[1]
    got = distill.token_gradient_norms(loss, jnp.float32(e), where=where)
    size = np.abs(a)
    expected = (size - size[where].min()) / np.ptp(size[where])
    np.testing.assert_allclose(got, np.where(where, expected, 0), atol=1e-5)
    scaled = distill.token_gradient_norms(lambda e: 1e3 * loss(e), jnp.float32(e), where=where)
    np.testing.assert_allclose(scaled, got, atol=1e-5)


def mask_oracle(student, teacher, where, ratio, cap, protected):
    found = np.zeros(len(where), bool)
    kept = np.flatnonzero(where)
    d = teacher[kept] - student[kept]
    if len(kept) and np.ptp(d) > 0:
        d = (d - d.min()) / np.ptp(d)
        threshold = min(np.sort(d)[int(len(d) * ratio)], cap)
        found[kept] = d <= threshold
    return found & ~protected


def test_masks_equal_the_loop():
    for ratio, cap in ((0.05, 0.5), (0.3, 0.5), (0.9, 0.5)):
        student, teacher = rng.uniform(size=(2, 20, 12)).astype(np.float32)
        where, protected = rng.random((20, 12)) > 0.3, rng.random((20, 12)) > 0.8
        where[0], teacher[1] = False, student[1]  # no prompt; models that agree
        run = jax.jit(lambda s, t, w, p, ratio=ratio, cap=cap: distill.confounding_mask(
            s, t, where=w, protected=p, ratio=ratio, cap=cap))  # fmt: skip
        got = run(student, teacher, where, protected)
        for i in range(20):
            expected = mask_oracle(student[i], teacher[i], where[i], ratio, cap, protected[i])
            np.testing.assert_array_equal(got[i], expected)
        assert np.any(got) and not np.any(got[:2])


def test_runs_and_pruning():
    mask = rng.random((30, 9)) > 0.5
    runs = np.asarray(distill.mask_runs(jnp.asarray(mask)))
    ids, where = rng.integers(1, 50, (30, 9)), rng.random((30, 9)) > 0.2
    pruned, real = (np.asarray(a) for a in distill.prune_tokens(ids, jnp.asarray(mask), where=jnp.asarray(where)))
    for i in range(30):
        number, previous = -1, False
        for j in range(9):
            number += mask[i, j] and not previous
            previous = mask[i, j]
            assert runs[i, j] == (number if mask[i, j] else -1)
        kept = [ids[i, j] for j in range(9) if where[i, j] and not mask[i, j]]
        assert pruned[i].tolist() == kept + [0] * (9 - len(kept)) and real[i].sum() == len(kept)
    whole, real = distill.prune_tokens(ids, jnp.zeros((30, 9), bool))
    np.testing.assert_array_equal(whole, ids)
    assert np.all(real)


def test_refuses():
    z, keep = jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="weight=2"):
        distill.leaf_loss(z, z, z, z, where=keep, pruned_where=keep, weight=2)
    with pytest.raises(ValueError, match="logits and teacher_logits"):
        distill.token_distillation_loss(z, z[:1], where=keep)
    with pytest.raises(ValueError, match="expected at least 4"):
        distill.token_distillation_loss(z, z[..., :2], where=keep)
    with pytest.raises(ValueError, match="where has shape"):
        distill.token_distillation_loss(z, z, where=keep[:1])
    with pytest.raises(ValueError, match="embeddings and where"):
        distill.token_gradient_norms(jnp.sum, z, where=keep[0])
    with pytest.raises(ValueError, match="one shape"):
        distill.confounding_mask(z[0], z[1, :2], where=keep)
    with pytest.raises(ValueError, match="ratio=1"):
        distill.confounding_mask(z[0, 0], z[0, 0], where=jnp.ones(4, bool), ratio=1)
    with pytest.raises(ValueError, match="protected has shape"):
        distill.confounding_mask(z[0, 0], z[0, 0], where=jnp.ones(4, bool), protected=keep)
    with pytest.raises(ValueError, match="mask must be"):
        distill.mask_runs(jnp.array(True))
    with pytest.raises(ValueError, match="ids, drop and where"):
        distill.prune_tokens(jnp.ones(3, int), keep)


def sequences(logits, teacher_logits, where, axis_name=None):
    """The suite masks whole sequences."""
    where = jnp.broadcast_to(where[:, None], logits.shape[:2])
    return distill.token_distillation_loss(logits, teacher_logits, where=where, axis_name=axis_name)


def both(logits, teacher_logits, where, axis_name=None):
    where = jnp.broadcast_to(where[:, None], logits.shape[:2])
    pruned = logits[:, 1:], teacher_logits[:, :-1]
    return distill.leaf_loss(
        logits, teacher_logits, *pruned, where=where, pruned_where=where[:, 1:], axis_name=axis_name
    )


def norms(embeddings, where):
    return distill.token_gradient_norms(lambda e: jnp.sum(jnp.sin(e)), embeddings, where=where)


def pruned(ids, drop):
    return distill.prune_tokens(ids, drop)


TOKENS = {"logits": Arg("scores", (6, 3, 4)), "teacher_logits": Arg("scores", (6, 3, 5)), "where": Arg("where", (6,))}
OPTIONS = {
    "wrt": ("logits",),
    "frozen": ("teacher_logits",),
    "rows": {"logits": 0, "teacher_logits": 0, "where": 0},
    "symmetry": "invariant",
}
NORMS = {"student_norms": Arg("weights", (8,)), "teacher_norms": Arg("weights", (8,)), "where": Arg("where", (8,))}
CASES = [
    Case(both, TOKENS, **OPTIONS, name="leaf_loss", covers=("distill.leaf_loss",)),
    Case(
        sequences,
        TOKENS,
        **OPTIONS,
        helper=True,
        name="token_distillation_loss",
        covers=("distill.token_distillation_loss",),
    ),
    Case(
        norms,
        {"embeddings": Arg("embeddings", (6, 4)), "where": Arg("where", (6,))},
        frozen=("embeddings",),
        reason="norms are constants",
        rows={"embeddings": 0, "where": 0},
        helper=True,
        name="token_gradient_norms",
        covers=("distill.token_gradient_norms",),
    ),
    Case(distill.confounding_mask, NORMS, reason="a mask", rows=dict.fromkeys(NORMS, 0), helper=True),
    Case(distill.mask_runs, {"mask": Arg("where", (8,))}, reason="numbers of runs", helper=True),
    Case(
        pruned,
        {"ids": Arg("labels", (8,)), "drop": Arg("where", (8,))},
        helper=True,
        name="prune_tokens",
        covers=("distill.prune_tokens",),
    ),
]
test_conformance = conformance.conformance_tests(CASES)
