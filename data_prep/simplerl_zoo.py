"""SimpleRL-Zoo's parquet files -> prompt files for OpenRLHF.

    python -m data_prep.simplerl_zoo --level easy|medium|hard --model qwen|llama-instruct --out DIR
        [--source DIR_OR_HUB_ID] [--tokenizer DIR_OR_HUB_ID] [--max_prompt_tokens 1024] [--drop_empty_answers]

Writes DIR/train.jsonl and DIR/test.jsonl, a row being {"input": chat messages, "label": answer}, and DIR/manifest.json: sources, row
counts, settings, checksums. Prompts longer than --max_prompt_tokens under the model's own tokenizer and chat template are left out. Run
again, it checks that folder against the same inputs and changes nothing. Without network, give --source and --tokenizer as folders.
For OpenRLHF: --data.prompt_dataset DIR/train.jsonl --data.input_key input --data.label_key label --data.apply_chat_template.
Exit codes: 0 done or verified, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calib.command_line import CommandParser, number
from data_prep import chat_prompts, prompt_folder
from data_prep.source_files import HUB_ID, LEVEL_FOLDERS, SourceFiles, find_source
from data_prep.zoo_rows import read_rows
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.path_names import check_names

PROGRAM = "data_prep.simplerl_zoo"


def main(argv: Sequence[str] | None = None) -> int:
    try:
        prepare(_parser().parse_args(argv))
    except SelfSpecError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(PROGRAM, __doc__)
    hub_ids = ", ".join(f"{model}: {name}" for model, name in chat_prompts.DEFAULT_TOKENIZERS.items())
    parser.add_argument("--level", required=True, choices=LEVEL_FOLDERS, help="difficulty of the problems")
    parser.add_argument("--model", required=True, choices=chat_prompts.DEFAULT_TOKENIZERS, help="whose tokenizer counts")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the prompt files")
    parser.add_argument("--source", default=HUB_ID, metavar="DIR_OR_HUB_ID", help="the data set (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="DIR_OR_HUB_ID", help=f"(default: {hub_ids})")
    parser.add_argument("--max_prompt_tokens", type=number(int, 1, float("inf")), default=1024, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--drop_empty_answers", action="store_true", help="leave out rows without an answer, which are an error otherwise")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Make the folder, or verify it if it is there. Raises SelfSpecError."""
    check_names(args.out, "--out")
    manifest = prompt_folder.read_manifest(args.out)
    source = find_source(args.source, args.level)
    tokenizer_name = args.tokenizer or chat_prompts.DEFAULT_TOKENIZERS[args.model]
    tokenizer = chat_prompts.load_tokenizer(tokenizer_name)
    inputs = {
        "level": args.level,
        "model": args.model,
        "max_prompt_tokens": args.max_prompt_tokens,
        "drop_empty_answers": args.drop_empty_answers,
        "instruction": chat_prompts.INSTRUCTION,
        **{f"{path.name} sha256": prompt_folder.sha256(path) for path in source.paths.values()},
        "tokenizer sha256": chat_prompts.fingerprint(tokenizer),
    }
    if manifest is not None:
        prompt_folder.verify(args.out, manifest, inputs)
        print(f"{args.out}: already prepared from these inputs, checksums verified; nothing to do")
        return
    files, counts = {}, {}
    for split in source.paths:
        files[f"{split}.jsonl"], counts[split] = _prompt_file(source, split, tokenizer, args)
    origin = {
        "source": args.source,
        "folder": LEVEL_FOLDERS[args.level],
        "revision": source.revision,
        "tokenizer": tokenizer_name,
        "packages": {name: version(name) for name in ("pyarrow", "transformers", "tokenizers")},
    }
    prompt_folder.write(args.out, files, {"origin": origin, "inputs": inputs, "splits": counts})
    for split, count in counts.items():
        print(
            f"{args.out / split}.jsonl: {count['num_prompts']} prompts of {count['num_source_rows']} rows "
            f"({count['num_empty_answers']} without an answer, {count['num_overlong']} longer than {args.max_prompt_tokens} tokens; "
            f"the longest kept has {count['longest_prompt_tokens']})"
        )


def _prompt_file(source: SourceFiles, split: str, tokenizer: Any, args: argparse.Namespace) -> tuple[str, dict[str, int]]:
    """(JSON lines, row counts) of one split."""
    path = source.paths[split]
    rows, num_source_rows = read_rows(path, args.drop_empty_answers)
    chat_prompts.check_plain_text(rows, tokenizer, path)
    num_tokens = chat_prompts.prompt_tokens(rows, tokenizer)
    kept = [row for row, tokens in zip(rows, num_tokens) if tokens <= args.max_prompt_tokens]
    if not kept:
        shortest = min(num_tokens)
        raise SelfSpecError(f"--max_prompt_tokens: {args.max_prompt_tokens} leaves no prompt of {path}; the shortest has {shortest} tokens")
    lines = [json.dumps({"input": chat_prompts.messages(row.question), "label": row.answer}, ensure_ascii=False) for row in kept]
    counts = {
        "num_source_rows": num_source_rows,
        "num_empty_answers": num_source_rows - len(rows),
        "num_overlong": len(rows) - len(kept),
        "num_prompts": len(kept),
        "longest_prompt_tokens": max(tokens for tokens in num_tokens if tokens <= args.max_prompt_tokens),
    }
    return "\n".join(lines) + "\n", counts


if __name__ == "__main__":
    sys.exit(main())
