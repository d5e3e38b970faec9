"""Tiny real tokenizers with real chat templates, and files of rows, for the tests of `data`."""

import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from configs.loader import load_chatbot
from configs.schema import ChatbotConfig

# SmolLM2's own template, word for word.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Written by hand after Llama 3's: begins with BOS, trims each message, and no line break follows the end token.
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Leaves out the thinking of every answer but the last, as reasoning models do.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Refuses two turns of one role in a row, as Mistral's and Gemma's do.
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# How Llama 3 cuts a text into words: unlike GPT-2's way, line breaks stay together whatever follows them.
LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<filename>",
]
CORPUS = [
    "How do I start the serve card? Run it with python -m cluster up.",
    "Tandem trains adapters while the other card answers.",
    "\n\n  \n",
]

KEPT: list[TemporaryDirectory[str]] = []  # removed when the tests end


@lru_cache
def tokenizer_folder(template: str | None = CHATML, bos: str = "<|im_start|>", eos: str = "<|im_end|>") -> Path:
    """Train a byte-level BPE on a few sentences, and save it as a model's folder would have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    as_gpt2, as_llama3 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex) for regex in (True, False))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, as_llama3]) if template == LLAMA3 else as_gpt2
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    # As Llama 3's does, this one puts BOS in front by itself; a rendered conversation must not get a second one.
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    kept = TemporaryDirectory(prefix="tandem-tokenizer-")
    KEPT.append(kept)
    folder = Path(kept.name)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=eos, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def llama3_folder() -> Path:
    return tokenizer_folder(LLAMA3, "<|begin_of_text|>", "<|eot_id|>")


def chat(*turns: str, **fields: Any) -> dict[str, Any]:
    """Make a row of turns, the user's first, each in turn."""
    return {"messages": [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)], **fields}


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def chatbot(folder: Path, source: Path | str, *overrides: str) -> ChatbotConfig:
    """Load a config through the real loader, as users do."""
    file = folder / "bot.yaml"
    file.write_text(f"name: bot\ndata:\n  source: {source}\n")
    return load_chatbot(file, overrides)
