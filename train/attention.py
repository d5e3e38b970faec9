"""Attention without transformers' masks: of rows that are filled up, and of rows that lie end to end, each blind to the others.

Knows transformers' attention interface. Does not know what else the tokens go through, which takes what lies end to end as one long row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

ATTENTION, CAUSAL = "tandem_rows", "tandem_causal"
TRIED_TOKENS = 16
TRIED = (5, 3)  # tokens of two rows
TRIED_CLOSE = 0.1  # of a row's outcome; bf16 and other kernels make some hundredths, other tokens all of it


class OtherMaskError(Exception):
    """A model has a mask of its own, of which `attend` knows nothing."""


@dataclass(frozen=True)
class Spread:
    """Where tokens of rows that lie end to end are, once the rows are filled up to the longest; a model is given it as `rows`."""

    num_rows: int
    longest: int
    places: torch.Tensor | None
    """Of each token; None where all rows are equally long."""
    windows: set[int | None] | None = None
    """If there is one, what each layer says of how far back it attends goes in."""

    def pin_memory(self) -> "Spread":
        """Return it in memory that a GPU reads by itself; torch's loader asks for that, as of a tensor."""
        return replace(self, places=None if self.places is None else self.places.pin_memory())

    def to(self, device: Any, non_blocking: bool = False) -> "Spread":
        """Return it on a device; accelerate asks for that, as of a tensor."""
        places = None if self.places is None else self.places.to(device, non_blocking=non_blocking)
        return replace(self, places=places)


def spread(lengths: Sequence[int]) -> Spread:
    """Make it for rows of these lengths, in tokens."""
    longest = max(lengths)
    if min(lengths) == longest:
        return Spread(len(lengths), longest, None)
    return Spread(len(lengths), longest, torch.cat([torch.arange(length) + number * longest for number, length in enumerate(lengths)]))


def widen(rows: Spread, longest: int, num_more: int) -> tuple[Spread, torch.Tensor]:
    """Return where tokens are once rows are filled up to another length, and so many more tokens stand where rows have none.

    And these tokens' positions, (num_more,).
    """
    places = torch.arange(rows.num_rows * rows.longest) if rows.places is None else rows.places
    places = places // rows.longest * longest + places % rows.longest
    is_free = torch.ones(rows.num_rows * longest, dtype=torch.bool)
    is_free[places] = False
    added = is_free.nonzero().flatten()[:num_more]
    return Spread(rows.num_rows, longest, torch.cat([places, added])), added % longest


def lay_end_to_end(base: Any) -> bool:
    """Let a model take rows that lie end to end, of those that `train.model.packs_safely` names; return whether it keeps them apart.

    By `attend`, or where a model does not attend as that supposes, by transformers' own mask of all tokens by all.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)  # under a name without a mask of its own it gets none
    for attention in (ATTENTION, base.config._attn_implementation):
        base.set_attn_implementation(attention)
        if _keeps_rows_apart(base):
            return True
    return False


def attend_without_masks(base: Any, longest_tokens: int) -> bool:
    """Let a model of those that `packs_safely` names attend causally without transformers' masks, for rows up to a length; or leave it.

    At each pass transformers looks whether rows are packed, and a GPU that is asked stands still. Return whether it is not asked any more.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config, before = base.config.get_text_config(), base.config._attn_implementation
    if 0 < (getattr(config, "sliding_window", None) or 0) < longest_tokens:
        return False
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)  # under a name without a mask of its own it gets none
    tokens = torch.arange(TRIED_TOKENS, device=base.get_input_embeddings().weight.device)[None] % config.vocab_size
    outcomes = []
    for attention in (before, CAUSAL):
        base.set_attn_implementation(attention)
        outcomes.append(_outcome(base, {"input_ids": tokens, "use_cache": False}))
    if outcomes[0] is None or outcomes[1] is None or not _are_close(outcomes[1], outcomes[0]):
        base.set_attn_implementation(before)
        return False
    return True


@torch.no_grad()  # type: ignore[untyped-decorator]
def _outcome(base: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
    """Return what a model makes of tokens, (tokens, width), as in training; None where it has a mask of its own, or does not go without."""
    was_training = base.training
    base.train(getattr(base, "is_loaded_in_4bit", False))  # else bitsandbytes packs its weights anew on a CPU
    try:
        hidden: torch.Tensor = base.get_decoder()(**inputs).last_hidden_state
    except (KeyError, TypeError, AttributeError, ValueError, OtherMaskError):
        return None
    finally:
        base.train(was_training)
    return hidden[0].float()


def _are_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm() / other.norm()) < TRIED_CLOSE


@torch.no_grad()  # type: ignore[untyped-decorator]
def _keeps_rows_apart(base: Any) -> bool:
    """Whether a row's outcome is the same behind another; in some models it is not, which pass on no `rows`, or have masks of their own."""
    config = base.config.get_text_config()
    tokens = torch.arange(sum(TRIED), device=base.get_input_embeddings().weight.device)[None] % config.vocab_size
    positions = torch.cat([torch.arange(length) for length in TRIED]).to(tokens.device)[None]
    windows: set[int | None] = set()

    def outcome(begin: int, *lengths: int) -> torch.Tensor | None:
        rows = replace(spread(lengths), windows=windows).to(tokens.device)
        inputs = {"input_ids": tokens[:, begin:], "position_ids": positions[:, begin:], "rows": rows, "use_cache": False}
        found = _outcome(base, inputs)
        return None if found is None else found[-TRIED[-1] :]

    behind, alone = outcome(0, *TRIED), outcome(TRIED[0], TRIED[1])
    if behind is None or alone is None:
        return False
    reaches_back = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    if reaches_back and windows == {None}:  # its window is in a mask alone
        return False
    return _are_close(behind, alone)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **settings: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each row: rows are filled up for this alone, and causal attention never sees what follows a row's end."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows: Spread = settings.pop("rows")
    window = settings.pop("sliding_window", None)
    if attention_mask is not None:
        raise OtherMaskError
    if rows.windows is not None:
        rows.windows.add(window)
    mask = None
    if window and window < rows.longest:
        near = torch.ones(rows.longest, rows.longest, dtype=torch.bool, device=query.device)
        mask = (near.tril() & near.triu(1 - window))[None, None]

    def fill_up(states: torch.Tensor) -> torch.Tensor:  # (1, heads, tokens, width) -> (rows, heads, longest, width)
        states = states[0].transpose(0, 1)
        if rows.places is not None:
            states = _Put.apply(states, rows.places, rows.num_rows * rows.longest)
        return states.reshape(rows.num_rows, rows.longest, *states.shape[1:]).transpose(1, 2)

    mixed, _ = sdpa_attention_forward(module, fill_up(query), fill_up(key), fill_up(value), mask, **settings)
    mixed = mixed.flatten(0, 1)  # (rows * longest, heads, width)
    return (mixed if rows.places is None else take(mixed, rows.places))[None], None


def take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the values at the given places, no place twice; its way back is a copy, where indexing's own is a sum."""
    taken: torch.Tensor = _Take.apply(values, places)
    return taken


class _Take(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(places)
        context.num_values = len(values)
        return values.index_select(0, places)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = context.saved_tensors
        return _put(gradient, places, context.num_values), None


class _Put(torch.autograd.Function):  # type: ignore[misc]
    """Puts values at places among noughts; `index_copy_` itself would keep them for the way back, where only places are needed."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, places: torch.Tensor, num_places: int) -> torch.Tensor:
        context.save_for_backward(places)
        return _put(values, places, num_places)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = context.saved_tensors
        return gradient.index_select(0, places), None, None


def _put(values: torch.Tensor, places: torch.Tensor, num_places: int) -> torch.Tensor:
    return values.new_zeros(num_places, *values.shape[1:]).index_copy_(0, places, values)
