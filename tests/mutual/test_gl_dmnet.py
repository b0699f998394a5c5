"""GL-DMNet's fusions, decoder, loss and metrics against loops in float64."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mutual

rng = np.random.default_rng(0)
R, D = rng.normal(size=(2, 2, 3, 2, 4))
sigmoid = lambda a: 1 / (1 + np.exp(-a))
single = lambda tree: jax.tree.map(np.float32, tree)
double = lambda tree: jax.tree.map(lambda a: np.asarray(a + rng.normal(size=a.shape) * 0.3, np.float64), tree)
affine = lambda p, x: x @ p["w"] + p["b"]


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def norm(p, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return unit * p["gain"] + p["bias"]


def convolve(x, w):
    """A 3x3 convolution with zeros around; one filter a channel if w has one input."""
    out = np.zeros((*x.shape[:3], w.shape[-1]))
    for n, i, j, a, b in np.ndindex(*x.shape[:3], 3, 3):
        row, column = i + a - 1, j + b - 1
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            pixel = x[n, row, column]
            out[n, i, j] += pixel * w[a, b, 0] if w.shape[2] == 1 else pixel @ w[a, b]
    return out


def position_oracle(p, streams, exchange):
    seen, values, outs = {}, {}, []
    for name, x in streams.items():
        flat = x.reshape(2, 6, 4)
        q, k, values[name] = (affine(p[name][n], flat) for n in ("q", "k", "v"))
        seen[name] = softmax(np.stack([q[b] @ k[b].T for b in range(2)]) / np.sqrt(q.shape[-1]))
    for name, other in (("rgb", "depth"), ("depth", "rgb")):
        looked = exchange * seen[other] + (1 - exchange) * seen[name]
        far = np.stack([looked[b] @ values[name][b] for b in range(2)]).reshape(2, 3, 2, 4)
        near = np.maximum(norm(p[name]["norm"], convolve(streams[name], p[name]["local"])), 0)
        outs.append(streams[name] + p[name]["gamma"] * far + near)
    return affine(p["fuse"], np.concatenate([*outs, outs[0] * outs[1]], axis=-1))


def channel_oracle(p, streams, exchange):
    flat = {n: x.reshape(2, 6, 4) for n, x in streams.items()}
    alike = {n: softmax(np.stack([x[b].T @ x[b] for b in range(2)]) / np.sqrt(6)) for n, x in flat.items()}
    outs = []
    for name, other in (("rgb", "depth"), ("depth", "rgb")):
        x = streams[name]
        mixed = exchange * alike[other] + (1 - exchange) * alike[name]
        far = np.stack([flat[name][b] @ mixed[b].T for b in range(2)]).reshape(x.shape)
        mean = exchange * flat[other].mean(1) + (1 - exchange) * flat[name].mean(1)
        hidden = np.maximum(affine(p[name]["gate"]["dense_0"], mean), 0)
        gate = sigmoid(affine(p[name]["gate"]["dense_1"], hidden))
        outs.append(x + p[name]["gamma"] * far + x * gate[:, None, None])
    return affine(p["fuse"], np.concatenate([*outs, outs[0] * outs[1]], axis=-1))


@pytest.mark.parametrize("kind", ["position", "channel"])
def test_fusions_equal_the_loops(kind):
    make = getattr(mutual, f"{kind}_mutual_fusion")
    drawn = jax.jit(make().init, static_argnums=1)(jax.random.key(0), 4)
    assert drawn["rgb"]["gamma"] == 0 and drawn["depth"]["gamma"] == 0
    params = double(drawn)

    @jax.jit
    def run(params, r, d, exchange, branches):
        return make(exchange=exchange, branches=branches).apply(params, r, d)

    r, d = np.float32(R), np.float32(D)
    oracle = position_oracle if kind == "position" else channel_oracle
    for exchange in (1.0, 0.0, 0.3):
        expected = oracle(params, {"rgb": R, "depth": D}, exchange)
        np.testing.assert_allclose(run(single(params), r, d, exchange, 1.0), expected, rtol=2e-4, atol=2e-5)
    plain = affine(params["fuse"], np.concatenate([R, D, R * D], axis=-1))
    np.testing.assert_allclose(run(single(params), r, d, 1.0, 0.0), plain, rtol=1e-4, atol=1e-5)
    # With equal streams and equal weights there is nothing to exchange.
    shared = single({**params, "depth": params["rgb"]})
    a, b = (run(shared, r, r, exchange, 1.0) for exchange in (0.0, 1.0))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_decoder_equals_the_loops():
    """Two levels, of which the deeper one alone has few enough places for a transformer block."""
    decoder = mutual.cascade_decoder(4, num_heads=2, max_tokens=6)
    shallow, deep = rng.normal(size=(2, 6, 2, 3)), rng.normal(size=(2, 3, 2, 4))
    params = double(jax.jit(decoder.init, static_argnums=(1, 2))(jax.random.key(0), 3, 4))
    got = jax.jit(decoder.apply)(single(params), [np.float32(shallow), np.float32(deep)])
    own = params["level_1"]
    x = np.maximum(norm(own["norm"], convolve(deep, own["join"])), 0).reshape(2, 6, 4)
    block = own["block"]
    q, k, v = np.split(affine(block["project"], norm(block["first"], x)), 3, axis=-1)
    seen = np.zeros_like(x)
    for b, h in np.ndindex(2, 2):
        part = slice(2 * h, 2 * h + 2)
        seen[b, :, part] = softmax(q[b, :, part] @ k[b, :, part].T / np.sqrt(2)) @ v[b, :, part]
    x = x + affine(block["out"], seen)
    hidden = np.maximum(affine(block["feed"]["dense_0"], norm(block["second"], x)), 0)
    x = (x + affine(block["feed"]["dense_1"], hidden)).reshape(2, 3, 2, 4)
    np.testing.assert_allclose(got[1], affine(own["head"], x)[..., 0], rtol=2e-4, atol=2e-5)
    grown = np.zeros((2, 6, 2, 4))
    for i in range(6):  # the place of row i among three rows, linearly between its neighbours
        place = np.clip((i + 0.5) / 2 - 0.5, 0, 2)
        low = int(np.floor(place))
        high = min(low + 1, 2)
        grown[:, i] = (1 - place + low) * x[:, low] + (place - low) * x[:, high]
    own = params["level_0"]
    joined = convolve(np.concatenate([grown, shallow], axis=-1), own["join"])
    expected = affine(own["head"], np.maximum(norm(own["norm"], joined), 0))[..., 0]
    np.testing.assert_allclose(got[0], expected, rtol=2e-4, atol=2e-4)


def test_the_network_gives_a_map_a_level_and_starts_from_local_branches():
    rgb, depth = np.float32(rng.normal(size=(1, 8, 8, 3))), np.float32(rng.normal(size=(1, 8, 8, 1)))
    net = lambda exchange: mutual.gl_dmnet((4, 4), width=4, exchange=exchange)
    shapes = jax.eval_shape(lambda: net(1.0).init(jax.random.key(0), 3, 1))
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    for fused in params["fusion"].values():
        for name in ("rgb", "depth"):
            fused[name]["gamma"] = np.float32(0)
    run = jax.jit(lambda p, exchange: net(exchange).apply(p, rgb, depth))
    maps = run(params, 1.0)
    assert [m.shape for m in maps] == [(1, 4, 4), (1, 2, 2)]
    # At gamma = 0 the first level's fusion has nothing to exchange; the second one's gate has.
    other = run(params, 0.0)
    assert np.abs(maps[1] - other[1]).max() > 1e-4
    params["fusion"]["level_1"] = jax.tree.map(np.zeros_like, params["fusion"]["level_1"])
    for a, b in zip(run(params, 1.0), run(params, 0.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


P, G = rng.uniform(size=(3, 5, 6)), (rng.uniform(size=(3, 5, 6)) < 0.4).astype(float)


def test_the_loss_equals_the_loop():
    z, where = rng.normal(size=(3, 5, 6)) * 2, np.array([True, False, True])
    flat = np.full((3, 2, 2), 0.7)  # resized, a constant map stays one
    dirty = [np.float32(np.where(where[:, None, None], x, np.nan)) for x in (z, flat)]
    run = jax.jit(
        lambda z, f: [mutual.saliency_loss([z, f], np.float32(G), where=where, reduction=r) for r in ("none", "mean")]
    )
    each, mean = run(*dirty)
    terms = np.zeros(3)
    for n in (0, 2):
        for p in (sigmoid(z[n]), np.full((5, 6), sigmoid(0.7))):
            entropy = -np.mean(G[n] * np.log(p) + (1 - G[n]) * np.log(1 - p))
            iou = (np.sum(p * G[n]) + 1) / (np.sum(p + G[n] - p * G[n]) + 1)
            terms[n] += entropy + 1 - iou
    np.testing.assert_allclose(each, terms, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mean, terms[[0, 2]].mean(), rtol=1e-4)


def structure(p, g):
    if g.mean() in (0, 1):
        return 1 - p.mean() if g.mean() == 0 else p.mean()
    alike = lambda x: 2 * x.mean() / (x.mean() ** 2 + 1 + x.std(ddof=1))
    objects = g.mean() * alike(p[g == 1]) + (1 - g.mean()) * alike(1 - p[g == 0])
    rows, columns = np.nonzero(g)
    y, x, regions = round(rows.mean() + 1), round(columns.mean() + 1), 0.0
    for part in (np.s_[:y, :x], np.s_[:y, x:], np.s_[y:, :x], np.s_[y:, x:]):
        a, b = p[part].ravel(), g[part].ravel()
        if a.size:
            ma, mb, n = a.mean(), b.mean(), max(a.size - 1, 1)
            upper = 4 * ma * mb * np.sum((a - ma) * (b - mb)) / n
            lower = (ma**2 + mb**2) * (np.sum((a - ma) ** 2) + np.sum((b - mb) ** 2)) / n
            regions += a.size / p.size * (upper / (lower + 1e-8) if upper else float(lower == 0))
    return max(0.5 * objects + 0.5 * regions, 0)


@jax.jit
def metrics(p, g, where):
    options = {"where": where}
    return (mutual.saliency_mae(p, g, **options), mutual.max_f_beta(p, g, **options), mutual.s_measure(p, g, **options),
            mutual.e_measure(p, g, **options), mutual.soft_iou(p, g))  # fmt: skip


def test_metrics_equal_the_loops():
    p, g = np.concatenate([P, P[:2]]), np.concatenate([G, np.zeros((1, 5, 6)), np.ones((1, 5, 6))])
    where = np.array([True, True, False, True, True])
    dirty = np.float32(np.where(where[:, None, None], p, 0.5))
    mae, f, s, e, iou = metrics(dirty, np.float32(g), where)
    real = np.flatnonzero(where)
    np.testing.assert_allclose(mae, np.mean([np.abs(p[n] - g[n]).mean() for n in real]), rtol=1e-5)
    best = 0.0
    for threshold in np.arange(1, 256) / 255:
        found = [np.float32(p[n]) >= np.float32(threshold) for n in real]
        hits = [np.sum(a & (g[n] == 1)) for a, n in zip(found, real, strict=True)]
        precision = np.mean([h / max(a.sum(), 1) for h, a in zip(hits, found, strict=True)])
        recall = np.mean([h / max(g[n].sum(), 1) for h, n in zip(hits, real, strict=True)])
        best = max(best, 1.3 * precision * recall / (0.3 * precision + recall) if precision + recall else 0)
    np.testing.assert_allclose(f, best, rtol=1e-5)
    np.testing.assert_allclose(s, np.mean([structure(p[n], g[n]) for n in real]), rtol=1e-4)
    values = []
    for n in real:
        a, b = p[n] - p[n].mean(), g[n] - g[n].mean()
        usual = np.mean((1 + 2 * a * b / (a * a + b * b + 1e-8)) ** 2) / 4
        values.append({0.0: 1 - p[n].mean(), 1.0: p[n].mean()}.get(g[n].mean(), usual))
    np.testing.assert_allclose(e, np.mean(values), rtol=1e-4)
    expected = [(np.sum(a * b) + 1) / (np.sum(a + b - a * b) + 1) for a, b in zip(np.float64(dirty), g, strict=True)]
    np.testing.assert_allclose(iou, expected, rtol=1e-5)
    right = metrics(np.float32(g), np.float32(g), np.arange(5) < 3)
    np.testing.assert_allclose(right[:4], [0, 1, 1, 1], atol=1e-4)
    assert metrics(np.float32(1 - g), np.float32(g), np.arange(5) < 3)[0] == 1


def test_refuses():
    x, m = np.ones((1, 2, 2, 4), np.float32), np.ones((1, 2, 2), np.float32)
    layer = mutual.position_mutual_fusion()
    for call, message in (
        (lambda: mutual.gl_dmnet(()), r"levels=\(\)"),
        (lambda: mutual.position_mutual_fusion(reduction=0), "reduction=0"),
        (lambda: mutual.channel_mutual_fusion(ratio=0), "ratio=0"),
        (lambda: mutual.cascade_decoder(6), "width=6"),
        (lambda: jax.eval_shape(lambda k: layer.apply(layer.init(k, 4), x, x[..., :2]), jax.random.key(0)), "rgb and"),
        (lambda: mutual.saliency_loss([m], m[0]), "mask must be"),
        (lambda: mutual.saliency_loss([m], m, where=np.ones(2, bool)), "where has shape"),
        (lambda: mutual.soft_iou(m, m[0]), "probs and mask"),
        (lambda: mutual.max_f_beta(m, m, thresholds=0), "thresholds=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def layer_case(layer, name, args, drawn, wrt=True):
    shapes = jax.eval_shape(drawn, jax.random.key(0))
    params = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape) * 0.3), shapes)

    def apply(**streams):
        like = next(iter(streams.values()))
        return layer(jax.tree.map(lambda a: jnp.asarray(a, like.dtype), params), **streams)

    streams = {n: Arg("activations", shape) for n, shape in args.items()}
    return Case(apply, streams, wrt=tuple(args) if wrt else (), helper=True, name=name, covers=(f"mutual.{name}",))


FUSIONS = [
    layer_case(
        make().apply, make.__name__, dict.fromkeys(("rgb", "depth"), (2, 3, 2, 4)), lambda k, m=make: m().init(k, 4)
    )
    for make in (mutual.position_mutual_fusion, mutual.channel_mutual_fusion)
]
DECODER, NET = mutual.cascade_decoder(4), mutual.gl_dmnet((2, 2), width=4)
MAPS = {"probs": Arg("probabilities", (4, 3, 4)), "mask": Arg("probabilities", (4, 3, 4))}
WHERE = {"where": Arg("where", (4,))}


def loss_case(logits, mask, *, where=None, axis_name=None):
    return mutual.saliency_loss([logits], mask, where=where, axis_name=axis_name)


CASES = [
    Case(
        loss_case,
        {"logits": Arg("scores", (4, 3, 2)), "mask": Arg("probabilities", (4, 3, 2)), **WHERE},
        wrt=("logits",),
        rows={"logits": 0, "mask": 0, "where": 0},
        symmetry="invariant",
        name="saliency_loss",
        covers=("mutual.saliency_loss",),
    ),
    *FUSIONS,
    layer_case(
        lambda p, x: DECODER.apply(p, [x]), "cascade_decoder", {"x": (2, 3, 2, 4)}, lambda k: DECODER.init(k, 4)
    ),
    layer_case(
        lambda p, rgb, depth: NET.apply(p, rgb, depth),
        "gl_dmnet",
        {"rgb": (1, 4, 4, 2), "depth": (1, 4, 4, 2)},
        lambda k: NET.init(k, 2, 2),
        wrt=False,  # its parts have their gradients checked
    ),
    Case(
        lambda probs, mask, where: metrics.__wrapped__(probs, mask, where)[::2],
        {**MAPS, **WHERE},
        reason="metrics",
        helper=True,
        name="metrics",
        covers=("mutual.saliency_mae", "mutual.s_measure", "mutual.soft_iou"),
        skip={"dtype": "metrics are in the accumulation dtype"},
    ),
    Case(
        lambda probs, mask, where: metrics.__wrapped__(probs, mask, where)[1:4:2],
        {**MAPS, **WHERE},
        reason="metrics",
        helper=True,
        name="more metrics",
        covers=("mutual.max_f_beta", "mutual.e_measure"),
        skip={"dtype": "metrics are in the accumulation dtype"},
    ),
]
test_conformance = conformance.conformance_tests(CASES)
