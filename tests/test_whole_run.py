"""What a whole run opens, compiles and leaves behind: GRPO on real Ray, DeepSpeed and vLLM on a CPU, with an eye on all its processes."""

import ipaddress
import json
import os
import secrets
import stat
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from test_cpu_platform import build_policy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Ray is OpenRLHF's to start"),
]


def is_loopback(address):
    """Ray's servers listen at `::ffff:127.0.0.1`, which is 127.0.0.1 for a socket that also knows IPv6."""
    address = ipaddress.ip_address(address)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def processes(top):
    """`top` and what descends from it."""
    try:
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def sockets(process):
    """(program, TCP and UDP addresses that anyone may send to, files of Unix sockets) of one process, now."""
    try:
        program = (process.cmdline() or [process.name()])[0].rpartition("/")[2].partition(".")[0]
        inet, unix = process.net_connections("inet"), process.net_connections("unix")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return "", [], []
    bound = [c.laddr.ip for c in inet if c.status == psutil.CONN_LISTEN or (c.type.name == "SOCK_DGRAM" and not c.raddr)]
    return program, bound, [c.laddr for c in unix if c.laddr.startswith("/")]


def processes_with(marker: str) -> list[str]:
    """Command lines of the running processes that have inherited `marker` in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and marker.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended while we looked, or is not ours to see
    return found


@dataclass
class WatchedRun:
    folder: Path
    addresses: dict[str, set[str]] = field(default_factory=dict)
    """By program."""
    modes: dict[str, int] = field(default_factory=dict)
    """By Unix socket."""
    left_behind: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> WatchedRun:
    """One step of a self-speculating run."""
    folder = tmp_path_factory.mktemp("run")
    watched = WatchedRun(folder)
    build_policy(folder / "model", tied=True)
    prompts = [{"input": f"{i * 37 % 91}+{i * 11 % 53}=", "label": ""} for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (folder / "reward.py").write_text(
        "import torch\n"
        "def reward_func(queries, prompts, labels):\n"
        "    rewards = torch.arange(len(queries)).float()\n"
        "    return {'rewards': rewards, 'scores': rewards, 'extra_logs': {}}\n"
    )
    flags = f"""
        --self-spec fixed --self-spec.gamma 2 --self-spec.run_dir {folder}/run
        --ckpt.output_dir {folder}/ckpt --ckpt.path {folder}/ckpt/states
        --actor.model_name_or_path {folder}/model --data.prompt_dataset {folder}/prompts.jsonl --data.label_key label
        --reward.remote_url {folder}/reward.py --ds.attn_implementation sdpa
        --vllm.num_engines 1 --vllm.enforce_eager --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1
        --algo.advantage.estimator group_norm --algo.advantage.is_correction_level token --algo.kl.init_coef 0
        --rollout.batch_size 8 --rollout.n_samples_per_prompt 4 --rollout.micro_batch_size 8
        --train.batch_size 32 --train.micro_batch_size 8 --data.max_len 128 --rollout.max_new_tokens 64
        --actor.adam.lr 1e-3 --actor.lr_scheduler constant
    """.split()
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "GLOO_SOCKET_IFNAME")}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    marker = str(uuid.uuid4())
    environment |= {"OPENRLHF_SD_TEST": marker, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "openrlhf_sd.launch", *flags]
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, umask=0o022)
        top = psutil.Process(run.pid)
        while run.poll() is None:
            for process in processes(top):
                program, bound, files = sockets(process)
                watched.addresses.setdefault(program, set()).update(bound)
                for file in files:
                    if os.path.exists(file):
                        watched.modes[file] = stat.S_IMODE(os.stat(file).st_mode)
            time.sleep(0.5)
    assert run.returncode == 0, (folder / "log").read_text()[-6000:]
    watched.left_behind = processes_with(marker)
    return watched


def test_no_extension_is_compiled(seen):
    """A minute at first use, and a compiler."""
    assert not (seen.folder / "extensions").exists()


def test_no_process_outlives_the_launcher(seen):
    assert seen.left_behind == []


def test_a_run_listens_on_the_loopback_interface_only(seen, measured):
    addresses = {program: found for program, found in seen.addresses.items() if found}
    for program, found in sorted(addresses.items()):
        measured(f"listening, CPU run: {program} at {', '.join(sorted(found))}")
    assert {"gcs_server", "raylet"} <= set(addresses), "Ray's servers were looked at"
    assert {"VLLM::EngineCore"} == {program for program in seen.addresses if program.startswith("VLLM")}, "the worker is in there"
    assert "ray::PolicyModelActor" in addresses, "the trainer's store was looked at"
    assert {program: found for program, found in addresses.items() if not all(map(is_loopback, found))} == {}


def test_only_the_user_may_write_to_its_unix_sockets(seen):
    assert seen.modes
    assert {file: oct(mode) for file, mode in seen.modes.items() if mode & 0o022} == {}


RAY = """
import json
import psutil, ray
from openrlhf_sd.cpu.ray_start import session_dir

with session_dir() as folder:
    ray.init(num_cpus=1, address="local", include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    [server] = [child for child in psutil.Process().children() if child.name() == "gcs_server"]
    listens = [c.laddr.ip for c in server.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    print(json.dumps([listens, ray.get_runtime_context().gcs_address]), flush=True)
    input()
    ray.shutdown()
"""
JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(ray.get(ray.remote(lambda: 7).remote()))"


def test_ray_left_alone_listens_everywhere_and_a_token_closes_it():
    """What docs/security.md says of Ray on GPUs, and what examples/slurm.sh relies on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    cluster = subprocess.Popen([sys.executable, "-c", RAY], env=environment | token, **pipes)
    try:
        [listens], address = json.loads(cluster.stdout.readline())
        assert not is_loopback(listens)

        def joined(settings):
            command = [sys.executable, "-c", JOIN, address]
            return subprocess.run(command, env=environment | settings, capture_output=True, text=True, timeout=120).stdout

        assert joined(token).endswith("7\n")
        assert joined(token | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}) == joined({}) == ""
    finally:
        cluster.communicate("\n", timeout=60)
