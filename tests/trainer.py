"""The trainer's end of OpenRLHF's weight broadcast, for a plain `vllm.LLM`: the same RPCs, the same order, gloo."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedModel
from vllm import LLM


class Trainer:
    """Rank 0 of a broadcast group with one engine, of as many ranks as it has tensor-parallel workers."""

    def __init__(self, llm: LLM) -> None:
        from openrlhf_sd.cpu.gloo_broadcast import GlooBroadcastGroup

        self._llm = llm
        world_size = 1 + llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(
                llm.collective_rpc, "init_process_group", args=("127.0.0.1", port, 1, world_size, "openrlhf", "gloo", False)
            )
            self._group = GlooBroadcastGroup("127.0.0.1", port, 0, world_size)
            joined.result()

    def send(self, name: str, weight: torch.Tensor, is_last: bool) -> None:
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(self._llm.collective_rpc, "update_weight", args=(name, weight.dtype, weight.shape, is_last))
            self._group.broadcast(weight, src=0)
            received.result()

    def broadcast(self, model: PreTrainedModel) -> None:
        """As OpenRLHF: `named_parameters()` in order (tied heads are not in it), the end mark with the last one."""
        parameters = list(model.named_parameters())
        for position, (name, parameter) in enumerate(parameters, start=1):
            self.send(name, parameter.data, is_last=position == len(parameters))


def perturb(model: PreTrainedModel, scale: float, seed: int) -> None:
    """Change every weight by about `scale` of its spread, biases and norms too: no parameter may be left behind unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.float().std().clamp_min(0.02)
            noise = torch.randn(parameter.shape, generator=generator) * spread * scale
            parameter.copy_((parameter.float() + noise).to(parameter.dtype))


def logprob_errors(model: PreTrainedModel, outputs, temperature: float = 1.0) -> torch.Tensor:
    """|engine's logprob - model's logprob| of every sampled token; asserts that no token's logprob is missing."""
    errors = []
    for output in outputs:
        prompt, completion = list(output.prompt_token_ids), output.outputs[0]
        tokens = list(completion.token_ids)
        assert len(completion.logprobs) == len(tokens) > 0
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0].float() / temperature
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for row, token, entry in zip(logprobs, tokens, completion.logprobs, strict=True):
            errors.append(abs(row[token].item() - entry[token].logprob))
    return torch.tensor(errors)
