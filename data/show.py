"""Shows conversations to people: counts, lengths, which tokens carry loss, and rows that wait for their word.

Knows how to print. Does not know how anything is prepared.
"""

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from configs.cli import console
from configs.errors import DataError
from configs.schema import DataConfig
from data.conversations import Conversation, read_prepared
from data.feedback import PENDING, REJECTED, Fields, Gathered
from data.prepare import Prepared
from data.template import NO_LOSS, TokenRow, fit, load_tokenizer, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = ("yes", "no", "later", "quit")
PERCENTILES = (0, 50, 90, 99, 100)


def prepared_table(prepared: Prepared) -> Table:
    """Return what `prepare` reports, one count a line."""
    table = Table(title=f"{prepared.folder}{'  (made before)' if prepared.from_cache else ''}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    share = prepared.num_loss_tokens / max(1, prepared.num_train_tokens)
    for name, value in (
        ("conversations to train on", f"{prepared.num_train:,}"),
        ("conversations held out", f"{prepared.num_heldout:,}"),
        ("tokens to train on", f"{prepared.num_train_tokens:,}"),
        ("of them with loss", f"{prepared.num_loss_tokens:,} ({share:.0%})"),
        ("longest, in tokens", f"{prepared.longest_tokens:,}"),
        ("too long: dropped", f"{prepared.num_dropped_too_long:,}"),
        ("too long: cut", f"{prepared.num_cut:,}"),
        ("duplicates left out", f"{prepared.num_duplicates:,}"),
        ("left out of training, as held out too", f"{prepared.num_leaks:,}"),
        ("bad rows set aside", f"{prepared.num_bad:,}"),
        *((f"taken out: {kind.replace('_', ' ')}", f"{count:,}") for kind, count in prepared.scrubbed.items()),
        ("fingerprint", prepared.fingerprint),
    ):
        table.add_row(name, value)
    return table


def show_rows(prepared: Prepared, model_folder: Path, config: DataConfig, num_shown: int) -> None:
    """Print lengths of both splits, then the first training conversations with their loss tokens in green."""
    tokenizer = load_tokenizer(model_folder)
    sides = {"train": read_prepared(prepared.train_file), "held out": read_prepared(prepared.heldout_file)}
    rows = {name: _token_rows(conversations, tokenizer, config) for name, conversations in sides.items()}
    console.print(_length_table(rows))
    for conversation, row in list(zip(sides["train"], rows["train"], strict=True))[:num_shown]:
        console.print(f"\n{conversation.origin}: {len(row.input_ids)} tokens, {row.num_loss_tokens} with loss", style="bold", markup=False)
        console.print(paint(row, tokenizer))


def show_gathered(gathered: Gathered, folder: Path) -> None:
    """Print what feedback became, and how much personal data was taken out of it."""
    console.print(f"[green]to review[/]  {len(gathered.pending)} rows in {folder / PENDING}")
    console.print(f"rejected   {len(gathered.rejected)} answers without a better one, in {folder / REJECTED}")
    for reason, count in sorted(gathered.left_out.items()):
        console.print(f"left out   {count}: {reason}")
    if gathered.num_withdrawn:
        console.print(f"withdrawn  {gathered.num_withdrawn} accepted rows: somebody said something new of these answers")
    if gathered.num_decided:
        console.print(f"left out   {gathered.num_decided}: decided on before")
    for kind, counts in gathered.scrubbed().items():
        console.print(f"scrubbed   {counts['found']} {kind.replace('_', ' ')} in {counts['rows']} rows")


def ask_for_each(rows: list[Fields], decide: Callable[[list[Fields], list[Fields]], None]) -> None:
    """Show each row and ask what to do with it; each answer holds at once."""
    if not sys.stdin.isatty():
        raise DataError("there is nobody to ask", "standard input is no terminal", "--all, after reading the file")
    for number, row in enumerate(rows, start=1):
        console.print(f"\n[bold]{number} of {len(rows)}[/]  {row['why']}, {row['version']}", highlight=False)
        for message in row["messages"]:
            console.print(f"  {message['role']}: {message['content']}", markup=False)
        if row["comment"]:
            console.print(f"  comment: {row['comment']}", markup=False, style="dim")
        said = ""
        while said not in ANSWERS:
            said = typer.prompt(f"Train on it? ({', '.join(ANSWERS)})", default="later")
        if said == "quit":
            return
        decide([row] if said == "yes" else [], [row] if said == "no" else [])


def paint(row: TokenRow, tokenizer: "PreTrainedTokenizerBase") -> Text:
    """Return the row's text, green where the model learns to say it and dim elsewhere."""
    painted = Text()
    # Runs of tokens, not single ones: one character may be made of several tokens.
    for has_loss, run in groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != NO_LOSS):
        painted.append(
            str(tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)), style="green" if has_loss else "dim"
        )
    return painted


def _token_rows(conversations: list[Conversation], tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> list[TokenRow]:
    fitted, _ = fit((tokenize(conversation, tokenizer) for conversation in conversations), config)
    return [row for row in fitted if row is not None]


def _length_table(rows: dict[str, list[TokenRow]]) -> Table:
    """Return the percentiles of lengths, and the exact number of tokens with loss."""
    table = Table("tokens a conversation", *(_percentile_name(percent) for percent in PERCENTILES), "all", "with loss")
    for name, side in rows.items():
        lengths = sorted(len(row.input_ids) for row in side)
        picked = [lengths[round(percent / 100 * (len(lengths) - 1))] for percent in PERCENTILES]
        table.add_row(name, *(f"{length:,}" for length in picked), f"{sum(lengths):,}", f"{sum(row.num_loss_tokens for row in side):,}")
    return table


def _percentile_name(percent: int) -> str:
    return {0: "shortest", 50: "median", 100: "longest"}.get(percent, f"{percent} %")
