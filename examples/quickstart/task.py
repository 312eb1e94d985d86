"""The quickstart's task: the remainder of N by K, found by counting N down while a tally runs round a clock of K hours.

    prompt    "04 modulo three\\n"
    response  "work\\n04:0\\n03:1\\n02:2\\n01:0\\n00:1\\nanswer:1<eos>"

Why this task: nothing to download, one rule checks it, and every line of working needs only the line above it and K,
so a small model learns it in a minute or two. A response has one line per unit of N and N is drawn log-normal, so the
lengths of correct answers have a long tail (99th percentile about five times the median) although every prompt has 5
tokens. Such a rollout ends with a few long responses in a small batch, which is where speculation pays.

Everything about the task is here and only here: wording, tokens, the drawing of problems, the demonstrations of the
warm start, the checker. Plain Python, because the reward loads it inside OpenRLHF's actors.

    python examples/quickstart/task.py --out DIR [--train 640] [--eval 64] [--seed 0]   # DIR/{prompts,eval}.jsonl
    python examples/quickstart/task.py --samples 3                                      # show some, write nothing
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)
TOKEN_PATTERN = r" ?[a-z]+|[^a-z]"
"""A token is a word with the space before it, or any single other character, so numbers are counted digit by digit."""
DIVISORS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
"""Spelt out in prompts: a word of its own is easier to attend to than one more digit."""
CHARACTERS = "0123456789:\n"
WORDS = ("work", "guess", "answer", " modulo", *(f" {name}" for name in DIVISORS.values()))

MEDIAN_NUMBER = 9.0
NUMBER_SIGMA = 0.75
"""Log-normal spread: exp(0.75 * 2.33) = 5.7 between median and 99th percentile."""
MAX_NUMBER = 90
MAX_RESPONSE_TOKENS = 480
"""What `--rollout.max_new_tokens` should be. The longest correct response has 461 tokens
(tests/test_quickstart_task.py)."""

GUESS_FRACTION = 0.35
MISCOUNT_FRACTION = 0.25
"""Share of warm-start demonstrations with each fault: answering without work, and starting the tally at 1. They are
faulty on purpose: they leave the policy undecided at two places so that reinforcement has something to mend. The
quickstart shows the machinery of training at work, not progress on a hard problem."""

_ANSWER = re.compile(rf"answer:(\d){EOS}")


@dataclass(frozen=True)
class Problem:
    """Find `number` modulo `divisor`; number in 1..MAX_NUMBER, divisor in DIVISORS."""

    number: int
    divisor: int

    @property
    def prompt(self) -> str:
        return f"{self.number:02d} modulo {DIVISORS[self.divisor]}\n"

    @property
    def label(self) -> str:
        return str(self.number % self.divisor)

    @property
    def solution(self) -> str:
        return worked_response(self, first_tally=0)


def draw_problem(rng: random.Random) -> Problem:
    """A divisor, uniform, and a heavy-tailed number (drawn again when out of 1..MAX_NUMBER)."""
    divisor = rng.choice(list(DIVISORS))
    number = 0
    while not 1 <= number <= MAX_NUMBER:
        number = round(rng.lognormvariate(math.log(MEDIAN_NUMBER), NUMBER_SIGMA))
    return Problem(number, divisor)


def draw_problems(count: int, seed: int) -> list[Problem]:
    """`count` problems, the same for the same seed. Repeats are possible: there are only 630 different ones."""
    rng = random.Random(seed)
    return [draw_problem(rng) for _ in range(count)]


def worked_response(problem: Problem, first_tally: int) -> str:
    """Count down to zero, one line each, then the answer and EOS. Only `first_tally=0` gives the right answer."""
    tally = [(first_tally + i) % problem.divisor for i in range(problem.number + 1)]
    lines = [f"{problem.number - i:02d}:{hour}" for i, hour in enumerate(tally)]
    return "\n".join(["work", *lines, f"answer:{tally[-1]}{EOS}"])


def demonstration(problem: Problem, rng: random.Random) -> str:
    """A response to imitate in the warm start: correct, or with one of the two faults described above."""
    fault = rng.random()
    if fault < GUESS_FRACTION:
        return f"guess\nanswer:{rng.randrange(problem.divisor)}{EOS}"
    if fault < GUESS_FRACTION + MISCOUNT_FRACTION:
        return worked_response(problem, first_tally=1)
    return problem.solution


def is_correct(response: str, label: str) -> bool:
    """Whether the last line of the response is "answer:<label><eos>". One cut off by its length limit is wrong.

    The work is not read: only the answer counts, so a lucky guess scores.
    """
    found = _ANSWER.fullmatch(response.rpartition("\n")[2])
    return found is not None and found.group(1) == label


def split_tokens(text: str) -> list[str]:
    """The tokens of `text`, as the tokenizer of build_model.py cuts it."""
    specials = "|".join(re.escape(token) for token in SPECIAL_TOKENS)
    return re.findall(f"{specials}|{TOKEN_PATTERN}", text)


def write_prompts(path: Path, problems: list[Problem]) -> None:
    """One JSON object a line, `{"input": prompt, "label": answer}`: OpenRLHF's `--data.input_key input
    --data.label_key label`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for problem in problems:
            out.write(json.dumps({"input": problem.prompt, "label": problem.label}) + "\n")


def length_summary(problems: list[Problem]) -> dict[str, float]:
    """Median, 99th percentile (nearest rank) and maximum of correct response lengths, in tokens."""
    lengths = sorted(len(split_tokens(problem.solution)) for problem in problems)
    median, p99 = (lengths[math.ceil(share * len(lengths)) - 1] for share in (0.5, 0.99))
    return {"median": median, "p99": p99, "max": lengths[-1]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for prompts.jsonl and eval.jsonl")
    parser.add_argument("--train", type=int, default=640, help="training prompts (default: 40 steps of 16)")
    parser.add_argument("--eval", type=int, default=64, help="evaluation prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=0, help="problems with their demonstrations to show")
    args = parser.parse_args(argv)

    rng = random.Random(args.seed)
    for problem in draw_problems(args.samples, args.seed):
        shown = demonstration(problem, rng)
        num_tokens = len(split_tokens(problem.solution))
        print(f"{problem.prompt.strip()}   (label {problem.label}; a correct response has {num_tokens} tokens)")
        print(f"  solution       {problem.solution.replace(chr(10), ' | ')}")
        print(f"  demonstration  {shown.replace(chr(10), ' | ')}\n")
    if args.out is not None:
        train, held_out = draw_problems(args.train, args.seed), draw_problems(args.eval, args.seed + 1)
        write_prompts(args.out / "prompts.jsonl", train)
        write_prompts(args.out / "eval.jsonl", held_out)
        lengths = length_summary(train)
        print(
            f"wrote {len(train)} training and {len(held_out)} evaluation prompts to {args.out}; tokens of a correct "
            f"response: median {lengths['median']}, p99 {lengths['p99']}, max {lengths['max']}"
        )


if __name__ == "__main__":
    main()
