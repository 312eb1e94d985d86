"""The quickstart's task, tokenizer, warm-start batches and reward, through OpenRLHF's own loaders. No training here."""

import asyncio
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

QUICKSTART = Path(__file__).resolve().parent.parent / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))  # its scripts run by path, as a folder on sys.path, not as an installed package

import build_model  # noqa: E402
import prepare  # noqa: E402
import run as quickstart  # noqa: E402
import task  # noqa: E402
import warm_start  # noqa: E402

EVERY_PROBLEM = [task.Problem(n, k) for n in range(1, task.MAX_NUMBER + 1) for k in task.DIVISORS]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "init"
    build_model.main(["--out", str(out)])
    return out


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def reward_executor():
    """OpenRLHF's own loader of `--reward.remote_url some_file.py`."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    return SingleTurnAgentExecutor(str(QUICKSTART / "reward.py"))


def test_worked_response_counts_down_and_ends_in_the_remainder():
    # 7 mod 3: 7 steps round a clock of 3 hours end at 1.
    assert task.Problem(7, 3).solution == "work\n07:0\n06:1\n05:2\n04:0\n03:1\n02:2\n01:0\n00:1\nanswer:1<eos>"
    assert task.Problem(7, 3).prompt == "07 modulo three\n"
    assert all(task.is_correct(p.solution, str(p.number % p.divisor)) for p in EVERY_PROBLEM)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_correct_responses_have_a_long_tail_and_fit(tmp_path, seed):
    task.main(["--out", str(tmp_path), "--train", "640", "--seed", str(seed)])
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").open()]
    problems = task.draw_problems(640, seed)
    assert rows == [{"input": p.prompt, "label": p.label} for p in problems]
    lengths = task.length_summary(problems)
    assert 30 <= lengths["median"] <= 60
    assert lengths["p99"] >= 3 * lengths["median"]
    assert lengths["p99"] >= 4 * lengths["median"], "the aim is higher than the requirement; see NUMBER_SIGMA"


def test_longest_correct_response_fits_the_limits():
    # "work\n" 2 tokens, 91 lines of 5, "answer:d<eos>" 4.
    assert task.length_summary(EVERY_PROBLEM)["max"] == 461 <= task.MAX_RESPONSE_TOKENS
    assert warm_start.ROW_TOKENS <= build_model.CONTEXT_TOKENS
    assert {len(task.split_tokens(p.prompt)) for p in EVERY_PROBLEM} == {5}


def test_a_seed_decides_everything_drawn():
    assert task.draw_problems(50, 3) == task.draw_problems(50, 3) != task.draw_problems(50, 4)


def test_auto_tokenizer_gives_one_token_per_task_token_and_the_text_back(tokenizer):
    for problem in EVERY_PROBLEM[::7]:
        text = problem.prompt + problem.solution
        ids = tokenizer(text=text, add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode([i]) for i in ids] == task.split_tokens(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert ids[-1] == tokenizer.eos_token_id


def test_model_folder_is_a_small_bf16_qwen2_with_int4_friendly_dimensions(model_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert model.config.model_type == "qwen2" and model.config.tie_word_embeddings and model.dtype == torch.bfloat16
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 10e6
    linears = [m for name, m in model.named_modules() if ".layers." in name and isinstance(m, torch.nn.Linear)]
    assert linears and all(m.in_features % 128 == 0 and m.out_features % 64 == 0 for m in linears)
    assert len(tokenizer) <= model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize(
    "response",
    ["", "<eos>", "answer:1", "answer:12<eos>", "answer:1<eos>2", "00:1\nanswer:2<eos>", "answer:1\n<eos>", "\0é"],
)
def test_wrong_cut_off_or_garbled_responses_score_zero(response):
    assert not task.is_correct(response, "1")


def test_demonstrations_have_the_documented_faults():
    rng = random.Random(0)
    problems = task.draw_problems(4000, 0)
    shown = [task.demonstration(p, rng) for p in problems]
    guesses = sum(d.startswith("guess") for d in shown) / len(shown)
    miscounts = sum(d == task.worked_response(p, first_tally=1) for p, d in zip(problems, shown)) / len(shown)
    # Three standard errors of a share near 0.3 of 4,000 draws are 0.022.
    assert guesses == pytest.approx(task.GUESS_FRACTION, abs=0.023)
    assert miscounts == pytest.approx(task.MISCOUNT_FRACTION, abs=0.023)


def test_packed_rows_hold_whole_demonstrations_and_score_only_responses(tokenizer):
    rows = warm_start.packed_rows(tokenizer, seed=0)
    for _ in range(3):
        ids, targets, documents = next(rows)
        assert len(ids) == len(targets) == len(documents) == warm_start.ROW_TOKENS
        for document in range(max(documents) + 1):
            here = [i for i in range(len(ids)) if documents[i] == document]
            text = tokenizer.decode([ids[i] for i in here])
            scored = tokenizer.decode([targets[i] for i in here if targets[i] != warm_start.IGNORE])
            assert text.endswith(scored) and text.removesuffix(scored).count("\n") == 1 and scored.endswith(task.EOS)
            assert all(targets[i] in (warm_start.IGNORE, ids[i + 1]) for i in here[:-1])
        assert all(t == warm_start.IGNORE for t, d in zip(targets, documents) if d == -1)


def test_a_packed_demonstration_is_blind_to_its_neighbours(model_dir, tokenizer):
    """The loss of two packed rows is the token-weighted mean of the demonstrations' own losses, each run alone."""
    model = warm_start.Qwen2ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = warm_start.packed_rows(tokenizer, seed=1)
    rows = [next(generator) for _ in range(2)]
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, targets, documents in rows:
            for document in range(max(documents) + 1):
                here = [i for i in range(len(ids)) if documents[i] == document]
                logits = model(input_ids=torch.tensor([[ids[i] for i in here]])).logits[0]
                labels = torch.tensor([targets[i] for i in here])
                total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                count += int((labels != warm_start.IGNORE).sum())
        packed = warm_start.imitation_loss(model, rows).item()
    assert packed == pytest.approx(total / count, abs=1e-4)


def test_openrlhf_loads_the_reward_by_path_and_reads_its_numbers():
    problem = task.Problem(17, 5)
    guess = f"guess\nanswer:2{task.EOS}"  # 17 mod 5 is 2: a lucky guess scores, the work is not read
    responses = [problem.solution, guess, task.worked_response(problem, first_tally=1), "work\n17:0\n16", "\udcff"]
    queries = [problem.prompt + response for response in responses]
    prompts, labels = [problem.prompt] * len(responses), [problem.label] * len(responses)
    results = asyncio.run(reward_executor()._fetch_rewards_via_func(queries, prompts, labels))
    assert [r["rewards"].item() for r in results] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [r["scores"].item() for r in results] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [r["extra_logs"]["shows_work"].item() for r in results] == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert all(r["rewards"].shape == (1,) for r in results)


def test_openrlhf_prompt_dataset_passes_prompt_and_label_through(tmp_path):
    from openrlhf.datasets.prompts_dataset import preprocess_data

    task.main(["--out", str(tmp_path), "--train", "4", "--eval", "2"])
    first = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])
    assert preprocess_data(first, input_key="input", label_key="label") == (first["input"], first["label"])
    assert isinstance(first["label"], str)
    assert len((tmp_path / "eval.jsonl").read_text().splitlines()) == 2


def test_prompts_are_made_once_with_some_to_spare(tmp_path):
    def labels(num_prompts):
        assert prepare.main(["--data", str(tmp_path / "data"), "--num-prompts", str(num_prompts)]) == 0
        return [json.loads(line)["label"] for line in (tmp_path / "data" / "prompts.jsonl").open()]

    first = labels(8)
    assert len(first) == 640
    assert labels(12) == first


def test_prompts_of_somebody_else_are_never_replaced(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("one\ntwo\n")
    assert prepare.main(["--data", str(tmp_path), "--num-prompts", "4"]) == 2
    assert f"--data: {tmp_path} holds 2 prompts and the run needs 4" in capsys.readouterr().err
    assert (tmp_path / "prompts.jsonl").read_text() == "one\ntwo\n"


def test_a_data_folder_that_is_not_the_quickstarts_is_left_alone(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("theirs")
    assert prepare.main(["--data", str(tmp_path), "--num-prompts", "4"]) == 2
    assert f"--data: {tmp_path} is there and has no prompts.jsonl" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.fixture
def started(monkeypatch):
    """Names of the quickstart's stages in the order of their starts. None is run; each leaves what the next ones look for."""
    names = []

    def run_stage(name, argv):
        names.append(name)
        folder = Path(argv[argv.index("--out" if "--out" in argv else "--self-spec.run_dir") + 1])
        folder.mkdir(parents=True)
        if name == "data":
            (folder / "prompts.jsonl").write_text("{}\n" * int(argv[argv.index("--train") + 1]))
        if "--self-spec.run_dir" in argv:
            (folder / "provenance.json").write_text(json.dumps({"status": "finished", "argv": argv[3:]}))
        return 1.0

    for module in (prepare, quickstart, sys.modules["stages"]):
        monkeypatch.setattr(module, "run_stage", run_stage)
    monkeypatch.setattr(quickstart, "set_environment", lambda experiment: None)
    return names


def test_the_quickstart_prepares_trains_the_arms_and_compares_them(started, tmp_path, capsys):
    assert quickstart.main(["--out", str(tmp_path / "out"), "--steps", "2"]) == 0
    assert started == ["data", "model", "warm start", "vanilla", "auto", "comparison"]
    assert f"in all 6 s after installation; the page: {tmp_path}/out/comparison/report.html" in capsys.readouterr().out


def test_the_quickstart_goes_on_where_it_was_and_refuses_a_finished_folder(started, tmp_path, capsys):
    argv = ["--out", str(tmp_path / "out"), "--steps", "2", "--arms", "vanilla,auto"]
    quickstart.main(argv)
    (tmp_path / "out" / "comparison").rmdir()
    (tmp_path / "out" / "auto" / "provenance.json").write_text('{"status": "failed"}')
    started.clear()
    assert quickstart.main(argv) == 0
    assert started == ["auto", "comparison"]
    assert quickstart.main(argv) == 2
    assert "holds a finished quickstart; give another folder" in capsys.readouterr().err
