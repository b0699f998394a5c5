"""Competitive distillation against loops in float64: who learns where, targets, groups, pool and duplicates."""

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
N, C = 8, 3
GAP = np.array([0.9, 0.3, 0.2, 0.1, -0.1, -0.2, -0.7, 0.9])
Y = np.array([0, 1, -1, 2, 1, 0, -1, 2], np.int32)
WHERE = np.arange(N) != 7
GROUPS = ([0, 1, 2], [3, 4], [5, 6])


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def oracle(z, t, temperature=2.0, sharpness=10.0, a=0.5):
    hard, easy, won = GROUPS
    w = 1 / (1 + np.exp(-sharpness * GAP))[:, None]
    p, q = softmax(z / temperature), softmax(t / temperature)
    target = softmax((1 - w) * np.log(p) + w * np.log(q))
    kl = lambda a, b, n: np.sum(a[n] * np.log(a[n] / b[n]))
    soft = temperature**2 * np.mean([kl(target, p, n) for n in hard + easy])
    ce = -np.mean([np.log(softmax(z)[n, Y[n]]) for n in range(N) if WHERE[n] and Y[n] >= 0])
    return a * soft + (1 - a) * ce, temperature**2 * np.mean([kl(p, q, n) for n in won]), target


@jax.jit
def losses_and_gradients(z, t, gap, y, where):
    losses = lambda z, t: jnp.stack(mutual.comd_losses(z, t, gap, y, where=where))
    soft = lambda z: mutual.comd_losses(z, t, gap, where=where)[0]
    targets = mutual.competitive_targets(z, t, gap, temperature=2.0)
    return losses(z, t), jax.jacrev(losses, argnums=(0, 1))(z, t), jax.grad(soft)(z), targets


def test_losses_equal_the_loop_and_each_network_learns_where_the_other_won():
    z, t = rng.normal(size=(2, N, C)) * 2
    dirty = [np.float32(np.where(WHERE[:, None], a, np.nan)) for a in (z, t)]
    run = lambda *args: jax.tree.map(np.asarray, losses_and_gradients(*args))
    got, (by_z, by_t), soft, target = run(*dirty, np.float32(GAP), Y, WHERE)
    student, teacher, expected = oracle(z, t)
    np.testing.assert_allclose(got, [student, teacher], rtol=1e-4)
    np.testing.assert_allclose(target[WHERE], expected[WHERE], rtol=1e-4, atol=1e-6)
    hard, easy, won = GROUPS
    assert not np.any(by_t[0]) and not np.any(by_z[1]), "one network's loss moves the other"
    assert not np.any(by_t[1][hard + easy]) and np.all(np.any(by_t[1][won], axis=1))
    assert not np.any(soft[won]) and np.all(np.any(soft[hard + easy], axis=1))
    same, (own, _), soft, _ = run(dirty[0], dirty[0], np.float32(GAP), np.full(N, -1), WHERE)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    np.testing.assert_allclose(own, 0, atol=1e-6)
    # Where the student surely won, its target is its own prediction.
    _, _, _, target = run(*dirty, np.full(N, -9, np.float32), Y, WHERE)
    np.testing.assert_allclose(target[WHERE], softmax(z[WHERE] / 2), rtol=1e-4)


def test_groups_divide_the_pool_and_change_places_with_the_sign():
    gap = np.float32(GAP)
    groups = [np.asarray(m) for m in mutual.split_by_gap(gap, where=WHERE)]
    assert [np.flatnonzero(m).tolist() for m in groups] == list(GROUPS)
    other = [np.asarray(m) for m in mutual.split_by_gap(-gap, where=WHERE)]
    np.testing.assert_array_equal(other[0], groups[2])
    np.testing.assert_array_equal(other[2], groups[0])


def test_an_assessor_that_likes_the_first_is_corrected():
    calls = []

    def assessor(first, second):
        calls.append((first, second))
        return first + 0.3, second

    a, b = rng.uniform(size=(2, 4))
    gap = mutual.debiased_gap(assessor, a, b)
    np.testing.assert_allclose(gap, a - b)
    np.testing.assert_allclose(mutual.debiased_gap(assessor, b, a), -gap)
    assert len(calls) == 4 and np.array_equal(calls[1][0], b)
    with pytest.raises(ValueError, match="scores of shapes"):
        mutual.debiased_gap(lambda first, second: (first, second[:1]), a, b)


def test_the_pool_is_half_hard_and_half_easy():
    hard, easy = np.isin(np.arange(9), [1, 4, 8]), np.isin(np.arange(9), [0, 5])
    none = np.zeros(9, bool)
    draw = jax.jit(lambda hard, easy: mutual.balance_pool(jax.random.key(0), hard, easy, size=401))
    rows = np.asarray(draw(hard, easy))
    counts = np.bincount(rows, minlength=9)
    assert counts[[1, 4, 8]].sum() == 201 and counts[[0, 5]].sum() == 200
    assert np.all(np.abs(counts[[1, 4, 8]] - 67) < 30) and np.all(np.abs(counts[[0, 5]] - 100) < 35)
    assert set(np.asarray(draw(none, easy)).tolist()) == {0, 5} and set(np.asarray(draw(hard, none))) == {1, 4, 8}
    assert np.all(np.asarray(draw(none, none)) == -1)


def test_duplicates_go_in_order():
    x = rng.normal(size=(12, 3))
    x[7] = 3 * x[2]
    where = np.arange(12) != 5
    stay = []
    for i in range(12):
        cosines = [x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for j in stay]
        if where[i] and all(c < 0.6 for c in cosines):
            stay.append(i)
    dirty = np.float32(np.where(where[:, None], x, np.nan))
    run = jax.jit(lambda x, where: mutual.remove_duplicates(x, threshold=0.6, where=where))
    assert np.flatnonzero(run(dirty, where)).tolist() == stay and 2 < len(stay) < 11
    assert np.all(run(np.eye(12, dtype=np.float32), np.ones(12, bool)))


def linear():
    return Layer(lambda key, d: {"w": jax.random.normal(key, (d, C))}, lambda params, x: x @ params["w"])


def test_a_round_chooses_perturbs_and_a_step_moves_each_network_by_its_loss():
    x = rng.normal(size=(N, 4)).astype(np.float32)
    learner = mutual.comd(linear(), linear(), optax.sgd(1.0))
    pool = {"x": x, "y": np.zeros(N, np.int32), "where": WHERE}
    scores = np.float32(np.where(np.arange(N) < 3, 0.9, 0.5))

    @jax.jit
    def run(key, batch):
        state = learner.init(key, batch)
        new, metrics = learner.update(state, {**batch, "gap": jnp.float32(GAP)}, None)
        first = learner.predict(state, batch)
        score = lambda z, pool: jnp.where(jnp.all(z == first["teacher_logits"]), scores, 0.5)
        options = {"score": score, "perturb": lambda key, x: -x, "size": 6}
        return state.params, new.params, metrics, comd_round(learner, state, batch, key, **options)

    comd_round = mutual.comd_round
    old, new, metrics, (batch, shares) = jax.tree.map(np.asarray, run(jax.random.key(0), {**pool, "y": Y}))
    z, t = (x.astype(np.float64) @ np.asarray(old[n]["w"], np.float64) for n in ("student", "teacher"))
    student, teacher, _ = oracle(z, t)
    np.testing.assert_allclose([metrics["student"], metrics["teacher"]], [student, teacher], rtol=1e-4)
    np.testing.assert_allclose([metrics["hard"], metrics["won"]], [3 / 7, 2 / 7], rtol=1e-6)
    p, q = softmax(z / 2), softmax(t / 2)
    grad = sum(2 * np.outer(x[n], q[n] - p[n]) / 2 for n in GROUPS[2])
    np.testing.assert_allclose(new["teacher"]["w"], old["teacher"]["w"] - grad, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose([shares["hard"], shares["easy"], shares["won"]], [3 / 7, 4 / 7, 0], rtol=1e-6)
    np.testing.assert_array_equal(batch["x"][6:], -batch["x"][:6])
    found = [int(np.flatnonzero((x == row).all(axis=1))[0]) for row in batch["x"][:6]]
    assert all(r < 3 for r in found[:3]) and all(3 <= r < 7 for r in found[3:])
    np.testing.assert_allclose(batch["gap"][:6], np.where(np.array(found) < 3, 0.4, 0), atol=1e-6)
    assert np.all(batch["where"][:6])
    kept = [i for i in range(6) if found[i] not in found[:i]]
    unlike = [i for i in kept if all(x[found[i]] @ x[r] > -0.9 * np.linalg.norm(x[found[i]]) * np.linalg.norm(x[r])
                                     for r in found)]  # fmt: skip
    assert np.flatnonzero(batch["where"][6:]).tolist() == unlike


def test_refuses():
    z, d = np.ones((3, 2), np.float32), np.ones(3, np.float32)
    for call, message in (
        (lambda: mutual.comd_losses(z, z[:2], d), "must both be"),
        (lambda: mutual.comd_losses(z, z, d, np.zeros(2, int)), "labels has shape"),
        (lambda: mutual.comd_losses(z, z, d[:2]), "gap has shape"),
        (lambda: mutual.comd_losses(z, z, d, soft_weight=2), "soft_weight=2"),
        (lambda: mutual.competitive_targets(z, z, d, temperature=0), "temperature=0"),
        (lambda: mutual.split_by_gap(d, threshold=-1), "threshold=-1"),
        (lambda: mutual.split_by_gap(d, where=np.ones(2, bool)), "where has shape"),
        (lambda: mutual.balance_pool(None, d > 0, d[:2] > 0, size=2), "hard and easy"),
        (lambda: mutual.balance_pool(None, d > 0, d > 0, size=0), "size=0"),
        (lambda: mutual.remove_duplicates(d), "embeddings must be"),
        (lambda: mutual.remove_duplicates(z, where=np.ones(2, bool)), "where has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def student_loss(logits, teacher_logits, gap, labels, *, where=None, axis_name=None):
    return mutual.comd_losses(logits, teacher_logits, gap, labels, where=where, axis_name=axis_name)[0]


PARAMS = {name: {"w": np.float32(rng.normal(size=(4, C)))} for name in ("student", "teacher")}


@jax.jit
def step_and_round(x, y, gap, where):
    learner, batch = mutual.comd(linear(), linear(), optax.sgd(0.1)), {"x": x, "y": y, "gap": gap, "where": where}
    state = learner.init(None, batch, params=jax.tree.map(lambda a: jnp.asarray(a, x.dtype), PARAMS))
    options = {"score": lambda z, pool: jax.nn.softmax(z)[:, 0], "perturb": lambda key, x: 0.5 * x, "size": 2}
    new, _ = mutual.comd_round(learner, state, batch, jax.random.key(0), **options)
    return learner.update(state, batch, None)[1]["student"], new["x"]


WHERE_CASE, LOGITS = {"where": Arg("where", (6,))}, Arg("scores", (6, 3))
CASES = [
    Case(
        student_loss,
        {"logits": LOGITS, "teacher_logits": LOGITS, "gap": Arg("embeddings", (6,)), "labels": Arg("labels", (6,)),
         **WHERE_CASE},
        wrt=("logits",),
        frozen=("teacher_logits", "gap"),
        rows=dict.fromkeys(("logits", "teacher_logits", "gap", "labels", "where"), 0),
        symmetry="invariant",
        name="comd_losses",
        covers=("mutual.comd_losses",),
        skip={"gradient": "the competitive target holds the student's own prediction as a constant"},
    ),
    Case(
        mutual.competitive_targets,
        {"logits": LOGITS, "teacher_logits": LOGITS, "gap": Arg("embeddings", (6,))},
        frozen=("logits", "teacher_logits", "gap"),
        reason="targets are constants",
        helper=True,
        skip={"dtype": "targets are in the accumulation dtype, as they enter a loss"},
    ),
    Case(mutual.split_by_gap, {"gap": Arg("scores", (6,)), **WHERE_CASE}, reason="masks", helper=True),
    Case(
        mutual.balance_pool,
        {"key": Arg("key"), "hard": Arg("where", (6,)), "easy": Arg("where", (6,))},
        static={"size": 4},
        helper=True,
    ),
    Case(mutual.remove_duplicates, {"embeddings": Arg("embeddings", (6, 4)), **WHERE_CASE}, reason="a mask",
         helper=True),
    Case(
        step_and_round,
        {"x": Arg("embeddings", (6, 4)), "y": Arg("labels", (6,)), "gap": Arg("embeddings", (6,)), **WHERE_CASE},
        reason="the loss of a step before its update, and rows of the pool",
        helper=True,
        name="comd",
        covers=("mutual.comd", "mutual.comd_round"),
    ),
    Case(
        lambda a, b: mutual.debiased_gap(lambda first, second: (first, second), a, b),
        {"a": Arg("scores", (4,)), "b": Arg("scores", (4,))},
        host=True,
        name="debiased_gap",
        covers=("mutual.debiased_gap",),
    ),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
