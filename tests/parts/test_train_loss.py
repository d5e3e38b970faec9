"""The loss of answers in chunks, against torch's own over all logits at once."""

import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from cluster import memory
from cluster.memory import CHUNK_LOGIT_BYTES
from data.template import NO_LOSS
from train import loss
from train.loss import sum_losses

TOKENS, WIDTH, VOCABULARY = 37, 16, 96


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of ten tokens each, so that the last one is not full."""
    monkeypatch.setattr(memory, "CHUNK_BYTES", 10 * VOCABULARY * 4)


def make(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    states = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    return states, head, torch.randint(0, VOCABULARY, (TOKENS,))


def whole(states, head, targets, smoothing):
    return cross_entropy(head(states).float(), targets, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_all_logits_at_once(smoothing):
    states, head, targets = make()
    found, wanted = (way(states, head, targets, smoothing) for way in (sum_losses, whole))
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(3 * total, states)[0] for total in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_token_without_a_target_counts_nothing(smoothing):
    states, head, targets = make()
    some = torch.arange(TOKENS) % 3 == 0
    left = torch.where(some, targets, NO_LOSS)
    found, wanted = sum_losses(states, head, left, smoothing), whole(states[some], head, targets[some], smoothing)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(total, states)[0] for total in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_in_bf16_it_is_as_near_to_the_truth():
    states, head, targets = make(torch.bfloat16)
    truth = whole(states.double(), head.double(), targets, 0.0)
    wanted = torch.autograd.grad(truth, states)[0].float()
    head = head.bfloat16()
    apart = []
    for way in (sum_losses, whole):
        total = way(states, head, targets, 0.0)
        apart.append((abs(float(total - truth)), float((torch.autograd.grad(total, states)[0].float() - wanted).norm())))
    assert apart[0][0] <= apart[1][0] + 0.05
    assert apart[0][1] <= 1.5 * apart[1][1]


def test_under_autocast_states_in_fp32_are_brought_to_the_heads_format():
    states, head, targets = make()
    head = head.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = sum_losses(states, head, targets, 0.0), whole(states, head, targets, 0.0)
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.0)
    assert torch.autograd.grad(found, states)[0].dtype == torch.float32


def test_logits_are_never_all_there_and_none_is_kept(monkeypatch):
    sizes, plain = [], torch.nn.functional.log_softmax
    monkeypatch.setattr(loss, "log_softmax", lambda logits, dim: sizes.append(len(logits)) or plain(logits, dim=dim))
    states, head, targets = make()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sum_losses(states, head, targets, 0.0)
    assert sizes == [10, 10, 10, 7]
    assert [tuple(tensor.shape) for tensor in kept] == [(TOKENS, WIDTH)]


class Held(TorchDispatchMode):
    """Counts the bytes of tensors of a chunk's logits' size that are there at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == (10, VOCABULARY):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunks_logits_take_what_the_plan_says(dtype):
    states, head, targets = make(dtype)
    with Held() as held:
        sum_losses(states, head, targets, 0.1).backward()
    assert held.most == 10 * VOCABULARY * CHUNK_LOGIT_BYTES


def test_without_a_gradient_none_is_made(monkeypatch):
    states, head, targets = make()
    made, plain = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **settings: made.append(args) or plain(*args, **settings))
    with torch.no_grad():
        found = sum_losses(states, head, targets, 0.0)
    assert made == []
    torch.testing.assert_close(found, whole(states, head, targets, 0.0))
    assert not found.requires_grad


@pytest.mark.parametrize("learns", [True, False])
def test_a_head_that_learns_or_is_another_layer_is_asked_itself(learns):
    """Such as one with an adapter."""
    states, head, targets = make()
    layer = head.requires_grad_() if learns else torch.nn.Sequential(head)
    sum_losses(states, layer, targets, 0.0).backward()
    assert (head.weight.grad is not None) == learns
    assert states.grad is not None


def test_in_bf16_a_factor_keeps_its_digits():
    """As that of a loss that is divided by a number of tokens."""
    states, head, targets = make(torch.bfloat16)
    gradients = [torch.autograd.grad(sum_losses(states, head, targets, 0.0) / count, states)[0].float() for count in (1, 1003)]
    assert float((gradients[1] * 1003).norm() / gradients[0].norm()) == pytest.approx(1, abs=2e-4)


def test_nothing_to_learn_is_no_loss():
    states, head, targets = make()
    assert float(sum_losses(states[:0], head, targets[:0], 0.0)) == 0.0
