"""Tokens per second of the self-speculating engine against plain vLLM, on this machine.

    python -m openrlhf_sd.bench [--models 60m 400m DIR ...] [--quant w4 w8a8] [--batches 1,4,8,16,tail16] [--gammas 0,1,2,3]
        [--modes toggle,adaptive,auto] [--calibration auto] [--tokens 64] [--rounds 3] [--compile] [--out DIR]

What is measured: `LLM.generate` of BATCH distinct prompts, TOKENS sampled tokens each (temperature 1, end of text ignored), wall time.
`tailN` is a small rollout: N requests of which most end early (TAIL_LENGTHS), so that the batch shrinks to 1. The columns are constant
gammas, then modes, which decide by the calibration (`auto`: the quick sweep of this machine, measured now if it never was) and start
their ramp-up guard at 0; a mode's controller learns over the rounds as over the rollouts of a training. Both engines live in processes
of their own and take turns, A B A B, in every round: a ratio is formed within a round, so that a machine that drifts hurts both alike.
The baseline is plain vLLM with the same settings, never our engine with speculation off. On a CPU the latter is the faster one: its worker
needs no process of its own (cpu/in_process_executor.py). What speculation adds to that is a column divided by `gamma 0`.

What to expect: a cycle costs gamma draft steps and one step on gamma + 1 tokens per request, and yields the mean acceptance length in
tokens. It pays where a step's cost hardly grows with its tokens (weights streamed from memory) and the drafter's step is cheap.
`60m` and `400m` have random weights: the cost of a step is that of a trained model, the acceptance is not.

Output: one table per model and scheme, and OUT/bench.json with every round.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy.observation import mean_acceptance_length

RANDOM_MODELS = {
    "60m": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 11, "num_attention_heads": 8},
    "400m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
VOCAB_SIZE = 32_000
PROMPT_TOKENS = 32

TAIL_LENGTHS = (0.125, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 4.0)
"""Of a `tail` row, as shares of TOKENS, repeated over its requests; the last one is long only once, as in the tail of a rollout."""

TAIL = "tail"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m openrlhf_sd.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["60m", "400m"], metavar="DIR", help="60m, 400m or a model folder")
    parser.add_argument("--quant", nargs="+", default=["w4", "w8a8"], help="drafter schemes")
    parser.add_argument("--batches", type=_names, default=["1", "4", "8", "16"], metavar="N,N,tailN")
    parser.add_argument("--gammas", type=_numbers, default=[0, 1, 2, 3], metavar="N,N")
    parser.add_argument("--modes", type=_names, default=[], metavar="MODE,MODE", help="toggle, adaptive, auto")
    parser.add_argument("--calibration", default="auto", help="as --self-spec.calibration; used by the modes only")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds after one that warms up")
    parser.add_argument("--tokens", type=int, default=64, help="sampled tokens per request")
    parser.add_argument("--compile", action="store_true", help="on a CPU: both engines under torch.compile, as without enforce_eager")
    parser.add_argument("--out", type=Path, default=None, help="folder for bench.json")
    args = parser.parse_args(argv)
    # vLLM ends its engines when Python ends, which SIGTERM by itself does not wait for.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        bench(args)
    except SelfSpecError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def bench(args: argparse.Namespace) -> None:
    """Raises SelfSpecError for a model, scheme or calibration that there is no engine for."""
    from rich.console import Console

    from openrlhf_sd.provenance import describe_machine

    # Piped into a file, rich would fold the table to 80 columns. No markup: names of files and models are printed.
    console = Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=120)
    results: dict[str, Any] = {"machine": describe_machine(), "settings": vars(args) | {"out": str(args.out)}, "models": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            model = build_random_model(name, Path(folder) / name) if name in RANDOM_MODELS else Path(name)
            for quant in args.quant:
                result = {"model": name, "quant": quant} | measure(model, quant, args, console)
                results["models"].append(result)
                console.print(table(result))
                if args.out is not None:  # after every table: an interrupted bench keeps what it measured
                    args.out.mkdir(parents=True, exist_ok=True)
                    (args.out / "bench.json").write_text(json.dumps(results, indent=1))
    if args.out is not None:
        console.print(f"every round is in {args.out / 'bench.json'}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def row_lengths(row: str, num_tokens: int) -> list[int]:
    """Tokens to sample, by request."""
    if not row.startswith(TAIL):
        return [num_tokens] * int(row)
    num_requests = int(row.removeprefix(TAIL))
    shares = [TAIL_LENGTHS[index % (len(TAIL_LENGTHS) - 1)] for index in range(num_requests - 1)] + [TAIL_LENGTHS[-1]]
    return [max(1, int(share * num_tokens)) for share in shares]


def build_random_model(name: str, folder: Path) -> Path:
    """A random-weight Qwen2 with a vocabulary of 32,000 and grouped-query attention, saved in bf16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = RANDOM_MODELS[name]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=sizes["num_attention_heads"] // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **sizes,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def measure(model: Path, quant: str, args: argparse.Namespace, console: Any) -> dict[str, Any]:
    """One scheme on one model: {"requantize_s": [...], "cells": [{"batch", "draft", "ratios", "plain_tokens_per_s", ...}]}."""
    from rich.progress import Progress
    from vllm import LLM
    from vllm.platforms import current_platform

    from openrlhf_sd import SelfSpecConfig, engine_args
    from openrlhf_sd.cpu.engine_kwargs import PLAIN_WORKER
    from openrlhf_sd.engine.scripted_gamma import QUALNAME

    sizes = {
        "max_model_len": 512,
        "max_num_seqs": max(len(row_lengths(row, args.tokens)) for row in args.batches),
        "kv_cache_memory_bytes": 512 << 20,
        # vLLM wants this share of a GPU to be free at the start, where the other engine may be, and with the line above makes no other
        # use of it.
        "gpu_memory_utilization": 0.1,
        # Eager plain decoding is no baseline on CUDA, where vLLM has graphs; on a CPU compilation takes half a minute per engine.
        "enforce_eager": current_platform.is_cpu() and not args.compile,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    gamma = max(1, *args.gammas)
    ladder = tuple(range(1, gamma + 1))
    if args.modes:
        config = SelfSpecConfig(
            mode="auto", gamma=gamma, gamma_max=gamma, ladder=ladder, ramp_up=0, quant=quant, calibration=args.calibration
        )
    else:
        config = SelfSpecConfig(mode="fixed", gamma=gamma, quant=quant)
    console.print(f"{model.name}, drafter {quant}: starting two engines (under a minute)", style="bold")
    ours = engine_args(config, model) | {"scheduler_cls": QUALNAME}
    plain = LLM(str(model), **sizes, **({"worker_cls": PLAIN_WORKER} if current_platform.is_cpu() else {}))
    speculating = LLM(str(model), **sizes, **ours)
    try:
        requantize_s = [speculating.collective_rpc("self_spec_requantize_checkpoint")[0] for _ in range(3)]
        cells = [
            {"batch": batch, "draft": draft, "ratios": [], "plain_tokens_per_s": [], "tokens_per_s": [], "accepted": [0, 0]}
            for batch in args.batches
            for draft in (*args.gammas, *args.modes)
        ]
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(cells) * (args.rounds + 1))
            for round_number in range(args.rounds + 1):
                for cell in cells:
                    measure_cell(plain, speculating, cell, args.tokens, is_warm_up=round_number == 0)
                    progress.advance(task)
    finally:
        plain.llm_engine.engine_core.shutdown()
        speculating.llm_engine.engine_core.shutdown()
    return {"requantize_s": requantize_s, "cells": [summarize(cell) for cell in cells]}


def measure_cell(plain: Any, speculating: Any, cell: dict[str, Any], num_tokens: int, is_warm_up: bool) -> None:
    lengths = row_lengths(cell["batch"], num_tokens)
    plain_s, _ = timed(plain, lengths, None)
    ours_s, (num_drafts, num_accepted) = timed(speculating, lengths, cell["draft"])
    if is_warm_up:
        return
    total = sum(lengths)
    cell["ratios"].append(plain_s / ours_s)
    cell["plain_tokens_per_s"].append(total / plain_s)
    cell["tokens_per_s"].append(total / ours_s)
    cell["accepted"] = [cell["accepted"][0] + num_drafts, cell["accepted"][1] + num_accepted]


def timed(llm: Any, lengths: list[int], draft: int | str | None) -> tuple[float, tuple[int, int]]:
    """Seconds of one `generate` call, and the drafts and accepted tokens in it."""
    from vllm import SamplingParams

    from openrlhf_sd.engine.scripted_gamma import DRAFT_ARG

    vocab_size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = [
        {"prompt_token_ids": [(7919 * row + 104_729 * column) % vocab_size for column in range(PROMPT_TOKENS)]}
        for row in range(len(lengths))
    ]
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if draft is None else {DRAFT_ARG: draft},
        )
        for length in lengths
    ]
    before = _spec_decode_counts(llm)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    after = _spec_decode_counts(llm)
    return seconds, (after[0] - before[0], after[1] - before[1])


def _spec_decode_counts(llm: Any) -> tuple[int, int]:
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return values.get("vllm:spec_decode_num_drafts", 0), values.get("vllm:spec_decode_num_accepted_tokens", 0)


def summarize(cell: dict[str, Any]) -> dict[str, Any]:
    num_drafts, num_accepted = cell.pop("accepted")
    return cell | {
        "ratio_median": statistics.median(cell["ratios"]),
        "mean_acceptance_length": mean_acceptance_length(num_accepted, num_drafts),
    }


def table(result: dict[str, Any]) -> Any:
    """Speed-up over plain vLLM as median (lowest..highest of the rounds), then the mean acceptance length."""
    from rich.table import Table

    seconds = statistics.median(result["requantize_s"])
    shown = Table(title=f"{result['model']}, drafter {result['quant']}: speed-up over plain vLLM; re-quantize {seconds:.2f} s")
    drafts = list(dict.fromkeys(cell["draft"] for cell in result["cells"]))
    for heading in ("batch", "plain tok/s", *(draft if isinstance(draft, str) else f"gamma {draft}" for draft in drafts)):
        shown.add_column(heading, justify="right")
    for batch in dict.fromkeys(cell["batch"] for cell in result["cells"]):
        row = [cell for cell in result["cells"] if cell["batch"] == batch]
        plain = statistics.median(value for cell in row for value in cell["plain_tokens_per_s"])
        cells = {cell["draft"]: cell for cell in row}
        shown.add_row(batch, f"{plain:.0f}", *(_cell_text(cells[draft]) for draft in drafts))
    return shown


def _cell_text(cell: dict[str, Any]) -> str:
    length = cell["mean_acceptance_length"]
    text = f"{cell['ratio_median']:.2f} ({min(cell['ratios']):.2f}..{max(cell['ratios']):.2f})"
    return text if length is None else f"{text} L={length:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
