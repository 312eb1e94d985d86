"""Splitting a command line into our flags and OpenRLHF's. No torch, no Ray."""

import subprocess
import sys

import pytest

from openrlhf_sd import flags
from openrlhf_sd.config import SelfSpecConfig, SelfSpecError


def test_no_flag_of_ours_is_vanilla_and_leaves_the_command_line_alone():
    argv = ["--actor.model_name_or_path", "m", "--rollout.batch_size", "8"]
    assert flags.split_flags(argv) == (None, None, argv)


@pytest.mark.parametrize(
    "argv, mode, rest",
    [
        (["--self-spec"], "auto", []),
        (["--self-spec", "--rollout.top_p", "1"], "auto", ["--rollout.top_p", "1"]),
        (["--self-spec", "toggle", "--ds.zero_stage", "2"], "toggle", ["--ds.zero_stage", "2"]),
        (["--ds.zero_stage", "2", "--self-spec=adaptive"], "adaptive", ["--ds.zero_stage", "2"]),
    ],
)
def test_mode_is_the_optional_value_of_the_bare_flag(argv, mode, rest):
    config, run_dir, left = flags.split_flags(argv)
    assert (config.mode, run_dir, left) == (mode, None, rest)


def test_values_take_the_type_of_their_field():
    argv = """--self-spec adaptive --self-spec.gamma=2 --self-spec.ladder 1,2,5 --self-spec.raise_at 0.9
        --self-spec.quant w4 --self-spec.group_size 64 --self-spec.run_dir runs/a""".split()
    config, run_dir, _ = flags.split_flags(argv)
    assert config == SelfSpecConfig(mode="adaptive", gamma=2, ladder=(1, 2, 5), raise_at=0.9, quant="w4", group_size=64)
    assert run_dir == "runs/a"


def test_run_dir_alone_records_a_vanilla_run():
    assert flags.split_flags(["--self-spec.run_dir", "runs/a"]) == (None, "runs/a", [])


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--self-spec sometimes", "--self-spec: unknown mode 'sometimes'"),
        ("--self-spec --self-spec.gam 3", "--self-spec.gam: no such flag; did you mean --self-spec.gamma?"),
        ("--self-spec --self-spec.mode fixed", "--self-spec.mode: no such flag"),
        ("--self-spec --self-spec.gamma", "--self-spec.gamma: needs a value"),
        ("--self-spec --self-spec.gamma --ds.zero_stage 2", "--self-spec.gamma: needs a value"),
        ("--self-spec --self-spec.gamma many", "--self-spec.gamma: 'many' is not a whole number"),
        ("--self-spec --self-spec.gamma 99", "--self-spec.gamma: 99 is out of range"),
        ("--self-spec --self-spec.gamma -1", "--self-spec.gamma: -1 is out of range"),
        ("--self-spec --self-spec.ladder 1,b", "--self-spec.ladder: '1,b' is not whole numbers separated by commas"),
        ("--self-spec --self-spec.gamma 1 --self-spec.gamma 2", "--self-spec.gamma: given twice"),
        ("--self-spec --self-spec toggle", "--self-spec: given twice"),
        ("--self-spec.gamma 3", "--self-spec.gamma: means nothing without --self-spec"),
    ],
)
def test_bad_flags_of_ours_are_named(argv, message):
    with pytest.raises(SelfSpecError) as error:
        flags.split_flags(argv.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_openrlhf_flags_are_parsed_by_its_own_parser():
    parsed = vars(flags.parse_upstream(["--actor.model_name_or_path", "m", "--algo.advantage.estimator", "group_norm"]))
    assert parsed["actor.model_name_or_path"] == "m"
    assert parsed["algo.advantage.estimator"] == "group_norm"
    assert parsed["ds.attn_implementation"] == "flash_attention_2"  # a default of OpenRLHF 0.11.2


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--rollout.batch_siz 8", "--rollout.batch_siz: no such flag; did you mean --rollout.batch_size?"),
        ("--selfspec.gamma 8", "--selfspec.gamma: no such flag; did you mean --self-spec.gamma?"),
        ("--rollout.batch_size eight", "--rollout.batch_size: invalid int value"),
        ("--algo.advantage.estimator grpo", "--algo.advantage.estimator: invalid choice"),
    ],
)
def test_bad_flags_of_openrlhf_are_named(argv, message):
    with pytest.raises(SelfSpecError) as error:
        flags.parse_upstream(argv.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_help_documents_every_flag_of_ours_and_of_openrlhf():
    result = subprocess.run([sys.executable, "-m", "openrlhf_sd.launch", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for flag in [*flags.our_flags(), *flags.upstream_parser()._option_string_actions]:
        assert flag in result.stdout, flag
