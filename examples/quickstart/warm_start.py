"""Warm start: short supervised training of the quickstart's policy on demonstrations, some faulty on purpose.

    python examples/quickstart/warm_start.py --model DIR --out DIR2 [--steps 300] [--seed 0] [--threads 2] [--samples 3]

Plain PyTorch on the CPU, float32, then saved in bf16. Ends by sampling fresh prompts at temperature 1 and printing
the accuracy. About half is the aim: GRPO learns from prompts that are answered sometimes rightly and sometimes
wrongly. The faults are described at GUESS_FRACTION in task.py. The same seed on the same machine and thread
count gives the same weights. Two threads at most: the matrices are small, and threads that share their cores with other
work wait for each other (two took five minutes).
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import task
import torch
import torch.nn.functional as F
from build_model import save_policy
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from openrlhf_sd.cpu import bf16_products

ROWS, ROW_TOKENS = 2, 512
"""An update sees 1,024 tokens, about 20 demonstrations packed into two rows: lengths vary so much that padding would
be most of a batch, and batches of like lengths would show the model guesses only or long work only."""
MUON_LR = 0.02
ADAM_LR = 3e-3
WARMUP_STEPS = 20
IGNORE = -100
EVAL_PROMPTS = 128
EVAL_SEED = 1_000_003
"""Far from the seeds of training prompts, so the accuracy is on freshly drawn problems."""


def packed_rows(tokenizer: PreTrainedTokenizerBase, seed: int):
    """Yields without end (ids, targets, documents), each a list of ROW_TOKENS integers holding whole demonstrations.

    targets: the id to predict at that position, IGNORE on prompts and padding, which are not scored. documents: which
    demonstration a position belongs to; -1 is padding.
    """
    rng = random.Random(seed)
    ids, targets, documents = [], [], []
    while True:
        problem = task.draw_problem(rng)
        prompt = tokenizer.encode(problem.prompt, add_special_tokens=False)
        response = tokenizer.encode(task.demonstration(problem, rng), add_special_tokens=False)
        if len(ids) + len(prompt) + len(response) > ROW_TOKENS:
            short = ROW_TOKENS - len(ids)
            yield ids + [tokenizer.pad_token_id] * short, targets + [IGNORE] * short, documents + [-1] * short
            ids, targets, documents = [], [], []
        document = documents[-1] + 1 if documents else 0
        ids += prompt + response
        targets += [IGNORE] * (len(prompt) - 1) + response + [IGNORE]
        documents += [document] * (len(prompt) + len(response))


def imitation_loss(model: Qwen2ForCausalLM, rows: list[tuple[list[int], list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy in nats over the response tokens of the rows; a demonstration attends to itself only."""
    ids, targets, documents = (torch.tensor(column) for column in zip(*rows))
    same_document = documents[:, None, :] == documents[:, :, None]
    causal = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()
    # Positions run on through a row: rotary embeddings see differences only.
    logits = model(input_ids=ids, attention_mask=(same_document & causal)[:, None]).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> None:
    """Linear warm-up, constant for the first half, linear decay to zero; changes `model` in place.

    Muon (torch.optim.Muon) for the matrices inside the decoder layers, AdamW for embeddings, norms and biases.
    After 150 updates the loss on unseen demonstrations was 0.04 nats per token; with AdamW alone 0.28, after 300 0.21.
    """
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (".layers." in name and p.ndim == 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def lr_factor(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS, 2.0 * (1.0 - step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor) for optimizer in optimizers]
    model.train()
    rows = packed_rows(tokenizer, seed)
    progress = tqdm(range(steps), desc="warm start", unit="step", mininterval=1.0)
    for _ in progress:
        loss = imitation_loss(model, [next(rows) for _ in range(ROWS)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def sample_responses(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: list[task.Problem]) -> list[str]:
    """One response per problem at temperature 1, special tokens kept, padding after EOS removed."""
    model.eval()
    # All prompts of the task have five tokens, so the batch needs no padding.
    prompts = tokenizer([p.prompt for p in problems], add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=task.MAX_RESPONSE_TOKENS)
    texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=False)
    return [text.replace(task.PAD, "") for text in texts]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder written by build_model.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the warm-started policy")
    parser.add_argument("--steps", type=int, default=300, help=f"updates of {ROWS * ROW_TOKENS} tokens each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="CPU threads (default: 2 where there are two cores)"
    )
    parser.add_argument("--samples", type=int, default=3, help="sampled responses to show at the end")
    args = parser.parse_args(argv)
    if not (args.model / "config.json").is_file():
        parser.error(f"--model: no model in {args.model}; write one with build_model.py --out {args.model}")

    torch.set_num_threads(args.threads)
    bf16_products.install()  # Muon's
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = Qwen2ForCausalLM.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True)
    started = time.perf_counter()
    train(model, tokenizer, args.steps, args.seed)
    trained = time.perf_counter()
    save_policy(model, tokenizer, args.out)

    torch.manual_seed(args.seed)
    problems = task.draw_problems(EVAL_PROMPTS, EVAL_SEED)
    # Back to float32 for speed; the weights keep the bf16 rounding the policy is served with.
    responses = sample_responses(model.float(), tokenizer, problems)
    correct = [task.is_correct(r, p.label) for r, p in zip(responses, problems)]
    for problem, response, good in list(zip(problems, responses, correct))[: args.samples]:
        shown = (problem.prompt + response).replace("\n", " | ")
        print(f"{'right' if good else 'wrong'}  {shown}  (label {problem.label})")
    worked = [good for r, good in zip(responses, correct) if r.startswith("work")]
    print(
        f"warm start: {trained - started:.0f} s for {args.steps} steps; sampled accuracy on {len(problems)} fresh "
        f"prompts {sum(correct) / len(correct):.2f}, {sum(worked)} of the {len(worked)} that show work; evaluation "
        f"{time.perf_counter() - trained:.0f} s; policy in {args.out}"
    )


if __name__ == "__main__":
    main()
