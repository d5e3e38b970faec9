"""Linear layers and their adapters as one product: forward and back, the adapter's part is added where the base's is written.

PEFT writes the adapter's part, its multiple and the sum each to memory, in every layer and both ways. Here layers that read the same
values are multiplied together, and an adapter's matrices are brought to the products' number format once a pass, not by each layer each
time. Knows PEFT's layers. Does not know the model around them, or how a frozen base multiplies (`train.frozen`). A layer that does more
than that (dropout, several adapters, one merged or switched off) is left to PEFT.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear

from train.frozen import Frozen, frozen_of

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What models call the layers of one module that read the same values, in the order in which they are asked."""


class _Products(torch.autograd.Function):  # type: ignore[misc]
    """Of each layer x W' + scale x A' B', where W has no gradient."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, layers: "Layers", *matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take x (tokens, inputs) and the matrices, which are multiplied as `layers` holds them; return (tokens, outputs) of each."""
        inner = linear(x, layers.down)
        context.save_for_backward(x, inner)
        context.layers, context.dtype = layers, matrices[0].dtype
        prepared = layers.frozen[0].prepare(x)
        return tuple(
            frozen.multiply(prepared).addmm_(own, up.t(), alpha=scale)
            for frozen, own, up, scale in zip(layers.frozen, inner.split(layers.ranks, 1), layers.ups, layers.scales, strict=True)
        )

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, inner), layers = context.saved_tensors, context.layers
        of_inner = torch.empty_like(inner)
        of_x, of_ups = None, []
        parts = zip(gradients, inner.split(layers.ranks, 1), of_inner.split(layers.ranks, 1), strict=True)
        for (gradient, own, of_own), frozen, up, scale in zip(parts, layers.frozen, layers.ups, layers.scales, strict=True):
            torch.addmm(own, gradient, up, beta=0, alpha=scale, out=of_own)
            of_ups.append(torch.addmm(up, gradient.t(), own, beta=0, alpha=scale))
            if context.needs_input_grad[0]:
                of_x = frozen.multiply_back(gradient, of_x)
        if of_x is not None:
            of_x.addmm_(of_inner, layers.down)
        of_downs = (of_inner.t() @ x).to(context.dtype).split(layers.ranks)
        return of_x, None, *(matrix for pair in zip(of_downs, of_ups, strict=True) for matrix in pair)


@dataclass(frozen=True)
class Layers:
    """What is multiplied at once: frozen layers, and their adapter's matrices in the products' number format."""

    frozen: Sequence[Frozen]
    down: torch.Tensor
    """The first matrices behind one another, (the sum of their ranks, inputs)."""
    ups: Sequence[torch.Tensor]
    scales: Sequence[float]

    @property
    def ranks(self) -> list[int]:
        """The second matrices' widths."""
        return [up.shape[1] for up in self.ups]


class Copies:
    """Matrices of adapters in another number format, copied at once before each pass of the model."""

    def __init__(self) -> None:
        self.pairs: dict[Siblings, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self.versions: dict[Siblings, list[int]] = {}

    def keep(self, owner: "Siblings", originals: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
        """Copy these now and at each pass, in the place of what this owner had kept."""
        if any(some[0].dtype != copies[0].dtype for _, some in self.pairs.values()):
            self.pairs.clear()  # of a pass in another format; who is asked again comes again
        self.pairs[owner] = originals, copies
        self._renew([owner])

    def are_new(self, owner: "Siblings", originals: list[torch.Tensor]) -> bool:
        """Whether an owner's copies are these matrices as they are now, as far as torch knows."""
        kept = self.pairs.get(owner, ([], []))[0]
        if len(kept) != len(originals) or any(one is not other for one, other in zip(kept, originals, strict=True)):
            return False
        return [each._version for each in originals] == self.versions[owner]

    def renew(self, *_: Any) -> None:
        """Copy all, as a hook: there are optimizers that change matrices without torch's knowledge."""
        if self.pairs:
            self._renew(self.pairs)

    def _renew(self, owners: Iterable["Siblings"]) -> None:
        pairs = {owner: self.pairs[owner] for owner in owners}
        originals = [each for some, _ in pairs.values() for each in some]
        with torch.no_grad():
            torch._foreach_copy_([each for _, some in pairs.values() for each in some], originals)
        self.versions |= {owner: [each._version for each in some] for owner, (some, _) in pairs.items()}


@dataclass(frozen=True)
class Look:
    """What was found of a layer: good as long as the layer is made of the same parts, which is seen at once."""

    parts: tuple[object, ...]
    kind: torch.dtype
    """Of the values that it multiplies."""
    layer: Any
    is_plain: bool = False
    frozen: Frozen | None = None
    down: Any = None
    up: Any = None
    scale: float = 1.0

    @classmethod
    def at(cls, layer: Any, parts: tuple[object, ...], kind: torch.dtype) -> "Look":
        """Look at all of it."""
        if not _is_plain(layer):
            return cls(parts, kind, layer)
        (name,) = layer.active_adapters
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        return cls(parts, kind, layer, True, frozen_of(layer.base_layer, kind), down, up, layer.scaling[name])


class Siblings:
    """PEFT layers that read the same values: when the first is asked, all are multiplied, and the others' products wait for them."""

    def __init__(self, layers: Sequence[Any], copies: Copies) -> None:
        self.layers, self.copies = layers, copies
        self.are_together = len(layers) > 1
        """Until one does not fetch its product: then the model asks them in another way."""
        self._down, self._ups = torch.empty(0), [torch.empty(0)]
        self._read: torch.Tensor | None = None
        self._waiting: dict[int, tuple[torch.Tensor, Look]] = {}
        self._looks: dict[int, Look] = {}

    def multiply(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """Return one layer's product, (..., outputs) for x (..., inputs); None where it is PEFT's to make."""
        if x is self._read and index in self._waiting:
            found, look = self._waiting.pop(index)
            self._read = x if self._waiting else None
            if self._look(index, look.kind) is look:
                return found
        if index == 0 and self._waiting:
            self.are_together, self._read, self._waiting = False, None, {}
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if index == 0 and self.are_together:
            looks = [self._look(each, kind) for each in range(len(self.layers))]
            if products := self._products(looks, x):
                found, *others = products
                self._read, self._waiting = x, dict(enumerate(zip(others, looks[1:], strict=True), 1))
                return found
        return next(iter(self._products([self._look(index, kind)], x)), None)

    def _look(self, index: int, kind: torch.dtype) -> Look:
        """Look at a layer, at all of it only where something has changed: a step asks some hundred times, and its GPU would wait."""
        layer, seen = self.layers[index], self._looks.get(index)
        parts = _parts(layer)
        if seen is None or seen.kind != kind or not all(map(is_, parts, seen.parts)):
            seen = self._looks[index] = Look.at(layer, parts, kind)
        return seen

    def _products(self, looks: Sequence[Look], x: torch.Tensor) -> list[torch.Tensor]:
        """Return the products of all these layers, or none."""
        first, frozen = looks[0], [look.frozen for look in looks]
        if not all(look.is_plain for look in looks) or len(set(map(type, frozen))) > 1 or (first.frozen is None and len(looks) > 1):
            return []
        flat = x.to(first.kind).reshape(-1, x.shape[-1])
        if first.frozen is None:  # a layer with a product of its own
            own, inner = first.layer.base_layer(flat).to(first.kind), linear(flat, first.down.to(first.kind))
            products = [torch.addmm(own, inner, first.up.to(first.kind).t(), alpha=first.scale)]
        else:
            downs, ups = [look.down for look in looks], [look.up for look in looks]
            with torch.no_grad():  # the gradients are those of the matrices themselves
                down, others = self._ready(downs, ups, first.kind)
            matrices = [matrix for pair in zip(downs, ups, strict=True) for matrix in pair]
            made = Layers(frozen, down, others, [look.scale for look in looks])  # type: ignore[arg-type]
            products = list(_Products.apply(flat, made, *matrices))
        return [product.view(*x.shape[:-1], -1) for product in products]

    def _ready(self, downs: list[torch.Tensor], ups: list[torch.Tensor], kind: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the first matrices behind one another, and the second ones, in a number format; copies of all layers' are kept."""
        if downs[0].dtype == kind:
            return downs[0] if len(downs) == 1 else torch.cat(downs), ups
        if len(downs) < len(self.layers):
            return downs[0].to(kind), [ups[0].to(kind)]
        originals = [*downs, *ups]
        if self._down.dtype != kind or not self.copies.are_new(self, originals):
            ranks = [down.shape[0] for down in downs]
            with torch.inference_mode(False):  # they outlive an evaluation that asks first
                self._down = torch.empty(sum(ranks), downs[0].shape[1], dtype=kind, device=downs[0].device)
                self._ups = [torch.empty_like(up, dtype=kind, requires_grad=False) for up in ups]
            self.copies.keep(self, originals, [*self._down.split(ranks), *self._ups])
        return self._down, self._ups


def fuse_adapter(model: Any) -> None:
    """Give each of a PEFT model's LoRA layers that does no more than such a product this forward pass."""
    from peft.tuners.lora import LoraLayer

    copies = Copies()
    for module in model.modules():
        fitting = {name: layer for name, layer in module.named_children() if isinstance(layer, LoraLayer)}
        fitting = {name: layer for name, layer in fitting.items() if isinstance(layer.get_base_layer(), torch.nn.Linear)}
        together = [names for names in SIBLINGS if set(names) <= set(fitting)]
        alone = [(name,) for name in fitting if not any(name in names for names in together)]
        for names in [*together, *alone]:
            layers = [fitting[name] for name in names]
            siblings = Siblings(layers, copies)
            for index, layer in enumerate(layers):
                layer.siblings = siblings, index
                layer.forward = MethodType(_with_fallback(type(layer).forward), layer)
    model.get_input_embeddings().register_forward_hook(copies.renew)


def _with_fallback(of_peft: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        siblings, index = self.siblings
        found = None if args or kwargs else siblings.multiply(index, x)
        return of_peft(self, x, *args, **kwargs) if found is None else found

    return forward


def _parts(layer: Any) -> tuple[object, ...]:
    """Return what a layer is made of and how it is used, each the same object until that is changed."""
    inside, names = layer._modules, layer.active_adapters
    name = names[0] if len(names) == 1 else None
    base = inside["base_layer"]
    weight = base._parameters.get("weight")
    how = (weight.dtype, weight.requires_grad) if weight is not None else ()
    matrices = (inside[part]._modules.get(name) for part in ("lora_A", "lora_B"))
    own = (matrix and matrix._parameters["weight"] for matrix in matrices)
    return layer.disable_adapters, layer.merged, name, layer.scaling.get(name), base, weight, *how, *own


def _is_plain(layer: Any) -> bool:
    """Whether a layer has one adapter at work, and nothing of PEFT's beside it."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return False
    return isinstance(layer.lora_dropout[name], torch.nn.Identity)
