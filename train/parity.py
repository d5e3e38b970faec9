"""Whether a version says on the engine what it says where it was trained: transformers and PEFT against vLLM, token by token.

Both are asked for log-probabilities at every token of held-out answers: of the row's own token and of the engine's likeliest ones.
Knows both sides. Does not know quality: an adapter served on another precision of its base may differ and still answer well.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.models import ensure_model
from cluster.registry import Registry, Version
from configs.schema import ChatbotConfig
from data.ask import token_logprobs
from data.template import NO_LOSS, TokenRow, load_tokenizer, tokenize
from train.contenders import as_asked, spread
from train.evaluate import FP8_BY_ROWS, SAME_BASE, contender_of, heldout_of, require_served, trained_on

NUM_ROWS = 12
NUM_LIKELIEST = 5
# Log-probabilities below this are of tokens that neither would say; bf16 leaves them few right digits.
LEAST_LOGPROB = -8.0
# The bound for two implementations of one model in bf16: between 16 and 32, where logits lie, its numbers are 0.125 apart, and every layer
# rounds in its own order. Seen with the 135M model and an adapter of the helpdesk bot: 0.061 on average, 0.61 at most.
MAX_MEAN_DIFFERENCE = 0.1
MAX_DIFFERENCE = 1.0


@dataclass(frozen=True)
class Parity:
    """How far the two sides are from each other, in log-probability, over `num_tokens` tokens of answers."""

    trained_on: str
    served_on: str
    num_tokens: int
    mean_difference: float
    max_difference: float
    share_same_best: float

    @property
    def is_same_base(self) -> bool:
        """Whether the base is served in the precision that the adapter was trained on."""
        return SAME_BASE.get(self.trained_on, self.trained_on) == self.served_on

    @property
    def agrees(self) -> bool:
        """Whether the differences are within the bound."""
        return self.mean_difference <= MAX_MEAN_DIFFERENCE and self.max_difference <= MAX_DIFFERENCE

    def __str__(self) -> str:
        """Say it in a line."""
        figures = f"log-probabilities differ by {self.mean_difference:.4f} on average and {self.max_difference:.3f} at most"
        bound = f"the bound is {MAX_MEAN_DIFFERENCE} and {MAX_DIFFERENCE}"
        bases = f"trained on a base in {self.trained_on}, served on {self.served_on}" if not self.is_same_base else "the same base"
        return f"{figures} ({bound}); the likeliest token is the same at {self.share_same_best:.1%} of {self.num_tokens} places; {bases}"


def compare_engines(config: ChatbotConfig, registry: Registry, version: Version) -> Parity:
    """Compare the served version with transformers and PEFT, whose base is loaded in the precision that it was trained on.

    Raises:
        TandemError: The endpoint does not answer, or the base or the adapter cannot be loaded.
    """
    served_base = require_served(config)
    folder = ensure_model(config.model)
    tokenizer = load_tokenizer(folder)
    contender = contender_of(registry, version)
    heldout, _ = heldout_of(config, version)
    asked = [as_asked(entry, config.data.system_prompt, contender.system_prompt) for entry in spread(heldout, NUM_ROWS)]
    rows = [tokenize(conversation, tokenizer) for conversation in asked]
    served = token_logprobs(served_base.endpoint, version.name, rows, NUM_LIKELIEST)
    kept = [(row, places) for row, places in zip(rows, served, strict=True) if places]
    base_format = trained_on(version)
    trained = trained_logprobs(_as_trained(config, base_format), folder, registry.download(version), [row for row, _ in kept])
    return _compare(base_format, served_base.quantization, trained, [places for _, places in kept])


def trained_logprobs(config: ChatbotConfig, folder: Path, adapter: Path, rows: Sequence[TokenRow]) -> list[Any]:
    """Return for each row a tensor (tokens that carry loss, vocabulary) of log-probabilities, by transformers and PEFT."""
    import torch
    from peft import PeftModel

    from train.model import load_base

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU here may be the engine's, whose memory is taken; some rows need none
    longest_tokens = max(len(row.input_ids) for row in rows)
    model = PeftModel.from_pretrained(load_base(folder, config.model, config.train, longest_tokens), str(adapter)).eval()
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.input_ids], device=model.device)).logits[0, :-1].float()
            carries_loss = torch.tensor([label != NO_LOSS for label in row.labels[1:]])
            found.append(torch.log_softmax(logits[carries_loss.to(logits.device)], dim=-1).cpu())
    return found


def _as_trained(config: ChatbotConfig, base_format: str) -> ChatbotConfig:
    in_fp8 = base_format == FP8_BY_ROWS
    formats = {"quantization": "none" if in_fp8 else base_format, "precision": "fp8" if in_fp8 else "auto"}
    train = config.train.model_copy(update=formats)
    return config.model_copy(update={"train": train})


def _compare(base_format: str, served_on: str, trained: list[Any], served: list[list[dict[int, float]]]) -> Parity:
    differences, num_tokens, num_same_best = [], 0, 0
    for logprobs, places in zip(trained, served, strict=True):
        for ours, theirs in zip(logprobs, places, strict=True):
            num_tokens += 1
            num_same_best += int(ours.argmax()) == max(theirs, key=lambda token: theirs[token])
            differences += [
                abs(float(ours[token]) - logprob) for token, logprob in theirs.items() if max(float(ours[token]), logprob) >= LEAST_LOGPROB
            ]
    mean = sum(differences) / len(differences)
    return Parity(base_format, served_on, num_tokens, mean, max(differences), num_same_best / num_tokens)
