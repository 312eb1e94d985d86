"""The quickstart after installation: build, warm start, GRPO vanilla and with --self-spec, comparison; prints what each stage took.

    python examples/quickstart/run.py --out DIR [--steps 15] [--seed 0] [--arms vanilla,fixed,auto] [flags for all training runs]

All arms get the same OpenRLHF flags; only `--self-spec*` and the folders differ. Stages that are done are not repeated, so an
interrupted quickstart goes on where it was; a finished one is refused rather than overwritten.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPTS_PER_STEP = 16
SAMPLES_PER_PROMPT = 8
MAX_NEW_TOKENS = 480
CONTEXT_TOKENS = 512
LEARNING_RATE = 2e-4

ARMS = {
    "vanilla": (),
    "fixed": ("--self-spec", "fixed", "--self-spec.gamma", "3"),
    "toggle": ("--self-spec", "toggle", "--self-spec.gamma", "3"),
    "adaptive": ("--self-spec", "adaptive", "--self-spec.ladder", "3,5,7", "--self-spec.gamma", "3"),
    "auto": ("--self-spec", "auto"),
}
"""Folder name -> our flags. toggle, adaptive and auto measure this machine once before the first of them starts."""

DEFAULT_ARMS = "vanilla,fixed,auto"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the data, both runs and the page")
    parser.add_argument("--steps", type=int, default=15, help="GRPO steps of each arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", default=DEFAULT_ARMS, help=f"of {','.join(ARMS)} (default: {DEFAULT_ARMS})")
    args, more_flags = parser.parse_known_args(argv)
    arms = args.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"--arms: no arm {unknown[0]!r}; choose from {','.join(ARMS)}")
    if args.steps < 1:
        parser.error(f"--steps: {args.steps} must be at least 1")
    out = args.out.resolve()
    if (out / "comparison").exists():
        parser.error(f"--out: {out} holds a finished quickstart; give another folder")
    out.mkdir(parents=True, exist_ok=True)

    # No network from here on; without these, libraries wait for hubs and statistics servers.
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "offline"}
    # Ray exports 1 into its own environment; left over from elsewhere it would slow everything down.
    os.environ.pop("OMP_NUM_THREADS", None)

    seconds: dict[str, float] = {}
    num_prompts = str(args.steps * PROMPTS_PER_STEP)
    stage(seconds, "data", out / "data", "task.py", "--train", num_prompts, "--seed", str(args.seed))
    stage(seconds, "model", out / "model", "build_model.py", "--seed", str(args.seed))
    warm_start = ("--model", str(out / "model"), "--seed", str(args.seed))
    stage(seconds, "warm start", out / "warm_start", "warm_start.py", *warm_start)
    for arm in arms:
        run_dir = out / arm
        if is_finished(run_dir):
            continue
        shutil.rmtree(run_dir, ignore_errors=True)
        flags = [*ARMS[arm], "--self-spec.run_dir", str(run_dir), *training_flags(out, args.steps, args.seed), *more_flags]
        timed(seconds, f"GRPO {arm}", [sys.executable, "-m", "openrlhf_sd.launch", *flags])
    runs = [str(out / arm) for arm in arms]
    page = out / "comparison"
    timed(seconds, "comparison", [sys.executable, "-m", "openrlhf_sd.launch", "compare", *runs, "--out", str(page)])

    print("\nseconds per stage: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"in all {sum(seconds.values()):.0f} s after installation; the page: {page / 'report.html'}")
    return 0


def training_flags(out: Path, steps: int, seed: int) -> list[str]:
    """OpenRLHF's flags, the same for all arms."""
    flags = {
        "--actor.model_name_or_path": out / "warm_start",
        "--data.prompt_dataset": out / "data" / "prompts.jsonl",
        "--data.input_key": "input",
        "--data.label_key": "label",
        "--data.max_samples": steps * PROMPTS_PER_STEP,
        "--data.max_len": CONTEXT_TOKENS,
        "--reward.remote_url": HERE / "reward.py",
        "--rollout.batch_size": PROMPTS_PER_STEP,
        "--rollout.n_samples_per_prompt": SAMPLES_PER_PROMPT,
        "--rollout.max_new_tokens": MAX_NEW_TOKENS,
        "--rollout.micro_batch_size": 16,
        "--train.batch_size": PROMPTS_PER_STEP * SAMPLES_PER_PROMPT,
        "--train.micro_batch_size": 16,
        "--train.seed": seed,
        "--actor.adam.lr": LEARNING_RATE,
        "--actor.lr_scheduler": "constant",
        "--actor.num_gpus_per_node": 1,
        "--ref.num_gpus_per_node": 1,
        "--algo.advantage.estimator": "group_norm",
        "--algo.advantage.is_correction_level": "token",
        "--algo.kl.init_coef": 0,
        "--vllm.num_engines": 1,
        "--vllm.gpu_memory_utilization": 0.3,
        "--ds.attn_implementation": "sdpa",
        "--ckpt.output_dir": out / "trained",
    }
    # torch.compile takes half a minute per engine and gains nothing on a model this small.
    return [*(str(part) for item in flags.items() for part in item), "--vllm.enforce_eager"]


def stage(seconds: dict[str, float], name: str, folder: Path, script: str, *flags: str) -> None:
    """Run one of this folder's scripts unless its output is there; it appears whole or not at all."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    timed(seconds, name, [sys.executable, str(HERE / script), "--out", str(unfinished), *flags])
    unfinished.rename(folder)


def timed(seconds: dict[str, float], name: str, command: list[str]) -> None:
    """Run a stage in a process of its own. Its output is the user's progress display, so it is not captured."""
    print(f"\n=== {name} ===", flush=True)
    started = time.perf_counter()
    finished = subprocess.run(command)
    seconds[name] = time.perf_counter() - started
    if finished.returncode:
        raise SystemExit(f"quickstart: stage {name!r} failed (exit code {finished.returncode}); see its output above")
    print(f"=== {name}: {seconds[name]:.0f} s ===", flush=True)


def is_finished(run_dir: Path) -> bool:
    path = run_dir / "provenance.json"
    return path.exists() and '"status": "finished"' in path.read_text()


if __name__ == "__main__":
    raise SystemExit(main())
