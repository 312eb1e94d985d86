"""Prompts as chat messages, and how many tokens a model's own tokenizer and chat template make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.source_files import first_line, is_hub_id
from data_prep.zoo_rows import QuestionAnswer
from openrlhf_sd.config import SelfSpecError

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""What the published experiments put under every question, for all three models."""

DEFAULT_TOKENIZERS = {"qwen": "Qwen/Qwen2.5-7B", "llama-instruct": "meta-llama/Llama-3.1-8B-Instruct"}
"""--model -> hub id. Qwen2.5-14B has the tokenizer and the chat template of the 7B."""

IMAGE_TAG = "<image>"
"""OpenRLHF (datasets/prompts_dataset.py) takes it for a picture."""

Message = dict[str, str]


def messages(question: str) -> list[Message]:
    return [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}]


def load_tokenizer(name: str) -> Any:
    """A transformers tokenizer that can format a user message.

    Raises:
        SelfSpecError: it cannot be found or read, or has no chat template.
    """
    from transformers import AutoTokenizer

    if not is_hub_id(name) and not Path(name).expanduser().is_dir():
        raise SelfSpecError(f"--tokenizer: no folder {name}; give the folder of the model, or a hub id as owner/name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).expanduser()) if not is_hub_id(name) else name)
    except (OSError, ValueError, KeyError) as error:
        mend = "give the folder of a Hugging Face model"
        if is_hub_id(name):
            mend = "with no network or no access to the hub, give --tokenizer DIR, a folder with the model's tokenizer files"
        raise SelfSpecError(f"--tokenizer: cannot load {name} ({first_line(error)}); {mend}") from error
    if not tokenizer.chat_template:
        raise SelfSpecError(f"--tokenizer: {name} has no chat template, which --data.apply_chat_template needs; give a model that has one")
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """sha256 of the vocabulary and the chat template."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return hashlib.sha256(content.encode()).hexdigest()


def check_plain_text(rows: Sequence[QuestionAnswer], tokenizer: Any, path: Path) -> None:
    """Raises SelfSpecError for a question with a text that would not reach the model as text."""
    marks = [IMAGE_TAG, *(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)]
    for row in rows:
        for mark in marks:
            if mark in row.question:
                reads = "OpenRLHF reads as a picture" if mark == IMAGE_TAG else "the tokenizer reads as a special token"
                raise SelfSpecError(f"{path}: the question of row {row.row} (from 0) has {mark!r}, which {reads}; take it out of the file")


def prompt_tokens(rows: Sequence[QuestionAnswer], tokenizer: Any) -> list[int]:
    """Tokens of each prompt as OpenRLHF will send it: the chat template with a generation prompt, nothing added.

    Raises:
        SelfSpecError: the chat template refuses a user message.
    """
    from jinja2 import TemplateError

    try:
        chats = [messages(row.question) for row in rows]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    except TemplateError as error:
        raise SelfSpecError(f"--tokenizer: its chat template fails on a user message ({first_line(error)})") from error
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
