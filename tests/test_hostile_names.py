"""Names and texts that others chose reach a shell, a terminal, Markdown and HTML as text and as nothing else."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_folders import FIXED, FLAGS, make_run

from calib import sweep
from data_prep import simplerl_zoo
from openrlhf_sd import flags, launch
from openrlhf_sd.config import SelfSpecError, printable
from openrlhf_sd.metrics import SpecDecodeCounts, append_row

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES / "launcher"), str(EXAMPLES / "quickstart")]

import checks  # noqa: E402
import compare_arms  # noqa: E402
import inputs  # noqa: E402
import run as quickstart  # noqa: E402
import run_arm  # noqa: E402
import stages  # noqa: E402

SHELL = "$(touch ran) `touch ran`; touch ran; #'\"'\"' & | > ran *\n touch ran\\"
"""No slash: a folder's name. Were a shell to read it, a file `ran` would appear."""

TERMINAL = "\x1b[31m\x1b]8;;http://evil.example\x07\x9b2J\r[red]x[/red][/][link=http://evil.example]y[/link]"
MARKUP = "'\" onmouseover='alert(1)' x=\"</title></style></td></script><script>alert(1)</script><img src=x onerror=alert(1)>--><!--"
TABLE = "| a | b |\n|---|---|\n`code` [link](javascript:alert(1)) ![i](x) <b>"
FOLDER = "\x1b[31m\x9b2J\r[red]x[-red]'\" onload='alert(1)' ><script>alert(1)<!-- | `c` [l](j) ![i](x)\n<b>$\\frac"
HOSTILE = TERMINAL + MARKUP + TABLE + "$\\frac{1}{0}$ javascript:alert(1)"

# Shells.


@pytest.fixture
def checkout(tmp_path):
    """The launchers beside a set-up script that installs nothing, in a folder where nothing may appear."""
    examples = tmp_path / "checkout" / "examples"
    examples.mkdir(parents=True)
    for name in ("run.sh", "compare.sh", "quickstart.sh", "launcher", "settings", "quickstart", "math_reward.py"):
        (examples / name).symlink_to(EXAMPLES / name)
    (examples / "setup.sh").write_text(f"printf '%s\\n' {shlex.quote(sys.executable)}\n")
    (tmp_path / "here").mkdir()
    return SimpleNamespace(examples=examples, here=tmp_path / "here")


def bash(checkout, *argv, stdin=None, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = ["bash", *map(str, argv)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=checkout.here, env=environment, timeout=120)


def pasted(checkout, shown):
    """The arguments of each `openrlhf-sd` command that a shell reads in `shown`."""
    function = "openrlhf-sd() { printf '%s\\0' \"$@\"; printf '\\0'; }\n"
    done = bash(checkout, "-c", function + shown)
    assert (done.returncode, done.stderr) == (0, "")
    return [command.split("\0") for command in done.stdout.removesuffix("\0\0").split("\0\0")]


def value(argv, flag):
    return argv[argv.index(flag) + 1]


def test_a_shell_would_run_these_names(checkout):
    """Otherwise the tests below would show nothing."""
    bash(checkout, "-c", f"echo {SHELL}")
    assert (checkout.here / "ran").exists()


@pytest.mark.parametrize("dash", ["", "-"])
def test_run_sh_hands_hostile_folders_on_unchanged(checkout, dash):
    name = dash + SHELL
    done = bash(
        *(
            checkout,
            checkout.examples / "run.sh",
            "quickstart",
            "fixed",
            "--dry-run",
            f"--model-dir={name}m",
            f"--data-dir={name}d",
        ),
        f"--self-spec.run_dir={name}r",
    )
    assert done.returncode == 0, done.stderr
    [argv] = pasted(checkout, done.stdout)
    here = checkout.here
    assert value(argv, "--self-spec.run_dir") == f"{here}/{name}r"
    assert value(argv, "--actor.model_name_or_path") == f"{here}/{name}m"
    assert value(argv, "--data.prompt_dataset") == f"{here}/{name}d/prompts.jsonl"
    assert value(argv, "--ckpt.output_dir").startswith(f"{here}/{name}r/")
    assert list(here.iterdir()) == []


def test_compare_sh_hands_hostile_folders_on_unchanged(checkout):
    name = f"-{SHELL}"
    command = (checkout.examples / "compare.sh", "quickstart", "--dry-run", "--arms", "vanilla,auto", "--seeds", "1")
    done = bash(checkout, *command, f"--out={name}", f"--model-dir={name}m")
    assert done.returncode == 0, done.stderr
    runs = pasted(checkout, done.stdout)
    assert [value(argv, "--self-spec.run_dir") for argv in runs] == [f"{checkout.here}/{name}/{arm}-seed1" for arm in ("vanilla", "auto")]
    assert {value(argv, "--actor.model_name_or_path") for argv in runs} == {f"{checkout.here}/{name}m"}
    assert list(checkout.here.iterdir()) == []


def test_quickstart_sh_hands_a_hostile_folder_on_unchanged(checkout):
    (checkout.examples / "setup.sh").write_text("printf '%s\\n' ./python\n")
    (checkout.here / "python").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (checkout.here / "python").chmod(0o755)
    done = bash(checkout, checkout.examples / "quickstart.sh", "--steps", SHELL, "--out", SHELL, f"--x={SHELL}")
    assert done.stdout.split("\0")[1:] == ["--steps", SHELL, "--out", SHELL, f"--x={SHELL}", ""]
    assert [path.name for path in checkout.here.iterdir()] == ["python"]


def test_setup_sh_takes_a_hostile_venv_for_a_name(checkout):
    done = bash(checkout, EXAMPLES / "setup.sh", "--dry-run", "--venv", SHELL)
    assert done.returncode == 0, done.stderr
    assert list(checkout.here.iterdir()) == []


def test_slurm_sh_hands_hostile_arguments_on_and_gives_ray_a_secret(checkout, tmp_path):
    """`scontrol`, `srun` and `ray` are stand-ins; whether Slurm and Ray do their part is not tested."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "scontrol").write_text("#!/bin/sh\necho node1\n")
    (stubs / "ray").write_text("#!/bin/sh\n")
    (stubs / "srun").write_text('#!/bin/sh\n{ env | grep ^RAY_A; printf "%s\\0" "$@"; } > "$STUBS/call.$$"\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    job = {"SLURM_SUBMIT_DIR": str(checkout.here), "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
    search = f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**job, "VENV": str(tmp_path / "venv"), "STUBS": str(stubs), "PATH": search}
    done = bash(checkout, EXAMPLES / "slurm.sh", "quickstart", "auto", "--model-dir", SHELL, **environment)
    assert done.returncode == 0, done.stderr
    calls = [path.read_text() for path in stubs.glob("call.*")]
    [run] = [call for call in calls if "examples/run.sh" in call]
    assert run.endswith("\0".join(["quickstart", "auto", "--model-dir", SHELL, ""]))
    tokens = {re.search("RAY_AUTH_TOKEN=([0-9a-f]{64})\n", call)[1] for call in calls}
    assert len(tokens) == 1 and all("RAY_AUTH_MODE=token\n" in call for call in calls)
    assert list(checkout.here.iterdir()) == []


def test_a_run_becomes_openrlhf_sd_with_hostile_folders_unchanged(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks.platform, "is_needed", lambda: False)
    monkeypatch.setattr(stages, "set_environment", lambda experiment: None)
    monkeypatch.setattr(inputs.subprocess, "run", lambda argv, check: SimpleNamespace(returncode=0))
    monkeypatch.setattr(inputs, "missing_inputs", lambda experiment, flags: {})
    executed = []
    monkeypatch.setattr(run_arm.os, "execv", lambda path, argv: executed.append(argv))
    run_arm.main(["quickstart", "auto", f"--model-dir={SHELL}m", f"--self-spec.run_dir={SHELL}r"])
    [argv] = executed
    assert value(argv, "--actor.model_name_or_path") == f"{tmp_path}/{SHELL}m"
    assert value(argv, "--self-spec.run_dir") == f"{tmp_path}/{SHELL}r"


def test_a_run_folder_may_begin_with_a_dash(monkeypatch, tmp_path):
    """OpenRLHF's parser would take `-r/tensorboard` for a flag."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "reward.py").write_text("")
    (tmp_path / "prompts.jsonl").write_text("")
    flags = "--actor.model_name_or_path model --reward.remote_url reward.py --data.prompt_dataset prompts.jsonl --vllm.num_engines 1"
    flags += " --ds.attn_implementation sdpa --algo.advantage.estimator group_norm --rollout.n_samples_per_prompt 4"
    trained = []
    monkeypatch.setattr(launch, "train", lambda *args: trained.append(vars(args[4])))
    assert launch.main(["--self-spec.run_dir", "-r", *flags.split()]) == 0
    assert trained[0]["logger.tensorboard_dir"] == str(tmp_path / "-r" / "tensorboard")
    assert (tmp_path / "-r" / "provenance.json").exists()


# Pages.


class Structure(HTMLParser):
    """Tags with the names of their attributes, in order."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.images, self.comments, self.text = [], [], [], ""
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *(name for name, _ in attributes)))
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_comment(self, comment):
        self.comments.append(comment)

    def handle_data(self, data):
        self.text += data


def compared(folder, last, name):
    """(page, Markdown, JSON) of runs in which everything with a name is called `name`, and their folders `last`."""
    counts = SpecDecodeCounts(10, 20, 15, [9, 6], [10, 10])
    timelines = [[[4, 100, 8, 1, 2, 40, 0.5]] * 2] * 6
    flags = {**FLAGS, "actor.model_name_or_path": name, "data.prompt_dataset": name, "flag": name}
    spec = {**FIXED, "quant": name, "calibration": name, name: name}
    runs = [
        make_run(folder / f"_a{last}", [3.0] * 6, flags=flags),
        make_run(folder / f"b{last}", [2.0] * 6, arm="fixed", self_spec=spec, flags=flags, counts=counts, timelines=timelines),
        make_run(folder / f"c{last}", [2.0] * 6, arm="fixed", self_spec=spec, flags={**flags, name: name}, counts=counts),
    ]
    for run in runs:
        record = json.loads((run / "provenance.json").read_text())
        record["machine"] |= {"cpu_model": name, "gpus": [name], "platform": name}
        record |= {"git_sha": name, "status": name}
        record["packages"][name] = name
        (run / "provenance.json").write_text(json.dumps(record))
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(log_dir=str(run / "tensorboard" / "texts")) as writer:
            writer.add_text("train/generated", f"a prompt of the run: {name}", 1)
            writer.add_scalar(f"train/{last}", 1.0, 1)
    out = folder / f"out{last}"
    assert launch.main(["compare", *map(str, runs), "--out", str(out)]) == 0
    return [(out / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "md", "json")]


@pytest.fixture(scope="module")
def harmless_page(tmp_path_factory):
    return compared(tmp_path_factory.mktemp("harmless"), "harmless", "harmless")[0]


def test_hostile_names_add_nothing_to_the_page(tmp_path, capsys, harmless_page):
    page, markdown, document = compared(tmp_path, FOLDER, HOSTILE)
    terminal = capsys.readouterr().out
    harmless, hostile = Structure(harmless_page), Structure(page)
    assert hostile.tags == harmless.tags and hostile.comments == harmless.comments == []
    assert "script" not in {tag for tag, *_ in hostile.tags} and not any(
        name.startswith("on") or name == "href" for _, *names in hostile.tags for name in names
    )
    assert "<script>alert(1)</script>" in hostile.text, "the name is shown, as text"
    assert "default-src 'none'" in page
    for image in hostile.images:
        header, _, data = image.partition(",")
        assert header == "data:image/svg+xml;base64"
        tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(base64.b64decode(data)).iter()}
        assert not tags & {"script", "foreignObject", "image", "a", "iframe"}

    for shown in (page, markdown, terminal):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
        assert "a prompt of the run" not in shown, "texts of rollouts are not read"
    assert json.loads(document)["arms"]
    assert "<script" not in markdown and "<img" not in markdown and "<b>" not in markdown
    assert not re.search(r"(?<!\\)\]\(", markdown), "no link"
    for table in (block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "a column more"
        assert all(line.startswith("|") for line in table)


# Terminals.


def clean(shown):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown), shown
    return shown


def test_watch_shows_hostile_names_as_text(tmp_path, capsys):
    spec = {**FIXED, "quant": HOSTILE}
    run = make_run(tmp_path / FOLDER, [1.0] * 2, arm="fixed", self_spec=spec)
    record = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps({**record, "status": HOSTILE}))
    assert launch.main(["watch", str(run), "--once"]) == 0
    shown = "".join(clean(capsys.readouterr().out).split())
    assert "[red]x[/red]" in shown and "[link=http:" in shown
    assert launch.main(["watch", str(tmp_path / f"{FOLDER} not there"), "--once"]) == 0
    clean(capsys.readouterr().out)


def test_explain_shows_hostile_names_as_text(tmp_path, capsys):
    model = tmp_path / FOLDER
    model.mkdir()
    config = {"architectures": [HOSTILE], "model_type": HOSTILE, "rope_scaling": {"type": HOSTILE}, "max_position_embeddings": 64}
    (model / "config.json").write_text(json.dumps(config))
    flags = [
        "--self-spec",
        "fixed",
        "--self-spec.gpu",
        "h100",
        "--actor.model_name_or_path",
        str(model),
        "--vllm.num_engines",
        "1",
    ]
    assert launch.main(["--explain", *flags, "--data.prompt_dataset", f"{HOSTILE}.jsonl"]) == 2
    shown = capsys.readouterr()
    assert "[red]x[/red]" in clean(shown.out)
    clean(shown.err)


def test_a_calibration_from_elsewhere_names_nothing_but_text(tmp_path, capsys):
    from calibrations import make_calibration

    from calib import predict

    calibration = make_calibration(model=HOSTILE, device=HOSTILE)
    calibration.save(tmp_path / "cal.json")
    clean(calibration.describe())
    predict.main(["--calibration", str(tmp_path / "cal.json"), "--batch", "1", "--seq", "64", "--gamma", "3", "--acceptance", "0.9"])
    assert "[red]x[/red]" in clean(capsys.readouterr().out)


def test_errors_name_hostile_files_as_text(tmp_path, capsys):
    folder = tmp_path / FOLDER
    assert launch.main(["compare", str(folder), "--out", str(tmp_path / "out")]) == 2
    clean(capsys.readouterr().err)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"arm": HOSTILE}))
    assert launch.main(["watch", str(folder), "--once"]) == 2
    clean(capsys.readouterr().err)
    assert str(SelfSpecError("a\x1b[2Jb\nc")) == "a?[2Jb\nc" == printable("a\x1b[2Jb\nc")


def test_a_sweep_prints_hostile_file_names_as_text(tmp_path, monkeypatch, capsys):
    """rich would read `[/]` as markup that closes nothing, and end with a traceback."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 1 << 14}
    (model / "config.json").write_text(json.dumps(config))
    cells = sweep.points_of(sweep.sweep_plan.grid([1], [64], [1]))
    monkeypatch.setattr(sweep, "measured_points", lambda out, setting: cells)
    out = tmp_path / "[red]x[-red][[/]]].csv"
    assert sweep.main(["--model", str(model), "--out", str(out), "--batches", "1", "--seqs", "64", "--gammas", "1"]) == 0
    assert "[red]x[-red]" in capsys.readouterr().out


# Names that no file system takes.

LONG = "out/" + "ä" * 128
"""A name of 128 characters and 256 bytes."""


@pytest.mark.parametrize(
    "program, argv, named",
    [
        (launch, ["--self-spec.run_dir", LONG], "--self-spec.run_dir"),
        (launch, ["--self-spec", "--self-spec.run_dir", LONG, "--explain"], "--self-spec.run_dir"),
        (launch, ["--actor.model_name_or_path", LONG], "--actor.model_name_or_path"),
        (launch, ["--data.prompt_dataset", f"a.jsonl,{LONG}/b.jsonl"], "--data.prompt_dataset"),
        (launch, ["--ckpt.output_dir", LONG], "--ckpt.output_dir"),
        (launch, ["compare", "a", LONG, "--out", "out"], "RUN_DIR"),
        (launch, ["compare", "a", "--out", LONG], "--out"),
        (launch, ["compare", "a", "--baseline", LONG, "--out", "out"], "--baseline"),
        (launch, ["watch", LONG], "RUN_DIR"),
        (run_arm, ["quickstart", "auto", "--model-dir", LONG], "--model-dir"),
        (run_arm, ["quickstart", "auto", "--data-dir", LONG], "--data-dir"),
        (run_arm, ["quickstart", "auto", "--self-spec.run_dir", LONG], "--self-spec.run_dir"),
        (compare_arms, ["quickstart", "--out", LONG], "--out"),
        (compare_arms, ["quickstart", "--dry-run", "--out", LONG], "--out"),
        (quickstart, ["--out", LONG], "--out"),
        (sweep, ["--model", "m", "--out", LONG], "--out"),
        (simplerl_zoo, ["--level", "hard", "--model", "qwen", "--out", LONG], "--out"),
    ],
)
def test_a_name_longer_than_any_file_can_have_is_one_line(program, argv, named, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f" {named}: the name ää" in line and "has 256 bytes and may have 255" in line
    assert list(tmp_path.iterdir()) == []


def test_names_of_the_longest_length_and_urls_are_taken():
    longest = "ä" * 127 + "x"
    flags.split_flags(["--self-spec.run_dir", f"{longest}/{longest}"])
    parsed = flags.parse_upstream(["--reward.remote_url", f"http://host/{LONG}", "--data.prompt_dataset", f"{longest},{longest}"])
    assert vars(parsed)["data.prompt_dataset"] == f"{longest},{longest}"


# Records that were cut.


def test_a_cut_line_is_said_in_every_view(tmp_path, capsys):
    run = make_run(tmp_path / "r", [1.0] * 4)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])  # killed while it wrote
    append_row(run / "metrics.jsonl", json.loads(lines[3]))  # and resumed
    note = "metrics.jsonl: 1 unreadable line(s) left out"
    assert launch.main(["watch", str(run), "--once"]) == 0
    shown = capsys.readouterr().out
    assert note in shown and "3 rollouts recorded" in shown
    assert launch.main(["compare", str(run), "--out", str(tmp_path / "out")]) == 0
    assert note in capsys.readouterr().out
    for name in ("report.html", "report.md"):
        assert "1 unreadable line(s) left out" in (tmp_path / "out" / name).read_text()
