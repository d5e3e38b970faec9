"""What several adapters beside one frozen base take of a card's memory, for their default number, and whether an error says it is full.

Knows a model's shape, and figures that were measured. Does not know how large a card is, or who asks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ModelError

MOST_OF_BASE = 1.5  # what a base and all that learns beside it may take, as a multiple of the base alone
# Bytes. Measured with four adapters of rank 16 on a base of 7.4 billion weights, rows of 64 to 1,024 tokens, on an H100: see the newest
# tests/benchmarks/results/sweep-shared-base-*; what is computed with these is up to a sixth above each figure there, and never below.
A_WEIGHT_OF_THE_BASE = {"none": 2.0, "nf4": 0.61}
A_WEIGHT_OF_AN_ADAPTER = 16  # in fp32, with its gradient and AdamW's two moments
A_TOKEN_IN_A_LAYER = {False: 50, True: 4}  # for each of its hidden states, kept or recomputed
A_LOGIT = 10  # of every token, as if all carried loss and all were there at once, as they were when this was measured
MAX_BATCH_TOKENS = 8192  # of all adapters, in one pass through the base: more fill no card better
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not reach."""
    return any(words in str(error) for words in NO_MEMORY)


def outline(model_folder: Path) -> Any:
    """Return a base model without its weights: its shape and its layers.

    Raises:
        ModelError: transformers does not know it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot read the base model in {model_folder}", str(error), "python -m cluster doctor") from error


@dataclass(frozen=True)
class Memory:
    """Of one base and the adapters that learn beside it."""

    base: Any
    """The model, with its weights or without."""
    num_adapters: int
    rank: int
    quantization: str = "none"
    recompute: bool = False
    """Whether activations are recomputed."""

    def share(self, num_tokens: float) -> float:
        """Return what all takes with so many tokens in a pass, as a multiple of the base alone."""
        return 1 + (self._adapters_bytes + num_tokens * self._token_bytes) / self._base_bytes

    @property
    def most_tokens(self) -> int:
        """Tokens that a pass may have for all to stay within MOST_OF_BASE; 0 where none may."""
        left_bytes = (MOST_OF_BASE - 1) * self._base_bytes - self._adapters_bytes
        return max(0, int(left_bytes / self._token_bytes))

    @property
    def _base_bytes(self) -> float:
        num_weights = sum(parameter.numel() for parameter in self.base.parameters())
        return float(num_weights * A_WEIGHT_OF_THE_BASE[self.quantization])

    @property
    def _adapters_bytes(self) -> float:
        """Of adapters on all linear layers but the head, which is the most that they may be."""
        import torch

        head = self.base.get_output_embeddings()
        layers = [layer for layer in self.base.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
        widths = sum(layer.in_features + layer.out_features for layer in layers)
        return float(self.num_adapters * self.rank * widths * A_WEIGHT_OF_AN_ADAPTER)

    @property
    def _token_bytes(self) -> float:
        shape = self.base.config.get_text_config()
        logits = shape.vocab_size * A_LOGIT
        if self.recompute:
            logits /= self.num_adapters  # those of one adapter at a time
        return float(shape.num_hidden_layers * shape.hidden_size * A_TOKEN_IN_A_LAYER[self.recompute] + logits)
