"""What one engine did in one rollout, added up as it happens, and the row it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from openrlhf_sd.metrics import SpecDecodeCounts, SpecDecodeStats, rollout_row

LOG_PREFIX = "rollout/sd/"


@dataclass
class RolloutRecord:
    """Times are seconds of one monotonic clock, given by the caller."""

    num_responses: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    counts: SpecDecodeCounts = field(default_factory=SpecDecodeCounts)
    acceptance_before: SpecDecodeCounts = field(default_factory=SpecDecodeCounts)
    """Counts of the rollout before this one: what is known until this one has drafted."""

    _num_in_flight: int = 0
    _busy_since_s: float = 0.0
    _busy_s: float = 0.0
    _response_lengths: list[int] = field(default_factory=list)
    _response_logs: list[dict[str, float]] = field(default_factory=list)

    def request_started(self, now_s: float) -> None:
        if self._num_in_flight == 0:
            self._busy_since_s = now_s
        self._num_in_flight += 1

    def request_ended(self, now_s: float) -> None:
        self._num_in_flight -= 1
        if self._num_in_flight == 0:
            self._busy_s += now_s - self._busy_since_s

    def step(self, stats: SpecDecodeStats | None) -> None:
        """One engine step; `stats` is None where no draft was verified."""
        if stats is not None and stats.num_draft_tokens:
            self.counts.add(stats)

    def request_answered(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.num_responses += 1
        self.num_prompt_tokens += num_prompt_tokens
        self.num_output_tokens += num_output_tokens
        self._response_lengths.append(num_output_tokens)

    def response_logged(self, logs: dict[str, float]) -> None:
        self._response_logs.append(logs)

    def next(self, ended_s: float, begins_s: float) -> RolloutRecord:
        """The record of the rollout after this one. Requests in flight across the boundary (partial rollouts) move over: they kept the
        engine busy until the sync began, and do again from its end on."""
        if self._num_in_flight:
            self._busy_s += max(0.0, ended_s - self._busy_since_s)
        following = RolloutRecord(acceptance_before=self.counts if self.counts.num_drafts else self.acceptance_before)
        following._num_in_flight = self._num_in_flight
        following._busy_since_s = begins_s
        return following

    def row(
        self,
        *,
        rollout: int,
        engine: int,
        time_unix_s: float,
        weight_sync_s: float,
        counts: SpecDecodeCounts | None,
        report: dict[str, Any],
    ) -> dict[str, Any]:
        """The line of metrics.jsonl.

        Args:
            counts: None in a vanilla run.
            report: of the scheduler's StepLedger and of the weight sync, in a vanilla run of PlainSteps; what is not in it was not
                measured.

        `response_lengths` are output tokens per engine request, in the order they ended; `timeline` is a list of TIMELINE_COLUMNS.
        `response_mean` holds the means over responses that OpenRLHF's TensorBoard and W&B show; the `rollout/sd/*` values above it are
        pooled over tokens. `drafter_error` and `weights_fingerprint` are of the sync that ended the rollout.
        """
        row = rollout_row(
            rollout=rollout,
            engine=engine,
            time_unix_s=time_unix_s,
            rollout_s=self._busy_s,
            weight_sync_s=weight_sync_s,
            requantize_s=report.get("requantize_s"),
            num_responses=self.num_responses,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            counts=counts,
            gamma=report.get("gamma"),
            toggle_step=report.get("toggle_step"),
            toggle_batch=report.get("toggle_batch"),
            predicted_speedup=report.get("predicted_speedup"),
            measured_speedup=report.get("measured_speedup"),
        )
        row["rollout/sd/collapse"] = report.get("collapse")
        row["audit"] = report.get("audit")
        row["drafter_error"] = report.get("drafter_error")
        row["weights_fingerprint"] = report.get("fingerprint")
        row["num_steps"] = report.get("num_steps")
        row["response_lengths"] = self._response_lengths
        row["timeline"] = report.get("timeline")
        row["response_mean"] = _means(self._response_logs)
        return row


@dataclass
class ResponseCounts:
    """What the engine calls behind one response drafted (several calls in a multi-turn rollout)."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    is_measured: bool = True

    def add(self, request_metrics: Any) -> None:
        """`request_metrics`: vLLM's RequestSpecDecodeMetrics; its histogram counts verify steps by accepted tokens. None for a request
        that the front end ended, by a stop string or an abort: the engine process then tells nobody its counts."""
        if request_metrics is None:
            self.is_measured = False
            return
        self.num_drafts += sum(request_metrics.histogram)
        self.num_draft_tokens += request_metrics.num_draft_tokens
        self.num_accepted_tokens += sum(accepted * steps for accepted, steps in enumerate(request_metrics.histogram))

    def logs(self, record: RolloutRecord) -> dict[str, float]:
        """This response's share of OpenRLHF's logged means. Every response must carry every key.

        A response that drafted nothing counts as the engine's pooled rate so far, so that it does not pull the mean; NaN (a gap in
        the plot) while nothing has been drafted at all. Of a response that was not measured the counts are NaN, too.
        """
        own = SpecDecodeCounts(self.num_drafts, self.num_draft_tokens, self.num_accepted_tokens)
        candidates = (own, record.counts, record.acceptance_before) if self.is_measured else (record.counts, record.acceptance_before)
        known = next((c for c in candidates if c.num_drafts), None)
        counts = {
            f"{LOG_PREFIX}num_drafts": float(self.num_drafts),
            f"{LOG_PREFIX}num_draft_tokens": float(self.num_draft_tokens),
            f"{LOG_PREFIX}num_accepted_tokens": float(self.num_accepted_tokens),
        }
        return {
            f"{LOG_PREFIX}acceptance_rate": known.acceptance_rate if known else float("nan"),
            f"{LOG_PREFIX}mean_acceptance_length": known.mean_acceptance_length if known else float("nan"),
            **(counts if self.is_measured else dict.fromkeys(counts, float("nan"))),
        }


def _means(logs: list[dict[str, float]]) -> dict[str, float | None]:
    if not logs:
        return {}
    means = {key: sum(entry[key] for entry in logs) / len(logs) for key in logs[0]}
    return {key: None if value != value else value for key, value in means.items()}
