"""One small GRPO run through the launcher, on real Ray, DeepSpeed and vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
STEPS = 3
PROMPTS = 8
SAMPLES = 4


def make_task(folder: Path) -> Path:
    """`folder` with prompts.jsonl and eval.jsonl in it."""
    subprocess.run([sys.executable, QUICKSTART / "task.py", "--out", folder], check=True)
    return folder


def command(run_dir: Path, policy: Path, data: Path, *flags: object, steps: int = STEPS) -> list[str]:
    """The launcher's command line. Of a flag given twice the later one counts, so `flags` may replace what is here.

    As in the quickstart, nothing is compiled: eight seconds of a training's two minutes. test_data_to_training.py leaves that on.
    """
    line = [
        *("env", "TORCH_COMPILE_DISABLE=1", sys.executable, "-m", "openrlhf_sd.launch", "--self-spec.run_dir", run_dir),
        *("--actor.model_name_or_path", policy, "--reward.remote_url", QUICKSTART / "reward.py"),
        *("--data.prompt_dataset", data / "prompts.jsonl", "--data.input_key", "input", "--data.label_key", "label"),
        *("--data.max_len", 256, "--rollout.max_new_tokens", 128, "--data.max_samples", steps * PROMPTS),
        *("--rollout.batch_size", PROMPTS, "--rollout.n_samples_per_prompt", SAMPLES, "--rollout.micro_batch_size", 8),
        *("--train.batch_size", PROMPTS * SAMPLES, "--train.micro_batch_size", 8),
        *("--vllm.num_engines", 1, "--vllm.enforce_eager", "--vllm.gpu_memory_utilization", 0.3),
        *("--actor.num_gpus_per_node", 1, "--ref.num_gpus_per_node", 1, "--ds.attn_implementation", "sdpa"),
        *("--algo.advantage.estimator", "group_norm", "--algo.advantage.is_correction_level", "token"),
        *("--algo.kl.init_coef", 0, "--actor.adam.lr", 2e-4, "--ckpt.output_dir", run_dir / "trained"),
        *("--ckpt.path", run_dir / "ckpt"),
        *flags,
    ]
    return list(map(str, line))


def train(run_dir: Path, policy: Path, data: Path, *flags: object, steps: int = STEPS) -> Path:
    """Runs to the end. Returns the run folder."""
    line = command(run_dir, policy, data, *flags, steps=steps)
    finished = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-3000:]
    return run_dir
