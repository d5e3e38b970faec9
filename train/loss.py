"""The loss of answers under a frozen head, some hundred tokens at a time: their logits are never all in memory, nor kept for the way back.

Logits over a vocabulary of 50 to 150 thousand are among the largest things in training. The head does not learn, so that a token's
gradient is known as soon as its loss is, and its logits can go: the same two products, in other order. Knows matrices and targets. Does
not know the model.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, log_softmax

from cluster.memory import chunk_tokens
from data.template import NO_LOSS


def sum_losses(states: torch.Tensor, head: Any, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return the sum of the losses, in fp32.

    Args:
        states: What the head reads, (tokens, width).
        head: The model's last layer.
        targets: The next token of each, (tokens,); `NO_LOSS` where it carries none.
        smoothing: How much of a target is spread over the vocabulary.
    """
    if type(head) is torch.nn.Linear and not head.weight.requires_grad and head.bias is None:
        total: torch.Tensor = _InChunks.apply(states, head.weight, targets, smoothing, torch.is_grad_enabled())
        return total
    return cross_entropy(head(states).float(), targets, reduction="sum", label_smoothing=smoothing)


class _InChunks(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        context: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float, learns: bool
    ) -> torch.Tensor:
        total = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states) if learns and context.needs_input_grad[0] else None
        num_tokens = chunk_tokens(len(weight))
        for begin in range(0, len(states), num_tokens):
            chunk = slice(begin, begin + num_tokens)
            logits = linear(states[chunk].to(weight.dtype), weight).float()  # (tokens, vocabulary)
            chances = log_softmax(logits, dim=-1)
            del logits  # no more than two of its size are there at once: see `cluster.memory`
            counts = targets[chunk, None] != NO_LOSS
            wanted = targets[chunk, None].clamp(min=0)
            total -= (1 - smoothing) * (chances.gather(1, wanted) * counts).sum()
            if smoothing:
                total -= smoothing * (chances.mean(-1, keepdim=True) * counts).sum()
            if gradient is not None:
                chances.exp_()
                if smoothing:
                    chances -= smoothing / len(weight)
                chances.scatter_add_(1, wanted, chances.new_full(wanted.shape, smoothing - 1))  # less what they should be
                gradient[chunk] = (chances.to(weight.dtype) @ weight) * counts
            del chances
        if gradient is not None:
            context.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, of_total: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = context.saved_tensors
        # In fp32: a GPU would round the factor, and all gradients with it, to bf16.
        return (gradient.float() * of_total).to(gradient.dtype), None, None, None, None
