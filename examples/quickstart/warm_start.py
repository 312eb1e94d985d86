"""Warm start: a short supervised training of the quickstart's policy on demonstrations of the task, some of them faulty on purpose.

    python examples/quickstart/warm_start.py --model DIR --out DIR2 [--steps 400] [--seed 0] [--samples 3]

Plain PyTorch on the CPU, float32, then saved in bf16. Ends by sampling fresh prompts at temperature 1 and printing the accuracy. About
half is the aim: GRPO learns from prompts that are answered sometimes rightly and sometimes wrongly. The faults are described at
GUESS_FRACTION in task.py. The same seed on the same machine and thread count gives the same weights.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import task
import torch
import torch.nn.functional as F
from build_model import save_policy
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

BATCH_SIZE = 16
POOL_BATCHES = 64
"""Demonstrations are drawn 64 batches at a time and sorted by length, so that a batch holds little padding."""
MUON_LR = 0.02
ADAM_LR = 3e-3
WARMUP_STEPS = 20
EVAL_PROMPTS = 128
EVAL_SEED = 1_000_003
"""Far from the seeds of training prompts, so the accuracy is on freshly drawn problems."""


def demonstration_batches(steps: int, seed: int):
    """Yields `steps` lists of BATCH_SIZE (prompt, response) pairs of similar length, in random order of length."""
    rng = random.Random(seed)
    pool: list = []
    for _ in range(steps):
        if not pool:
            problems = [task.draw_problem(rng) for _ in range(BATCH_SIZE * POOL_BATCHES)]
            pairs = sorted(((p.prompt, task.demonstration(p, rng)) for p in problems), key=lambda pair: len(pair[1]))
            pool = [pairs[i : i + BATCH_SIZE] for i in range(0, len(pairs), BATCH_SIZE)]
            rng.shuffle(pool)
        yield pool.pop()


def imitation_loss(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]):
    """Mean cross-entropy in nats over the response tokens of a batch; prompts and padding are not scored."""
    prompts = [tokenizer.encode(prompt, add_special_tokens=False) for prompt, _ in pairs]
    responses = [tokenizer.encode(response, add_special_tokens=False) for _, response in pairs]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    targets = torch.full((len(pairs), width), -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        targets[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    # Padding is on the right, where causal attention never looks back at it: no mask needed.
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> None:
    """Linear warm-up, constant for the first half, linear decay to zero; changes `model` in place.

    Muon (torch.optim.Muon) for the matrices inside the decoder layers, AdamW for embeddings, norms and biases: with AdamW alone the
    same accuracy takes more than twice the updates.
    """
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (".layers." in name and p.ndim == 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    shape = lambda step: min(1.0, (step + 1) / WARMUP_STEPS, 2.0 * (1.0 - step / steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, shape) for optimizer in optimizers]
    model.train()
    progress = tqdm(demonstration_batches(steps, seed), total=steps, desc="warm start", unit="step", mininterval=1.0)
    for pairs in progress:
        loss = imitation_loss(model, tokenizer, pairs)
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
    # All prompts of the task have the same number of tokens, so the batch needs no padding.
    prompts = tokenizer([p.prompt for p in problems], add_special_tokens=False, return_tensors="pt")
    ids = model.generate(
        **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=task.MAX_RESPONSE_TOKENS
    )
    texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=False)
    return [text.replace(task.PAD, "") for text in texts]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder written by build_model.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the warm-started policy")
    parser.add_argument("--steps", type=int, default=400, help=f"updates on {BATCH_SIZE} demonstrations each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=3, help="sampled responses to show at the end")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = Qwen2ForCausalLM.from_pretrained(args.model, dtype=torch.float32)
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
        print(f"{'right' if good else 'wrong'}  {problem.prompt + response!r}  (label {problem.label})")
    worked = [good for r, good in zip(responses, correct) if r.startswith("work")]
    print(
        f"warm start: {trained - started:.0f} s for {args.steps} steps; sampled accuracy on {len(problems)} fresh prompts "
        f"{sum(correct) / len(correct):.2f}, {sum(worked)} of the {len(worked)} that show work; evaluation "
        f"{time.perf_counter() - trained:.0f} s; policy in {args.out}"
    )


if __name__ == "__main__":
    main()
