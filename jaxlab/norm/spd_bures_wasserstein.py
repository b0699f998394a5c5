"""Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry (GBWBN, 2025, arXiv 2504.00660).

Batch normalisation of symmetric positive definite (SPD) matrices, such as covariances, under the Bures-Wasserstein
metric with a learnt SPD parameter M (the generalised metric): it copes with ill-conditioned matrices where the
affine-invariant metric suffers.

    X  <- M^-1/2 X^p M^-1/2,  B <- M^-1/2 B^p M^-1/2           afterwards the metric is the plain one
    G   = one fixed-point step of the barycentre from the mean,  v = mean_i d^2(X_i, I) / p^2,   both without gradient
    X  <- Exp_I(T_{G -> I} Log_G X)                            centre
    X  <- Exp_I(s / sqrt(v + eps) Log_I X)                     scale
    X  <- Exp_B(T_{I -> B} Log_I X)                            bias
    X  <- (M^1/2 X M^1/2)^(1/p)

    d^2(X, Y) = tr X + tr Y - 2 tr (Y^1/2 X Y^1/2)^1/2,   Log_G X = (GX)^1/2 + (XG)^1/2 - 2G
    Exp_P V = P + V + L P L with P L + L P = V,   T multiplies V_ab by sqrt((q_a + q_b) / (p_a + p_b)) in the eigenbasis

The variance is taken about the identity, as in the official code; `var_about="mean"` takes it about the batch's mean.
All gradients are divided differences of the spectrum, right for repeated eigenvalues as well (the official backward is
not, nor for p other than 1), so that the bias can start at the identity itself.

Reconstructed: eigenvalues are raised to machine precision times the largest; a mask of real matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.ops.collectives import all_sum, match_varying
from jaxlab.ops.masked import compute_dtype, masked_sum, safe_divide
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, StatefulLayer


def spd_batch_norm(
    *,
    power: float = 1.0,
    var_about: str = "identity",
    momentum: float = 0.9,
    eps: float = 1e-5,
    axis_name: str | None = None,
) -> StatefulLayer:
    """Returns batch normalisation of SPD matrices under the generalised Bures-Wasserstein metric.

    The equations are those of the module's docstring; statistics carry no gradient, as in the official code.

    Args:
        power: p != 0, of the deformation of the metric.
        var_about: "identity" (official code) or "mean".
        momentum: in [0, 1], of the running statistics: `running <- geodesic(running, batch, 1 - momentum)`.
        eps: >= 0, added to the variance.
        axis_name: mapped axis over which the matrices are spread: statistics of all shards.

    Returns:
        A `StatefulLayer`: `params, state = init(key, n)` with `spd_bias`, `spd_metric` `[n, n]` (SPD: train them with
        `riemannian_sgd`) and `scale` `[]`; `y, state = apply(params, state, x, where=None, train=False)` with x float
        `[..., n, n]` SPD and `where` bool `[...]`, real matrices, the others come out as the identity.

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> layer = spd_batch_norm()
        >>> params, state = layer.init(jax.random.key(0), 2)
        >>> x = jnp.stack([4 * jnp.eye(2), 4 * jnp.eye(2)])
        >>> y, _ = layer.apply(params, state, x, train=True)
        >>> y[0].round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Source:
        arXiv 2504.00660, section 4 and algorithm 1; code jjscc/GBWBN.
    """
    if power == 0:
        raise ValueError("power=0 must not be 0")
    if var_about not in ("identity", "mean"):
        raise ValueError(f"var_about={var_about!r} must be 'identity' or 'mean'")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must be between 0 and 1")
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative")

    def init(key, n):
        del key
        params = {"spd_bias": jnp.eye(n), "spd_metric": jnp.eye(n), "scale": jnp.ones(())}
        return params, {"mean": jnp.eye(n), "var": jnp.ones(())}

    def apply(params, state, x, *, where=None, train=False):
        if x.ndim < 3 or x.shape[-2:] != params["spd_bias"].shape:
            raise ValueError(f"x has shape {x.shape}, expected [..., {', '.join(map(str, params['spd_bias'].shape))}]")
        if where is not None and where.shape != x.shape[:-2]:
            raise ValueError(f"where has shape {where.shape}, expected {x.shape[:-2]}, the leading dims of x")
        keep = jnp.ones(x.shape[:-2], bool) if where is None else where
        return rows_mixed(normalise)(params, state, x, keep, train=train)

    def normalise(params, state, x, keep, *, train):
        dtype, n = compute_dtype(x), x.shape[-1]
        one = jnp.eye(n, dtype=dtype)
        wide = _keep_or_one(x.astype(dtype), keep)
        bias, metric, scale = (params[name].astype(dtype) for name in ("spd_bias", "spd_metric", "scale"))
        root, inverse = spd_power(metric, 0.5), spd_power(metric, -0.5)
        y = _sandwich(inverse, spd_power(wide, power) if power != 1 else _symmetric(wide))
        bias = _sandwich(inverse, spd_power(bias, power) if power != 1 else _symmetric(bias))
        mean, var = (jax.lax.stop_gradient(state[name]).astype(dtype) for name in ("mean", "var"))
        if train:
            fixed = jax.lax.stop_gradient(y)
            count = all_sum(jnp.sum(keep, dtype=dtype), axis_name)
            batch_mean = bw_barycenter(fixed, where=keep, axis_name=axis_name)
            about = batch_mean if var_about == "mean" else one
            squared = bw_squared_distance(fixed, jnp.broadcast_to(about, fixed.shape)) / power**2
            batch_var = safe_divide(all_sum(masked_sum(squared, keep), axis_name), count)
            some = count > 0
            moved = bw_geodesic(mean, batch_mean, 1.0 - momentum)
            new = {"mean": moved, "var": momentum * var + (1 - momentum) * batch_var}
            state = {name: jnp.where(some, new[name].astype(old.dtype), old) for name, old in state.items()}
            state = jax.lax.stop_gradient(state)
            mean, var = jnp.where(some, batch_mean, mean), jnp.where(some, batch_var, var)
        mean, bias, y = match_varying(jnp.broadcast_to(mean, y.shape), jnp.broadcast_to(bias, y.shape), y)
        y = bw_exp(None, _transport(mean, bw_log(mean, y), True))
        y = bw_exp(None, scale * jax.lax.rsqrt(var + eps) * bw_log(None, y))
        y = _sandwich(root, bw_exp(bias, _transport(bias, bw_log(None, y), False)))
        y = spd_power(y, 1.0 / power) if power != 1 else y
        return _keep_or_one(y, keep).astype(x.dtype), state

    return StatefulLayer(init, apply)


def spd_function(x: Array, function: Callable[[Array], Array], derivative: Callable[[Array], Array]) -> Array:
    """Returns `U f(l) U^T` for `x = U l U^T`, with the right gradient for repeated eigenvalues, too.

    `d f(X)[H] = U ((U^T H U) o K) U^T, K_ab = (f(l_a) - f(l_b)) / (l_a - l_b)`, and `f'` where the two are equal.

    Args:
        x: float [..., n, n], symmetric; its symmetric part is taken.
        function: f, elementwise.
        derivative: f'.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: `x` does not hold square matrices.

    Example:
        >>> spd_function(jnp.diag(jnp.array([1.0, 4.0])), jnp.sqrt, lambda l: 0.5 / jnp.sqrt(l)).tolist()
        [[1.0, 0.0], [0.0, 2.0]]

    Source:
        Daleckii and Krein's formula; the official code of arXiv 2504.00660 uses it for distinct eigenvalues.
    """
    return _spectrum_mapped(x, function, derivative, True)


def spd_power(x: Array, power: float) -> Array:
    """Returns the matrix power `x^power` of SPD matrices [..., n, n]; 0.5 is the square root.

    Example:
        >>> spd_power(jnp.diag(jnp.array([4.0, 9.0])), 0.5).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    return spd_function(
        x, functools.partial(_power, power=power, factor=1.0), functools.partial(_power, power=power - 1, factor=power)
    )


def spd_log(x: Array) -> Array:
    """Returns the matrix logarithm of SPD matrices [..., n, n] (the layer LogEig).

    Example:
        >>> spd_log(jnp.eye(2)).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    return spd_function(x, jnp.log, jnp.reciprocal)


def reeig(x: Array, *, threshold: float = 1e-5) -> Array:
    """Returns the matrices with all eigenvalues below `threshold` raised to it (the layer ReEig, SPDNet's ReLU).

    Args:
        x: float [..., n, n], symmetric.
        threshold: > 0.

    Raises:
        ValueError: `threshold` is not positive or `x` not square.

    Example:
        >>> reeig(jnp.diag(jnp.array([4.0, -1.0])), threshold=0.5).tolist()
        [[4.0, 0.0], [0.0, 0.5]]

    Source:
        Huang, Van Gool, A Riemannian Network for SPD Matrix Learning, arXiv 1608.04233.
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be positive")
    raised = functools.partial(jnp.maximum, threshold)
    return _spectrum_mapped(x, raised, functools.partial(_above, threshold=threshold), False)


def bimap(features: int) -> Layer:
    """Returns the layer BiMap: `Y = W^T X W` with a matrix W of orthonormal columns.

    Args:
        features: size m of the result, at most that of the input.

    Returns:
        A `Layer`: `params = init(key, n)` with `stiefel` `[n, m]` (train it with `riemannian_sgd`);
        `y = apply(params, x)`, x float `[..., n, n]`, y `[..., m, m]`.

    Raises:
        ValueError: `features` is out of range.

    Example:
        >>> layer = bimap(2)
        >>> layer.apply(layer.init(jax.random.key(0), 3), jnp.eye(3)).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Source:
        Huang, Van Gool, arXiv 1608.04233.
    """

    def init(key, n):
        if not 1 <= features <= n:
            raise ValueError(f"features={features} must be between 1 and the input's n={n}")
        return {"stiefel": jax.nn.initializers.orthogonal()(key, (n, features))}

    def apply(params, x):
        w = params["stiefel"].astype(compute_dtype(x))
        y = jnp.einsum("na,...nm,mb->...ab", w, x.astype(w.dtype), w, precision=jax.lax.Precision.HIGHEST)
        return _symmetric(y).astype(x.dtype)

    return Layer(init, apply)


def riemannian_sgd(learning_rate: float) -> optax.GradientTransformation:
    """Returns gradient descent that stays on the manifolds: SPD matrices, and matrices with orthonormal columns.

    A leaf whose name begins with `spd` moves to `Exp_P(-lr P sym(grad) P)` of the Bures-Wasserstein metric; one called
    `stiefel` along the tangent `grad - W grad^T W` and back by a QR decomposition; every other leaf by `-lr grad`.

    Args:
        learning_rate: > 0.

    Returns:
        An `optax.GradientTransformation` whose `update` needs `params`.

    Raises:
        ValueError: `learning_rate` is not positive; in `update`, no `params`.

    Example:
        >>> params = {"stiefel": jnp.eye(3)[:, :2]}
        >>> tx = riemannian_sgd(0.1)
        >>> updates, _ = tx.update({"stiefel": jnp.ones((3, 2))}, tx.init(params), params)
        >>> w = optax.apply_updates(params, updates)["stiefel"]
        >>> abs(w.T @ w - jnp.eye(2)).max() < 1e-6
        Array(True, dtype=bool)

    Source:
        Code jjscc/GBWBN (its optimiser), with the Stiefel steps that are commented out there.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate} must be positive")

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params=None: a step on a manifold needs the parameters, tx.update(grads, state, params)")

        def one(path, gradient, p):
            name = jax.tree_util.keystr(path[-1:], simple=True)
            wide, g = p.astype(compute_dtype(p)), gradient.astype(compute_dtype(p))
            if name.startswith("spd"):
                step = -learning_rate * _sandwich(wide, _symmetric(g))
                return (bw_exp(wide, step) - wide).astype(gradient.dtype)
            if name == "stiefel":
                return (_stiefel_step(wide, g, learning_rate) - wide).astype(gradient.dtype)
            return (-learning_rate * g).astype(gradient.dtype)

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def bw_squared_distance(x: Array, y: Array) -> Array:
    """Returns the squared Bures-Wasserstein distance, that of Wasserstein-2 between N(0, x) and N(0, y).

    Args:
        x: float [..., n, n], SPD.
        y: like `x`.

    Returns:
        float [...], >= 0, in the dtype of `x`.

    Example:
        >>> float(bw_squared_distance(4 * jnp.eye(2), jnp.eye(2)))
        2.0

    Source:
        Bhatia, Jain, Lim, On the Bures-Wasserstein distance, arXiv 1712.01504.
    """
    a, b = (v.astype(compute_dtype(x, y)) for v in (x, y))
    cross = spd_power(_sandwich(spd_power(b, 0.5), a), 0.5)
    trace = functools.partial(jnp.trace, axis1=-2, axis2=-1)
    return jnp.maximum(trace(a) + trace(b) - 2 * trace(cross), 0.0).astype(x.dtype)


def bw_log(p: Array | None, x: Array) -> Array:
    """Returns the tangent vector at `p` that points to `x`: `(px)^1/2 + (xp)^1/2 - 2p`.

    Args:
        p: float [..., n, n], SPD; None = the identity.
        x: float [..., n, n], SPD.

    Example:
        >>> bw_log(jnp.eye(2), 4 * jnp.eye(2)).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    wide = x.astype(compute_dtype(x))
    if p is None:
        return (2 * (spd_power(wide, 0.5) - _one(wide))).astype(x.dtype)
    p = p.astype(wide.dtype)
    root = _product_root(p, wide)
    return (root + jnp.swapaxes(root, -1, -2) - 2 * p).astype(x.dtype)


def bw_exp(p: Array | None, v: Array) -> Array:
    """Returns the SPD matrix that the tangent vector `v` at `p` leads to: `p + v + l p l` with `p l + l p = v`.

    Args:
        p: float [..., n, n], SPD; None = the identity.
        v: float [..., n, n], symmetric.

    Example:
        >>> bw_exp(jnp.eye(2), 2 * jnp.eye(2)).tolist()
        [[4.0, 0.0], [0.0, 4.0]]
    """
    wide = v.astype(compute_dtype(v))
    if p is None:
        half = wide / 2 + _one(wide)
        return _dot(half, half).astype(v.dtype)
    p = p.astype(wide.dtype)
    return (p + wide + _sandwich(lyapunov(p, wide), p)).astype(v.dtype)


def bw_geodesic(a: Array, b: Array, t: float | Array) -> Array:
    """Returns the point at `t` in [0, 1] of the way from `a` to `b`.

    `(1 - t)^2 a + t^2 b + t (1 - t) ((ab)^1/2 + (ba)^1/2)`.

    Args:
        a: float [..., n, n], SPD.
        b: like `a`.
        t: share of the way.

    Example:
        >>> bw_geodesic(jnp.eye(2), 9 * jnp.eye(2), 0.5).round(3).tolist()
        [[4.0, 0.0], [0.0, 4.0]]
    """
    first, last = (v.astype(compute_dtype(a, b)) for v in (a, b))
    root = _product_root(first, last)
    way = (1 - t) ** 2 * first + t**2 * last + t * (1 - t) * (root + jnp.swapaxes(root, -1, -2))
    return way.astype(a.dtype)


def bw_barycenter(
    x: Array,
    *,
    steps: int = 1,
    weights: Array | None = None,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the weighted Bures-Wasserstein mean of SPD matrices, by fixed-point steps from their arithmetic mean.

    `G <- G^-1/2 (mean_i (G^1/2 X_i G^1/2)^1/2)^2 G^-1/2`.

    Args:
        x: float [..., n, n], SPD.
        steps: >= 0; one is what the paper's layer takes.
        weights: float [...] >= 0, of the matrices; None = equal.
        where: bool [...], real matrices.
        axis_name: mapped axis over which the matrices are spread.

    Returns:
        float [n, n] in the dtype of `x`; the identity without matrices.

    Raises:
        ValueError: `steps` is negative, or a shape does not fit.

    Example:
        >>> bw_barycenter(jnp.stack([jnp.eye(2), 9 * jnp.eye(2)])).round(3).tolist()
        [[4.0, 0.0], [0.0, 4.0]]

    Source:
        Alvarez-Esteban et al., arXiv 1511.05355, equation 7.
    """
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative")
    if x.ndim < 3 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"x must be [..., n, n] with leading dims, got shape {x.shape}")
    for name, value in (("weights", weights), ("where", where)):
        if value is not None and value.shape != x.shape[:-2]:
            raise ValueError(f"{name} has shape {value.shape}, expected {x.shape[:-2]}, the leading dims of x")
    share = jnp.ones(x.shape[:-2], compute_dtype(x)) if weights is None else weights.astype(compute_dtype(x))
    share = share if where is None else jnp.where(where, share, 0.0)
    return rows_mixed(_barycenter)(x, share, steps=steps, axis_name=axis_name)


def lyapunov(b: Array, c: Array) -> Array:
    """Returns the symmetric L with `b L + L b = c`.

    Args:
        b: float [..., n, n], SPD.
        c: float [..., n, n], symmetric.

    Example:
        >>> lyapunov(2 * jnp.eye(2), jnp.eye(2)).tolist()
        [[0.25, 0.0], [0.0, 0.25]]
    """
    dtype = compute_dtype(b, c)
    return _lyapunov(b.astype(dtype), c.astype(dtype)).astype(c.dtype)


def _barycenter(x, share, *, steps, axis_name):
    dtype, n = compute_dtype(x), x.shape[-1]
    one = jnp.eye(n, dtype=dtype)
    wide = _symmetric(_keep_or_one(x.astype(dtype), share > 0))
    total = all_sum(jnp.sum(share), axis_name)

    def mean(matrices):
        weighted = jnp.sum(matrices * share[..., None, None], axis=tuple(range(x.ndim - 2)))
        return jnp.where(total > 0, safe_divide(all_sum(weighted, axis_name), total), one)

    def step(_, center):
        root, inverse = spd_power(center, 0.5), spd_power(center, -0.5)
        middle = mean(spd_power(_sandwich(root, wide), 0.5))
        return _sandwich(inverse, _dot(middle, middle))

    center = jax.lax.fori_loop(0, steps, step, mean(wide))
    return center.astype(x.dtype)


def _dot(a: Array, b: Array) -> Array:
    return jnp.einsum("...ij,...jk->...ik", a, b, precision=jax.lax.Precision.HIGHEST)


def _symmetric(x: Array) -> Array:
    return (x + jnp.swapaxes(x, -1, -2)) / 2


def _sandwich(a: Array, x: Array) -> Array:
    """Returns the symmetric `a x a` for a symmetric `a`."""
    return _symmetric(_dot(_dot(a, x), a))


def _one(x: Array) -> Array:
    """Returns the identity with the rank of `x`."""
    return jnp.eye(x.shape[-1], dtype=x.dtype).reshape((1,) * (x.ndim - 2) + x.shape[-2:])


def _keep_or_one(x: Array, keep: Array) -> Array:
    return jnp.where(keep[..., None, None], x, _one(x))


def _product_root(a: Array, b: Array) -> Array:
    """Returns `(a b)^1/2 = a^1/2 (a^1/2 b a^1/2)^1/2 a^-1/2`, which is not symmetric."""
    root = spd_power(a, 0.5)
    return _dot(_dot(root, spd_power(_sandwich(root, b), 0.5)), spd_power(a, -0.5))


def _power(values: Array, power: float, factor: float) -> Array:
    # The exact roots are quicker and more precise than a power.
    special = {0.0: jnp.ones_like, 0.5: jnp.sqrt, 1.0: jnp.asarray, -0.5: jax.lax.rsqrt, -1.0: jnp.reciprocal}
    return factor * special.get(power, lambda v: v**power)(values)


def _above(values: Array, threshold: float) -> Array:
    return (values > threshold).astype(values.dtype)


def _eigen(x: Array) -> tuple[Array, Array]:
    """Returns eigenvalues and vectors of the symmetric part."""
    values, vectors = jnp.linalg.eigh(_symmetric(x), symmetrize_input=False)
    return values, vectors


def _positive(values: Array) -> Array:
    """Raises eigenvalues to machine precision times the largest, below which they are rounding."""
    info = jnp.finfo(values.dtype)
    return jnp.maximum(values, jnp.maximum(info.eps * values[..., -1:], info.tiny))


def _in_basis(vectors: Array, x: Array) -> Array:
    return _dot(_dot(jnp.swapaxes(vectors, -1, -2), x), vectors)


def _from_basis(vectors: Array, x: Array) -> Array:
    return _dot(_dot(vectors, x), jnp.swapaxes(vectors, -1, -2))


def _spectrum_mapped(x: Array, function: Callable, derivative: Callable, positive: bool) -> Array:
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"x must be [..., n, n], got shape {x.shape}")
    return _spectral(x.astype(compute_dtype(x)), function, derivative, positive).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _spectral(x: Array, function: Callable, derivative: Callable, positive: bool) -> Array:
    del derivative
    values, vectors = _eigen(x)
    values = _positive(values) if positive else values
    return _dot(vectors * function(values)[..., None, :], jnp.swapaxes(vectors, -1, -2))


@_spectral.defjvp
def _spectral_jvp(function, derivative, positive, primals, tangents):
    (x,), (h,) = primals, tangents
    values, vectors = _eigen(x)
    values = _positive(values) if positive else values
    f = function(values)
    a, b = values[..., :, None], values[..., None, :]
    gap = a - b
    near = jnp.abs(gap) <= jnp.finfo(x.dtype).eps ** 0.5 * jnp.maximum(jnp.abs(a), jnp.abs(b))
    quotient = (f[..., :, None] - f[..., None, :]) / jnp.where(near, 1.0, gap)
    kernel = jnp.where(near, derivative((a + b) / 2), quotient)
    value = _dot(vectors * f[..., None, :], jnp.swapaxes(vectors, -1, -2))
    return value, _from_basis(vectors, _in_basis(vectors, _symmetric(h)) * kernel)


@jax.custom_jvp
def _lyapunov(b: Array, c: Array) -> Array:
    values, vectors = _eigen(b)
    values = _positive(values)
    return _from_basis(vectors, _in_basis(vectors, _symmetric(c)) / (values[..., :, None] + values[..., None, :]))


@_lyapunov.defjvp
def _lyapunov_jvp(primals, tangents):
    (b, c), (db, dc) = primals, tangents
    values, vectors = _eigen(b)
    sums = _positive(values)
    sums = sums[..., :, None] + sums[..., None, :]
    inverse = lambda right: _from_basis(vectors, _in_basis(vectors, _symmetric(right)) / sums)
    solution = inverse(c)
    moved = _dot(_symmetric(db), solution)
    return solution, inverse(_symmetric(dc) - moved - jnp.swapaxes(moved, -1, -2))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _transport(p: Array, v: Array, back: bool) -> Array:
    """Carries a tangent vector from the identity to `p`, or back: `V_ab * sqrt((p_a + p_b) / 2)^(+-1)` in its basis."""
    values, vectors = _eigen(p)
    return _from_basis(vectors, _in_basis(vectors, v) * _transport_factor(_positive(values), back))


def _transport_factor(values: Array, back: bool) -> Array:
    half = (values[..., :, None] + values[..., None, :]) / 2
    return jax.lax.rsqrt(half) if back else jnp.sqrt(half)


@_transport.defjvp
def _transport_jvp(back, primals, tangents):
    """Divided differences of sqrt((a + c) / 2) in a, written so that nothing cancels where eigenvalues are equal."""
    (p, v), (dp, dv) = primals, tangents
    values, vectors = _eigen(p)
    values = _positive(values)
    factor = _transport_factor(values, back)
    inner_v, inner_dv, inner_dp = (_in_basis(vectors, m) for m in (v, dv, _symmetric(dp)))
    root = _transport_factor(values, False)
    # difference[i, k, j] = (F(l_i, l_j) - F(l_k, l_j)) / (l_i - l_k)
    left, right = root[..., :, None, :], root[..., None, :, :]
    difference = 1 / (2 * (left + right))
    difference = -difference / (left * right) if back else difference
    precision = jax.lax.Precision.HIGHEST
    first = jnp.einsum("...ik,...kj,...ikj->...ij", inner_dp, inner_v, difference, precision=precision)
    second = jnp.einsum("...ik,...kj,...jki->...ij", inner_v, inner_dp, difference, precision=precision)
    return _from_basis(vectors, inner_v * factor), _from_basis(vectors, inner_dv * factor + first + second)


def _stiefel_step(w: Array, gradient: Array, learning_rate: float) -> Array:
    tangent = gradient - _dot(_dot(w, jnp.swapaxes(gradient, -1, -2)), w)
    q, r = jnp.linalg.qr(w - learning_rate * tangent)
    # The signs of the columns are QR's choice; those of a small step keep the direction.
    return q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0).astype(q.dtype)[..., None, :]
