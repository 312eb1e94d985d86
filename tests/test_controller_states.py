"""Controller states beside OpenRLHF's checkpoints."""

from __future__ import annotations

import dataclasses

import pytest
from calibrations import CONFIG, TERMS

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.controller_states import ControllerStates, checkpoint_step, controller_states
from openrlhf_sd.policy.controller import make_controller
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.model_constants import model_constants
from openrlhf_sd.row_writer import RowWriter

FLAGS = {"ckpt.save_steps": 2, "ckpt.load_enable": False, "eval.dataset": None, "eval.steps": -1}


def states_of(path, **changes):
    return controller_states({**FLAGS, "train.async_enable": False, "ckpt.path": str(path), **changes}, "adaptive")


def checkpoint(path, tag: str):
    (path / "_actor").mkdir(parents=True, exist_ok=True)
    (path / "_actor" / "latest").write_text(tag)


def test_a_run_without_checkpoints_keeps_no_states(tmp_path):
    assert states_of(tmp_path, **{"ckpt.save_steps": -1}) is None


def save(states, engine, step, state):
    assert RowWriter(states.path(engine)).write(states.row(step, state)) is None


def test_the_state_of_the_checkpoints_step_comes_back_the_later_of_two(tmp_path):
    new = states_of(tmp_path)
    for step, gamma in ((1, 5), (2, 7), (3, 9), (2, 11)):  # step 2 was lived through again
        save(new, 0, step, {"gamma": gamma})
    checkpoint(tmp_path, "global_step2")
    assert states_of(tmp_path, **{"ckpt.load_enable": True}).saved(0) == {"gamma": 11}


@pytest.mark.parametrize("tag, step", [("global_step12", 12), ("best_global_step3", 3)])
def test_deepspeeds_latest_names_the_step(tmp_path, tag, step):
    checkpoint(tmp_path, tag)
    assert states_of(tmp_path, **{"ckpt.load_enable": True}).global_step == step
    upstream = {"ckpt.path": str(tmp_path), "train.async_enable": False}
    assert checkpoint_step({**upstream, "ckpt.load_enable": True}) == step
    assert checkpoint_step({**upstream, "ckpt.load_enable": False}) == 0


def test_the_best_checkpoint_of_an_asynchronous_run_is_another_step_than_it_says(tmp_path):
    upstream = {"ckpt.path": str(tmp_path), "train.async_enable": True, "ckpt.load_enable": True}
    checkpoint(tmp_path, "global_step12")
    assert checkpoint_step(upstream) == 12
    checkpoint(tmp_path, "best_global_step3")
    with pytest.raises(SelfSpecError, match="--ckpt.load_enable: with --train.async_enable the checkpoint best_global_step3 holds a later"):
        checkpoint_step(upstream)


def test_what_was_not_saved_is_none(tmp_path):
    new = states_of(tmp_path)
    assert new.saved(0) is None, "a run that starts anew"
    save(new, 0, 4, {})
    folder = new.folder
    assert ControllerStates(folder, 4, "toggle").saved(0) is None, "another mode"
    assert ControllerStates(folder, 5, "adaptive").saved(0) is None, "another step"
    assert ControllerStates(folder, 4, "adaptive").saved(1) is None, "another engine"


def test_loading_without_a_checkpoint_starts_anew_as_openrlhf_does(tmp_path):
    assert states_of(tmp_path, **{"ckpt.load_enable": True}).global_step == 0


def test_a_checkpoint_that_names_no_step_is_refused(tmp_path):
    checkpoint(tmp_path, "final")
    with pytest.raises(SelfSpecError, match="--ckpt.path: .* names no global_step"):
        states_of(tmp_path, **{"ckpt.load_enable": True})


@pytest.mark.parametrize("change", [{"gamma_max": 4}, {"calibration": "none"}])
def test_a_state_that_these_settings_cannot_go_on_from_is_refused_before_the_run(tmp_path, change):
    config = SelfSpecConfig(mode="auto", gamma_max=7)
    costs = CostModel(model_constants(CONFIG), "w4", TERMS)
    states = controller_states({**FLAGS, "ckpt.path": str(tmp_path)}, "auto")
    save(states, 0, 2, make_controller(config, costs).state())
    checkpoint(tmp_path, "global_step2")
    resumed = controller_states({**FLAGS, "ckpt.path": str(tmp_path), "ckpt.load_enable": True}, "auto")
    resumed.check(config, costs)
    other = dataclasses.replace(config, **change)
    with pytest.raises(SelfSpecError, match="--ckpt.load_enable: .*engine0.jsonl was saved under other --self-spec settings") as error:
        resumed.check(other, None if "calibration" in change else costs)
    assert "\n" not in str(error.value)
