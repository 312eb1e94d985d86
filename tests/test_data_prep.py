"""SimpleRL-Zoo parquet to OpenRLHF prompt files: what comes out, and one clear error for what cannot go in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from zoo_fixture import CHAT_TEMPLATE, FOLDERS, PROBLEMS, byte_tokenizer, write_zoo, zoo_row

from data_prep import simplerl_zoo

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def prepare(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command with defaults for what a test does not give; returns (exit code, stdout, stderr)."""

    def run(**flags: object) -> tuple[int, str, str]:
        given = {"level": "hard", "model": "qwen", "out": tmp_path / "out", "source": tmp_path / "zoo", "tokenizer": tokenizer_dir, **flags}
        argv = [word for name, value in given.items() for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
        code = simplerl_zoo.main(argv)
        return code, *capsys.readouterr()

    return run


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def error_of(result: tuple[int, str, str]) -> str:
    code, _, err = result
    *noise, line = err.splitlines()
    assert code == 2 and line.startswith("data_prep.simplerl_zoo: error: "), result
    assert not noise, noise
    return line.removeprefix("data_prep.simplerl_zoo: error: ")


# What comes out


def test_prompts_are_rebuilt_from_the_bare_question(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    code, out, _ = prepare()
    assert code == 0
    assert read_jsonl(tmp_path / "out" / "train.jsonl") == [
        {"input": [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}], "label": answer} for question, answer in PROBLEMS
    ]
    assert len(read_jsonl(tmp_path / "out" / "test.jsonl")) == 2
    assert f"{tmp_path / 'out' / 'train'}.jsonl: 6 prompts of 6 rows" in out


def test_openrlhf_makes_these_prompts_of_it(prepare, tmp_path: Path) -> None:
    from datasets import load_dataset
    from openrlhf.datasets.prompts_dataset import preprocess_data

    write_zoo(tmp_path / "zoo")
    prepare()
    rows = load_dataset("json", data_files=str(tmp_path / "out" / "train.jsonl"), cache_dir=str(tmp_path / "cache"))["train"]
    prompts = [preprocess_data(row, None, "input", "label", byte_tokenizer().apply_chat_template) for row in rows]
    assert prompts[1] == (
        f"<|im_start|>user\nSolve $2x = 1$ for $x$.\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
        r"\frac{1}{2}",
    )


def test_overlong_prompts_are_left_out_by_the_models_own_count(prepare, tmp_path: Path) -> None:
    # One byte is one token. Around the question of n bytes: <|im_start|> user \n 1+4+1, \n and the instruction 1+70,
    # <|im_end|> \n 2, <|im_start|> assistant \n 1+9+1.
    around = 6 + 1 + len(INSTRUCTION) + 2 + 11
    write_zoo(tmp_path / "zoo", train=[("q" * 10, "1"), ("q" * 11, "2"), ("q" * 1_000_000, "3")], test=[("é" * 5, "4")])
    code, out, _ = prepare(max_prompt_tokens=around + 10)
    assert code == 0
    assert [row["label"] for row in read_jsonl(tmp_path / "out" / "train.jsonl")] == ["1"]
    assert [row["label"] for row in read_jsonl(tmp_path / "out" / "test.jsonl")] == ["4"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"] == {
        "num_source_rows": 3, "num_empty_answers": 0, "num_overlong": 2, "num_prompts": 1, "longest_prompt_tokens": around + 10,
    }  # fmt: skip
    assert "2 longer than" in out


HOSTILE = [
    "line\u2028and\u2029paragraph\x85separators",
    "null \x00 byte",
    "\ufeffbyte order mark, \u202eright to left, \U0001d538 beyond the first plane, e\u0301 decomposed",
    "tab\t, carriage\r\n return, \x1b[31mescape\x1b[0m",
    '{"input": "json"}\\n"',
    "{{ jinja }} {% raw %} {question}",
    "2019-01-01",
]


def test_hostile_questions_arrive_in_openrlhf_as_they_were(prepare, tmp_path: Path) -> None:
    from datasets import load_dataset

    write_zoo(tmp_path / "zoo", train=[(question, "2019-01-01") for question in HOSTILE])
    assert prepare()[0] == 0
    rows = load_dataset("json", data_files=str(tmp_path / "out" / "train.jsonl"), cache_dir=str(tmp_path / "cache"))["train"]
    assert [row["input"][0]["content"] for row in rows] == [f"{question}\n{INSTRUCTION}" for question in HOSTILE]


def test_answers_that_are_numbers_become_text(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo", train=[("What is $6 \\cdot 12$?", 72)])
    assert prepare()[0] == 0
    assert [row["label"] for row in read_jsonl(tmp_path / "out" / "train.jsonl")] == ["72"]


def test_folder_of_the_level_itself_is_a_source(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo", "easy")
    assert prepare(level="easy", source=tmp_path / "zoo" / FOLDERS["easy"])[0] == 0


# Again


def test_second_run_verifies_and_changes_nothing(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    prepare()
    files = sorted((tmp_path / "out").iterdir())
    before = [(path.name, path.stat().st_mtime_ns) for path in files]
    assert [name for name, _ in before] == ["manifest.json", "test.jsonl", "train.jsonl"]
    code, out, _ = prepare()
    assert (code, out) == (0, f"{tmp_path / 'out'}: already prepared from these inputs, checksums verified; nothing to do\n")
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").iterdir())] == before


def test_two_runs_write_the_same_bytes(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    prepare()
    prepare(out=tmp_path / "other")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (tmp_path / "other" / "manifest.json").read_bytes()


def test_other_settings_into_the_same_folder_are_refused(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    prepare()
    out = tmp_path / "out"
    mend = f"give another --out, or remove {out} first"
    assert error_of(prepare(max_prompt_tokens=500)) == f"--out: {out} was prepared with max_prompt_tokens 1024, and now it is 500; {mend}"
    assert "was prepared with model qwen, and now it is llama-instruct" in error_of(prepare(model="llama-instruct"))


def test_changed_source_is_noticed(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    prepare()
    write_zoo(tmp_path / "zoo", train=PROBLEMS[1:])
    assert "was prepared with train.parquet sha256" in error_of(prepare())


def test_changed_chat_template_is_noticed(prepare, tmp_path: Path, tokenizer_dir: Path) -> None:
    write_zoo(tmp_path / "zoo")
    prepare()
    byte_tokenizer(CHAT_TEMPLATE + " ").save_pretrained(tmp_path / "other")
    assert "was prepared with tokenizer sha256" in error_of(prepare(tokenizer=tmp_path / "other"))


@pytest.mark.parametrize(("damage", "said"), [(Path.unlink, "is gone"), (lambda path: path.write_text("x"), "has changed")])
def test_damaged_output_is_noticed(prepare, tmp_path: Path, damage, said: str) -> None:
    write_zoo(tmp_path / "zoo")
    prepare()
    damage(tmp_path / "out" / "test.jsonl")
    message = error_of(prepare())
    assert said in message and message.endswith(f"remove {tmp_path / 'out'} and run again")


def test_folder_with_other_things_in_it_is_left_alone(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert "holds something else" in error_of(prepare())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_failed_run_leaves_nothing(prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zoo(tmp_path / "zoo")

    def full_disk(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full_disk)
    assert error_of(prepare()) == f"--out: cannot write {tmp_path / 'out'} (No space left on device); give another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


# One clear error each


def train_file(root: Path) -> Path:
    return root / "zoo" / FOLDERS["hard"] / "train.parquet"


def test_missing_column_is_named_with_those_that_are_there(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    table = pq.read_table(train_file(tmp_path))
    pq.write_table(table.drop_columns(["extra_info", "prompt", "gt_answer"]), train_file(tmp_path))
    assert error_of(prepare()) == (
        f"{train_file(tmp_path)}: no column extra_info; its columns are answer, subject, level, question, target, data_source, ability, "
        "reward_model"
    )


def test_missing_field_is_named_with_those_that_are_there(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    rows = [{**zoo_row(0, "q", "a"), "reward_model": {"style": "rule", "answer": "a"}}]
    pq.write_table(pa.Table.from_pylist(rows), train_file(tmp_path))
    assert error_of(prepare()) == f"{train_file(tmp_path)}: no field reward_model.ground_truth; what reward_model has is style, answer"
    pq.write_table(pa.Table.from_pylist([{**zoo_row(0, "q", "a"), "reward_model": "a"}]), train_file(tmp_path))
    assert error_of(prepare()).endswith("what reward_model has is of type string")


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_empty_answer_is_named_by_row_and_left_out_on_request(prepare, tmp_path: Path, empty: str | None) -> None:
    write_zoo(tmp_path / "zoo", train=[*PROBLEMS[:3], ("Unanswered?", empty), *PROBLEMS[3:]])
    assert error_of(prepare()) == (
        f"{train_file(tmp_path)}: row 3 (from 0) has no answer in reward_model.ground_truth; leave them out with --drop_empty_answers"
    )
    code, out, _ = prepare(drop_empty_answers=True)
    assert code == 0 and "6 prompts of 7 rows (1 without an answer" in out
    assert [row["label"] for row in read_jsonl(tmp_path / "out" / "train.jsonl")] == [answer for _, answer in PROBLEMS]


def test_many_empty_answers_are_counted(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo", train=[(question, "") for question, _ in PROBLEMS] + PROBLEMS)
    assert "6 rows, 0, 1, 2, 3, 4, ... (from 0), have no answer" in error_of(prepare())


@pytest.mark.parametrize("question", ["", " \n", None])
def test_row_without_a_question_is_named(prepare, tmp_path: Path, question: str | None) -> None:
    write_zoo(tmp_path / "zoo", train=[*PROBLEMS, (question, "5")])
    assert "row 6 (from 0) has no extra_info.question" in error_of(prepare())


def test_row_whose_structs_are_null_is_named(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    rows = [zoo_row(0, *PROBLEMS[0]), {**zoo_row(1, *PROBLEMS[1]), "reward_model": None}]
    pq.write_table(pa.Table.from_pylist(rows), train_file(tmp_path))
    assert "row 1 (from 0) has no answer" in error_of(prepare())


@pytest.mark.parametrize(
    ("damage", "size"),
    [
        (lambda content: content[: len(content) // 2], None),
        (lambda content: b"", 0),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", 63),
        (lambda content: content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :], None),
    ],
    ids=["cut off", "empty", "large-file pointer", "zeros in the middle"],
)
def test_incomplete_parquet_is_an_error(prepare, tmp_path: Path, damage, size: int | None) -> None:
    write_zoo(tmp_path / "zoo")
    content = damage(train_file(tmp_path).read_bytes())
    train_file(tmp_path).write_bytes(content)
    message = error_of(prepare())
    assert message.startswith(f"{train_file(tmp_path)}: not a complete parquet file, {len(content)} bytes (")
    assert message.endswith("); fetch it again") and "\n" not in message
    assert size is None or len(content) == size


def test_split_without_rows_is_an_error(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    table = pq.read_table(train_file(tmp_path))
    pq.write_table(table.slice(0, 0), train_file(tmp_path))
    assert error_of(prepare()) == f"{train_file(tmp_path)}: has no rows; fetch it again"


def test_limit_that_leaves_no_prompt_is_an_error(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    message = error_of(prepare(max_prompt_tokens=20))
    assert message.startswith("--max_prompt_tokens: 20 leaves no prompt of ") and message.endswith(" tokens")


@pytest.mark.parametrize(("mark", "read"), [("<image>", "OpenRLHF reads as a picture"), ("<|im_end|>", "reads as a special token")])
def test_question_that_would_not_be_read_as_text_is_an_error(prepare, tmp_path: Path, mark: str, read: str) -> None:
    write_zoo(tmp_path / "zoo", train=[*PROBLEMS, (f"What does {mark} show?", "5")])
    message = error_of(prepare())
    assert f"the question of row 6 (from 0) has {mark!r}" in message and read in message


def test_wrong_folder_is_an_error(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo", "medium")
    zoo = tmp_path / "zoo"
    needed = "simplelr_qwen_level3to5, which --level hard needs; it holds simplelr_qwen_level1to4"
    assert error_of(prepare()) == f"--source: {zoo} has no folder {needed}"
    assert "is the medium level; give --level medium" in error_of(prepare(source=zoo / FOLDERS["medium"]))
    assert error_of(prepare(source=tmp_path / "nowhere")).startswith(f"--source: no folder {tmp_path / 'nowhere'};")
    (zoo / FOLDERS["medium"] / "test.parquet").unlink()
    assert error_of(prepare(level="medium")).startswith(f"--source: no file {zoo / FOLDERS['medium'] / 'test.parquet'};")


def test_tokenizer_that_cannot_format_a_chat_is_an_error(prepare, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    assert "has no chat template" in error_of(prepare(tokenizer=tmp_path / "base"))
    byte_tokenizer("{{ raise_exception('only systems') }}").save_pretrained(tmp_path / "picky")
    assert error_of(prepare(tokenizer=tmp_path / "picky")) == "--tokenizer: its chat template fails on a user message (only systems)"
    (tmp_path / "empty").mkdir()
    assert error_of(prepare(tokenizer=tmp_path / "empty")).startswith(f"--tokenizer: cannot load {tmp_path / 'empty'} (")
    assert error_of(prepare(tokenizer=tmp_path / "nowhere")).startswith(f"--tokenizer: no folder {tmp_path / 'nowhere'};")


def run_offline(folder: Path, *flags: object) -> str:
    """In a process of its own, because huggingface_hub reads its environment when imported; with an empty cache."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "data_prep.simplerl_zoo", "--level", "hard", "--out", folder / "out", *flags]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert finished.returncode == 2, finished.stderr
    return finished.stderr.splitlines()[-1]


def test_no_network_names_the_mend(tmp_path: Path, tokenizer_dir: Path) -> None:
    assert run_offline(tmp_path, "--model", "qwen", "--tokenizer", tokenizer_dir) == (
        "data_prep.simplerl_zoo: error: --source: cannot fetch simplelr_qwen_level3to5/train.parquet of hkust-nlp/SimpleRL-Zoo-Data "
        "(no network to the hub, and no copy in its cache); fetch it elsewhere and give --source DIR"
    )
    said = run_offline(tmp_path, "--model", "llama-instruct", "--source", write_zoo(tmp_path / "zoo"))
    assert said.startswith("data_prep.simplerl_zoo: error: --tokenizer: cannot load meta-llama/Llama-3.1-8B-Instruct (")
    assert said.endswith("give --tokenizer DIR, a folder with the model's tokenizer files")


def test_hub_copy_is_used_with_its_revision(prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = write_zoo(tmp_path / "hub" / "snapshots" / "0123abcd")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, file, repo_type: str(snapshot / file))
    assert prepare(source="hkust-nlp/SimpleRL-Zoo-Data")[0] == 0
    origin = json.loads((tmp_path / "out" / "manifest.json").read_text())["origin"]
    assert (origin["source"], origin["revision"]) == ("hkust-nlp/SimpleRL-Zoo-Data", "0123abcd")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "qwen", "--out", "x"], "--level"),
        (["--level", "harder", "--model", "qwen", "--out", "x"], "--level: invalid choice: 'harder'"),
        (["--level", "hard", "--model", "qwen", "--out", "x", "--max_prompt_tokens", "0"], "--max_prompt_tokens: '0'"),
    ],
)
def test_bad_flag_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simplerl_zoo.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("data_prep.simplerl_zoo: error: ") and said in line
