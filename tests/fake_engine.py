"""A vLLM engine without a model: the real scheduler and the real engine loop over a runner that makes tokens up.

`FakeRunner` keeps between steps what a worker keeps (its requests, their tokens, blocks and drafts, and what each KV slot holds)
and checks every step it is given against that. It stands for the V1 model runner of vLLM 0.29.0, synchronous or asynchronous.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import queue
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

import torch
from transformers import Qwen2Config
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from openrlhf_sd import SelfSpecConfig, engine_args
from openrlhf_sd.engine import scheduler as synchronous
from openrlhf_sd.policy.cost_model import CostModel

BLOCK_SIZE = 8
STOP = 7
"""The token that ends a request early."""
WRONG = 8
"""No request ever generates it."""

init_none_hash(sha256)
block_hasher = get_request_block_hasher(BLOCK_SIZE, sha256)


@dataclass(frozen=True)
class Script:
    """A request, and all it will ever say."""

    request_id: str
    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    stop_at: int | None = None
    """Index of the STOP among its output tokens."""
    prompt_logprobs: int | None = None

    def token(self, index: int) -> int:
        """Of no other request and no other place, so that whatever is lost, doubled or mixed up shows."""
        return STOP if index == self.stop_at else 1000 * (self.number + 1) + index

    def tokens(self, start: int, end: int) -> list[int]:
        return [self.token(index) for index in range(start, end)]

    def whole_output(self, max_model_len: int) -> list[int]:
        length = min(self.max_tokens, max_model_len - len(self.prompt))
        if self.stop_at is not None:
            length = min(length, self.stop_at + 1)
        return self.tokens(0, length)

    def request(self, prefix_caching: bool) -> Request:
        params = SamplingParams(max_tokens=self.max_tokens, stop_token_ids=[STOP], prompt_logprobs=self.prompt_logprobs, detokenize=False)
        hasher = block_hasher if prefix_caching else None
        return Request(self.request_id, list(self.prompt), params, None, block_hasher=hasher)


@dataclass(frozen=True)
class Sizes:
    num_blocks: int = 64
    """One of them is vLLM's null block."""
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 64
    max_model_len: int = 64
    prefix_caching: bool = True


@functools.cache
def _base_config(config: SelfSpecConfig, costs: CostModel | None) -> VllmConfig:
    with TemporaryDirectory() as folder:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = Qwen2Config(vocab_size=64, max_position_embeddings=128, architectures=["Qwen2ForCausalLM"], **shape)
        model.save_pretrained(folder)
        arguments = engine_args(config, Path(folder), costs=costs)
        fixed = {"dtype": "bfloat16", "block_size": 32, "skip_tokenizer_init": True, "enforce_eager": True}
        return EngineArgs(folder, **arguments, **fixed).create_engine_config()


@functools.cache
def asynchronous() -> ModuleType:
    """openrlhf_sd.engine.scheduler as it is on CUDA, where vLLM schedules a step before it knows the tokens of the one before."""
    spec = importlib.util.spec_from_file_location("asynchronous_scheduler", synchronous.__file__)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(current_platform, "is_cpu", lambda: False):
        spec.loader.exec_module(module)
    return module


@functools.cache
def _structured_output_manager(config: SelfSpecConfig, costs: CostModel | None) -> StructuredOutputManager:
    return StructuredOutputManager(_base_config(config, costs))


def make_scheduler(scheduler_class: type, config: SelfSpecConfig, sizes: Sizes, is_async: bool, costs: CostModel | None = None):
    vllm_config = copy.deepcopy(_base_config(config, costs))
    limits = vllm_config.scheduler_config
    limits.max_num_seqs = sizes.max_num_seqs
    limits.max_num_batched_tokens = limits.max_num_scheduled_tokens = sizes.max_num_batched_tokens
    limits.async_scheduling = is_async
    vllm_config.model_config.max_model_len = sizes.max_model_len
    vllm_config.cache_config.block_size = BLOCK_SIZE
    vllm_config.cache_config.num_gpu_blocks = sizes.num_blocks
    vllm_config.cache_config.enable_prefix_caching = sizes.prefix_caching
    group = KVCacheGroupSpec(["layer"], FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.bfloat16))
    return scheduler_class(
        vllm_config,
        KVCacheConfig(sizes.num_blocks, kv_cache_tensors=[], kv_cache_groups=[group]),
        _structured_output_manager(config, costs),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )


@dataclass
class _Row:
    """A request in the worker."""

    tokens: list[int]
    """Prompt and output."""
    blocks: list[int]
    num_computed: int
    """Tokens whose keys and values are the policy's."""
    num_rejected: int = 0
    """Of the drafts verified in the last step."""
    drafts: list[int] = field(default_factory=list)
    """Made in the last step."""


class FakeRunner:
    """Args:
    scripts: request id -> Script, filled by whoever adds requests.
    """

    def __init__(self, scripts: dict[str, Script], sizes: Sizes, is_async: bool) -> None:
        self.num_right: tuple[int, ...] = (2, 0, 1)
        """How many of its drafts are right, for one request of a step after the other."""
        self.seen: Counter[str] = Counter()
        self.num_steps = 0
        self.last_gamma = 0
        self.rows: dict[str, _Row] = {}
        self._scripts = scripts
        self._sizes = sizes
        self._is_async = is_async
        self._kv: dict[tuple[int, int], object] = {}
        self._batch: list[str] = []
        """Of the last step."""

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        assert step.total_num_scheduled_tokens == sum(step.num_scheduled_tokens.values()) <= self._sizes.max_num_batched_tokens
        assert len(step.num_scheduled_tokens) <= self._sizes.max_num_seqs
        self._update_rows(step)
        self._batch = list(step.num_scheduled_tokens)[::-1]  # the worker's order is its own
        if not self._batch:
            return EMPTY_MODEL_RUNNER_OUTPUT
        for request_id in self._batch:
            self._take_drafts(request_id, step.scheduled_spec_decode_tokens.get(request_id, []))
            self._write(request_id, step.num_scheduled_tokens[request_id])
        # After all of it is written: requests of one step share what any of them computes, layer by layer.
        sampled = [self._verify(request_id, step.num_scheduled_tokens[request_id]) for request_id in self._batch]
        self.num_steps += 1
        self.last_gamma = step.num_spec_tokens_to_schedule
        for place, request_id in enumerate(self._batch):
            self._draft(request_id, self.num_right[place % len(self.num_right)])
        return ModelRunnerOutput(list(self._batch), {name: place for place, name in enumerate(self._batch)}, sampled)

    def _update_rows(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_req_ids:
            self.rows.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            assert new.req_id not in self.rows
            self.seen["prefix hits"] += new.num_computed_tokens > 0
            self.rows[new.req_id] = _Row(list(new.prompt_token_ids), list(new.block_ids[0]), new.num_computed_tokens)
        cached = step.scheduled_cached_reqs
        for place, request_id in enumerate(cached.req_ids):
            row, blocks, num_computed = self.rows[request_id], cached.new_block_ids[place], cached.num_computed_tokens[place]
            if request_id in cached.resumed_req_ids:
                self.seen["preemptions"] += 1
                row.blocks = list(blocks[0])
            elif blocks is not None:
                row.blocks += blocks[0]
            if request_id in self._batch and request_id not in cached.resumed_req_ids:
                # Asynchronous scheduling counts drafts as accepted whose verification it does not know yet.
                ahead = num_computed - row.num_computed
                assert ahead == 0 or (self._is_async and ahead == row.num_rejected), "scheduler and worker disagree on what is computed"
            else:
                self.seen["steps passed over"] += request_id not in cached.resumed_req_ids
                known = cached.all_token_ids[request_id]
                assert known == row.tokens[: len(known)]
                row.tokens, row.num_computed, row.drafts = list(known), num_computed, []

    def _take_drafts(self, request_id: str, scheduled: list[int]) -> None:
        """Of the drafts made in the last step those that are scheduled now."""
        row = self.rows[request_id]
        assert len(scheduled) <= self.last_gamma, "more drafts scheduled than the step before was told to make"
        assert len(scheduled) <= len(row.drafts), "drafts scheduled that nobody made"
        row.drafts = row.drafts[: len(scheduled)]
        # Asynchronous scheduling does not know the drafts, it only leaves room for them.
        assert scheduled == ([-1] * len(row.drafts) if self._is_async else row.drafts)

    def _write(self, request_id: str, num_scheduled: int) -> None:
        row = self.rows[request_id]
        end = row.num_computed + num_scheduled
        assert len(row.drafts) == max(0, end - len(row.tokens)), "neither a part of a prompt nor a newest token with its drafts"
        prefixes = _prefixes(row.tokens + row.drafts)
        for position in range(row.num_computed, end):
            self._kv[self._slot(row, position)] = prefixes[position]

    def _verify(self, request_id: str, num_scheduled: int) -> list[int]:
        """One request's target step. Returns its new tokens, none for a part of a prompt."""
        row, script = self.rows[request_id], self._scripts[request_id]
        end = row.num_computed + num_scheduled
        for position, prefix in enumerate(_prefixes((row.tokens + row.drafts)[:end])):
            assert self._kv.get(self._slot(row, position)) == prefix, "keys and values of something else are read"
        row.num_computed, row.num_rejected = end, 0
        if end < len(row.tokens):
            self.seen["parts of prompts"] += 1
            return []
        truth = script.tokens(len(row.tokens) - len(script.prompt), self._sizes.max_model_len)
        num_accepted = next((place for place, draft in enumerate(row.drafts) if draft != truth[place]), len(row.drafts))
        row.num_rejected = len(row.drafts) - num_accepted
        self.seen.update({"accepted drafts": num_accepted, "rejected drafts": row.num_rejected, "plain tokens": not row.drafts})
        row.num_computed -= row.num_rejected
        row.tokens += truth[: num_accepted + 1]
        assert len(row.tokens) <= self._sizes.max_model_len
        return truth[: num_accepted + 1]

    def _draft(self, request_id: str, num_right: int) -> None:
        """The drafter goes on from the newest token, or from a prompt's computed part, and leaves its keys and values there."""
        row, script = self.rows[request_id], self._scripts[request_id]
        row.drafts = self._proposal(script, len(row.tokens) - len(script.prompt), num_right)
        for position in range(row.num_computed, min(row.num_computed + self.last_gamma, self._sizes.max_model_len)):
            self._kv[self._slot(row, position)] = "the drafter's"

    def _proposal(self, script: Script, first: int, num_right: int) -> list[int]:
        num_right = min(num_right, self.last_gamma)
        return script.tokens(first, first + num_right) + [WRONG] * (self.last_gamma - num_right)

    def _slot(self, row: _Row, position: int) -> tuple[int, int]:
        assert position < len(row.blocks) * BLOCK_SIZE, "no block for this position"
        return row.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE

    def drafts(self) -> DraftTokenIds:
        return DraftTokenIds(list(self._batch), [list(self.rows[request_id].drafts) for request_id in self._batch])


def _prefixes(tokens: list[int]) -> list[int]:
    """What keys and values depend on: for each position a digest of all tokens up to it."""
    digests, digest = [], 0
    for token in tokens:
        digest = hash((digest, token))
        digests.append(digest)
    return digests


def _done(value) -> Future:
    future = Future()
    future.set_result(value)
    return future


class _FakeExecutor:
    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self._sampled: ModelRunnerOutput | None = None

    def execute_model(self, step: SchedulerOutput, non_block: bool) -> Future:
        output = self._runner.execute(step)
        if output is EMPTY_MODEL_RUNNER_OUTPUT:
            return _done(output)
        self._sampled = output
        return _done(None)

    def sample_tokens(self, grammar_output, non_block: bool = False):
        return _done(self._sampled) if non_block else self._sampled

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        return self._runner.drafts()

    def collective_rpc(self, method: str) -> list:
        return {"synchronize_device": [None], "self_spec_sync_report": [{"drafter_error": 0.1}]}[method]

    def reset_mm_cache(self) -> None:
        pass

    def reset_encoder_cache(self) -> None:
        pass


class FakeEngine(EngineCoreProc):
    """vLLM's engine process around a scheduler, without process and sockets.

    Sets what `EngineCoreProc`'s own methods need to step, pause and abort; those methods are the real ones.
    """

    def __init__(self, scheduler, runner: FakeRunner) -> None:
        self.vllm_config = scheduler.vllm_config
        self.log_stats = False
        self.scheduler = scheduler
        self.model_executor = _FakeExecutor(runner)
        self.mm_receiver_cache = None
        self.async_scheduling = self.vllm_config.scheduler_config.async_scheduling
        self.check_for_draft_tokens = True
        self.is_ec_consumer, self.is_pooling_model = True, False
        self.batch_queue_size = self.vllm_config.max_concurrent_batches
        self.batch_queue = deque(maxlen=self.batch_queue_size) if self.batch_queue_size > 1 else None
        self.step_fn = self.step if self.batch_queue is None else self.step_with_batch_queue
        self.aborts_queue = queue.Queue()
        self.output_queue = queue.Queue()
        self.engines_running = False
        self._idle_state_callbacks = []

    def turn(self) -> None:
        """Of the busy loop: a step, or what waits for the engine to be idle."""
        if self.has_work():
            self._process_engine_step()
        else:
            self._notify_idle_state_callbacks()
