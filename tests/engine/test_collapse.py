"""A drafter whose drafts are hardly ever accepted is turned off for the rollout, with a cause; the output stays plain vLLM's."""

from __future__ import annotations

import json

import pytest
from engines import generate, greedy, plain_engine, self_spec_engine, spec_decode_counts, token_prompts

from openrlhf_sd import SelfSpecConfig
from openrlhf_sd.policy.acceptance_watch import WINDOW

PROMPTS = token_prompts(32, 23)
NUM_TOKENS = 64


def end_rollout(llm) -> dict:
    return json.loads(llm.llm_engine.engine_core.call_utility("self_spec_end_rollout", 0, 0, 0))


@pytest.mark.slow
def test_speculation_goes_off_for_the_rollout_and_comes_back_in_the_next(measured, warm_policy, capfd):
    with plain_engine(warm_policy) as llm:
        wanted = generate(llm, PROMPTS, greedy(NUM_TOKENS))
    config = SelfSpecConfig(mode="fixed", gamma=3, quant="w8a8")
    with self_spec_engine(warm_policy, config, worker_cls="unrepaired.UselessDrafter") as llm:
        end_rollout(llm)  # from the first mark on rollouts end at marks
        before = 0
        for _ in range(2):
            assert generate(llm, PROMPTS, greedy(NUM_TOKENS)) == wanted
            num_drafts = spec_decode_counts(llm)["num_drafts"] - before
            before += num_drafts
            assert WINDOW <= num_drafts < 2 * WINDOW
            report = end_rollout(llm)
            assert [segment[0] for segment in report["timeline"]][-1] == 0
            assert "first draft tokens accepted: cause unknown (drafter error " in report["collapse"]
            assert capfd.readouterr().out.count("self-speculation: off for the rest of this rollout") == 1
        measured(f"useless drafter: off after {num_drafts} drafts of a rollout; {report['collapse']}")
