"""A small data set in SimpleRL-Zoo's layout, and a tokenizer to prepare it with; nothing is downloaded.

Layout as on the hub (hkust-nlp/SimpleRL-Zoo-Data): one folder per level with train.parquet and test.parquet, columns gt_answer, answer,
subject, level, question, target, data_source, prompt, ability, reward_model, extra_info; `prompt` is a chat of one user message whose
content has Qwen's chat marks baked in. The problems are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FOLDERS = {"easy": "simplelr_qwen_gsm8k_level1", "medium": "simplelr_qwen_level1to4", "hard": "simplelr_qwen_level3to5"}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PROBLEMS = [
    ("What is $1 + 1$?", "2"),
    ("Solve $2x = 1$ for $x$.", r"\frac{1}{2}"),
    ("Find the solution set of $x^2 = 4$.", r"\{-2, 2\}"),
    ("For which $x$ is $x - 1 \\ge 0$? Give an interval.", r"[1, \infty)"),
    ("A square has area $9\\text{ cm}^2$. How long is its side, in centimetres?", r"3\text{ cm}"),
    ("What is a tenth, in percent?", r"10\%"),
]


def zoo_row(number: int, question: str, answer: str | None) -> dict[str, Any]:
    instruction = "Please reason step by step, and put your final answer within \\boxed{{}}."
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"
    chat = f"{system}\n<|im_start|>user\n{question}\n{instruction}<|im_end|>\n<|im_start|>assistant"
    return {
        "gt_answer": answer,
        "answer": answer,
        "subject": "Algebra",
        "level": 3,
        "question": question,
        "target": answer,
        "data_source": "simplerl/fixture",
        "prompt": [{"content": chat, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"answer": answer, "index": number, "level": 3, "question": question, "split": "train", "subject": "Algebra"},
    }


def write_parquet(path: Path, problems: Sequence[tuple[str, str | None]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([zoo_row(i, *problem) for i, problem in enumerate(problems)]), path)
    return path


def write_zoo(
    root: Path,
    level: str = "hard",
    train: Sequence[tuple[str, str | None]] = PROBLEMS,
    test: Sequence[tuple[str, str | None]] = PROBLEMS[:2],
) -> Path:
    """Returns the root, as --source takes it."""
    write_parquet(root / FOLDERS[level] / "train.parquet", train)
    write_parquet(root / FOLDERS[level] / "test.parquet", test)
    return root


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE, more_tokens: Sequence[str] = ()) -> Any:
    """Qwen2's tokenizer class with one token per byte, so that any text comes back as it went in."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*bytes_to_unicode().values(), *specials])},
        merges=[],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(list(more_tokens))
    tokenizer.chat_template = chat_template
    return tokenizer
