"""The scoring functions against numbers worked out by hand."""

import pytest

from calib.accuracy import Pair, known_speedup, mape, prediction_pairs, r_squared, score, toggle_accuracy
from calib.sweep_csv import Sweep, Timing


class ConstantCosts:
    """Target 10 ms, draft 2 ms (3 in an engine built for one gamma), verify 12 ms; 100 times that for identical
    prompts."""

    def __init__(self, scale=1):
        self.scale = scale

    def under(self, prompts):
        return ConstantCosts(100 if prompts == "identical" else 1)

    def target_step_s(self, batch, context):
        return 0.010 * self.scale

    def draft_step_s(self, batch, context, gamma=None):
        return (0.002 if gamma is None else 0.003) * self.scale

    def verify_step_s(self, batch, context, gamma):
        return 0.012 * self.scale


def make_sweep(timings, **changed):
    values = {"model": "M", "device": None, "quant": None, "tensor_parallel_size": None, "distinct_prompts": True}
    return Sweep(**values | changed, timings=tuple(timings), sha256="", path="sweep.csv")


def test_mape_is_relative_to_the_measured_time():
    # |12/10 - 1| = 0.2, |15/20 - 1| = 0.25; mean 0.225. Relative to the predicted it would be 0.25.
    assert mape([10, 20], [12, 15]) == pytest.approx(0.225)


def test_r_squared_by_hand():
    # mean 2, total 1 + 0 + 1 = 2; residuals 0, 0.5, 0.5 squared 0 + 0.25 + 0.25 = 0.5; 1 - 0.25
    assert r_squared([1, 2, 3], [1, 2.5, 2.5]) == pytest.approx(0.75)
    assert r_squared([1, 2, 3], [2, 2, 2]) == pytest.approx(0)
    assert r_squared([2, 2], [2, 3]) is None


def test_a_cycle_not_timed_whole_is_gamma_drafts_and_a_verify():
    timings = [
        Timing("draft", 4, 256, 3, 0.003),
        Timing("verify", 4, 256, 3, 0.011),
        Timing("target_sd", 4, 256, 3, 0.5),
    ]
    by_kind = {pair.kind: pair for pair in prediction_pairs(ConstantCosts(), make_sweep(timings))}
    assert set(by_kind) == {"draft", "verify", "cycle"}  # the engine's own plain step is no term of the model
    assert by_kind["cycle"].measured_s == pytest.approx(3 * 0.003 + 0.011)
    assert by_kind["cycle"].predicted_s == pytest.approx(3 * 0.002 + 0.012)


def test_a_cycle_timed_whole_is_taken_as_measured_wherever_it_stands():
    parts = [Timing("draft", 4, 256, 3, 0.003), Timing("verify", 4, 256, 3, 0.011)]
    whole = Timing("cycle", 4, 256, 3, 0.025)
    for timings in ([whole, *parts], [*parts, whole]):
        cycles = [pair for pair in prediction_pairs(ConstantCosts(), make_sweep(timings)) if pair.kind == "cycle"]
        assert [cycle.measured_s for cycle in cycles] == [0.025]


def test_predictions_are_for_the_conditions_of_the_sweep():
    timings = [Timing("target", 4, 256, 0, 1.0), Timing("draft", 4, 256, 3, 1.0), Timing("verify", 4, 256, 3, 1.0)]
    sweep = make_sweep(timings, distinct_prompts=False, engine_per_gamma=True)
    predicted = {pair.kind: pair.predicted_s for pair in prediction_pairs(ConstantCosts(), sweep)}
    # identical prompts: times 100; a draft step of an engine per gamma: 3 ms; cycle 3 x 0.3 + 1.2
    assert predicted == pytest.approx({"target": 1.0, "draft": 0.3, "verify": 1.2, "cycle": 2.1})


def test_known_speedup_is_tokens_per_cycle_over_relative_cycle_time():
    # a = 1: 4 tokens in 0.020 against 4 x 0.010
    assert known_speedup(0.010, 0.020, 3, 1.0) == pytest.approx(2.0)
    # a = 0.5, gamma 1: 1.5 tokens in 0.020 against 1.5 x 0.010
    assert known_speedup(0.010, 0.020, 1, 0.5) == pytest.approx(0.75)


def test_toggle_accuracy_counts_agreeing_decisions():
    # gamma 1: L = 1 + a, speed-up = (1 + a) x 10 / cycle. Measured cycle 17 ms: at a = 0.8 1.0588 (on), at 0.7 1.0 (off).
    # Predicted cycle 18 ms: 1.0 (off) and 0.944 (off). So one of two is right. Both measured lie within 10% of 1.05.
    pairs = [Pair("target", 1, 256, 0, 0.010, 0.010), Pair("cycle", 1, 256, 1, 0.017, 0.018)]
    accuracy = toggle_accuracy(pairs, margin=0.05, acceptances=(0.7, 0.8))
    assert (accuracy.overall, accuracy.num_decisions) == (0.5, 2)
    assert (accuracy.near_boundary, accuracy.num_near_boundary) == (0.5, 2)


def test_decisions_far_from_the_boundary_are_not_counted_near_it():
    # measured speed-ups 1.8 x 10 / 10 = 1.8: far away
    pairs = [Pair("target", 1, 256, 0, 0.010, 0.010), Pair("cycle", 1, 256, 1, 0.010, 0.011)]
    accuracy = toggle_accuracy(pairs, margin=0.05, acceptances=(0.8,))
    assert (accuracy.overall, accuracy.near_boundary, accuracy.num_near_boundary) == (1.0, None, 0)


def test_a_speedup_of_exactly_one_plus_margin_speculates():
    # 2 x 10 / 16 = 1.25 = 1 + 0.25, exact in binary; a prediction a hair slower says no
    at = [Pair("target", 1, 256, 0, 0.010, 0.010), Pair("cycle", 1, 256, 1, 0.016, 0.0160001)]
    assert toggle_accuracy(at, margin=0.25, acceptances=(1.0,)).overall == 0.0


def test_the_default_range_has_eighteen_acceptances():
    # 0.80, 0.81, ..., 0.97
    pairs = [Pair("target", 1, 256, 0, 0.010, 0.010), Pair("cycle", 1, 256, 1, 0.010, 0.010)]
    assert toggle_accuracy(pairs).num_decisions == 18


def test_a_cycle_without_its_target_step_decides_nothing():
    pairs = [Pair("target", 2, 256, 0, 0.010, 0.010), Pair("cycle", 1, 256, 1, 0.010, 0.010)]
    assert toggle_accuracy(pairs).overall is None


def test_scores_are_by_kind():
    pairs = [
        Pair("target", 1, 256, 0, 0.010, 0.011),
        Pair("target", 2, 256, 0, 0.020, 0.018),
        Pair("verify", 1, 256, 3, 0.010, 0.012),
    ]
    scores = score(pairs)
    assert scores.mape == pytest.approx({"target": 0.1, "verify": 0.2})
    assert scores.num_scored == {"target": 2, "verify": 1}
    # target: mean 15, total 50; residuals 1 + 4 = 5; 1 - 0.1
    assert scores.r_squared["target"] == pytest.approx(0.9) and scores.r_squared["verify"] is None
