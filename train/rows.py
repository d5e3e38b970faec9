"""Training rows as tensors: tokenised conversations, padded or packed into batches.

Knows tokens and labels. Does not know the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.schema import DataConfig
from data.conversations import read_prepared
from data.template import NO_LOSS, fit, tokenize

Row = dict[str, list[int]]


def read_rows(file: Path, tokenizer: Any, config: DataConfig) -> list[Row]:
    """Read a prepared file as rows of `input_ids` and `labels`, cut where the config says so."""
    tokens, _ = fit((tokenize(conversation, tokenizer) for conversation in read_prepared(file)), config)
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in tokens if row]


@dataclass(frozen=True)
class Padder:
    """Makes a batch of equally long rows, filled up on the right."""

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and labels, each (rows, longest)."""
        longest = max(len(row["input_ids"]) for row in rows)

        def fill(values: list[int], value: int) -> list[int]:
            return values + [value] * (longest - len(values))

        return {
            "input_ids": torch.tensor([fill(row["input_ids"], self.pad_id) for row in rows]),
            "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([fill(row["labels"], NO_LOSS) for row in rows]),
        }


@dataclass(frozen=True)
class Packer:
    """Makes one long row of a batch, without padding; positions that begin anew keep the conversations blind to each other."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Return input_ids, position_ids and labels, each (1, sum of lengths)."""
        # A row's first label would be predicted from the end of the row before it.
        labels = [label for row in rows for label in [NO_LOSS, *row["labels"][1:]]]
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "position_ids": torch.tensor([[position for row in rows for position in range(len(row["input_ids"]))]]),
            "labels": torch.tensor([labels]),
        }
