"""The reward for mathematics: what it takes for equal, and that no answer can stop it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import math_reward as reward  # noqa: E402

PROMPT = "<|im_start|>user\nWhat is it? Put it within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"


EQUAL = [
    # fractions and decimals
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"\tfrac{2}{4}", r"\frac{1}{2}"),
    ("1/2", r"\frac12"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"3\frac{1}{2}", r"\frac{7}{2}"),
    (r"\frac{a}{b}", "a/b"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("5.0", "5"),
    (".5", "0.5"),
    ("+5", "5"),
    # sets and lists
    (r"\{1,2,3\}", r"\{3,2,1\}"),
    (r"\left\{1, 2\right\}", r"\{1,2\}"),
    ("1,2", "2,1"),
    ("-2, 1", "1,-2"),
    (r"2 \text{ and } 3", "2,3"),
    ("x=2, x=3", "2,3"),
    (r"\pm 3", "3, -3"),
    (r"\emptyset", r"\{\}"),
    # points, intervals, relations
    ("(1,2)", "(1, 2)"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"),
    ("[0,1)", "[0, 1)"),
    (r"\left[2, 5\right)", "[2,5)"),
    (r"(-\infty, 3]", r"(-\infty,3]"),
    (r"(-\infty,-2)\cup(2,\infty)", r"(-\infty,-2) \cup (2, \infty)"),
    (r"x \in [1,2]", "[1,2]"),
    ("3>x", "x<3"),
    (r"x \le 3", r"x \leq 3"),
    # units and currency
    (r"5\text{ cm}", "5"),
    ("5 cm", "5"),
    (r"5\,\text{cm}^2", "5"),
    ("5", r"5\text{ cm}"),
    (r"3 \mathrm{~km}", "3"),
    (r"12\text{ inches}", "12"),
    (r"\$5.50", "5.50"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    ("90 degrees", "90"),
    # percent
    (r"50\%", "50"),
    ("50%", "50"),
    ("50", r"50\%"),
    (r"12.5\%", "12.5"),
    ("12.5", r"12.5\%"),
    # roots, powers, functions
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\sqrt2", r"\sqrt{2}"),
    ("2^{10}", "1024"),
    ("10^{-3}", "0.001"),
    (r"1.2\times 10^{5}", "120000"),
    (r"\binom{5}{2}", "10"),
    ("5!", "120"),
    (r"\log_2 8", "3"),
    # expressions and equations
    ("(x+1)^2", "x^2+2x+1"),
    ("x=5", "5"),
    ("2x+3", "y=2x+3"),
    ("3+4i", "4i+3"),
    # big numbers
    ("1,000", "1000"),
    (r"1{,}000", "1000"),
    (r"1,\!000", "1000"),
    ("10,000,000", "10000000"),
    # words
    ("Friday", r"\text{Friday}"),
    (r"\textbf{(B)}", "B"),
    # matrices and number bases
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix}\frac{1}{2}\\2\end{pmatrix}"),
    (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("1101_{2}", "1101_2"),
    # spacing and signs around the answer
    (r"\ \ 7 \ ", "7"),
    (r"7\,", "7"),
    (r"7\quad", "7"),
    (r"\displaystyle 7", "7"),
    ("7.", "7"),
    ("$7$", "7"),
    (r"\(7\)", "7"),
    ("\n7\n", "7"),
    (r"\mathbf{7}", "7"),
    (r"\left(7\right)", "7"),
]

DIFFERENT = [
    ("0.333", r"\frac{1}{3}"),
    (r"\frac{3}{4}", r"\frac{4}{3}"),
    ("-5", "5"),
    ("3.001", "3"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("2", "2,3"),
    ("1,2,3,4,5", "5"),
    ("(1,2)", "(2,1)"),
    ("(0,1)", "[0,1]"),
    ("[0,1]", "(0,1]"),
    (r"(-\infty,-2)\cup(2,\infty)", r"(-\infty,-2] \cup (2, \infty)"),
    ("x>3", "x<3"),
    (r"6\text{ cm}", "5"),
    (r"50\%", "5"),
    (r"\sqrt{3}", r"\sqrt{2}"),
    ("x^2+1", "x^2+2"),
    ("12", "12x"),
    ("x", "y"),
    (r"\text{even}", r"\text{odd}"),
    ("B", "C"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("1101_2", "1100_2"),
    ("10^{100}+1", "10^{100}"),
    # a guess in prose, or half an answer, is not the number in it
    ("maybe 5", "5"),
    ("5 or 6", "5"),
    ("not 5", "5"),
    ("6$ $5", "5"),
    (r"\frac{1", "1"),
    ("5}", "5"),
    ("?", "5"),
]


@pytest.fixture(scope="module", autouse=True)
def checker() -> Iterator[object]:
    yield reward._CHECKER
    reward._CHECKER._clear_up()


@pytest.fixture
def hasty() -> Iterator[object]:
    """A checker with a limit of 0.5 s."""
    checker = reward.Checker(limit_cpu_s=0.5)
    yield checker
    checker._clear_up()


def result_of(*responses: str, label: str | None = "5") -> dict[str, list[float]]:
    n = len(responses)
    result = reward.reward_func([PROMPT + response for response in responses], [PROMPT] * n, [label] * n)
    assert result["rewards"].shape == result["scores"].shape == (n,)
    return {"rewards": result["rewards"].tolist(), **{name: log.tolist() for name, log in result["extra_logs"].items()}}


# Equality


@pytest.mark.parametrize(("answer", "label"), EQUAL)
def test_equal_answers_are_right(answer: str, label: str) -> None:
    assert reward.judge(answer, label) == reward.RIGHT


@pytest.mark.parametrize(("answer", "label"), DIFFERENT)
def test_different_answers_are_wrong(answer: str, label: str) -> None:
    assert reward.judge(answer, label) == reward.WRONG


def test_it_takes_more_right_answers_than_openrlhf_and_no_more_wrong_ones(measured) -> None:
    from openrlhf.utils.math_utils import grade_answer

    refused = [pair for pair in EQUAL if not grade_answer(*pair)]
    taken = [pair for pair in DIFFERENT if grade_answer(*pair)]
    measured(
        f"math: OpenRLHF's grade_answer refuses {len(refused)} of {len(EQUAL)} equal answers and takes {len(taken)} of {len(DIFFERENT)} "
        "different ones; examples/math_reward.py refuses and takes none"
    )
    assert len(refused) > 0


# The box


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{4}, no, \boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"{ an open brace, \boxed{5}", "5"),
        (r"} a lone one, \boxed{5}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        ("5", None),
        ("", None),
        (r"boxed{5}", None),
    ],
)
def test_last_closed_box_is_the_answer(response: str, answer: str | None) -> None:
    assert reward.last_box(response) == answer


def test_box_of_the_prompt_is_not_the_answer() -> None:
    assert result_of("I do not know.") == {"rewards": [0.0], "has_box": [0.0], "timed_out": [0.0], "unchecked": [0.0]}


@pytest.mark.parametrize(
    "query",
    [
        PROMPT.replace("What", "What\u0301") + "none",  # the question came back in another spelling
        PROMPT[20:] + "none",  # OpenRLHF cut the prompt to fit
    ],
)
def test_prompt_that_decodes_differently_is_still_cut_off(query: str) -> None:
    assert reward.response_of(query, PROMPT) == "none"


# Whole responses


def test_rewards_are_in_the_order_of_the_queries() -> None:
    assert result_of(r"\boxed{5}", "nothing", r"\boxed{6}", r"\boxed{10/2}") == {
        "rewards": [1.0, 0.0, 0.0, 1.0],
        "has_box": [1.0, 0.0, 1.0, 1.0],
        "timed_out": [0.0] * 4,
        "unchecked": [0.0] * 4,
    }


@pytest.mark.parametrize("label", [None, "", "  "])
def test_missing_label_is_told_apart_from_a_wrong_answer(label: str | None) -> None:
    result = result_of(r"\boxed{5}", label=label)
    assert (result["rewards"], result["unchecked"]) == ([0.0], [1.0])


GARBAGE = {
    "50 kB of opening boxes": r"\boxed{" * 7000,
    "50 kB of braces": "{" * 25000 + "}" * 25000,
    "50 kB in the box": r"\boxed{" + "9+" * 25000 + "}",
    "50 kB of backslashes": "\\" * 50000,
    "null bytes": "\x00\\boxed{\x00}\x00",
    "half a surrogate pair": "\\boxed{\ud800}",
    "deep parentheses": r"\boxed{" + "(" * 400 + "x" + ")" * 400 + "}",
    "deep roots": r"\boxed{" + r"\sqrt{" * 100 + "2" + "}" * 100 + "}",
    "deep matrices": r"\boxed{" + r"\begin{pmatrix}" * 50 + "}",
    "division by zero": r"\boxed{\frac{1}{0}}",
    "not a number": r"\boxed{0/0}",
    "factorials": r"\boxed{9999999!^{9999999!}}",
    "digits": r"\boxed{" + "1" * 900 + "}",
    "right to left": "\\boxed{\u202e5}",
}


@pytest.mark.parametrize("response", GARBAGE.values(), ids=GARBAGE)
def test_garbage_gets_no_reward_and_raises_nothing(response: str) -> None:
    assert result_of(response)["rewards"] == [0.0]


# The time limit


POWER_TOWER = "9^{9^{9^9}}"


@pytest.mark.parametrize("answer", [POWER_TOWER, "10^{10^{10}}", r"\binom{10^9}{5\cdot 10^8}", "(a+b+c+d+e)^{200}", "{" * 900])
def test_hostile_answer_is_stopped_at_the_limit_and_the_next_one_is_judged(hasty, answer: str) -> None:
    started = time.perf_counter()
    assert hasty.ask(answer, "5") == reward.TIMED_OUT
    assert time.perf_counter() - started < 15  # real time of a busy machine, not a claim
    assert hasty.ask("5.0", "5") == reward.RIGHT


def test_time_out_is_logged_apart_from_a_wrong_answer(hasty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "_CHECKER", hasty)
    result = result_of(rf"\boxed{{{POWER_TOWER}}}", r"\boxed{6}")
    assert result == {"rewards": [0.0, 0.0], "has_box": [1.0, 1.0], "timed_out": [1.0, 0.0], "unchecked": [0.0, 0.0]}


def test_limit_holds_off_the_main_thread_and_every_thread_gets_its_own_verdict(hasty) -> None:
    # Sixteen threads, as OpenRLHF's thread pool; every tenth answer is hostile, the others are right where odd.
    def ask(number: int) -> str:
        assert threading.current_thread() is not threading.main_thread()
        if number % 10 == 0:
            return hasty.ask(POWER_TOWER, "5")
        return hasty.ask(f"{2 * number}/2", str(number) if number % 2 else str(number + 1))

    with ThreadPoolExecutor(16) as threads:
        verdicts = list(threads.map(ask, range(1, 41)))
    expected = [reward.TIMED_OUT if n % 10 == 0 else reward.RIGHT if n % 2 else reward.WRONG for n in range(1, 41)]
    assert verdicts == expected


# The process


def test_one_process_is_kept_and_none_is_left_behind(hasty) -> None:
    before = set(psutil.Process().children())
    pids = set()
    for answer in ("10/2", "15/3", POWER_TOWER, "20/4", POWER_TOWER, "25/5"):
        hasty.ask(answer, "5")
        own = set(psutil.Process().children()) - before
        assert len(own) <= 1
        pids |= {process.pid for process in own}
    assert len(pids) == 3, "one until the first time-out, one until the second, one after it"
    hasty._clear_up()
    assert set(psutil.Process().children()) == before


def test_process_that_something_else_has_killed_costs_no_answer(hasty) -> None:
    hasty.ask("10/2", "5")
    hasty._process.kill()
    hasty._process.wait()
    assert hasty.ask("10/2", "5") == reward.RIGHT


def test_process_that_cannot_start_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = reward.Checker()
    checker._command = [sys.executable, "-c", "raise SystemExit('no such library')"]
    assert checker.ask("10/2", "5") == reward.UNCHECKED
    checker._command = ["/no/such/python"]
    assert checker.ask("10/2", "5") == reward.UNCHECKED


@pytest.mark.parametrize("answer", ["10/2", POWER_TOWER])
def test_process_goes_when_its_actor_is_killed(answer: str) -> None:
    code = (
        f"import sys, threading, time; sys.path.insert(0, {str(EXAMPLES)!r}); import math_reward\n"
        "checker = math_reward.Checker(limit_cpu_s=1)\n"
        "checker.ask('10/2', '5')\n"
        f"threading.Thread(target=checker.ask, args=({answer!r}, '5')).start()\n"
        "print(checker._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    actor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(actor.stdout.readline()))
    actor.kill()
    actor.wait()
    actor.stdout.close()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the checking process outlived its actor"
        time.sleep(0.05)


# The contract with OpenRLHF


def test_openrlhf_reads_reward_score_and_logs_of_every_response() -> None:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    responses = {1: r"\boxed{10/2}", 2: "no box"}
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: PROMPT + responses[ids[-1]])

    class Tokenizer(SimpleNamespace):
        def __call__(self, **_: object) -> dict[str, list]:
            return {"input_ids": [SimpleNamespace(tolist=lambda: [7])]}

    class Engine:
        def __init__(self, token: int) -> None:
            self.token = token

        async def generate(self, *_: object, **__: object) -> SimpleNamespace:
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[self.token], finish_reason="stop", logprobs=None)])

    executor = SingleTurnAgentExecutor(str(EXAMPLES / "math_reward.py"))
    params = SimpleNamespace(max_tokens=8, logprobs=None)

    async def execute_both() -> list[dict]:
        tasks = [executor.execute(PROMPT, "5", params, 64, Tokenizer(**vars(tokenizer)), Engine(token)) for token in (1, 2)]
        return await asyncio.gather(*tasks)

    right, wrong = asyncio.run(execute_both())
    executor.reward_func.__globals__["_CHECKER"]._clear_up()
    assert [right["reward"].item(), wrong["reward"].item()] == [1.0, 0.0]
    assert {name: value.item() for name, value in wrong["extra_logs"].items()} == {"has_box": 0.0, "timed_out": 0.0, "unchecked": 0.0}


def test_missing_library_ends_the_run_when_openrlhf_loads_the_file(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['math_verify'] = None\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    finished = subprocess.run([sys.executable, EXAMPLES / "math_reward.py"], capture_output=True, text=True, env=env)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].endswith("math-verify is not installed; run examples/setup.sh")
