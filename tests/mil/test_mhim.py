"""MHIM-MIL: masks against sorting by hand, the loss against a loop over bags, and the teacher."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import mil

rng = np.random.default_rng(0)
B, N, D = 3, 12, 4
KEEP = np.arange(N)[None, :] < np.array([12, 7, 1])[:, None]
SCORES = rng.permutation(B * N).reshape(B, N).astype(np.float32)


def highest(scores, number, largest=True):
    order = sorted(range(len(scores)), key=lambda i: -scores[i] if largest else scores[i])
    return set(order[:number])


def listed(a):
    """The kept instances as one shuffled list, with its layout."""
    order = rng.permutation(B * N)
    ids = np.where(KEEP, np.arange(B)[:, None], -1).reshape(-1)[order].astype(np.int32)
    return a.reshape(B * N, *a.shape[2:])[order], {"segment_ids": ids, "num_segments": B}, order


def ceil(x):
    return int(np.ceil(np.round(x, 9)))


@pytest.mark.parametrize("largest", [True, False])
def test_selection_equals_sorting_in_both_layouts(largest):
    flat, layout, order = listed(SCORES)
    both = jax.jit(
        lambda ratio: (
            mil.select_mask(SCORES, ratio=ratio, largest=largest, where=KEEP),
            mil.select_mask(flat, ratio=ratio, largest=largest, **layout),
        )
    )
    for ratio in (0.0, 0.25, 1 / 3, 1.0):
        got, again = (np.asarray(mask) for mask in both(jnp.float32(ratio)))
        for b in range(B):
            n = KEEP[b].sum()
            assert set(np.flatnonzero(got[b])) == highest(SCORES[b, :n], ceil(n * ratio), largest)
        np.testing.assert_array_equal(again, got.reshape(-1)[order])


def test_sizes_of_the_paper_and_the_random_part():
    scores = rng.normal(size=(1, 1000)).astype(np.float32)
    top = highest(scores[0], 20)
    part = jax.jit(lambda ratio, key: mil.select_mask(scores, ratio=ratio, random_ratio=0.5, key=key))
    keys = [jax.random.key(i) for i in range(2)]
    masks = [np.flatnonzero(part(jnp.float32(0.01), key)[0]) for key in keys]
    assert all(len(m) == 10 and set(m) <= top for m in masks) and set(masks[0]) != set(masks[1])
    assert part(jnp.float32(0.03), keys[0]).sum() == 30
    # A ratio above the random one: everything is a candidate.
    few = np.asarray(part(jnp.float32(0.7), keys[0]))
    assert few.sum() == 700 and not set(np.flatnonzero(few[0])) <= highest(scores[0], 700)
    half = jax.jit(lambda key: mil.hard_instance_mask(scores, ratio_random=0.5, key=key))(keys[0])
    assert half.sum() == 500


def test_heads_vote_or_share():
    scores = rng.normal(size=(1, 10, 3)).astype(np.float32)

    def every_form(scores):
        single = mil.select_mask(scores[..., :1], ratio=0.3), mil.select_mask(scores[..., 0], ratio=0.3)
        return *single, mil.select_mask(scores, ratio=0.4), mil.select_mask(scores, ratio=0.6, fusion="mean")

    one, plain, got, shared = (np.asarray(mask) for mask in jax.jit(every_form)(scores))
    np.testing.assert_array_equal(one, plain)
    got, shared = got[0], shared[0]
    named = [highest(scores[0, :, h], 4) for h in range(3)]
    votes = np.array([sum(i in s for s in named) for i in range(10)])
    assert got.sum() == 4 and votes[got].min() >= votes[~got].max()
    tied = votes == votes[got].min()  # the last places go to the highest mean score
    if (tied & got).any() and (tied & ~got).any():
        mean = scores[0].mean(-1)
        assert mean[tied & got].min() > mean[tied & ~got].max()
    assert set(np.flatnonzero(shared)) == set.union(*(highest(scores[0, :, h], 2) for h in range(3)))


def test_strategies_unite_their_parts():
    key = jax.random.key(3)
    parts = {"ratio_random": 0.5, "ratio_low": 0.25, "ratio_high": 0.25}

    def masks(key):
        chosen = [*({name: ratio} for name, ratio in parts.items()), parts, {}]
        return [mil.hard_instance_mask(SCORES, where=KEEP, key=key, **options) for options in chosen]

    *each, whole, nothing = (np.asarray(mask) for mask in jax.jit(masks)(key))
    np.testing.assert_array_equal(whole[:2], np.any(each, axis=0)[:2])
    assert not whole[2].any()  # the bag of one instance is not emptied
    assert not (whole & ~KEEP).any()
    np.testing.assert_array_equal(each[0].sum(1), [6, 4, 0])
    assert not nothing.any()


def test_padding_does_not_change_the_draw():
    options = {"ratio_random": 0.4, "ratio_high": 0.3, "high_random": 0.5}
    long = np.pad(SCORES, ((0, 0), (0, 5)))
    kept = np.pad(KEEP, ((0, 0), (0, 5)))
    short, padded = jax.jit(
        lambda key: [mil.hard_instance_mask(s, where=w, key=key, **options) for s, w in ((SCORES, KEEP), (long, kept))]
    )(jax.random.key(0))
    np.testing.assert_array_equal(padded[:, :N], short)


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def test_consistency_equals_the_loop():
    s, t = rng.normal(size=(2, 4, 5))
    where = np.array([1, 1, 0, 1], bool)
    terms = [-(softmax(t[b] / 0.1) * np.log(softmax(s[b] / 2.0))).sum() for b in range(4)]
    got, best = jax.jit(
        lambda s, t: (
            mil.bag_consistency_loss(s, t, student_temperature=2.0, where=where),
            mil.bag_consistency_loss(t[:1] / 0.1, t[:1]),
        )
    )(jnp.float32(s), jnp.float32(t))
    np.testing.assert_allclose(got, np.mean([terms[b] for b in (0, 1, 3)]), rtol=1e-5)
    entropy = -(softmax(t[0] / 0.1) * np.log(softmax(t[0] / 0.1))).sum()
    np.testing.assert_allclose(best, entropy, rtol=1e-4, atol=1e-6)


X = np.where(KEEP[..., None], rng.normal(size=(B, N, D)), np.nan).astype(np.float32)
BATCH = {"x": X, "y": np.array([1, 0, -1], np.int32), "where": KEEP}
MODEL = mil.abmil(2, hidden=3)
SHAPES = jax.eval_shape(lambda key: MODEL.init(key, D), jax.random.key(0))
PARAMS = [jax.tree.map(lambda v: np.float32(0.6 * rng.normal(size=v.shape)), SHAPES) for _ in range(2)]


FIXED = {"ratio_high": 0.25, "high_random": 1.0, "ratio_random": 0.0}
LOSS = jax.jit(
    jax.value_and_grad(lambda s, t: mil.mhim_loss(s, t, BATCH, model=MODEL, **FIXED), argnums=(0, 1), has_aux=True)
)


def attend(p, x):
    s = np.array([np.tanh(h @ p["hidden"]["w"]) @ p["score"]["w"][:, 0] for h in x])
    a = softmax(s)
    return a, a @ x


def test_loss_equals_the_loop_over_bags():
    """High attention masked, one part in four: cross-entropy of two labelled bags, consistency of all three."""
    student, teacher = (jax.tree.map(np.float64, p) for p in PARAMS)
    losses, ties, kept = [], [], 0
    for b in range(B):
        x = X[b][KEEP[b]].astype(np.float64)
        a, z_t = attend(teacher, x)
        hidden = highest(a, ceil(len(x) * 0.25)) if len(x) > 1 else set()
        rest = x[[i for i in range(len(x)) if i not in hidden]]
        kept += len(rest)
        _, z_s = attend(student, rest)
        ties.append(-(softmax(z_t / 0.1) * np.log(softmax(z_s))).sum())
        if BATCH["y"][b] >= 0:
            losses.append(-np.log(softmax(z_s @ student["head"]["w"] + student["head"]["b"]))[BATCH["y"][b]])
    (loss, aux), _ = LOSS(*PARAMS)
    np.testing.assert_allclose(loss, np.mean(losses) + 0.1 * np.mean(ties), rtol=1e-5)
    np.testing.assert_allclose(aux["consistency"], np.mean(ties), rtol=1e-5)
    np.testing.assert_allclose(aux["kept"], kept / KEEP.sum(), rtol=1e-6)


@pytest.fixture(scope="module")
def trained():
    """A step in both layouts, and what a dual-stream model behind dropout predicts."""
    flat, layout, _ = listed(X)
    batch = {"x": flat, "y": BATCH["y"], "segment_ids": layout["segment_ids"]}
    dual = mil.with_encoder(mil.instance_encoder(6), mil.dsmil(2, hidden=3))
    learner = mil.mhim(MODEL, optax.sgd(0.1), **FIXED, decay=0.9)
    other = mil.mhim(dual, optax.adam(1e-2), ratio_high=lambda step: mil.ham_ratio_schedule(0.2, step, 10))

    def run(key):
        state = learner.init(key, BATCH, params=PARAMS[0], teacher=PARAMS[1])
        one = learner.update(state, BATCH, key)
        two = learner.update(state, batch, key)
        dual_state = other.init(key, BATCH)
        start = dual_state.params, dual_state.net_state["teacher"]
        options = {"model": dual, "ratio_high": mil.ham_ratio_schedule(0.2, dual_state.step, 10), "key": key}
        return one, two, (mil.mhim_loss(*start, BATCH, **options)[1], other.predict(dual_state, BATCH))

    return jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(0)))


def test_learner_steps_the_student_and_averages_the_teacher(trained):
    (state, metrics), (listed_state, listed_metrics), (dual_metrics, outputs) = trained
    for a, b in zip(jax.tree.leaves((state, metrics)), jax.tree.leaves((listed_state, listed_metrics)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert state.step == 1 and all(np.isfinite(v).all() for v in jax.tree.leaves(state.params))
    expected = jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, PARAMS[1], state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.net_state["teacher"], expected)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, atol=1e-6),
        state.params, PARAMS[0], LOSS(*PARAMS)[1][0],
    )  # fmt: skip
    assert np.isfinite(dual_metrics["loss"]) and 0.2 < dual_metrics["kept"] < 0.6
    streams = [np.array([softmax(z) for z in outputs[n]]) for n in ("bag_logits", "max_logits")]
    np.testing.assert_allclose(outputs["probs"], np.mean(streams, 0), rtol=1e-5)


def test_schedule_and_no_gradient_to_the_teacher():
    got = jax.jit(lambda steps: mil.ham_ratio_schedule(0.04, steps, 4))(jnp.arange(5))
    np.testing.assert_allclose(got, [0.04 * 0.5 * (1 + np.cos(np.pi * i / 4)) for i in range(5)], atol=1e-7)
    student, teacher = LOSS(*PARAMS)[1]
    assert any(np.any(g) for g in jax.tree.leaves(student)) and not any(np.any(g) for g in jax.tree.leaves(teacher))


def test_shards_of_bags_give_the_gradient_of_all(mesh8):
    """Two steps on eight shards of bags equal those on one device (nothing random)."""
    from jax.sharding import PartitionSpec as P

    x = rng.normal(size=(16, 5, D)).astype(np.float32)
    batch = {"x": x, "y": np.arange(16) % 2, "where": np.arange(5)[None, :] < rng.integers(1, 6, (16, 1))}
    plain, spread = (mil.mhim(MODEL, optax.sgd(0.1), axis_name=a, decay=0.9, **FIXED) for a in (None, "data"))
    start = plain.init(jax.random.key(0), batch, params=PARAMS[0], teacher=PARAMS[1])
    key = jax.random.key(1)
    mapped = jax.shard_map(
        lambda s, b: spread.update(s, b, key), mesh=mesh8, in_specs=(P(), P("data")), out_specs=(P(), P())
    )
    expected, got = jax.jit(lambda s: (plain.update(s, batch, key), mapped(s, batch)))(start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


def test_refuses():
    with pytest.raises(ValueError, match=r"ratio=1\.5 must be"):
        mil.select_mask(SCORES, ratio=1.5)
    with pytest.raises(ValueError, match="random_ratio=0 must be"):
        mil.select_mask(SCORES, ratio=0.5, random_ratio=0)
    with pytest.raises(ValueError, match=r"random_ratio=0\.5 needs a key"):
        mil.select_mask(SCORES, ratio=0.5, random_ratio=0.5)
    with pytest.raises(ValueError, match=r"ratio_random=0\.5 needs a key"):
        mil.hard_instance_mask(SCORES, ratio_random=0.5)
    with pytest.raises(ValueError, match="fusion='max'"):
        mil.select_mask(SCORES, ratio=0.5, fusion="max")
    with pytest.raises(ValueError, match="weight=-1"):
        mil.mhim(MODEL, optax.sgd(0.1), weight=-1)
    with pytest.raises(ValueError, match="ratio_low=2"):
        mil.mhim(MODEL, optax.sgd(0.1), ratio_low=2)
    with pytest.raises(ValueError, match="teacher_temperature=0"):
        mil.bag_consistency_loss(X[:, 0], X[:, 0], teacher_temperature=0)
    with pytest.raises(ValueError, match="student and teacher must have one shape"):
        mil.bag_consistency_loss(X[:, 0], X)
    with pytest.raises(ValueError, match="total=0"):
        mil.ham_ratio_schedule(0.1, 0, 0)


LEARNER = mil.mhim(MODEL, optax.sgd(0.1), ratio_low=0.2)


def learner_case(x, where, labels, key):
    """A step: the metrics of the loss, and parameters that its gradient has moved."""
    batch = {"x": x, "where": where, "y": labels}
    state = LEARNER.init(key, batch, params=PARAMS[0], teacher=PARAMS[1])
    state, metrics = LEARNER.update(state, batch, key)
    return metrics, state.params["head"]


def loss_case(x, where, labels, head, teacher_hidden):
    student = {**PARAMS[0], "head": {**PARAMS[0]["head"], "w": head}}
    teacher = {**PARAMS[1], "hidden": {"w": teacher_hidden}}
    batch = {"x": x, "y": labels, "where": where}
    options = {"ratio_high": 0.25, "high_random": 1.0, "ratio_random": 0.0, "ratio_low": 0.2}
    return mil.mhim_loss(student, teacher, batch, model=MODEL, **options)[0]


MASK = {"scores": Arg("scores", (3, 8)), "where": Arg("where", (3, 8))}
CASES = [
    Case(mil.select_mask, MASK, static={"ratio": 0.3}, reason="a choice has no gradient", helper=True),
    Case(lambda scores, where, key: mil.hard_instance_mask(scores, where=where, key=key, ratio_random=0.3,
         ratio_high=0.2, high_random=0.5), {**MASK, "key": Arg("key")}, reason="a choice has no gradient",
         name="hard_instance_mask", covers=("mil.hard_instance_mask",), helper=True),
    Case(lambda scores: mil.ham_ratio_schedule(0.1, jnp.int32(1), 4) * scores, {"scores": Arg("scores")},
         wrt=("scores",), helper=True, name="ham_ratio_schedule", covers=("mil.ham_ratio_schedule",)),
    Case(mil.bag_consistency_loss, {"student": Arg("embeddings", (6, 5)), "teacher": Arg("embeddings", (6, 5)),
         "where": Arg("where", (6,))}, wrt=("student",), frozen=("teacher",),
         rows={"student": 0, "teacher": 0, "where": 0}, symmetry="invariant"),
    Case(loss_case, {"x": Arg("embeddings", (3, 8, D)), "where": Arg("where", (3, 8)),
         "labels": Arg("labels", (3,), high=2), "head": Arg("activations", (3 + 1, 2)),
         "teacher_hidden": Arg("activations", (D, 3))}, wrt=("head",), frozen=("teacher_hidden",),
         rows={"x": 1, "where": 1}, symmetry="invariant", covers=("mil.mhim_loss",), name="mhim_loss",
         skip={"dtype": "attention that rounds differently masks another instance"}),
    Case(learner_case, {"x": Arg("embeddings", (3, 8, D)), "where": Arg("where", (3, 8)),
         "labels": Arg("labels", (3,), high=2), "key": Arg("key")}, reason="metrics", helper=True,
         covers=("mil.mhim",), name="mhim", skip={
         "dtype": "metrics are float32 whatever the data are, and attention that rounds differently masks others"}),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
