"""Batches: padded on the right, or packed without padding, with the same tokens and the same loss tokens."""

from itertools import pairwise

import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from configs.schema import DataConfig
from data.conversations import to_jsonl
from data.template import NO_LOSS, load_tokenizer
from tests.helpers.data import chat, tokenizer_folder
from train.rows import Packer, Padder, RowOrder, answer_places, few_lengths, few_sizes, fill_up, fill_up_packed, halved, read_rows

N = NO_LOSS
ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [N, N, 7, 8]},
    {"input_ids": [9, 1], "labels": [N, 1]},
    {"input_ids": [2, 3, 4], "labels": [2, 3, N]},
]


def test_padding_fills_up_on_the_right_and_carries_no_loss():
    batch = Padder(pad_id=42)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 1, 42, 42], [2, 3, 4, 42]]
    assert batch["labels"].tolist() == [[N, N, 7, 8], [N, 1, N, N], [2, 3, N, N]]
    assert set(batch) == {"input_ids", "labels"}, "with a mask, attention is slower, and would be no other"
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_equally_long_rows_need_no_padding():
    assert Padder(42)(ROWS[:1])["input_ids"].tolist() == [ROWS[0]["input_ids"]]


def test_where_shapes_are_to_be_few_rows_are_as_long_as_the_next_length():
    batch = fill_up(Padder(42)(ROWS), (3, 6, 9))
    assert batch["input_ids"].tolist()[1] == [9, 1, 42, 42, 0, 0]
    assert batch["labels"].tolist()[0] == [N, N, 7, 8, N, N]
    assert fill_up(Padder(42)(ROWS), (3,))["input_ids"].shape == (3, 4), "none is that long"


@pytest.mark.parametrize("longest", [5, 64, 100, 2048, 8192])
def test_few_lengths_are_multiples_of_eight_up_to_the_longest(longest):
    lengths = few_lengths(longest)
    assert lengths[-1] == longest
    assert len(lengths) <= 8
    assert all(length % 8 == 0 for length in lengths[:-1])
    assert len({later - earlier for earlier, later in pairwise(lengths[:-1])}) <= 1


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_places_are_filled_up_with_such_as_carry_no_loss(num_parts):
    labels = Padder(0)(ROWS)["labels"]
    exact, filled = answer_places(labels), answer_places(labels, num_parts)
    assert filled[: len(exact)].tolist() == exact.tolist()
    others = filled[len(exact) :].tolist()
    assert len(set(filled.tolist())) == len(filled)
    assert all(place % 4 != 3 and labels.flatten()[place + 1] == N for place in others)
    assert len(filled) == min(9, -(-4 // (12 // num_parts)) * (12 // num_parts))


def test_packed_rows_are_filled_up_to_few_sizes_by_tokens_that_carry_no_loss():
    batch = fill_up_packed(Packer()(ROWS * 30), 4)  # 270 tokens in 90 rows of 4 at most
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape == (1, 360)
    assert batch["labels"][0, 270:].tolist() == [N] * 90
    rows = batch["rows"]
    assert (rows.num_rows, rows.longest) == (90, 4)
    assert rows.places[:5].tolist() == [0, 1, 2, 3, 4]
    assert sorted(rows.places.tolist()) == list(range(360)), "where rows have no tokens"
    assert rows.places[270:272].tolist() == [6, 7]
    assert batch["position_ids"][0, 270:272].tolist() == [2, 3]
    alike = fill_up_packed(Packer()(ROWS[:1] * 3), 4)
    assert alike["labels"].shape == (1, 12), "no longer than so many rows can be"
    assert alike["rows"].places.tolist() == list(range(12))


@pytest.mark.parametrize("number", [1, 7, 8, 9, 63, 64, 65, 1000, 2049, 65535])
def test_few_sizes_are_at_most_half_as_much_again(number):
    size = few_sizes(number)
    assert number <= size <= max(number + 7, number * 3 / 2)
    assert size % 8 == 0


def test_of_sizes_there_are_two_from_each_power_of_two_to_the_next():
    assert sorted({few_sizes(number) for number in range(1025, 4097)}) == [1536, 2048, 3072, 4096]


@pytest.mark.parametrize(
    ("longest", "needed", "wanted"),
    [(2048, 130, 256), (2048, 129, 256), (2048, 128, 128), (75, 38, 38), (75, 39, 75), (5, 1, 2), (1, 1, 1)],
)
def test_lengths_of_packed_rows_are_the_longest_one_halved(longest, needed, wanted):
    assert halved(longest, needed) == wanted


def test_packing_makes_one_row_whose_positions_begin_anew():
    batch = Packer()(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    rows = batch.pop("rows")
    assert (rows.num_rows, rows.longest) == (3, 4)
    assert rows.places.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert Packer()(ROWS[:1] * 2)["rows"].places is None, "what is equally long needs no moving"
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_no_row_is_predicted_from_the_end_of_another():
    assert Packer()(ROWS)["labels"].tolist() == [[N, N, 7, 8, N, 1, N, 3, N]]


def test_both_ways_carry_the_same_loss_tokens():
    """A model predicts from the token before, so that a row's first label never counts."""
    padded, packed = Padder(0)(ROWS)["labels"][:, 1:], Packer()(ROWS)["labels"][:, 1:]
    assert padded[padded != N].tolist() == packed[packed != N].tolist() == [7, 8, 1, 3]


@pytest.fixture
def file(tmp_path):
    conversations = [chat("Hi", "Ho"), chat("Hi", "Run it. " * 40)]
    fields = {"group": None, "split": "train", "keys": [], "origin": "chats.jsonl:1"}
    (tmp_path / "train.jsonl").write_text(to_jsonl({**row, **fields} for row in conversations))
    return tmp_path / "train.jsonl"


def test_rows_are_the_conversations_tokens_cut_or_dropped_as_the_config_says(file):
    tokenizer = load_tokenizer(tokenizer_folder())
    whole = read_rows(file, tokenizer, DataConfig(source="x"))
    assert [len(row["input_ids"]) == len(row["labels"]) for row in whole] == [True, True]
    assert tokenizer.decode([label for label in whole[0]["labels"] if label != N]) == "Ho<|im_end|>"
    limit = len(whole[0]["input_ids"]) + 1  # with the line break that ends the conversation
    assert read_rows(file, tokenizer, DataConfig(source="x", max_length_tokens=limit)) == whole[:1]
    cut = read_rows(file, tokenizer, DataConfig(source="x", max_length_tokens=limit + 1, too_long="cut"))
    assert cut == [whole[0], {name: values[: limit + 1] for name, values in whole[1].items()}]


def test_nothing_follows_the_last_token_that_carries_loss(file):
    """The template ends each turn with a line break, which nothing is predicted from."""
    rows = read_rows(file, load_tokenizer(tokenizer_folder()), DataConfig(source="x"))
    assert all(row["labels"][-1] != N for row in rows)


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "heldout.jsonl").write_text("")
    assert read_rows(tmp_path / "heldout.jsonl", load_tokenizer(tokenizer_folder()), DataConfig(source="x")) == []


def order(seed: int = 0, epoch: int = 0, by_length: bool = True) -> list[int]:
    made = RowOrder([{"input_ids": [0] * (1 + place % 7), "labels": []} for place in range(40)], 4, seed, by_length)
    made.set_epoch(epoch)
    assert len(made) == 40
    return list(made)


@pytest.mark.parametrize("by_length", [True, False])
def test_the_order_of_rows_depends_on_seed_and_epoch_alone(by_length):
    torch.manual_seed(1)
    first = order(by_length=by_length)
    torch.manual_seed(2)
    assert order(by_length=by_length) == first
    state = torch.get_rng_state()
    others = [order(by_length=by_length, **change) for change in ({"epoch": 1}, {"seed": 1}, {"epoch": 2})]
    assert torch.equal(torch.get_rng_state(), state), "dropout is the same with any order"
    assert all(sorted(other) == sorted(first) == list(range(40)) for other in others)
    assert len({tuple(found) for found in (first, *others)}) == 4


def test_steps_do_not_go_from_long_rows_to_short_ones():
    """A model that sees all long rows first learns worse."""
    means = [sum(place % 7 for place in batch) / 4 for batch in zip(*[iter(order())] * 4, strict=True)]
    assert means != sorted(means, reverse=True)
    rises = sum(after > before for before, after in pairwise(means))
    assert rises >= 2


@pytest.mark.parametrize("num_rows", [3, 4, 41, 43])
def test_steps_are_those_of_the_grouping_and_one_that_is_not_full_is_the_last(num_rows):
    """Else all after it would be made of rows of two lengths."""
    lengths = [1 + place % 7 for place in range(num_rows)]
    found = list(RowOrder([{"input_ids": [0] * length, "labels": []} for length in lengths], 4, 0, by_length=True))
    grouped = get_length_grouped_indices(lengths, 4, generator=torch.Generator().manual_seed(0))
    steps, wanted = ([tuple(places[begin : begin + 4]) for begin in range(0, num_rows, 4)] for places in (found, grouped))
    assert sorted(steps) == sorted(wanted)
    assert len(steps[-1]) == (num_rows % 4 or 4)


def test_rows_of_like_length_go_together():
    spread = [max(place % 7 for place in batch) - min(place % 7 for place in batch) for batch in zip(*[iter(order())] * 4, strict=True)]
    loose = [
        max(place % 7 for place in batch) - min(place % 7 for place in batch)
        for batch in zip(*[iter(order(by_length=False))] * 4, strict=True)
    ]
    assert sum(spread) < sum(loose) / 2
