"""QUEACO against loops in float64: refinement, a whole step with its feedback, values, spans."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import mutual
from jaxlab.types import Layer

rng = np.random.default_rng(0)
B, L, D, K = 3, 4, 2, 3
WHERE = np.ones((B, L), bool)
WHERE[0, 2:], WHERE[2, 3] = False, False
STRONG, WEAK = rng.normal(size=(2, B, L, D))
Y, WEAK_Y = rng.integers(0, K, (B, L)), rng.integers(-1, K, (B, L))
Y[1, 0] = -1


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def refined(probs, weak, threshold, mode):
    labels, weights = np.zeros(weak.shape, int), np.zeros(weak.shape)
    for i in np.ndindex(weak.shape):
        if not WHERE[i]:
            continue
        keep = mode == "weak" or (mode == "refine" and weak[i] > 0 and probs[i][weak[i]] >= threshold)
        labels[i] = max(weak[i], 0) if keep else probs[i].argmax()
        weights[i] = float(weak[i] >= 0) if keep else probs[i].max()
    return labels, weights


@pytest.mark.parametrize("mode", ["refine", "weak", "pseudo"])
def test_refinement_equals_the_loop(mode):
    probs = softmax(rng.normal(size=(B, L, K)) * 2)
    dirty = np.float32(np.where(WHERE[..., None], probs, np.nan))
    for threshold in (0.0, 0.3):
        got = jax.jit(lambda p, y, t=threshold: mutual.refine_weak_labels(p, y, where=WHERE, threshold=t, mode=mode))(
            dirty, WEAK_Y
        )
        labels, weights = refined(probs, WEAK_Y, threshold, mode)
        np.testing.assert_array_equal(got[0], labels)
        np.testing.assert_allclose(got[1], weights, rtol=1e-6)
        if mode == "refine" and threshold == 0:
            said = WHERE & (WEAK_Y > 0)
            np.testing.assert_array_equal(np.asarray(got[0])[said], WEAK_Y[said])


NET = Layer(lambda key, dims: {"w": jax.random.normal(key, (dims.shape[-1], K))}, lambda params, x: x @ params["w"])


def loss_and_grad(w, x, labels, weights=None, where=WHERE):
    """Mean weighted cross entropy over the tagged tokens and its derivative."""
    tokens = [i for i in np.ndindex(labels.shape) if where[i] and labels[i] >= 0]
    loss, grad = 0.0, np.zeros_like(w)
    for i in tokens:
        p, share = softmax(x[i] @ w), (1.0 if weights is None else weights[i]) / len(tokens)
        loss -= share * np.log(p[labels[i]])
        grad += share * np.outer(x[i], p - np.eye(K)[labels[i]])
    return loss, grad


@pytest.mark.parametrize("feedback", ["product", "drop"])
def test_two_steps_equal_the_updates_written_out(feedback):
    learner = mutual.queaco(NET, optax.sgd(0.5), optax.sgd(0.2), feedback=feedback, decay=0.9)
    dirty = lambda x: np.float32(np.where(WHERE[..., None], x, np.nan))
    batch = {"x": np.float32(STRONG), "y": Y, "where": WHERE, "weak": {"x": dirty(WEAK), "y": WEAK_Y, "where": WHERE}}
    state = jax.jit(learner.init)(jax.random.key(0), batch)
    update = jax.jit(learner.update)
    jax.tree.map(np.testing.assert_array_equal, state.params["student"], state.params["teacher"])
    student = teacher = np.asarray(state.params["student"]["w"], np.float64)
    running = None
    for _ in range(2):
        state, metrics = update(state, batch, None)
        probs = softmax(WEAK @ teacher)
        labels, weights = refined(probs, WEAK_Y, 0.3, "refine")
        loss, grad = loss_and_grad(student, WEAK, labels, weights)
        moved = student - 0.5 * grad
        after, strong_grad = loss_and_grad(moved, STRONG, Y)
        before, _ = loss_and_grad(student, STRONG, Y)
        h = np.sum(strong_grad * (student - moved)) if feedback == "product" else before - after
        advantage = 0.0 if running is None else h - running
        running = h if running is None else 0.9 * running + 0.1 * h
        own, pull = loss_and_grad(teacher, WEAK, probs.argmax(-1))
        strong, push = loss_and_grad(teacher, STRONG, Y)
        teacher, student = teacher - 0.2 * (advantage * pull + push), moved
        expected = {"student": loss, "strong": after, "feedback": h, "teacher": advantage * own + strong}
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(state.params["student"]["w"], student, atol=1e-5)
        np.testing.assert_allclose(state.params["teacher"]["w"], teacher, atol=1e-5)
        np.testing.assert_allclose(state.feedback_mean, running, rtol=2e-4, atol=1e-6)


def test_the_feedback_is_the_drop_of_the_loss_for_a_small_step():
    """For a step of 1e-5 in float64, to first order."""
    w, v = rng.normal(size=(2, D, K))
    moved = w - 1e-5 * v
    before, _ = loss_and_grad(w, STRONG, Y)
    after, grad = loss_and_grad(moved, STRONG, Y)
    with jax.enable_x64(True):
        got = float(mutual.feedback_product({"w": w}, {"w": moved}, {"w": grad}))
    np.testing.assert_allclose(got, before - after, rtol=1e-4)


def test_values_need_support_and_a_majority():
    counts = np.array([[40.0, 2, 0], [4, 0, 0], [15, 15, 0], [0, 0, 0], [0, 1, 99]])
    probs, values = jax.jit(lambda c: (mutual.value_probabilities(c), mutual.normalize_values(c)))(np.float32(counts))
    expected = [[(n + 1) / (row.sum() + 3) for n in row] for row in counts]
    np.testing.assert_allclose(probs, expected, rtol=1e-5)
    assert values.tolist() == [0, -1, -1, -1, 2]


def spans_by_hand(tags):
    found, i = set(), 0
    while i < len(tags):
        if tags[i] == 0:
            i += 1
            continue
        kind, stop = (tags[i] - 1) // 2, i + 1
        while stop < len(tags) and tags[stop] == 2 + 2 * kind:
            stop += 1
        found.add((i, stop, kind))
        i = stop
    return found


def test_spans_and_their_f1_equal_the_loop():
    tags, gold = rng.integers(0, 5, (2, 40, 7))
    where = rng.uniform(size=(40, 7)) < 0.9
    hits = found = there = 0
    for t, g, keep in zip(tags, gold, where, strict=True):
        a, b = spans_by_hand(np.where(keep, t, 0)), spans_by_hand(np.where(keep, g, 0))
        assert set(mutual.bio_spans(np.where(keep, t, 0))) == a
        hits, found, there = hits + len(a & b), found + len(a), there + len(b)
    f1 = jax.jit(mutual.span_f1)
    np.testing.assert_allclose(f1(tags, gold, where=where), 2 * hits / (found + there), rtol=1e-6)
    assert hits and f1(gold, gold, where=where) == 1 and f1(0 * tags, 0 * gold, where=where) == 0


def test_refuses():
    probs, weak = np.ones((2, 3)), np.zeros(2, int)
    for call, message in (
        (lambda: mutual.queaco(NET, optax.sgd(0.1), feedback="none"), "feedback='none'"),
        (lambda: mutual.queaco(NET, optax.sgd(0.1), decay=1), "decay=1"),
        (lambda: mutual.queaco(NET, optax.sgd(0.1), mode="all"), "mode='all'"),
        (lambda: mutual.refine_weak_labels(probs, weak, threshold=2), "threshold=2"),
        (lambda: mutual.refine_weak_labels(probs, weak[:1]), "weak has shape"),
        (lambda: mutual.refine_weak_labels(probs, weak, where=np.ones(3, bool)), "where has shape"),
        (lambda: mutual.value_probabilities(probs[0]), "counts must be"),
        (lambda: mutual.value_probabilities(probs, smoothing=0), "smoothing=0"),
        (lambda: mutual.bio_spans(probs), "tags must be"),
        (lambda: mutual.span_f1(weak, weak), "tags and gold"),
        (lambda: mutual.span_f1(probs, probs, where=np.ones(2, bool)), "where has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


W = np.float32(rng.normal(size=(4, K)))


@jax.jit
def one_step(x, y, weak_x, weak_y, where):
    learner = mutual.queaco(NET, optax.sgd(0.1))
    batch = {"x": x, "y": y, "where": where, "weak": {"x": weak_x, "y": weak_y, "where": where}}
    state = learner.init(None, batch, params={"w": jnp.asarray(W, x.dtype)})
    return learner.update(state, batch, None)[1]["strong"]


def product_case(x):
    return mutual.feedback_product({"w": x}, {"w": x[::-1]}, {"w": jnp.sin(x)})


TOKENS, TAGS = Arg("activations", (4, 3, 4)), Arg("labels", (4, 3))
CASES = [
    Case(
        one_step,
        {"x": TOKENS, "y": TAGS, "weak_x": TOKENS, "weak_y": TAGS, "where": Arg("where", (4, 3))},
        reason="the updates written out are the test",
        helper=True,
        name="queaco",
        covers=("mutual.queaco", "mutual.QueacoState"),
    ),
    Case(
        mutual.refine_weak_labels,
        {"teacher_probs": Arg("probabilities", (6, 3)), "weak": Arg("labels", (6,)), "where": Arg("where", (6,))},
        frozen=("teacher_probs",),
        reason="tags and their weights are constants",
        rows={"teacher_probs": 0, "weak": 0, "where": 0},
        symmetry="equivariant",
    ),
    Case(product_case, {"x": Arg("embeddings", (3, 2))}, wrt=("x",), helper=True, covers=("mutual.feedback_product",)),
    Case(mutual.value_probabilities, {"counts": Arg("weights", (3, 4))}, wrt=("counts",), helper=True),
    Case(mutual.normalize_values, {"counts": Arg("weights", (3, 4))}, reason="rows of a table", helper=True),
    Case(
        mutual.span_f1,
        {"tags": Arg("labels", (4, 5), high=5), "gold": Arg("labels", (4, 5), high=5), "where": Arg("where", (4, 5))},
        helper=True,
    ),
    Case(mutual.bio_spans, {"tags": Arg("labels", (9,), high=5)}, host=True),
]
test_conformance = conformance.conformance_tests(CASES)
