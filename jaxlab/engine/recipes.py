"""Recipes: frozen dataclasses whose every field is a flag of `jaxlab train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from jaxlab.engine.errors import InputError, did_you_mean
from jaxlab.engine.recipe import Recipe
from jaxlab.engine.recipes_mil import Mil
from jaxlab.types import Learner


@dataclasses.dataclass(frozen=True)
class MutualMoE(Recipe):
    """K small vision transformers with sparse mixture-of-experts layers teach each other.

    Command: `jaxlab train mutual_moe`. Cost: about two minutes on two CPU cores. Expected: at least 97% test accuracy
    for every peer on the handwritten digits.

    Attributes:
        peers: K.
        experts: experts per layer.
        top_k: experts per token.
        hidden: hidden width of one expert.
        width: features per token.
        depth: transformer blocks.
        heads: attention heads.
        patch: side of a patch in pixels.
        learning_rate: peak of AdamW's warm-up and cosine schedule.
        weight_decay: of AdamW.
        mutual_weight: weight of the mutual term.
        temperature: of the mutual term.
        balance: weight of the load-balancing loss.
        shift: largest random shift in pixels in training; 0 turns augmentation off.
        degrees: largest random rotation.
        zoom: largest random relative change of size.
        remat: `none`, or what the backward pass computes again: `block` everything inside a block, `dots` all but the
            matrix products.
    """

    name: ClassVar[str] = "mutual_moe"
    title: ClassVar[str] = "vision transformers with sparse mixtures of experts teach each other (mutual learning)"
    expected: ClassVar[str] = "about 2 minutes on 2 CPU cores"

    steps: int = 1200
    peers: int = 2
    experts: int = 4
    top_k: int = 2
    hidden: int = 64
    width: int = 64
    depth: int = 2
    heads: int = 4
    patch: int = 2
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    mutual_weight: float = 1.0
    temperature: float = 1.0
    balance: float = 0.01
    shift: float = 1.0
    degrees: float = 12.0
    zoom: float = 0.12
    remat: str = "none"

    def validate(self) -> None:
        """Raises an InputError for a field that makes no sense."""
        super().validate()
        if self.peers < 1:
            raise InputError(f"--peers must be at least 1, got {self.peers}")
        if not 1 <= self.top_k <= self.experts:
            raise InputError(f"--top-k must be between 1 and --experts {self.experts}, got {self.top_k}")
        if self.remat not in ("none", "block", "dots"):
            raise InputError(f"--remat must be none, block or dots, got {self.remat!r}")
        if self.width % self.heads:
            raise InputError(f"--heads {self.heads} must divide --width {self.width}")

    def divisions(self) -> list[tuple[str, str, int]]:
        """Returns what a mesh axis has to divide: `(axis, field, value)`."""
        return [*super().divisions(), ("expert", "experts", self.experts), ("peer", "peers", self.peers)]

    def learner(self, num_classes: int, steps: int) -> Learner:
        """Returns `deep_mutual_learning` over augmented vision transformers with mixture-of-experts layers."""
        import functools

        import optax

        from jaxlab import moe, mutual, nn

        net = nn.vit(
            num_classes,
            patch=self.patch,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            feed_forward=lambda: moe.moe_layer(
                moe.top_k_router(self.experts, self.top_k), moe.swiglu_experts(self.experts, self.hidden)
            ),
            penalty=lambda plan: self.balance * moe.load_balancing_loss(plan),
            remat=self.remat,
        )
        net = self.computed(net)
        if self.shift:
            affine = functools.partial(nn.random_affine, degrees=self.degrees, scale=self.zoom, pixels=self.shift)
            net = nn.with_augmentation(net, affine)
        updates = steps // self.accumulate
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, max(1, updates // 20), max(2, updates))
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=self.weight_decay)
        )
        return mutual.deep_mutual_learning(
            net,
            self.accumulated(optimizer),
            num_peers=self.peers,
            weight=self.mutual_weight,
            temperature=self.temperature,
        )


BACKBONES = ("mlp", "resnet", "vit")
# What crosses between the peers, by objective; the last two learn from averages of networks.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "none": ("logits",),
    "kl": ("logits",),
    "reverse_kl": ("logits",),
    "symmetric_kl": ("logits",),
    "mse": ("logits",),
    "distillation": ("logits",),
    "features": ("logits", "features"),
    "mi_alpha": ("logits", "features"),
    "mean_teacher": ("logits",),
    "mutual_mean_teaching": ("logits", "features"),
}


@dataclasses.dataclass(frozen=True)
class Mutual(Recipe):
    """K networks of one kind teach each other.

    Command: `jaxlab train mutual --backbone resnet --peers 4 --objective symmetric_kl`. Cost: about half a minute on
    two CPU cores for the multilayer perceptron. Expected: at least 95% test accuracy for every peer on the handwritten
    digits. Its plots show over time how often the peers agree, and the accuracy of each and of all together.

    Attributes:
        backbone: `mlp`, `resnet` or `vit`.
        objective: what peers take from each other: `none`; divergences `kl`, `reverse_kl`, `symmetric_kl`; `mse` of
            the probabilities; `distillation` (softened, temperature 4 unless given); `features` (of length 1) or
            `mi_alpha` (information between features) beside `kl`; `mean_teacher` or `mutual_mean_teaching` (averages of
            the networks teach). Those with features need `mlp` or `resnet`.
        peers: K.
        width: hidden units, channels of the first stage, or features per token; 0 = 128, 16 or 64.
        depth: hidden layers, blocks per stage, or transformer blocks.
        learning_rate: peak of AdamW's warm-up and cosine schedule.
        weight_decay: of AdamW.
        mutual_weight: weight of the mutual term.
        warmup: steps over which that weight grows; 0 = it is there from the start.
        temperature: of the divergences; 0 = the objective's own.
        decay: of the averages.
        shift: largest random shift in pixels in training; 0 turns augmentation off.
    """

    name: ClassVar[str] = "mutual"
    title: ClassVar[str] = "networks of one kind teach each other (backbone and objective by flag)"
    expected: ClassVar[str] = "about half a minute on 2 CPU cores"

    steps: int = 600
    backbone: str = "mlp"
    objective: str = "kl"
    peers: int = 3
    width: int = 0
    depth: int = 2
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    mutual_weight: float = 1.0
    warmup: int = 0
    temperature: float = 0.0
    decay: float = 0.99
    shift: float = 1.0

    def validate(self) -> None:
        """Raises an InputError for a field that makes no sense."""
        super().validate()
        for field, choices in (("backbone", BACKBONES), ("objective", OBJECTIVES)):
            value = getattr(self, field)
            if value not in choices:
                raise InputError(
                    f"--{field} {value!r} is unknown; there is {', '.join(choices)}{did_you_mean(value, choices)}"
                )
        if "features" in OBJECTIVES[self.objective] and self.backbone == "vit":
            raise InputError(f"--objective {self.objective} needs --backbone mlp or resnet, which give features")
        for field in ("peers", "depth"):
            if getattr(self, field) < 1:
                raise InputError(f"--{field} must be at least 1, got {getattr(self, field)}")
        for field in ("width", "warmup", "temperature", "shift"):
            if getattr(self, field) < 0:
                raise InputError(f"--{field} must be at least 0, got {getattr(self, field)}")
        if not 0 <= self.decay <= 1:
            raise InputError(f"--decay must be between 0 and 1, got {self.decay}")

    def divisions(self) -> list[tuple[str, str, int]]:
        """Returns what a mesh axis has to divide: `(axis, field, value)`."""
        return [*super().divisions(), ("peer", "peers", self.peers)]

    def learner(self, num_classes: int, steps: int) -> Learner:
        """Returns the learner of K peers with the objective."""
        import functools

        import optax

        from jaxlab import mutual, nn

        net = self.computed(self.network(num_classes))
        updates = steps // self.accumulate
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, max(1, updates // 20), max(2, updates))
        optimizer = self.accumulated(optax.adamw(schedule, weight_decay=self.weight_decay))
        augment = None
        if self.shift:
            augment = functools.partial(nn.random_affine, degrees=0.0, scale=0.0, pixels=self.shift)
        options: dict[str, Any] = {"num_peers": self.peers, "augment": augment}
        if self.objective == "mutual_mean_teaching":
            return mutual.mutual_mean_teaching(net, optimizer, decay=self.decay, **options)
        weight: Any = self.mutual_weight
        if self.warmup:
            weight = functools.partial(mutual.ramp_up, length=self.warmup, value=self.mutual_weight)
        if self.objective == "mean_teacher":
            return mutual.mean_teacher(net, optimizer, decay=self.decay, kind="kl", weight=weight, **options)
        exchanged = OBJECTIVES[self.objective]
        return mutual.peers(net, optimizer, mutual=self.term(), exchanged=exchanged, weight=weight, **options)

    def network(self, num_classes: int) -> Any:
        """Returns the backbone, from images to `logits`, and `features` where it has them."""
        import jax

        from jaxlab import nn
        from jaxlab.ops.layers import dense, mlp
        from jaxlab.types import Layer

        width = self.width or dict(zip(BACKBONES, (128, 16, 64), strict=True))[self.backbone]
        if self.backbone == "resnet":
            return nn.resnet(num_classes, width=width, blocks=(self.depth,) * 2)
        if self.backbone == "vit":
            return nn.vit(num_classes, width=width, depth=self.depth)
        body, head = mlp([width] * self.depth), dense(num_classes)

        def init(key, image):
            key_body, key_head = jax.random.split(key)
            shape = getattr(image, "shape", (image,))
            size = 1
            for side in shape:
                size *= side
            return {"body": body.init(key_body, size), "head": head.init(key_head, width)}

        def apply(params, x):
            features = jax.nn.relu(body.apply(params["body"], x.reshape(len(x), -1)))
            return {"logits": head.apply(params["head"], features), "features": features}

        return Layer(init, apply)

    def term(self) -> Callable[..., Any] | None:
        """Returns the mutual term of `mutual.peers`."""
        import jax
        import jax.numpy as jnp

        from jaxlab import distill, mutual
        from jaxlab.ops import safe_normalize

        name, temperature = self.objective, self.temperature or 1.0
        if name == "none":
            return None
        if name in ("kl", "reverse_kl", "symmetric_kl", "features"):
            direction = {"reverse_kl": "reverse", "symmetric_kl": "symmetric"}.get(name, "one_way")
            features = "features" if name == "features" else None
            return mutual.mutual_objective(direction=direction, temperature=temperature, features=features)

        def pair(own, other, where):
            z, t = own["logits"], other["logits"]
            if name == "mse":
                return mutual.consistency_loss(z, t, temperature=temperature, where=where)
            if name == "distillation":
                softened = self.temperature or 4.0
                return distill.distillation_loss(z, t, temperature=softened, soft_weight=1.0, where=where)
            # Peers of one kind share their space already: the critic is the cosine, as sharp as in contrastive losses.
            f, g = (safe_normalize(o["features"]) for o in (own, other))
            critic = {"student": {"w": jnp.eye(f.shape[1]) * (10 * f.shape[1] ** 0.5)}}
            critic["teacher"] = {"w": jnp.eye(f.shape[1])}
            term = distill.mi_alpha_loss(f, g, critic, where=where)
            return term + mutual.consistency_loss(z, t, kind="kl", temperature=temperature, where=where)

        def term(outputs, everyone, teach, batch):
            share = teach.astype(jnp.float32) / jnp.maximum(jnp.sum(teach, dtype=jnp.float32), 1)
            terms = jax.vmap(lambda other: pair(outputs, other, batch["where"]))(everyone)
            return jnp.sum(share * terms)

        return term


RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in (MutualMoE, Mutual, Mil)}


def find_recipe(name: str) -> type[Recipe]:
    """Returns the recipe of that name.

    Raises:
        InputError: there is none.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; there is {', '.join(sorted(RECIPES))}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def from_config(config: dict[str, Any]) -> Recipe:
    """Returns the recipe that a run's `config.json` describes.

    Raises:
        InputError: the recipe or one of its fields is unknown.
    """
    recipe = find_recipe(config.get("recipe", ""))
    fields = {field.name for field in dataclasses.fields(recipe)}
    values = config.get("fields", {})
    for name in values:
        if name not in fields:
            raise InputError(f"config.json has the unknown field {name!r}{did_you_mean(name, fields)}")
    return recipe(**values)
