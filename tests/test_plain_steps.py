"""The timeline of a vanilla engine, from the arrivals of its outputs."""

from openrlhf_sd.plain_steps import PlainSteps
from openrlhf_sd.step_ledger import TIMELINE_COLUMNS


def timeline(steps):
    return [dict(zip(TIMELINE_COLUMNS, segment)) for segment in steps.report()["timeline"]]


def test_plain_steps_are_timed_between_arrivals():
    steps = PlainSteps()
    steps.add(10.0, num_new_tokens=4, num_first_tokens=4, num_prompt_tokens=20, num_unfinished=4)  # the prompts
    for now_s in (10.5, 11.0, 11.5):
        steps.add(now_s, num_new_tokens=4, num_first_tokens=0, num_prompt_tokens=0, num_unfinished=4)
    prompts, decode = timeline(steps)
    assert (prompts["first_batch"], prompts["seconds"], prompts["num_tokens"]) == (0, 0.0, 4)
    assert (decode["gamma"], decode["num_steps"], decode["last_batch"], decode["seconds"], decode["num_tokens"]) == (0, 3, 4, 1.5, 12)
    assert steps.report()["num_steps"] == 4


def test_the_time_an_engine_was_idle_is_no_step_time():
    steps = PlainSteps()
    steps.add(1.0, num_new_tokens=1, num_first_tokens=1, num_prompt_tokens=5, num_unfinished=1)
    steps.add(1.25, num_new_tokens=1, num_first_tokens=0, num_prompt_tokens=0, num_unfinished=0)
    steps.add(60.0, num_new_tokens=1, num_first_tokens=1, num_prompt_tokens=5, num_unfinished=1)  # the next turn of an agent
    assert sum(segment["seconds"] for segment in timeline(steps)) == 0.25


def test_a_vanilla_report_holds_nothing_about_speculation():
    assert set(PlainSteps().report()) == {"num_steps", "timeline"}
