"""Run folders made as a run makes them: TensorBoard events through OpenRLHF's writer class, rows through `append_row`."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from openrlhf_sd.metrics import append_row, rollout_row

FLAGS = {"actor.model_name_or_path": "tiny", "actor.adam.lr": 1e-6, "ckpt.path": "/a", "train.async_enable": False}
FIXED = {"mode": "fixed", "gamma": 2, "quant": "w8a8"}


def make_run(
    folder, rollout_s, *, arm="vanilla", self_spec=None, flags=FLAGS, counts=None, num_output_tokens=100, rewards=None,
    timelines=None, lengths=None,
):  # fmt: skip
    """A finished run whose k-th step took rollout_s[k] seconds to generate, 3 s for the other three phases together.

    Args:
        timelines: of each step, rows of TIMELINE_COLUMNS.
        lengths: of each step, response lengths in tokens.
    """
    write_description(folder, arm=arm, self_spec=self_spec, flags=flags)
    scalars = []
    for k, seconds in enumerate(rollout_s):
        scalars.append(
            {
                "timing/generation": seconds,
                "timing/make_experience": 0.5,
                "timing/ppo_train": 2.0,
                "timing/broadcast": 0.5,
                "timing/step_total": 999.0,
                "rollout/reward_mean": rewards[k] if rewards else 0.5,
                "rollout/response_length_mean": 20.0 + k,
                "rollout/truncated_rate": 0.25,
                "vllm_kl": 1e-4,
            }
        )
        row = rollout_row(
            rollout=k,
            engine=0,
            time_unix_s=1000.0 + k,
            rollout_s=seconds,
            weight_sync_s=0.25,
            requantize_s=0.125 if counts and k else None,
            num_responses=5,
            num_prompt_tokens=50,
            num_output_tokens=num_output_tokens,
            counts=counts,
            gamma=2 if counts else None,
        )
        row |= {"timeline": timelines and timelines[k], "response_lengths": lengths and lengths[k]}
        append_row(folder / "metrics.jsonl", row)
    write_events(folder, scalars)
    return folder


def write_description(folder, *, arm="vanilla", self_spec=None, flags=FLAGS, status="finished"):
    folder.mkdir(parents=True)
    config = {"arm": arm, "self_spec": self_spec, "openrlhf": flags}
    provenance = {
        "git_sha": "abc123",
        "argv": ["--logger.wandb.key", "TOPSECRET"],
        "started_unix_s": 1.7e9,
        "packages": {"vllm": "0.29.0"},
        "machine": {"cpu_model": "Test CPU", "num_cpus": 2, "memory_bytes": 2**33, "gpus": [], "platform": "Linux"},
        "status": status,
        "ended_unix_s": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "provenance.json").write_text(json.dumps(provenance))


def write_events(folder, scalars, run_name="run", first_step=1, tensorboard_dir="tensorboard"):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder / tensorboard_dir / run_name))
    for step, values in enumerate(scalars, start=first_step):
        for tag, value in values.items():
            writer.add_scalar(f"train/{tag}", value, step)
    writer.close()


class Page(HTMLParser):
    """The tags and the visible text of an HTML document."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text, self.images = set(), "", []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data):
        self.text += data
