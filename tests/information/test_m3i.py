"""Every special case against the loss it is to be, written out in float64; mixing patch by patch."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import information
from jaxlab.information import TargetSpec

rng = np.random.default_rng(0)


def info_nce(a, b, t):
    cosine = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]
    e = np.exp(cosine / t)
    return -np.log(np.diag(e) / e.sum(1))


def cross_entropy(z, y):
    e = np.exp(z - z.max(1, keepdims=True))
    return -np.log(e[np.arange(len(y)), y] / e.sum(1))


def standard(v):
    v = v - v.mean(-1, keepdims=True)
    return v / np.sqrt((v**2).mean(-1, keepdims=True))


def test_special_cases_are_the_known_losses():
    z, text = rng.normal(size=(2, 6, 4))
    logits, labels = rng.normal(size=(6, 3)), np.array([0, 2, -1, 1, 1, 0])
    dense, truth = rng.normal(size=(2, 6, 5, 4))
    mask, where = rng.random((6, 5)) > 0.4, np.array([1, 1, 1, 1, 0, 1], bool)

    @jax.jit
    def run(z, text, logits, dense, truth):
        loss = lambda name, *lists, masks=None: information.m3i_loss(
            *lists, information.special_case(name), masks=masks, where=where
        )
        l1 = TargetSpec("laplace", 2.0, sigma=0.5, normalize=False)
        return {
            "supervised": loss("supervised", [logits], [labels]),
            "contrastive": loss("contrastive", [z], [text]),
            "clip": loss("clip", [z, text], [text, z]),
            "mim": loss("mim", [dense], [truth], masks=[mask]),
            "distillation": loss("distillation", [dense], [truth]),
            "m3i": loss("m3i", [dense, z, logits], [truth, text, labels], masks=[mask, None, None]),
            "laplace": information.m3i_loss([dense], [truth], [l1], where=where),
            "left out": information.m3i_loss([z, z], [text, text], [TargetSpec("softmax", 0.0)] * 2, where=where),
            "terms": information.log_likelihood(
                dense, truth, TargetSpec("gaussian", normalize=False), mask=mask, where=where, reduction="none"
            ),
        }

    hide = lambda v: np.where(where.reshape(-1, *[1] * (v.ndim - 1)), v, np.nan)
    with jax.enable_x64(True):
        got = run(*(hide(v) for v in (z, text, logits, dense, truth)))
    labelled, kept = where & (labels >= 0), mask & where[:, None]
    supervised = cross_entropy(logits[labelled], labels[labelled]).mean()
    contrastive = info_nce(z[where], text[where], 0.1).mean()
    square = lambda a, b: ((a - b) ** 2).mean(-1) / 2
    masked = square(dense, standard(truth))[kept].mean()
    expected = {
        "supervised": supervised,
        "contrastive": contrastive,
        "clip": (contrastive + info_nce(text[where], z[where], 0.1).mean()) / 2,
        "mim": square(dense, truth)[kept].mean(),
        "distillation": square(dense, standard(truth))[where].mean(),
        "m3i": masked + contrastive + supervised,
        "laplace": 2 * np.abs(dense - truth)[where].mean() / 0.5,
        "left out": 0,
        "terms": [-square(dense[i], truth[i])[kept[i]].mean() if kept[i].any() else 0 for i in range(6)],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_bound_of_gaussian_information():
    """The best softmax likelihood plus log N stays below the information and near it."""
    rho, count = 0.9, 128
    x, noise = np.float32(rng.normal(size=(2, 32, count)))
    y = rho * x + np.sqrt(1 - rho**2) * noise
    truth = float(information.gaussian_mutual_information(jnp.array([rho])))
    critic = -((y[:, None, :] - rho * x[:, :, None]) ** 2) / (2 * (1 - rho**2)) + y[:, None, :] ** 2 / 2
    log_p = critic - np.log(np.exp(critic).sum(-1, keepdims=True))
    # The same through the class likelihood: the batch's targets are the classes.
    told = jax.jit(jax.vmap(lambda z: information.log_likelihood(z, jnp.arange(count), TargetSpec("class"))))(critic)
    np.testing.assert_allclose(told, np.diagonal(log_p, axis1=1, axis2=2).mean(-1), rtol=1e-4)
    assert 0.9 * truth < float(np.mean(told)) + np.log(count) < truth + 0.05


def test_targets_are_constants_and_their_entropy_counts_on_request():
    z, text = np.float32(rng.normal(size=(2, 5, 3)))

    @jax.jit
    def run(z, text):
        loss = lambda spec, stop: lambda z, text: information.m3i_loss([z], [text], [spec], stop_gradient=stop)
        plain, spread = TargetSpec("softmax"), TargetSpec("softmax", entropy_weight=0.5)
        grads = [jax.grad(loss(plain, stop), (0, 1))(z, text) for stop in (True, False)]
        return grads, loss(plain, True)(z, text) - loss(spread, True)(z, text)

    (stopped, free), bonus = run(z, text)
    assert np.any(stopped[0]) and not np.any(stopped[1]) and np.any(free[1])
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(5) for j in range(5) if i != j]
    np.testing.assert_allclose(bonus, -0.5 * np.log(np.mean(pairs)), rtol=1e-4)


def test_mixtures_take_whole_patches_and_as_many_as_asked():
    a, b = np.float32(rng.normal(size=(2, 3, 6, 4, 2)))
    mix = jax.jit(lambda a, b, key: information.patch_mix(a, b, key=key, patch=2, ratio=0.3))
    image, mask = mix(a, b, jax.random.key(0))
    assert mask.shape == (3, 3, 2) and mask.sum(axis=(1, 2)).tolist() == [2, 2, 2]
    for n, i, j in np.ndindex(3, 6, 4):
        np.testing.assert_array_equal(image[n, i, j], (a if mask[n, i // 2, j // 2] else b)[n, i, j])
    same, other = mix(a, a, jax.random.key(1))
    np.testing.assert_array_equal(same, a)
    assert np.any(other != mask)


def test_refuses():
    z, spec = jnp.ones((4, 3)), TargetSpec("softmax")
    with pytest.raises(ValueError, match="must be as many, got 1, 1, 2 and 2"):
        information.m3i_loss([z], [z], [spec, spec])
    with pytest.raises(ValueError, match="weight=-1"):
        information.m3i_loss([z], [z], [TargetSpec("softmax", -1.0)])
    with pytest.raises(ValueError, match="kind='other'"):
        information.log_likelihood(z, z, TargetSpec("other"))
    with pytest.raises(ValueError, match="logits and labels must be"):
        information.log_likelihood(z, z, TargetSpec("class"))
    with pytest.raises(ValueError, match="target has shape"):
        information.log_likelihood(z, z[:, :2], TargetSpec("gaussian"))
    with pytest.raises(ValueError, match="mask has shape"):
        information.log_likelihood(z, z, TargetSpec("gaussian"), mask=jnp.ones((4, 3), bool))
    with pytest.raises(ValueError, match="sigma=0"):
        information.log_likelihood(z, z, TargetSpec("laplace", sigma=0.0))
    with pytest.raises(ValueError, match="patch=3 must divide"):
        information.patch_mix(jnp.ones((1, 4, 4)), jnp.ones((1, 4, 4)), key=jax.random.key(0), patch=3)
    with pytest.raises(ValueError, match="ratio=2"):
        information.patch_mix(jnp.ones((1, 4, 4)), jnp.ones((1, 4, 4)), key=jax.random.key(0), patch=2, ratio=2.0)
    with pytest.raises(ValueError, match="name='other'"):
        information.special_case("other")


def whole(dense, z, logits, labels, where, axis_name=None):
    targets = [dense[:, :, ::-1] * 2, z[:, ::-1], labels]
    specs = information.special_case("m3i")
    return information.m3i_loss(
        [dense, z, logits], targets, specs, stop_gradient=False, where=where, axis_name=axis_name
    )


def mixed(x, seed):
    return information.patch_mix(x, -x, key=jax.random.key(seed), patch=2)[0]


def terms(z, where):
    return information.log_likelihood(z, jnp.cos(z), TargetSpec("laplace"), where=where, reduction="none")


def names():
    return tuple(spec.weight for spec in information.special_case("clip"))


WHERE = Arg("where", (6,))
ARGS = {"dense": Arg("embeddings", (6, 2, 3)), "z": Arg("embeddings", (6, 4)), "logits": Arg("scores", (6, 3)),
        "labels": Arg("labels", (6,)), "where": WHERE}  # fmt: skip
CASES = [
    Case(whole, ARGS, wrt=("dense", "z", "logits"), rows=dict.fromkeys(ARGS, 0), symmetry="invariant", name="m3i_loss",
         covers=("information.m3i_loss",)),
    Case(terms, {"z": ARGS["z"], "where": WHERE}, wrt=("z",), helper=True, covers=("information.log_likelihood",)),
    Case(mixed, {"x": Arg("embeddings", (2, 4, 4)), "seed": Arg("index", (), high=9)}, wrt=("x",), helper=True,
         covers=("information.patch_mix",)),
    Case(names, {}, host=True, name="special_case", covers=("information.special_case",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
