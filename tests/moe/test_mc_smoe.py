"""Alignment, groups, merging and compression against searches over all and loops."""

import itertools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)
E, D, F = 5, 3, 4


def draw(*lead, gated=True):
    shapes = {"up": (D, F), "down": (F, D), "up_bias": (F,), "down_bias": (D,)}
    if gated:
        shapes |= {"gate": (D, F), "gate_bias": (F,)}
    return {n: np.float32(rng.normal(size=(*lead, *s))) for n, s in shapes.items()}


def output(p, x):
    up = x @ p["up"] + p["up_bias"]
    hidden = np.tanh(x @ p["gate"] + p["gate_bias"]) * up if "gate" in p else np.maximum(up, 0)
    return hidden @ p["down"] + p["down_bias"]


def permuted(p, order):
    axes = {"up": 1, "gate": 1, "down": 0, "up_bias": 0, "gate_bias": 0}
    return {n: np.take(w, order, axes[n]) if n in axes else w for n, w in p.items()}


def test_alignment_is_the_best_permutation_and_undoes_one():
    a, b = draw(), draw()
    match = jax.jit(moe.match_neurons)
    names = [n for n in ("up", "gate") if n in a]
    score = lambda order: sum(np.sum(a[n] * b[n][:, order]) for n in names) + np.sum(a["down"] * b["down"][order])
    best = max(itertools.permutations(range(F)), key=lambda order: score(list(order)))
    assert tuple(match(a, b).tolist()) == best
    order = np.array([2, 0, 3, 1])
    moved = permuted(a, order)
    assert np.array_equal(order[match(a, moved)], np.arange(F)) and np.array_equal(match(a, a), np.arange(F))
    x = rng.normal(size=(6, D))
    same = jax.tree.map(np.asarray, moe.permute_neurons(a, jnp.asarray(order)))
    np.testing.assert_allclose(output(same, x), output(a, x), rtol=1e-4, atol=1e-5)


def merged_oracle(experts, labels, usage, groups, align):
    result = []
    for g in range(groups):
        members = np.flatnonzero(labels == g)
        total = dict.fromkeys(experts, 0)
        for e in members:
            own = {n: w[e].astype(np.float64) for n, w in experts.items()}
            if align:
                first = {n: w[members[0]].astype(np.float64) for n, w in experts.items()}
                names = [n for n in ("up", "gate") if n in own]

                def score(order, own=own, first=first, names=names):
                    order = list(order)
                    return sum(np.sum(first[n] * own[n][:, order]) for n in names) + np.sum(
                        first["down"] * own["down"][order]
                    )

                own = permuted(own, list(max(itertools.permutations(range(F)), key=score)))
            total = {n: total[n] + usage[e] * own[n] for n in own}
        result.append({n: w / (usage[members].sum() + 1e-7) for n, w in total.items()})
    return {n: np.stack([r[n] for r in result]) for n in experts}


@pytest.mark.parametrize("align", [True, False])
def test_merging_equals_the_loop(align):
    experts, labels, usage = draw(E), np.array([1, 0, 1, 1, 0]), np.float32([0.1, 0.3, 0.2, 0.0, 0.4])
    got = jax.jit(lambda *a: moe.merge_experts(*a, num_groups=2, align=align))(experts, labels, usage)
    expected = merged_oracle(experts, labels, usage, 2, align)
    for name in experts:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_copies_with_shuffled_neurons_merge_into_their_original():
    one = draw(gated=False)
    orders = [rng.permutation(F) for _ in range(E)]
    copies = {n: np.stack([permuted(one, o)[n] for o in orders]) for n in one}
    labels, usage, x = jnp.zeros(E, int), jnp.float32(rng.random(E)), rng.normal(size=(6, D))
    results = [moe.merge_experts(copies, labels, usage, num_groups=1, align=a) for a in (True, False)]
    near, far = (output({n: np.float64(w[0]) for n, w in r.items()}, x) for r in results)
    np.testing.assert_allclose(near, output(one, x), rtol=1e-4, atol=1e-4)
    assert np.abs(far - output(one, x)).max() > 0.1


def test_a_merged_plan_adds_the_weights_of_a_group():
    scores = rng.normal(size=(7, E)).astype(np.float32)
    where, labels = np.arange(7) < 5, np.array([1, 0, 1, 2, 0])

    def run(scores):
        plan = moe.plan_from_weights(jax.nn.softmax(scores), scores, max_active=3, where=where)
        merged = moe.merge_plan(plan, labels, num_groups=3)
        return moe.dense_weights(plan), moe.dense_weights(merged), merged

    before, after, plan = jax.jit(run)(scores)
    expected = np.stack([np.asarray(before)[:, labels == g].sum(1) for g in range(3)], axis=1)
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    used = plan.expert < 3
    assert np.all(np.diff(plan.expert) >= 0) and np.array_equal(
        plan.counts, np.bincount(plan.expert[used], minlength=3)
    )
    joined = [np.log(np.exp(scores[:5, labels == g].astype(np.float64)).sum(1)) for g in range(3)]
    np.testing.assert_allclose(plan.logits[:5], np.stack(joined, 1), rtol=1e-5)


def test_similarity_and_groups():
    logits, where = rng.normal(size=(9, E)), np.arange(9) < 7
    got = jax.jit(moe.router_similarity)(np.float32(np.where(where[:, None], logits, np.nan)), where=where)
    real = logits[where]
    lengths = np.linalg.norm(real, axis=0)
    np.testing.assert_allclose(got, real.T @ real / lengths[:, None] / lengths[None], rtol=1e-4, atol=1e-5)
    usage = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    labels, centres = moe.group_experts(usage, np.asarray(got), num_groups=2)
    assert centres.tolist() == [1, 3]
    for e in (0, 2, 4):
        assert labels[e] == int(got[e, 3] > got[e, 1])
    labels, _ = moe.group_experts(usage, np.ones((E, E)), num_groups=2, capacity=3)
    assert sorted(np.bincount(labels)) == [2, 3] and labels.tolist()[1] == labels.tolist()[4] == labels.tolist()[0] == 0


def test_the_number_of_groups_follows_use_over_all_layers():
    usage = np.array([[0.7, 0.1, 0.1, 0.1], [0.3, 0.28, 0.22, 0.2], [0.4, 0.3, 0.2, 0.1]])
    # Each layer's first counts as 1; of the rest the three largest are 0.3, 0.28 and 0.22.
    assert moe.groups_per_layer(usage, 2).tolist() == [1, 3, 2]
    assert moe.groups_per_layer(usage, 2, mergeable=np.array([1, 1, 0], bool)).tolist() == [1, 3, 4]
    assert moe.groups_per_layer(usage, 4).tolist() == [4, 4, 4] and moe.groups_per_layer(usage, 1).tolist() == [1] * 3


def test_compression_splits_exactly_and_prunes_the_least_important_rows():
    w = np.float32(rng.normal(size=(8, 12)))
    for ratio in (0.15, 0.6):
        parts = jax.jit(lambda w, ratio=ratio: moe.low_rank_sparse(w, ratio=ratio))(w)
        rank = int(np.ceil(ratio * 96 / 20))
        u, s, v = np.linalg.svd(w.astype(np.float64))
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert parts["left"].shape == (8, rank) and parts["right"].shape == (rank, 12)
        np.testing.assert_allclose(parts["left"] @ parts["right"], best, atol=1e-4)
        np.testing.assert_allclose(parts["left"] @ parts["right"] + parts["sparse"], w, atol=1e-5)
    sparse = {"a": np.float32(rng.normal(size=(4, 3))), "b": np.float32(rng.normal(size=(5, 2)))}
    grads = [{n: np.float32(rng.normal(size=s.shape)) for n, s in sparse.items()} for _ in range(3)]
    step = jax.jit(lambda s, g, state, keep: moe.prune_rows(s, g, state, keep=keep))
    state = moe.prune_rows(sparse, grads[0], keep=1.0)[1]
    state = step(sparse, grads[1], state, 1.0)[1]
    average = {n: 0.15 * np.abs(s * grads[0][n]) * 0.85 + 0.15 * np.abs(s * grads[1][n]) for n, s in sparse.items()}
    entries = np.sort(np.concatenate([np.repeat(a.mean(1), a.shape[1]) for a in average.values()]))
    for keep in (1.0, 0.7, 0.25, 0.0):
        pruned = step(sparse, grads[2], state, keep)[0]
        k = int(len(entries) * (1 - keep) + 1e-4)
        limit = entries[k - 1] if k else -1
        for n, s in sparse.items():
            expected = np.where((average[n].mean(1) < limit * (1 - 1e-6))[:, None], 0, s)
            np.testing.assert_array_equal(pruned[n], expected, err_msg=f"{keep}")


def test_the_schedule_is_cubic():
    got = jax.jit(jax.vmap(lambda t: moe.kept_rows(t, steps=30, final=0.2, warmup=2)))(np.arange(30))
    for t in range(30):
        if t <= 2:
            expected = 1.0
        elif t >= 22:
            expected = 0.2
        else:
            expected = 0.2 + 0.8 * (1 - (t - 2) / 20) ** 3
        np.testing.assert_allclose(got[t], expected, rtol=1e-5)


def test_refuses():
    experts, one = draw(E), draw()
    ones = np.ones((2, 3))
    for make, match in (
        (lambda: moe.merge_experts({"up": 1}, jnp.zeros(E), jnp.zeros(E), num_groups=1), "must have up and down"),
        (lambda: moe.merge_experts(experts, jnp.zeros(3, int), jnp.zeros(E), num_groups=1), "labels and usage"),
        (lambda: moe.merge_experts(experts, jnp.zeros(E, int), jnp.zeros(E), num_groups=0), "num_groups=0"),
        (lambda: moe.match_neurons(one, {**one, "up_bias": jnp.ones(1)}), "same shapes"),
        (lambda: moe.permute_neurons(experts, jnp.arange(F)), "do not fit together"),
        (
            lambda: moe.merge_plan(moe.plan_from_weights(jnp.ones((2, 3))), jnp.zeros(2, int), num_groups=1),
            "labels must",
        ),
        (lambda: moe.router_similarity(jnp.ones(3)), "logits and where"),
        (lambda: moe.groups_per_layer(ones, 4), "average_groups=4"),
        (lambda: moe.groups_per_layer(np.ones((2, 3)) * 1.0, 2), "too few"),
        (lambda: moe.group_experts(np.ones(3), np.ones((3, 2)), num_groups=1), r"\[E\] and \[E, E\]"),
        (lambda: moe.group_experts(np.ones(3), np.ones((3, 3)), num_groups=4), "num_groups=4"),
        (lambda: moe.group_experts(np.ones(3), np.ones((3, 3)), num_groups=2, capacity=1), "capacity=1"),
        (lambda: moe.low_rank_sparse(jnp.ones(3)), "must be a matrix"),
        (lambda: moe.low_rank_sparse(jnp.ones((3, 3)), ratio=0.0), "ratio=0.0"),
        (lambda: moe.kept_rows(1, steps=500), "steps=500"),
        (lambda: moe.kept_rows(1, steps=5000, final=2.0), "final=2.0"),
        (lambda: moe.prune_rows({"w": jnp.ones(3)}, {"w": jnp.ones(3)}, keep=0.5), "must hold matrices"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def merge_experts(up, down, usage):
    labels = jnp.array([0, 1, 0, 1, 0])
    merged = moe.merge_experts({"up": up, "down": down}, labels, usage, num_groups=2, align=False)
    return merged["up"], merged["down"]


def merged_plan(scores, where):
    plan = moe.plan_from_weights(jax.nn.softmax(scores), scores, where=where)
    merged = moe.merge_plan(plan, jnp.array([0, 1, 0, 1, 0]), num_groups=2)
    return moe.dense_weights(merged).astype(scores.dtype), moe.router_similarity(scores, where=where)


def pruned(x):
    return moe.prune_rows({"w": x}, {"w": x}, {"average": {"w": x * x}, "last": {"w": x * x}}, keep=0.5)[0]["w"]


def split(x):
    parts = moe.low_rank_sparse(x, ratio=0.5)
    return parts["left"] @ parts["right"] + parts["sparse"]


def schedule(step):
    return moe.kept_rows(step, steps=600)


CASES = [
    Case(merge_experts, {"up": Arg("activations", (E, D, F)), "down": Arg("activations", (E, F, D)),
                         "usage": Arg("weights", (E,))}, wrt=("up", "down"), covers=("moe.merge_experts",)),
    Case(merged_plan, {"scores": Arg("scores", (6, E)), "where": Arg("where", (6,))}, wrt=("scores",), helper=True,
         covers=("moe.merge_plan", "moe.router_similarity")),
    Case(lambda a, b: moe.permute_neurons({"up": b, "down": b.T}, moe.match_neurons({"up": a, "down": a.T},
         {"up": b, "down": b.T}))["up"], {"a": Arg("activations", (D, F)), "b": Arg("activations", (D, F))}, wrt=("b",),
         helper=True, name="matched", covers=("moe.match_neurons", "moe.permute_neurons")),
    Case(split, {"x": Arg("activations", (4, 3))}, reason="a decomposition before training", helper=True,
         covers=("moe.low_rank_sparse",)),
    Case(pruned, {"x": Arg("activations", (4, 3))}, wrt=("x",), helper=True, covers=("moe.prune_rows",)),
    Case(schedule, {"step": Arg("index", (), high=600)}, reason="a schedule", helper=True, covers=("moe.kept_rows",)),
    Case(lambda usage: moe.groups_per_layer(usage, 2), {"usage": Arg("probabilities", (3, 4))}, host=True,
         name="groups_per_layer", covers=("moe.groups_per_layer",)),
    Case(lambda usage, similarity: moe.group_experts(usage, similarity, num_groups=2)[0], host=True,
         args={"usage": Arg("weights", (5,)), "similarity": Arg("scores", (5, 5))}, name="group_experts",
         covers=("moe.group_experts",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
