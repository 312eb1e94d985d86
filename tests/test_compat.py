"""Every private upstream name this package leans on exists in the installed upstreams, and those are the pinned ones."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest

from openrlhf_sd.engine import compat


@pytest.mark.parametrize(("module", "path"), [(module, path) for module, path, _ in compat.NAMES])
def test_upstream_name_exists(module, path):
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        # OpenRLHF's trainers import flash-attn, which a machine without a GPU lacks: there, read instead of importing.
        assert missing.name == "flash_attn"
        source = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
        assert path in {node.name for node in source.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        return
    for part in path.split("."):
        assert hasattr(found, part), f"{module}.{path}"
        found = getattr(found, part)


def test_installed_versions_are_the_pinned_ones():
    compat.check_versions()


def test_wrong_version_is_named(monkeypatch):
    monkeypatch.setitem(compat.PINNED, "vllm", "0.0.1")
    with pytest.raises(RuntimeError, match=r"vllm 0\.29\.0.*needs 0\.0\.1"):
        compat.check_versions()


def test_signatures_we_override_are_unchanged():
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    from openrlhf_sd.engine.proposer import SelfDraftProposer
    from openrlhf_sd.engine.scheduler import SelfSpecScheduler

    for ours, upstream, name in [
        (SelfDraftProposer, DraftModelProposer, "propose"),
        (SelfDraftProposer, DraftModelProposer, "dummy_run"),
        (SelfDraftProposer, DraftModelProposer, "_sample_from_logits"),
        (SelfSpecScheduler, Scheduler, "schedule"),
        (SelfSpecScheduler, Scheduler, "update_from_output"),
        (SelfSpecScheduler, Scheduler, "set_pause_state"),
        (SelfSpecScheduler, Scheduler, "make_spec_decoding_stats"),
    ]:
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(inspect.signature(getattr(upstream, name)).parameters), name


def test_scheduler_output_carries_gamma_and_attention_metadata_has_the_fields_we_replace():
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput

    assert "num_spec_tokens_to_schedule" in {f.name for f in dataclasses.fields(SchedulerOutput)}
    assert {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "_seq_lens_cpu",
        "_num_computed_tokens_cpu",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
        "seq_lens_cpu_upper_bound",
        "num_actual_tokens",
        "max_query_len",
    } <= {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
