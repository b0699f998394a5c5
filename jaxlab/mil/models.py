"""The bag classifiers that the family's papers build on and compare with.

Each is a `Layer`: `params = init(key, D)`, and `apply(params, x, where=, segment_ids=, num_segments=)` takes either
layout of `pooling.py` and returns a dict

    logits [B, C];  embedding [B, E], what the head reads;  attention [B, N] or [T] (with K heads a last axis of K), the
    weight of each instance, which sums to 1 over a bag (models that have one);  instance_logits [B, N, C] or [T, C]
    (models that classify instances).

Order of the instances never matters. Padding changes nothing. An empty bag has the pooled vector 0, hence logits equal
to the head's bias. They act on features; `with_encoder` puts a network over single instances before them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.attention import attention
from jaxlab.mil.pooling import Bags, group
from jaxlab.ops.layers import dense, feature_norm
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, accepted


def abmil(
    num_classes: int,
    *,
    hidden: int = 128,
    gated: bool = False,
    activation: Callable[[Array], Array] = jnp.tanh,
) -> Layer:
    """Returns attention pooling and a linear head (ABMIL).

    `a = softmax_i(w . f(V h_i))`, gated `a = softmax_i(w . (f(V h_i) * sigmoid(U h_i)))`, `z = sum_i a_i h_i`.

    Args:
        num_classes: C.
        hidden: size of the attention's hidden layer.
        gated: whether a sigmoid gate multiplies the hidden layer.
        activation: f.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits`, `embedding` and `attention`.

    Raises:
        ValueError: a size is below 1; in `apply`, shapes do not fit.

    Example:
        >>> model = abmil(2)
        >>> params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), 3)
        >>> jax.jit(model.apply)(params, jnp.ones((4, 5, 3)))["attention"].shape
        (4, 5)

    Source:
        Ilse, Tomczak, Welling, Attention-based Deep Multiple Instance Learning, arXiv 1802.04712, eqs. 7 to 9 (no
        biases inside the attention).
    """
    at_least_one(num_classes=num_classes, hidden=hidden)
    to_hidden, to_score, head = (xavier_dense(n, bias=b) for n, b in ((hidden, False), (1, False), (num_classes, True)))

    def init(key, size):
        keys = jax.random.split(key, 4)
        params = {"hidden": to_hidden.init(keys[0], size), "score": to_score.init(keys[1], hidden)}
        if gated:
            params["gate"] = to_hidden.init(keys[3], size)
        return {**params, "head": head.init(keys[2], size)}

    def run(params, x, bags):
        inner = activation(to_hidden.apply(params["hidden"], x))
        if gated:
            inner = inner * jax.nn.sigmoid(to_hidden.apply(params["gate"], x))
        pooled, weights = bags.pool(x, to_score.apply(params["score"], inner)[..., 0])
        return {"logits": head.apply(params["head"], pooled), "embedding": pooled, "attention": weights}

    return bag_model(init, run)


def mean_mil(num_classes: int) -> Layer:
    """Returns the mean over a bag's instances and a linear head.

    Args:
        num_classes: C.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits` and `embedding`.

    Raises:
        ValueError: `num_classes` is below 1; in `apply`, shapes do not fit.

    Example:
        >>> model = mean_mil(2)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["logits"].shape
        (4, 2)
    """
    return _pooled_then_head(num_classes, lambda bags, x: bags.mean(x).astype(x.dtype))


def max_mil(num_classes: int) -> Layer:
    """Returns the maximum of each feature over a bag and a linear head (MI-Net).

    Args:
        num_classes: C.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits` and `embedding`.

    Raises:
        ValueError: `num_classes` is below 1; in `apply`, shapes do not fit.

    Example:
        >>> model = max_mil(2)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["logits"].shape
        (4, 2)

    Source:
        Wang et al., Revisiting Multiple Instance Neural Networks, arXiv 1610.02501, section 3.2.
    """
    return _pooled_then_head(num_classes, lambda bags, x: bags.max(x))


def mi_net(num_classes: int) -> Layer:
    """Returns a linear classifier of instances whose largest logit is the bag's (mi-Net): `max_i w . h_i + b`.

    Adding an instance to a bag that is not empty never lowers its logit: the standard assumption of multiple-instance
    learning holds for any parameters.

    Args:
        num_classes: C; each class takes its own maximum.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits` and `instance_logits`.

    Raises:
        ValueError: `num_classes` is below 1; in `apply`, shapes do not fit.

    Example:
        >>> model = mi_net(1)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["instance_logits"].shape
        (4, 5, 1)

    Source:
        Wang et al., Revisiting Multiple Instance Neural Networks, arXiv 1610.02501, section 3.1.
    """
    at_least_one(num_classes=num_classes)
    head = xavier_dense(num_classes)

    def run(params, x, bags):
        scores, bias = _linear_and_bias(params["head"], x)
        return {"logits": bags.max(scores) + bias[None], "instance_logits": _add_last(scores, bias)}

    return bag_model(lambda key, size: {"head": head.init(key, size)}, run)


def dsmil(num_classes: int, *, hidden: int = 128) -> Layer:
    """Returns the dual-stream classifier: the critical instance, and attention by similarity to it (DSMIL).

    For each class c: `m = argmax_i (w_c . h_i + b_c)`, `q_i = tanh(W_2 relu(W_1 h_i))`,
    `A_c = softmax_i(q_i . q_m / sqrt(hidden))`, `z_c = sum_i A_ci h_i`; the bag's logits are
    `(max_i (w_c . h_i + b_c) + (W z + b)_c) / 2`, W over all features of all z_c.

    Args:
        num_classes: C.
        hidden: size of the queries.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits`, their two halves `max_logits` and
        `bag_logits` [B, C], `embedding` [B, C * D], `attention` [B, N, C] or [T, C], and `instance_logits`.
        Instances that tie for the largest logit share the role of the critical one.

    Raises:
        ValueError: a size is below 1; in `apply`, shapes do not fit.

    Example:
        >>> model = dsmil(2)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["embedding"].shape
        (4, 6)

    Source:
        Li, Li, Eliceiri, arXiv 2011.08939, eqs. 2 to 7; code binli123/dsmil-wsi (W is its convolution over z; values
        without a network of their own, its default).
    """
    at_least_one(num_classes=num_classes, hidden=hidden)
    instance, head = xavier_dense(num_classes), xavier_dense(num_classes)
    inner, outer = xavier_dense(hidden), xavier_dense(hidden)

    def init(key, size):
        keys = jax.random.split(key, 4)
        return {
            "instance": instance.init(keys[0], size),
            "inner": inner.init(keys[1], size),
            "outer": outer.init(keys[2], hidden),
            "head": head.init(keys[3], num_classes * size),
        }

    def run(params, x, bags):
        scores, bias = _linear_and_bias(params["instance"], x)
        largest = bags.max(scores)
        query = jnp.tanh(outer.apply(params["outer"], jax.nn.relu(inner.apply(params["inner"], x))))
        best = (scores == bags.spread(largest)) & bags.keep[..., None]
        # A softmax that is even over the critical instances and 0 elsewhere: their mean, [B, C, hidden].
        wide = compute_dtype(x)
        critical, _ = bags.pool(query.astype(wide), jnp.where(best, 0.0, -1e30).astype(wide))
        if bags.segment_ids is None:
            similar = jnp.einsum("bnh,bch->bnc", query.astype(wide), critical)
        else:  # class by class, since a critical instance for each of a list would be copies of C times its queries
            similar = jnp.stack(
                [jnp.sum(query.astype(wide) * bags.spread(critical[:, c]), axis=1) for c in range(num_classes)], axis=1
            )
        pooled, weights = bags.pool(x, similar * hidden**-0.5)
        pooled = pooled.reshape(bags.size, -1)
        max_logits, bag_logits = largest + bias[None], head.apply(params["head"], pooled)
        return {
            "logits": (max_logits + bag_logits) / 2,
            "max_logits": max_logits,
            "bag_logits": bag_logits,
            "embedding": pooled,
            "attention": weights,
            "instance_logits": _add_last(scores, bias),
        }

    return bag_model(init, run)


def transmil(num_classes: int, *, depth: int = 2, heads: int = 8) -> Layer:
    """Returns a transformer over a bag with a class token, whose last state is classified (as in TransMIL).

    `u <- u + attention(norm(u))`, `depth` times over `u = [class token; instances]`; the head reads norm of the class
    token. Different from TransMIL: attention is exact where it uses Nystrom's approximation, and there is no
    convolution over positions, so that the order of the instances does not matter.

    Args:
        num_classes: C.
        depth: number of attention layers.
        heads: attention heads; must divide D.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits`, `embedding` and `attention` [B, N, heads]
        or [T, heads], that of the class token in the first layer (without the token itself it sums to less than 1), and
        that layer's `values` [B, N, heads, D / heads] or [T, heads, D / heads].
        An empty bag gives what the class token alone gives.

    Raises:
        ValueError: a size is below 1; in `init`, `heads` does not divide D; in `apply`, shapes do not fit.

    Example:
        >>> model = transmil(2, heads=2)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 4), jnp.ones((3, 5, 4))), jax.random.key(0))
        >>> out["attention"].shape
        (3, 5, 2)

    Source:
        Shao et al., TransMIL, arXiv 2106.00908, algorithm 2; depth and heads as in code szc19990412/TransMIL.
    """
    at_least_one(num_classes=num_classes, depth=depth, heads=heads)
    norm, head = feature_norm(eps=1e-5), xavier_dense(num_classes)

    def init(key, size):
        if size % heads:
            raise ValueError(f"heads={heads} must divide the number of features {size}")
        keys = jax.random.split(key, 2 * depth + 2)
        params = {"token": jax.random.normal(keys[0], (size,)), "norm": norm.init(keys[1], size)}
        params["head"] = head.init(keys[1], size)
        for i in range(depth):
            params[f"layer_{i}"] = {
                "norm": norm.init(keys[1], size),
                "qkv": xavier_dense(3 * size, bias=False).init(keys[2 + 2 * i], size),
                "out": xavier_dense(size).init(keys[3 + 2 * i], size),
            }
        return params

    def run(params, x, bags):
        size = x.shape[-1]
        qkv, out = xavier_dense(3 * size, bias=False), xavier_dense(size)
        token = jnp.broadcast_to(params["token"].astype(x.dtype)[None], (bags.size, size))
        first = None
        for i in range(depth):
            layer = params[f"layer_{i}"]
            of_token, of_x = (
                qkv.apply(layer["qkv"], norm.apply(layer["norm"], u)).reshape(*u.shape[:-1], 3, heads, -1)
                for u in (token, x)
            )
            from_token, from_x, weights = _attend_with_token(of_token, of_x, bags)
            first = (weights, of_x[..., 2, :, :]) if first is None else first
            token = token + out.apply(layer["out"], from_token.reshape(token.shape))
            x = zero_where_false(x + out.apply(layer["out"], from_x.reshape(x.shape)), bags.keep)
        pooled = norm.apply(params["norm"], token)
        attended = {"attention": first[0], "values": first[1]}
        return {"logits": head.apply(params["head"], pooled), "embedding": pooled, **attended}

    return bag_model(init, run)


def hopfield_mil(num_classes: int, *, hidden: int = 128, beta: float | None = None, steps: int = 1) -> Layer:
    """Returns pooling by retrieval from a modern Hopfield network with a learnt query, and a linear head.

    `q <- sum_i softmax_i(beta q . k_i) k_i`, `steps - 1` times, then `z = sum_i softmax_i(beta q . k_i) v_i` with keys
    `k = W_k h` and values `v = W_v h`.

    Args:
        num_classes: C.
        hidden: size of the keys, and of the values.
        beta: inverse temperature > 0; None = `hidden ** -0.5`. Towards infinity the best match alone is retrieved.
        steps: associations, >= 1.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits`, `embedding` and `attention`.

    Raises:
        ValueError: a size is below 1 or `beta` is not positive; in `apply`, shapes do not fit.

    Example:
        >>> model = hopfield_mil(2)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["embedding"].shape
        (4, 128)

    Source:
        Ramsauer et al., Hopfield Networks is All You Need, arXiv 2008.02217, section 4 (pooling); without the
        normalisations and output projections of its layer (reconstructed).
    """
    at_least_one(num_classes=num_classes, hidden=hidden, steps=steps)
    if beta is not None and not beta > 0:
        raise ValueError(f"beta={beta} must be positive")
    scale = hidden**-0.5 if beta is None else beta
    project, head = xavier_dense(hidden, bias=False), xavier_dense(num_classes)

    def init(key, size):
        keys = jax.random.split(key, 4)
        return {
            "query": jax.random.normal(keys[0], (hidden,)),
            "keys": project.init(keys[1], size),
            "values": project.init(keys[2], size),
            "head": head.init(keys[3], hidden),
        }

    def run(params, x, bags):
        keys, values = project.apply(params["keys"], x), project.apply(params["values"], x)
        state = jnp.broadcast_to(params["query"].astype(x.dtype)[None], (bags.size, hidden))
        for step in range(steps):
            scores = jnp.einsum("...d,...d->...", keys, bags.spread(state), preferred_element_type=compute_dtype(x))
            state, weights = bags.pool(keys if step + 1 < steps else values, scale * scores)
        return {"logits": head.apply(params["head"], state), "embedding": state, "attention": weights}

    return bag_model(init, run)


def with_encoder(encoder: Layer, model: Layer) -> Layer:
    """Returns a bag model after a network that acts on each instance by itself.

    Args:
        encoder: `Layer` over features [..., D]; it sees 0 in place of padding.
        model: bag model, such as `abmil(2)`.

    Returns:
        A `Layer` with parameters `encoder` and `model`; `apply` also takes `key` and `train`.

    Raises:
        ValueError: in `apply`, shapes do not fit.

    Example:
        >>> from jaxlab.ops.layers import mlp
        >>> model = with_encoder(mlp([8, 4]), abmil(2))
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["embedding"].shape
        (4, 4)
    """

    def init(key, size):
        key_encoder, key_model = jax.random.split(key)
        params = encoder.init(key_encoder, size)
        width = jax.eval_shape(encoder.apply, params, jax.ShapeDtypeStruct((1, size), jnp.float32)).shape[-1]
        return {"encoder": params, "model": model.init(key_model, width)}

    def apply(params, x, *, where=None, segment_ids=None, num_segments=None, key=None, train=False):
        keys = (None, None) if key is None else jax.random.split(key)
        x = zero_where_false(x, group(x, where, segment_ids, num_segments).keep)
        h = encoder.apply(params["encoder"], x, **accepted(encoder.apply, key=keys[0], train=train))
        layout = {"where": where, "segment_ids": segment_ids, "num_segments": num_segments}
        return model.apply(params["model"], h, **layout, **accepted(model.apply, key=keys[1], train=train))

    return Layer(init, apply)


def instance_encoder(
    features: int = 512, *, activation: Callable[[Array], Array] = jax.nn.relu, dropout: float = 0.25
) -> Layer:
    """Returns the projection that models of whole slides put before the bag: dense, activation, dropout.

    Args:
        features: size of the result.
        activation: after the projection.
        dropout: share of features set to 0 in training, in [0, 1).

    Returns:
        A `Layer`: `apply(params, x [..., D], key=None, train=False)` gives [..., features]; `train=True` needs a key
        unless `dropout` is 0.

    Raises:
        ValueError: `features` or `dropout` is out of range; in `apply`, the key is missing.

    Example:
        >>> layer = instance_encoder(8)
        >>> jax.eval_shape(lambda key: layer.apply(layer.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0)).shape
        (4, 5, 8)

    Source:
        Code DearCaat/MHIM-MIL and isyangshu/MambaMIL: 512 features, dropout 0.25, Xavier-normal weights, bias 0.
    """
    at_least_one(features=features)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be in [0, 1)")
    project = xavier_dense(features)

    def apply(params, x, *, key=None, train=False):
        h = activation(project.apply(params, x))
        if not train or dropout == 0:
            return h
        if key is None:
            raise ValueError("dropout in training needs a key")
        return dropped(key, h, dropout)

    return Layer(project.init, apply)


def dropped(key: Array, x: Array, rate: float) -> Array:
    """Returns `x` with a share of `rate` set to 0 and the rest scaled up."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def bag_model(init: Callable, run: Callable[[dict, Array, Bags], dict]) -> Layer:
    """Returns the `Layer` of `run(params, x, bags)`, which it calls with clean instances in either layout."""

    def apply(params, x, *, where=None, segment_ids=None, num_segments=None):
        bags = group(x, where, segment_ids, num_segments)
        return rows_mixed(run)(params, zero_where_false(x, bags.keep), bags)

    return Layer(init, apply)


def xavier_dense(features: int, *, bias: bool = True) -> Layer:
    """Returns `ops.layers.dense` with weights of variance 2 / (inputs + outputs)."""
    layer = dense(features, bias=bias)
    return Layer(
        lambda key, size: dense(features, bias=bias, scale=2 * size / (size + features)).init(key, size), layer.apply
    )


def at_least_one(**sizes: int) -> None:
    """Raises ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def _pooled_then_head(num_classes: int, pool: Callable[[Bags, Array], Array]) -> Layer:
    at_least_one(num_classes=num_classes)
    head = xavier_dense(num_classes)

    def run(params, x, bags):
        pooled = pool(bags, x)
        return {"logits": head.apply(params["head"], pooled), "embedding": pooled}

    return bag_model(lambda key, size: {"head": head.init(key, size)}, run)


def _linear_and_bias(params: dict, x: Array) -> tuple[Array, Array]:
    """Returns scores without their bias, so that an empty bag's maximum of 0 leaves exactly the bias."""
    bias = params["b"]
    return dense(bias.shape[0], bias=False).apply({"w": params["w"]}, x), bias.astype(x.dtype)


def _add_last(x: Array, bias: Array) -> Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _attend_with_token(token: Array, x: Array, bags: Bags) -> tuple[Array, Array, Array]:
    """Attention within each bag over its class token and its instances, from queries, keys and values [..., 3, H, d].

    Returns the token's result [B, H, d], the instances' [..., H, d], and the token's attention to them [..., H].
    """
    if bags.segment_ids is None:
        both = jnp.concatenate([token[:, None], x], axis=1)
        ids = jnp.concatenate([jnp.ones((bags.size, 1), bool), bags.keep], axis=1).astype(jnp.int32) - 1
    else:
        both = jnp.concatenate([token, x], axis=0)[None]
        inside = jnp.where(bags.keep, bags.segment_ids, -1)
        ids = jnp.concatenate([jnp.arange(bags.size, dtype=jnp.int32), inside])[None]
    q, k, v = (both[:, :, i] for i in range(3))
    out, lse = attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, return_lse=True)
    if bags.segment_ids is None:
        of_token, of_x, lse = out[:, 0], out[:, 1:], lse[:, 0]
    else:
        of_token, of_x, lse = out[0, : bags.size], out[0, bags.size :], lse[0, : bags.size]
    wide = compute_dtype(x)
    scores = jnp.einsum("...hd,...hd->...h", bags.spread(token[:, 0]).astype(wide), x[..., 1, :, :].astype(wide))
    logs = scores * x.shape[-1] ** -0.5 - bags.spread(lse).astype(wide)
    weights = jnp.exp(jnp.where(bags.keep[..., None], logs, -jnp.inf))
    return of_token, of_x, weights.astype(x.dtype)
