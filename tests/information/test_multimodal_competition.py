"""The game between modalities against loops over permutations; gradients by differences of what each may move."""

import itertools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information

rng = np.random.default_rng(0)
KEY, COUNT = jax.random.key(5), 3


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def jsd(a, b):
    p, q = softmax(a), softmax(b)
    m = (p + q) / 2
    return ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2


def orders(key, rows):
    """The permutations as the documentation tells: of the real rows, each by the order of uniform numbers."""
    return [np.argsort(np.asarray(jax.random.uniform(k, (rows,)))) for k in jax.random.split(key, COUNT)]


def contribution(parts, m, intact, shuffled):
    """Mean over permutations of the divergence, with what is permuted and what it is compared with given apart."""
    total = 0
    for order in shuffled:
        mixed = [part[order] if i == m else part for i, part in enumerate(parts)]
        total = total + jsd(sum(mixed), intact)
    return total / len(shuffled)


def test_divergence():
    a, b = rng.normal(size=(2, 5, 3)) * 3
    got, back, same = jax.jit(
        lambda a, b: [information.jensen_shannon_divergence(*p) for p in ((a, b), (b, a), (a, a))]
    )(np.float32(a), np.float32(b))
    np.testing.assert_allclose(got, jsd(a, b), rtol=1e-5)
    np.testing.assert_allclose(got, back, rtol=1e-5)
    np.testing.assert_allclose(same, 0, atol=1e-7)
    assert np.all(got < np.log(2))


@jax.jit
def game(a, b, c):
    """Values and gradients of all modes, for two modalities and (greedy) for three."""
    found = {}
    for mode in ("greedy", "independent", "collaborative"):
        loss = lambda *parts, mode=mode: information.competition_loss(parts, key=KEY, num_permutations=COUNT, mode=mode)
        found[mode] = jax.value_and_grad(loss, (0, 1))(a, b)
    loss = lambda *parts: information.competition_loss(parts, key=KEY, num_permutations=COUNT)
    found["three"] = jax.value_and_grad(loss, (0, 1, 2))(a, b, c)
    found["contributions"] = information.modality_contributions([a, b, c], key=KEY, num_permutations=COUNT)
    return found


def differences(function, x, step=1e-6):
    grad = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        grad[place] = (function(up) - function(down)) / (2 * step)
    return grad


def test_each_modality_moves_only_what_it_may():
    parts = list(rng.normal(size=(3, 4, 3)))
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, game(*parts))
        shuffled = orders(KEY, 4)
    two, three = parts[:2], parts

    def greedy(parts, k, moved):
        """What modality k plays for; the comparison with the intact prediction is a constant."""
        intact, mine = sum(parts), [moved if i == k else part for i, part in enumerate(parts)]
        rivals = [contribution(mine, m, intact, shuffled).mean() for m in range(len(parts)) if m != k]
        return -contribution(mine, k, intact, shuffled).mean() + sum(rivals) / (len(parts) - 1)

    for name, group in (("greedy", two), ("three", three)):
        value, grads = found[name]
        np.testing.assert_allclose(value, 0, atol=1e-12)  # both forms of each contribution are one number
        for k, grad in enumerate(grads):
            expected = differences(lambda x, k=k, group=group: greedy(group, k, x), group[k])
            np.testing.assert_allclose(grad, expected, atol=1e-7)
    told = [contribution(three, m, sum(three), shuffled).mean() for m in range(3)]
    np.testing.assert_allclose(found["contributions"], told, rtol=1e-9)
    total = -sum(contribution(two, m, sum(two), shuffled).mean() for m in range(2))
    for mode in ("independent", "collaborative"):
        np.testing.assert_allclose(found[mode][0], total, rtol=1e-9)

    def independent(x):
        """The first modality moves the intact prediction everywhere, and the permuted one where it is permuted."""
        own = contribution([x, two[1]], 0, x + two[1], shuffled).mean()
        return -own - contribution(two, 1, x + two[1], shuffled).mean()

    np.testing.assert_allclose(found["independent"][1][0], differences(independent, two[0]), atol=1e-7)


def contrast_oracle(latents, labels, keep, t):
    z = [(v[i] / np.linalg.norm(v[i]), labels[i], i, m) for m, v in enumerate(latents) for i in np.flatnonzero(keep)]
    terms = np.zeros((len(latents), len(labels)))
    pairs = []
    for (a, la, i, m), (p, lp, j, k) in itertools.product(z, z):
        if la == lp and (i, m) != (j, k):
            negative = sum(np.exp(a @ n / t) for n, ln, _, _ in z if ln != la)
            pairs.append(((m, i), -np.log(np.exp(a @ p / t) / (np.exp(a @ p / t) + negative))))
    for place in np.ndindex(terms.shape):
        own = [value for where, value in pairs if where == place]
        terms[place] = np.mean(own) if own else 0
    return np.mean([value for _, value in pairs]), terms


def test_contrastive_term_equals_the_loop():
    latents, labels = rng.normal(size=(2, 6, 4)), np.array([0, 1, 0, 2, -1, 1])
    where = np.array([1, 1, 1, 1, 1, 0], bool)
    dirty = [np.float32(np.where(where[:, None], v, np.nan)) for v in latents]
    run = jax.jit(
        lambda latents, where: [
            information.label_contrastive_loss(latents, labels, temperature=0.3, where=where, reduction=r)
            for r in ("mean", "none")
        ]
    )
    mean, terms = run(dirty, where)
    expected = contrast_oracle(latents, labels, where & (labels >= 0), 0.3)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-5)
    np.testing.assert_allclose(terms, expected[1], rtol=1e-5)
    mean, terms = run(dirty, np.arange(6) == 0)  # a positive and no negative
    assert mean == 0 and not np.any(terms)


def test_loss_is_the_sum_of_its_terms():
    parts, heads, latents = rng.normal(size=(3, 2, 5, 3))
    labels, where = np.array([0, 2, 1, -1, 0]), np.array([1, 1, 1, 1, 0], bool)
    reconstruct = lambda z: jnp.concatenate([z, 2 * z], axis=-1)
    with jax.enable_x64(True):
        got = jax.jit(
            lambda p, h, z: information.mcr_loss(
                p, labels, key=KEY, unimodal_logits=h, latents=z, reconstruct=reconstruct, unimodal_weight=0.7,
                game_weight=0.9, contrastive_weight=0.4, bottleneck_weight=0.3, mode="independent",
                num_permutations=COUNT, where=where,
            )
        )(*(list(np.where(where[None, :, None], v, np.nan)) for v in (parts, heads, latents)))  # fmt: skip
        shuffled = orders(KEY, 5)
    shuffled = [np.array([i for i in order if where[i]]) for order in shuffled]
    labelled = where & (labels >= 0)
    entropy = lambda z: np.mean([-np.log(softmax(z[i])[labels[i]]) for i in np.flatnonzero(labelled)])
    kept = [part[where] for part in parts]
    fused = sum(parts)
    play = -sum(contribution(kept, m, sum(kept), shuffled).mean() for m in range(2))
    away = np.concatenate(list(latents), axis=1) - np.concatenate([fused, 2 * fused], axis=1)
    expected = entropy(fused) + 0.7 * sum(entropy(h) for h in heads) + 0.9 * play
    expected += 0.4 * contrast_oracle(latents, labels, labelled, 0.5)[0] + 0.3 * (away[where] ** 2).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_rows_over_shards_are_one_batch_in_value_and_gradient():
    a, b = np.float32(rng.normal(size=(2, 8, 4)))
    labels, where = rng.integers(0, 2, 8), np.arange(8) < 7

    def loss(a, b, split):
        def run(a, b, labels, where, axis_name=None):
            options = {"latents": [a, b], "unimodal_logits": [a, b], "num_permutations": 2, "mode": "independent"}
            return information.mcr_loss([a, b], labels, key=KEY, where=where, axis_name=axis_name, **options)

        if not split:
            return run(a, b, labels, where)
        parts = [v.reshape(2, 4, *v.shape[1:]) for v in (a, b, labels, where)]
        return jnp.mean(jax.vmap(lambda *v: run(*v, axis_name="data"), axis_name="data")(*parts))

    one, two = jax.jit(lambda a, b: [jax.value_and_grad(loss, (0, 1))(a, b, split) for split in (False, True)])(a, b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), two, one)


def test_gradient_modulation_slows_the_one_ahead():
    z, labels = rng.normal(size=(2, 6, 3)), rng.integers(0, 3, 6)
    score = [sum(softmax(z[m])[i, labels[i]] for i in range(5)) for m in range(2)]
    where = np.arange(6) < 5
    got = jax.jit(lambda z: information.ogm_coefficients(z, labels, alpha=0.3, where=where))(np.float32(z))
    ahead = int(score[1] > score[0])
    np.testing.assert_allclose(got[ahead], 1 - np.tanh(0.3 * score[ahead] / score[1 - ahead]), rtol=1e-5)
    assert got[1 - ahead] == 1


def test_refuses():
    z, labels = jnp.ones((4, 3)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match="at least 2 modalities, got 1"):
        information.competition_loss([z], key=KEY)
    with pytest.raises(ValueError, match="mode='other'"):
        information.competition_loss([z, z], key=KEY, mode="other")
    with pytest.raises(ValueError, match=r"parts\[1\] has shape \(3, 3\)"):
        information.modality_contributions([z, z[:3]], key=KEY)
    with pytest.raises(ValueError, match="num_permutations=0"):
        information.mcr_loss([z, z], labels, key=KEY, num_permutations=0)
    with pytest.raises(ValueError, match="labels has shape"):
        information.label_contrastive_loss([z, z], labels[:3])
    with pytest.raises(ValueError, match="temperature=0"):
        information.label_contrastive_loss([z, z], labels, temperature=0.0)
    with pytest.raises(ValueError, match="logits_b has shape"):
        information.jensen_shannon_divergence(z, z[:2])
    with pytest.raises(ValueError, match="alpha=0"):
        information.ogm_coefficients(jnp.stack([z, z]), labels, alpha=0.0)


def played_together(a, b, where, seed, axis_name=None):
    options = {"mode": "collaborative", "num_permutations": 1, "where": where, "axis_name": axis_name}
    return information.competition_loss([a, b], key=jax.random.key(seed), **options)


def whole(a, b, labels, where, seed):
    reconstruct = lambda z: jnp.concatenate([z, z], axis=-1)
    options = {"latents": [a, b], "reconstruct": reconstruct, "bottleneck_weight": 0.1, "num_permutations": 1}
    return information.mcr_loss([a, b], labels, key=jax.random.key(seed), where=where, **options)


def small(a, b, labels, where, seed):
    divergence = information.jensen_shannon_divergence(a, b)
    told = information.modality_contributions([a, b], key=jax.random.key(seed), num_permutations=1)
    return divergence, told, information.label_contrastive_loss([a, b], labels, where=where)


def modulation(z, labels):
    return information.ogm_coefficients(z, labels)


PAIR = {"a": Arg("embeddings", (6, 4)), "b": Arg("embeddings", (6, 4))}
MARKS = {"labels": Arg("labels", (6,)), "where": Arg("where", (6,))}
CASES = [
    Case(played_together, {**PAIR, "where": MARKS["where"], "seed": Arg("index", (), high=9)}, wrt=("a", "b"),
         rows=dict.fromkeys([*PAIR, "where"], 0), name="competition_loss", covers=("information.competition_loss",)),
    Case(whole, {**PAIR, **MARKS, "seed": Arg("index", (), high=9)}, wrt=("a", "b"), helper=True, name="mcr_loss",
         covers=("information.mcr_loss",)),
    Case(small, {**PAIR, **MARKS, "seed": Arg("index", (), high=9)}, wrt=("a", "b"), helper=True,
         covers=("information.jensen_shannon_divergence", "information.label_contrastive_loss",
                 "information.modality_contributions")),
    Case(modulation, {"z": Arg("scores", (2, 6, 3)), "labels": Arg("labels", (6,))}, helper=True,
         reason="factors of gradients", covers=("information.ogm_coefficients",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
