"""The rollout simulator: tokens are conserved, sums can be redone by hand, the oracle is a bound, and the command line is strict."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from calib.simulate_grid import Cell, failures
from calib.sweep_csv import Timing
from openrlhf_sd import simulator
from openrlhf_sd.calibration import shipped_paths
from openrlhf_sd.config import MAX_GAMMA, MODES, SelfSpecConfig
from openrlhf_sd.metrics import append_row
from openrlhf_sd.policy.speedup import acceptance_length, geometric_acceptance_length
from openrlhf_sd.simulation.acceptance import Bursty, ByPosition, Independent, acceptance_process, conditional
from openrlhf_sd.simulation.engine import Workload, plain_rollout_s, simulate
from openrlhf_sd.simulation.lengths import length_source
from openrlhf_sd.simulation.rollouts import Oracle, RandomInputs, pooled_acceptance, reduction, simulate_seed
from openrlhf_sd.simulation.step_times import from_cost_model, from_timings
from openrlhf_sd.simulation.sweep_truth import true_step_times


class RoundCosts:
    """Step times in round numbers: weights of 10 ms (drafter 3 ms), 0.1 ms per token computed, 1 microsecond per request and token of
    context."""

    def target_step_s(self, batch, context):
        return self.verify_step_s(batch, context, 0)

    def draft_step_s(self, batch, context):
        return 3e-3 + 1e-4 * batch + 1e-6 * batch * context

    def verify_step_s(self, batch, context, gamma):
        return 10e-3 + 1e-4 * batch * (gamma + 1) + 1e-6 * batch * context


COSTS = RoundCosts()
ALL_ACCEPTED = Independent(1.0)


def timings_of(costs, batches=(1, 4, 16, 64), contexts=(256, 1024, 4096), gammas=(3, 7, 15)):
    cells = [(batch, context) for batch in batches for context in contexts]
    timings = [Timing("target", *cell, 0, costs.target_step_s(*cell)) for cell in cells]
    for gamma in gammas:
        timings += [Timing("draft", *cell, gamma, costs.draft_step_s(*cell)) for cell in cells]
        timings += [Timing("verify", *cell, gamma, costs.verify_step_s(*cell, gamma)) for cell in cells]
    return timings


SWEEP_TIMES = from_timings(timings_of(COSTS), 32, off_costs_target_sd=False)
MODEL_TIMES = from_cost_model(COSTS, 32)


class Scripted:
    """Drafts by a list, over and over, and keeps what it is told."""

    def __init__(self, *gammas):
        self.gammas = gammas
        self.asked, self.told, self.ended = [], [], []

    def next_gamma(self, observation):
        self.asked.append(observation)
        return self.gammas[(len(self.asked) - 1) % len(self.gammas)]

    def observe(self, step):
        self.told.append(step)

    def end_rollout(self, acceptance):
        self.ended.append(acceptance)


def work_of(lengths, process=ALL_ACCEPTED, prompt_tokens=100, seed=0):
    return Workload.draw(np.random.default_rng(seed), np.array(lengths), prompt_tokens, process)


@pytest.mark.parametrize("process", [Independent(0.8), ByPosition((0.9, 0.5)), Bursty(0.8)])
@pytest.mark.parametrize("gammas", [(0,), (1,), (5,), (0, 0, 3, 16, 0, 1)])
def test_every_request_ends_with_exactly_its_length(process, gammas):
    lengths = [1, 2, 3, 50, 200, 7, 50]
    controller = Scripted(*gammas)
    run = simulate(controller, work_of(lengths, process), MODEL_TIMES)
    assert run.num_output_tokens == sum(lengths)
    # What a request got: one token per step it was in, and the accepted drafts; the last step may overshoot its length by what was
    # accepted beyond it. With no drafts there is no overshoot, and so steps times requests is the very number of tokens.
    got = sum(step.num_decodes + sum(step.num_accepted_tokens_per_pos) for step in controller.told)
    assert sum(lengths) <= got <= sum(lengths) + len(lengths) * max(gammas)
    assert sum(step.num_tokens for step in controller.told) == sum(lengths)  # what came out
    assert sum(step.num_ended for step in controller.told) == len(lengths)
    decodes = [observation.num_decodes for observation in controller.asked]
    assert decodes == sorted(decodes, reverse=True) and decodes[0] == len(lengths) and decodes[-1] >= 1


def test_a_request_advances_by_the_accepted_drafts_and_one():
    # Everything accepted, gamma 3: the first step has nothing to verify (1 token), then 4 per step: 1, 5, 9, 13 >= 10 tokens in 4 steps.
    controller = Scripted(3)
    run = simulate(controller, work_of([10]), MODEL_TIMES)
    assert run.num_steps == 4
    assert [step.gamma_verified for step in controller.told] == [0, 3, 3, 3]
    assert [step.gamma_drafted for step in controller.told] == [3, 3, 3, 3]
    assert [observation.mean_context for observation in controller.asked] == [100, 101, 105, 109]
    # A verify step costs its own gamma, and the drafts made in the same step come on top, also in the last one, as in vLLM.
    seconds = sum(COSTS.verify_step_s(1, c, g) + 3 * COSTS.draft_step_s(1, c) for c, g in ((100, 0), (101, 3), (105, 3), (109, 3)))
    assert run.seconds == pytest.approx(seconds, rel=1e-4)
    assert (run.num_drafts, run.num_draft_tokens, run.num_accepted_tokens) == (3, 9, 9)
    assert controller.told[1].num_draft_tokens_per_pos == controller.told[1].num_accepted_tokens_per_pos == (1, 1, 1)
    # The engine was idle before its first step: that one has no step time.
    assert [step.step_s is None for step in controller.told] == [True, False, False, False]


def test_mean_context_is_that_of_the_requests_still_decoding():
    controller = Scripted(0)
    simulate(controller, work_of([2, 4]), MODEL_TIMES)
    assert [(o.num_decodes, o.mean_context) for o in controller.asked] == [(2, 100), (2, 101), (1, 102), (1, 103)]


def test_a_plain_rollout_takes_the_sum_worked_out_by_hand():
    # Lengths 2 and 4: batches 2, 2, 1, 1 at contexts 256, 257, 258, 259 of the prompt and the tokens so far.
    seconds = sum(COSTS.target_step_s(b, c) for b, c in ((2, 256), (2, 257), (1, 258), (1, 259)))
    work = work_of([2, 4], prompt_tokens=256)
    assert plain_rollout_s(work, MODEL_TIMES) == pytest.approx(seconds, rel=1e-4)
    assert simulate(Scripted(0), work, MODEL_TIMES).seconds == pytest.approx(plain_rollout_s(work, MODEL_TIMES), rel=1e-12)


def test_steps_off_cost_what_plain_vllm_costs_through_a_whole_shrinking_rollout():
    work = work_of([5, 900, 33, 33, 4000, 120], prompt_tokens=300)
    assert simulate(Scripted(0), work, SWEEP_TIMES).seconds == pytest.approx(plain_rollout_s(work, SWEEP_TIMES), rel=1e-12)


@pytest.mark.parametrize("times", [MODEL_TIMES, SWEEP_TIMES])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_the_oracle_is_no_slower_than_plain_or_any_constant_gamma(times, acceptance):
    # Acceptance 0 and 1 leave nothing to chance; at 0.5 luck is the same for all. What is drafted past the end of a request is lost,
    # which nobody foresees: that is 4 steps of 16 drafts at most.
    work = work_of([500] * 8 + [3000], Independent(acceptance))
    process = Independent(acceptance)
    oracle = simulate(Oracle(times, process), work, times).seconds
    assert oracle <= plain_rollout_s(work, times) * 1.001
    assert oracle <= min(simulate(Scripted(g), work, times).seconds for g in range(1, MAX_GAMMA + 1)) * 1.01


def test_the_oracle_drafts_nothing_when_nothing_is_accepted_and_much_when_all_is():
    controller = Oracle(MODEL_TIMES, Independent(0.0))
    run = simulate(controller, work_of([50]), MODEL_TIMES)
    assert sum(run.steps_by_gamma[1:]) == 0
    run = simulate(Oracle(MODEL_TIMES, Independent(1.0)), work_of([500]), MODEL_TIMES)
    assert run.steps_by_gamma[MAX_GAMMA] == run.num_steps


@pytest.mark.parametrize(
    ("process", "conditionals"), [(Independent(0.9), [0.9] * 5), (ByPosition((0.9, 0.8, 0.5)), [0.9, 0.8, 0.5, 0.5, 0.5])]
)
def test_measured_acceptance_is_the_one_asked_for(process, conditionals):
    controller = Scripted(5)
    run = simulate(controller, work_of([2000] * 30, process), MODEL_TIMES)
    reached = np.sum([step.num_draft_tokens_per_pos for step in controller.told[1:]], axis=0)
    accepted = np.sum([step.num_accepted_tokens_per_pos for step in controller.told[1:]], axis=0)
    assert conditional(list(accepted / reached)) == pytest.approx(conditionals, abs=0.015)
    assert 1 + run.num_accepted_tokens / run.num_drafts == pytest.approx(acceptance_length(conditionals, 5), rel=0.01)
    assert process.mean_acceptance_length(5) == pytest.approx(acceptance_length(conditionals, 5))


@pytest.mark.parametrize("gamma", [1, 4, 12])
def test_bursty_acceptance_has_the_length_worked_out_exactly_and_no_geometric_one(gamma):
    process = Bursty(0.9)
    run = simulate(Scripted(gamma), work_of([5000] * 30, process), MODEL_TIMES)
    assert 1 + run.num_accepted_tokens / run.num_drafts == pytest.approx(process.mean_acceptance_length(gamma), rel=0.015)
    assert process.mean_acceptance_length(gamma) < geometric_acceptance_length(0.9, gamma)
    assert Bursty(1.0).mean_acceptance_length(gamma) == pytest.approx(gamma + 1)


def test_luck_does_not_depend_on_the_policy():
    # The 1st, 2nd, ... token of a request is an easy or a hard one whoever drafts it: gamma 2 accepts what gamma 6 accepts, cut at 2.
    work = work_of([300] * 4, Independent(0.7))
    places = work.starts + 17
    assert (work.draws.accepted(places, 2) == np.minimum(work.draws.accepted(places, 6), 2)).all()


def test_interpolation_hits_the_measured_points_and_says_what_it_extrapolates():
    for batch, context, gamma in ((1, 256, 3), (4, 1024, 7), (16, 4096, 15)):
        assert SWEEP_TIMES.verify_s(batch, context, gamma) == pytest.approx(COSTS.verify_step_s(batch, context, gamma))
        assert SWEEP_TIMES.draft_s(batch, context, gamma) == pytest.approx(gamma * COSTS.draft_step_s(batch, context))
    # Between points, in the logarithm: batch 2 is half way from 1 to 4, context 512 half way from 256 to 1024.
    corners = [COSTS.target_step_s(batch, context) for batch in (1, 4) for context in (256, 1024)]
    assert SWEEP_TIMES.verify_s(2, 512, 0) == pytest.approx(sum(corners) / 4)
    # RoundCosts are linear in context, so continuing the last segment is exact; gamma 11 lies half way between 7 and 15.
    assert SWEEP_TIMES.verify_s(16, 8192, 11) == pytest.approx(COSTS.verify_step_s(16, 8192, 11))
    inside = [(1, 256, 0), (64, 4096, 15), (3, 300, 4)]
    outside = [(65, 300, 3), (3, 255, 3), (3, 4097, 3), (3, 300, 1), (3, 300, 16)]
    times = from_timings(timings_of(COSTS), 128, off_costs_target_sd=False)
    assert [times.is_extrapolated(*point) for point in inside + outside] == [False] * 3 + [True] * 5
    assert times.verify_s(128, 1024, 7) == pytest.approx(COSTS.verify_step_s(128, 1024, 7))


def test_a_quick_sweep_is_enough_for_a_truth():
    # The shape of calib.sweep --quick: six cells of a grid of nine. Linear in context, so the missing ones are filled exactly.
    cells = ((1, 64), (1, 512), (4, 64), (4, 256), (16, 64), (16, 512))
    timings = [timing for timing in timings_of(COSTS, (1, 4, 16), (64, 256, 512), (1, 3, 7)) if timing.point[:2] in cells]
    times = from_timings(timings, 16, off_costs_target_sd=True)
    assert times.num_filled == 3 * (1 + 3 + 3)
    assert times.cycles_s(16, 256)[3] == pytest.approx(3 * COSTS.draft_step_s(16, 256) + COSTS.verify_step_s(16, 256, 3))


def test_a_measured_cycle_and_the_engines_own_off_step_count():
    timings = timings_of(COSTS)
    timings += [Timing("cycle", 4, 1024, 7, 0.123), Timing("target_sd", 4, 1024, 0, 0.0456)]
    times = from_timings(timings, 16, off_costs_target_sd=True)
    assert times.cycles_s(4, 1024)[7] == pytest.approx(0.123)
    assert times.verify_s(4, 1024, 0) == pytest.approx(0.0456)
    times = from_timings(timings, 16, off_costs_target_sd=False)
    assert times.verify_s(4, 1024, 0) == pytest.approx(COSTS.target_step_s(4, 1024))


def test_a_missing_point_is_filled_from_its_neighbours():
    timings = [timing for timing in timings_of(COSTS) if (timing.kind, *timing.point) != ("verify", 16, 4096, 7)]
    times = from_timings(timings, 16, off_costs_target_sd=False)
    assert times.num_filled == 1
    assert times.verify_s(16, 4096, 7) == pytest.approx(COSTS.verify_step_s(16, 4096, 7))  # linear in context


def results_of(seed=0, mode="fixed", noise=0.05, num_rollouts=3):
    inputs = RandomInputs(length_source("lognormal:60,0.8,400"), acceptance_process("0.8"), 2, 12, 64)
    policies = [("ar", None), (mode, SelfSpecConfig(mode=mode)), ("oracle", None)]
    return simulate_seed(policies, inputs, MODEL_TIMES, COSTS, seed=seed, num_rollouts=num_rollouts, noise=noise)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_rollouts_and_another_seed_others(mode):
    def seconds(results):
        return [result.makespan_s for result in results[mode]]

    assert seconds(results_of(0, mode)) == seconds(results_of(0, mode))
    assert seconds(results_of(0, mode)) != seconds(results_of(1, mode))


def test_all_policies_decode_the_same_tokens_against_the_same_plain_rollout():
    results = results_of()
    for rollout in range(3):
        found = [results[name][rollout] for name in ("ar", "fixed", "oracle")]
        assert len({result.plain_makespan_s for result in found}) == 1
        assert len({sum(engine.num_output_tokens for engine in result.engines) for result in found}) == 1
    assert reduction(results["ar"]) == 0


def test_engines_of_a_run_are_told_their_pooled_acceptance(monkeypatch):
    made = []

    def scripted(config, costs):
        made.append(Scripted(2 + len(made)))
        return made[-1]

    monkeypatch.setattr("openrlhf_sd.simulation.rollouts.make_controller", scripted)
    results = results_of(num_rollouts=2)["fixed"]
    assert [controller.gammas for controller in made] == [(2,), (3,)]  # one per engine, kept from rollout to rollout
    assert made[0].ended == made[1].ended == [pooled_acceptance(result.engines) for result in results]
    assert made[0].ended[0].num_drafts == sum(step.num_drafts for controller in made for step in controller.told[: _end(controller)])


def _end(controller):
    """Steps of the first rollout: the second one's first step has no step time."""
    return next(index for index, step in enumerate(controller.told) if index and step.step_s is None)


def test_reduction_is_of_the_slowest_engine():
    results = results_of(noise=0.0)["fixed"]
    first = results[0]
    assert first.makespan_s == max(engine.seconds for engine in first.engines)
    assert reduction([first]) == pytest.approx(1 - first.makespan_s / first.plain_makespan_s)


def test_lengths_are_log_normal_and_cut():
    lengths = length_source("lognormal:700,0.5,100000")(np.random.default_rng(0), 100_000)
    assert np.mean(lengths) == pytest.approx(700, rel=0.01)
    assert np.std(np.log(lengths)) == pytest.approx(0.5, rel=0.02)
    lengths = length_source("lognormal:700,1.0,800")(np.random.default_rng(0), 1000)
    assert (lengths.min() >= 1, lengths.max()) == (True, 800)


@pytest.mark.parametrize("text", ["5\n7\n9\n", "[5, 7, 9]", '{"response_lengths": [5, 7]}\n{"response_lengths": [9]}\n'])
def test_lengths_come_from_a_file(tmp_path, text):
    path = tmp_path / "lengths"
    path.write_text(text)
    assert set(length_source(str(path))(np.random.default_rng(0), 100).tolist()) == {5, 7, 9}


# The command line


def published_sweep(path, costs=COSTS, wrong_ms=None):
    lines = ["model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms,min_ms,max_ms,n_samples"]
    modes = {"target": "target_decode", "draft": "drafter_decode", "verify": "target_verify"}
    for timing in timings_of(costs):
        ms = (wrong_ms or {}).get((timing.kind, *timing.point), f"{1000 * timing.seconds:.6f}")
        lines.append(f"toy,{timing.batch},{timing.context},{timing.gamma},{modes[timing.kind]},{ms},{ms},0,{ms},{ms},10")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_contaminated_draft_step_is_no_truth(tmp_path):
    path = published_sweep(tmp_path / "sweep.csv", wrong_ms={("draft", 64, 4096, 15): "1.0"})
    _, times = true_step_times(path, 64)
    assert times.draft_s(64, 4096, 15) == pytest.approx(15 * COSTS.draft_step_s(64, 4096), rel=1e-4)


SMALL = ["--engines", "2", "--batch", "8", "--rollouts", "2", "--seeds", "2", "--lengths", "lognormal:50,0.5,200"]


@pytest.fixture
def sweep(tmp_path):
    return published_sweep(tmp_path / "sweep.csv")


def document_of(capsys, *argv):
    assert simulator.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_document_holds_reductions_with_their_spread(sweep, capsys):
    document = document_of(capsys, "--sweep", sweep, "--policy", "ar,fixed,oracle", *SMALL, "--self-spec.gamma", "3")
    assert list(document["policies"]) == ["ar", "fixed", "oracle"]
    assert document["policies"]["ar"]["reduction_after_first"]["mean"] == 0
    fixed, oracle = document["policies"]["fixed"], document["policies"]["oracle"]
    assert fixed["mean_gamma_when_on"] == 3 and fixed["speculating_share"] == 1
    assert fixed["reduction_after_first"]["low"] <= fixed["reduction_after_first"]["mean"] <= oracle["reduction_after_first"]["high"]
    assert oracle["num_output_tokens"] == fixed["num_output_tokens"]
    assert fixed["extrapolated_share"] == 0  # batches 1 to 8, contexts from 512, gamma 3: all inside the sweep


def test_a_calibration_alone_is_the_truth_that_all_policies_know(capsys):
    calibration = shipped_paths()[0]
    document = document_of(capsys, "--calibration", calibration, *SMALL, "--lengths", "lognormal:300,0.5,900")
    assert document["truth"]["calibration"] == calibration.name
    saved = {name: found["reduction_after_first"]["mean"] for name, found in document["policies"].items()}
    assert list(saved) == list(simulator.POLICIES)
    assert max(saved.values()) <= saved["oracle"] + 0.01
    assert all(found["extrapolated_share"] == 0 for found in document["policies"].values())


def test_seeds_in_processes_give_what_one_process_gives(sweep, capsys):
    argv = ["--sweep", sweep, "--policy", "fixed,auto", "--no-calibration", *SMALL]
    one, two = document_of(capsys, *argv), document_of(capsys, *argv, "--jobs", "2")
    assert one["policies"] == two["policies"]


def test_tables_are_printed_without_json(sweep, capsys):
    assert simulator.main(["--sweep", str(sweep), "--policy", "fixed,oracle", *SMALL]) == 0
    assert "oracle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--sweep or --calibration"),
        (["--sweep", "nowhere.csv", "--policy", "ar"], "nowhere.csv"),
        (["--sweep", "SWEEP", "--policy", "best"], "'best'"),
        (["--sweep", "SWEEP", "--policy", "ar,ar"], "given twice"),
        (["--sweep", "SWEEP", "--polcy", "ar"], "--polcy"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--self-spec.gama", "3"], "--self-spec.gama"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--acceptance", "1.2"], "--acceptance"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--acceptance", "nan"], "--acceptance"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--acceptance", "bursty:0.5"], "--acceptance"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--acceptance", "often"], "--acceptance"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--lengths", "nowhere.txt"], "--lengths"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--lengths", "lognormal:700"], "--lengths"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--lengths", "lognormal:-7,1,100"], "--lengths"),
        (["--sweep", "SWEEP", "--policy", "fixed", "--batch", "0"], "--batch"),
        (["--sweep", "SWEEP", "--policy", "toggle"], "--model-config"),
        (["--sweep", "SWEEP", "--policy", "toggle", "--no-calibration"], "--self-spec.calibration"),
        (["--sweep", "SWEEP", "--no-calibration", "--model-config", "m.json"], "--no-calibration"),
        (["--sweep", "SWEEP", "--policy", "ar", "--trace", "t.jsonl", "--batch", "8"], "--batch"),
        (["--sweep", "SWEEP", "--policy", "ar", "--trace", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(sweep, capsys, argv, words):
    assert simulator.main([str(sweep) if token == "SWEEP" else token for token in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error, error


@pytest.mark.parametrize("text", ["", "5\n-1\n", "5\n0\n", "a\n", "[1.5]", "[]", "{}\n"])
def test_a_bad_lengths_file_is_an_error(tmp_path, sweep, capsys, text):
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    assert simulator.main(["--sweep", str(sweep), "--policy", "ar", "--lengths", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def grid_cell(auto, uncalibrated, adaptive=0.05, oracle=0.10, first=0.0):
    saved = {"adaptive": adaptive, "auto": auto, "auto without": uncalibrated, "oracle": oracle}
    return {
        name: {"reduction_after_first": {"mean": mean, "low": mean}, "reduction_first": {"low": min(mean, first)}}
        for name, mean in saved.items()
    }


@pytest.mark.parametrize(
    ("cell", "found", "missed"),
    [
        (Cell(0, "heavy", 0.9), grid_cell(0.095, 0.067), []),
        (Cell(0, "heavy", 0.9), grid_cell(0.095, 0.066), ["auto without under 70% of auto"]),
        (Cell(0, "heavy", 0.85), grid_cell(0.095, 0.066), []),
        (Cell(0, "light", 0.9), grid_cell(0.095, 0.0), []),
        (Cell(0, "light", 0.9), grid_cell(0.089, 0.08), ["under 90% of oracle"]),
        (Cell(0, "light", 0.9), grid_cell(0.04, 0.04, oracle=0.029), ["under adaptive"]),
        (Cell(0, "light", 0.9), grid_cell(0.095, -0.006), ["auto without 0.6% slower than plain"]),
        (
            Cell(0, "light", 0.9),
            grid_cell(0.095, 0.09, first=-0.007),
            ["auto 0.7% slower than plain", "auto without 0.7% slower than plain"],
        ),
    ],
)
def test_the_grid_says_what_auto_misses(cell, found, missed):
    assert failures(cell, found) == missed


# Replay


def trace_row(rollout, engine, lengths, rollout_s, shares=(0.9, 0.72)):
    return {
        "rollout": rollout,
        "engine": engine,
        "timing/rollout_s": rollout_s,
        "num_prompt_tokens": 100 * len(lengths),
        "response_lengths": lengths,
        **{f"rollout/sd/acceptance_rate_pos_{i}": share for i, share in enumerate(shares)},
    }


def write_run(folder, rows, arm="fixed", gamma=2):
    for row in rows:
        append_row(folder / "metrics.jsonl", row)
    config = None if arm == "vanilla" else SelfSpecConfig(mode=arm, gamma=gamma).to_dict()
    (folder / "config.json").write_text(json.dumps({"arm": arm, "self_spec": config}))
    return folder / "metrics.jsonl"


def test_a_replay_repeats_what_ran_and_is_compared_with_the_clock(tmp_path, sweep, capsys):
    rows = [trace_row(0, 0, [3, 5], 1.0), trace_row(0, 1, [40], 0.6), trace_row(1, 0, [4], None), trace_row(1, 1, [4], 2.0)]
    trace = write_run(tmp_path, rows)
    document = document_of(capsys, "--sweep", sweep, "--trace", trace)
    assert list(document["policies"]) == ["fixed"] and document["policies"]["fixed"]["mean_gamma_when_on"] == 2
    replay = document["replay"]["fixed"]
    assert [(row["rollout"], row["measured_s"]) for row in replay["rollouts"]] == [(0, 1.0), (1, None)]
    # Only the rollout that both engines measured counts: predicted over measured, less one.
    assert replay["overall_error"] == pytest.approx(replay["rollouts"][0]["predicted_s"] / 1.0 - 1)
    assert document["policies"]["fixed"]["num_output_tokens"] == 3 * (3 + 5 + 40 + 4 + 4)  # three seeds


def test_a_replay_is_also_compared_with_the_engine_steps_alone(tmp_path, sweep, capsys):
    timeline = [[0, 0, 1, 2, 2, 0.25, 2], [2, 1, 3, 2, 1, 0.5, 8]]
    rows = [trace_row(number, 0, [3, 5], 2.0) | {"timeline": timeline} for number in range(2)]
    replay = document_of(capsys, "--sweep", sweep, "--trace", write_run(tmp_path, rows))["replay"]["fixed"]
    assert [row["engine_s"] for row in replay["rollouts"]] == [0.75, 0.75]
    predicted = [row["predicted_s"] for row in replay["rollouts"]]
    assert replay["overall_engine_error"] == pytest.approx(sum(predicted) / 1.5 - 1)
    assert replay["engine_error_after_first"] == pytest.approx(predicted[1] / 0.75 - 1)
    assert replay["overall_error"] == pytest.approx(sum(predicted) / 4.0 - 1)


def test_a_vanilla_run_replays_without_acceptance(tmp_path, sweep, capsys):
    trace = write_run(tmp_path, [trace_row(0, 0, [2, 2, 2, 4], 0.1, shares=())], arm="vanilla")
    replay = document_of(capsys, "--sweep", sweep, "--trace", trace, "--seeds", 1)["replay"]["ar"]
    # Batches 4, 4, 1, 1 at contexts 100 to 103. 400 prompt tokens at 0.1 ms each come first.
    seconds = sum(COSTS.target_step_s(b, c) for b, c in ((4, 100), (4, 101), (1, 102), (1, 103))) + 400 * 1e-4
    assert replay["rollouts"][0]["predicted_s"] == pytest.approx(seconds, rel=1e-6)
    assert simulator.main(["--sweep", str(sweep), "--trace", str(trace), "--policy", "oracle"]) == 2
    assert "--acceptance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"rollout": 0, "engine": 0}, "response_lengths"),
        ({"rollout": 0, "engine": 0, "response_lengths": [5]}, "num_prompt_tokens"),
        ({"engine": 0}, "'rollout'"),
        ({"rollout": 0, "engine": 0, "response_lengths": [], "num_prompt_tokens": 0}, "no row holds a response"),
    ],
)
def test_a_trace_without_what_a_replay_needs_is_an_error(tmp_path, sweep, capsys, row, words):
    trace = write_run(tmp_path, [row], arm="vanilla")
    assert simulator.main(["--sweep", str(sweep), "--trace", str(trace)]) == 2
    assert words in capsys.readouterr().err


def test_conditional_acceptance_is_the_ratio_of_neighbouring_shares():
    assert conditional([0.9, 0.72, 0.0, 0.0]) == pytest.approx((0.9, 0.8, 0.0, 0.0))
    assert conditional([0.5, 0.6]) == (0.5, 1.0)  # rounding or a changing gamma can make the later share the larger one


def test_importing_the_simulator_loads_no_engine():
    code = (
        "import sys, openrlhf_sd.simulator, openrlhf_sd.simulation.trace\n"
        "print([name for name in ('torch', 'vllm', 'ray', 'transformers', 'openrlhf') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
