"""What docs/security.md says of our own code: what it deserializes, whose code it runs, what it loads, where it listens."""

import ast
import importlib.util
import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from openrlhf_sd import launch
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.cpu import loopback, ray_start
from openrlhf_sd.model_support import check_weights, own_code

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

# The document.


def test_the_document_names_tests_and_files_that_exist():
    text = (ROOT / "docs" / "security.md").read_text()
    functions = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 8 and named <= functions
    [upstream] = {Path(path) for path in sys.path if (Path(path) / "openrlhf" / "cli").is_dir()}
    files = set(re.findall(r"`([\w/]+/\w+\.(?:py|sh))`", text))
    assert len(files) > 15
    assert {file for file in files if not (ROOT / file).exists() and not (upstream / file).exists()} == set()


# What may run code out of data.

UNPICKLING_MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "multiprocessing.connection",
}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
METHODS = {"load", "read_pickle", "run_path", "run_module", "import_module", "spec_from_file_location"}
"""Last names: whatever the module is called where it is used. `load` is torch's, numpy's and joblib's, and our own for JSON."""

KEYWORDS = {"shell", "allow_pickle", "trust_remote_code", "weights_only"}

ALLOWED = {
    # Parts of the installed OpenRLHF's own source, which the run executes as a whole right after.
    ("openrlhf_sd/flags.py", "compile"): "parser and checks of OpenRLHF's main program, which cannot be imported",
    ("openrlhf_sd/flags.py", "exec"): "the same",
    ("openrlhf_sd/flags.py", "run_path"): "openrlhf/utils/config.py, without its package",
    ("openrlhf_sd/launch.py", "run_module"): "OpenRLHF's main program",
    ("openrlhf_sd/setup_imports.py", "import_module"): "a constant list of installed modules",
    # Pickle between a process and the child it started, over a socket pair that only the two have.
    ("calib/timing_engine.py", "multiprocessing.connection"): "settings and times, between calib.sweep and its engines",
    # As OpenRLHF's engine arguments say: the engine will load the same model the same way.
    ("openrlhf_sd/cpu/rollout_actor.py", "trust_remote_code"): "OpenRLHF's own value, passed on",
}
OUR_LOADERS = {"calibration_file.load"}
"""Calls named `load` that read JSON."""


def risky(path):
    """Names from the lists above that a source file uses."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in UNPICKLING_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLING_MODULES:
            yield node.module
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                yield called
            elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and called not in OUR_LOADERS:
                yield node.func.attr
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                    yield keyword.arg


def test_nothing_of_ours_unpickles_or_runs_what_it_read():
    packages = [ROOT / name for name in ("openrlhf_sd", "calib", "data_prep", "examples")]
    found = {(str(path.relative_to(ROOT)), name) for package in packages for path in sorted(package.rglob("*.py")) for name in risky(path)}
    assert found == set(ALLOWED)


def test_the_search_finds_what_it_is_for(tmp_path):
    source = tmp_path / "bad.py"
    source.write_text(
        "import pickle, torch, numpy as np, os, subprocess\nfrom yaml import safe_load\n"
        "torch.load(f)\nnp.load(f, allow_pickle=True)\nos.system(c)\nsubprocess.run(c, shell=True)\neval(c)\n"
        "AutoConfig.from_pretrained(f, trust_remote_code=True)\nsubprocess.run(c, shell=False)\nmodel.eval()\n"
    )
    assert sorted(risky(source)) == [*("allow_pickle", "eval", "load", "load", "os.system", "pickle", "shell", "trust_remote_code", "yaml")]


# Weights.


@pytest.fixture
def pickled_model(tmp_path):
    """A model folder with a pickle that would make a file if anything loaded it."""
    folder = tmp_path / "pickled model"
    folder.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 1 << 14,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %b'\ntR." % str(tmp_path / "ran").encode())
    return folder


def run_flags(model, tmp_path):
    (tmp_path / "reward.py").write_text("")
    (tmp_path / "prompts.jsonl").write_text("")
    return [
        *("--actor.model_name_or_path", str(model), "--reward.remote_url", str(tmp_path / "reward.py")),
        *("--data.prompt_dataset", str(tmp_path / "prompts.jsonl"), "--ds.attn_implementation", "sdpa"),
        *("--vllm.num_engines", "1", "--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "4"),
    ]


REFUSED = "has no *.safetensors, only pickled weights (pytorch_model.bin)"


def test_a_run_that_speculates_refuses_pickled_weights(pickled_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "train", lambda *args: pytest.fail("training was started"))
    flags = run_flags(pickled_model, tmp_path)
    assert launch.main(["--self-spec", "fixed", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("openrlhf-sd: error: --actor.model_name_or_path: ") and REFUSED in line and "docs/security.md" in line
    assert launch.main(["--explain", "json", "--self-spec", "fixed", "--self-spec.gpu", "h100", *flags]) == 2
    assert REFUSED in json.loads(capsys.readouterr().out)["problems"][0]

    # vanilla is OpenRLHF's own business
    assert launch.main(["--explain", "json", *flags]) == 0


def test_a_sweep_refuses_pickled_weights(pickled_model, tmp_path, capsys):
    from calib import sweep

    assert sweep.main(["--model", str(pickled_model), "--out", str(tmp_path / "sweep.csv")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("calib.sweep: --model: ") and REFUSED in line


def test_weights_that_are_safetensors_or_not_there_are_no_matter(pickled_model, tmp_path):
    (pickled_model / "model.safetensors").write_text("")
    check_weights(str(pickled_model), "--model")
    check_weights("Qwen/Qwen2.5-7B", "--model")
    (tmp_path / "config only").mkdir()
    check_weights(str(tmp_path / "config only"), "--model")


def test_engines_load_safetensors_and_nothing_else(pickled_model, tmp_path, monkeypatch):
    import vllm
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from calib import timing_engine
    from openrlhf_sd.config import SelfSpecConfig
    from openrlhf_sd.engine.args import engine_args

    with pytest.raises(SelfSpecError, match="pickled weights"):
        engine_args(SelfSpecConfig(mode="fixed"), pickled_model)
    loader = DefaultModelLoader(LoadConfig(load_format="safetensors"))
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        loader._prepare_weights(str(pickled_model), None, None, True, None)

    (pickled_model / "model.safetensors").write_text("")
    drafter = SelfSpecConfig(mode="fixed", calibration="none")
    assert engine_args(drafter, pickled_model)["load_format"] == "safetensors"

    started = []

    class Engine:
        def __init__(self, model, **arguments):
            started.append(arguments["load_format"])

        def collective_rpc(self, method):
            pass

    monkeypatch.setattr(vllm, "LLM", Engine)
    for config in (None, drafter):
        settings = timing_engine.EngineSettings(str(pickled_model), config, 1, 64, 1 << 20, 4)
        timing_engine._start(settings, tmp_path / "times")
    assert started == ["safetensors", "safetensors"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("hostile", [False, True])
def test_the_documented_conversion_keeps_weights_and_runs_no_code(pickled_model, tmp_path, hostile):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if not hostile:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pickled_model))
        torch.save(model.state_dict(), pickled_model / "pytorch_model.bin")
    [lines] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "security.md").read_text(), re.DOTALL)
    lines = lines.replace("OLD", str(pickled_model)).replace("NEW", str(tmp_path / "new")).splitlines()
    weights_only = "\n".join(line for line in lines if not line.startswith("AutoTokenizer"))  # there is none here
    done = subprocess.run([sys.executable, "-c", weights_only], capture_output=True, text=True, timeout=120)
    if hostile:
        assert done.returncode != 0 and "UnpicklingError" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        converted = load_file(tmp_path / "new" / "model.safetensors")
        expected = model.state_dict()
        assert converted and all(torch.equal(converted[name], expected[name]) for name in converted)
        assert len(converted) >= len(expected) - 1, "all but a tied head"
        check_weights(str(tmp_path / "new"), "--model")
    assert not (tmp_path / "ran").exists()


# A model's own code.

READ_MODEL = """
import json, sys
from pathlib import Path
from transformers import AutoConfig
from calib.device import read_model_config
from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine.args import resolve

folder, ran = sys.argv[1:]
resolve(SelfSpecConfig(mode="fixed"), folder)
read_model_config(folder)
after_ours = Path(ran).exists()
AutoConfig.from_pretrained(folder, trust_remote_code=True)
print(json.dumps([after_ours, Path(ran).exists()]))
"""


def test_the_models_own_code_is_not_run_by_us(pickled_model, tmp_path):
    """As the last part shows, `trust_remote_code` would run it."""
    (pickled_model / "model.safetensors").write_text("")
    config = json.loads((pickled_model / "config.json").read_text())
    (pickled_model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (pickled_model / "own.py").write_text(
        f"from transformers import Qwen2Config\nopen({str(tmp_path / 'ran')!r}, 'w').close()\nclass OwnConfig(Qwen2Config): pass\n"
    )
    command = [sys.executable, "-c", READ_MODEL, str(pickled_model), str(tmp_path / "ran")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [False, True]


def test_openrlhf_running_the_models_own_code_is_said(pickled_model, tmp_path, monkeypatch, capsys):
    (pickled_model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.T", null]}}')
    flags = {
        "--actor.model_name_or_path": str(pickled_model),
        "--critic.model_name_or_path": None,
        "--reward.model_name_or_path": "a/b",
    }
    [sentence] = own_code(flags)
    assert sentence.startswith("--actor.model_name_or_path: tokenizer_config.json of ") and "OpenRLHF runs it" in sentence

    monkeypatch.setattr(launch.platform, "is_needed", lambda: False)
    monkeypatch.setattr(launch, "train", lambda *args: None)
    assert launch.main(run_flags(pickled_model, tmp_path)) == 0
    assert f"openrlhf-sd: warning: {sentence}" in capsys.readouterr().err
    launch.main(["--explain", "json", *run_flags(pickled_model, tmp_path)])
    assert sentence in json.loads(capsys.readouterr().out)["notes"]

    (pickled_model / "tokenizer_config.json").write_text("[not JSON")
    assert list(own_code(flags)) == []


# Answers of the policy.

HOSTILE_ANSWERS = (
    "__import__('os').system('touch marker')",
    r"\text{__import__('os').system('touch marker')}",
    r"\operatorname{__import__('os').system('touch marker')}",
    "exec(\"open('marker','w')\")",
    "x = __import__('os').system('touch marker')",
    r"\{1, __import__('os').system('touch marker')\}",
    r"(1; open('marker','w'))",
    "$(touch marker)`touch marker`",
    '5\n["a", "b"]\nmarker',
)
JUDGE = """
import json, sys
compiled = []
sys.addaudithook(lambda event, args: event == "compile" and b"marker" in (args[0] or b"") and compiled.append(args[0]))
import math_check
answers = json.load(sys.stdin)
for answer in answers:
    for pair in ((answer, "5"), ("5", answer), (answer, answer)):
        try:
            math_check.is_equal(*pair)
        except Exception:
            pass
by_ours = len(compiled)
eval("'marker'")
print(json.dumps([by_ours, len(compiled)]))
"""


def test_an_answer_is_read_and_never_evaluated(tmp_path):
    """sympy's own `parse_expr` is `eval`; math-verify's reading of LaTeX must not get there."""
    command = [sys.executable, "-c", JUDGE]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        command, input=json.dumps(HOSTILE_ANSWERS), capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_the_reward_judges_hostile_answers_as_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("math_reward", EXAMPLES / "math_reward.py")
    reward = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reward)
    checker = reward.Checker()
    try:
        assert {checker.ask(answer, "5") for answer in HOSTILE_ANSWERS} <= {reward.WRONG, reward.UNCHECKED}
        assert checker.ask("5", "5.0") == reward.RIGHT
    finally:
        checker._clear_up()
    assert list(tmp_path.iterdir()) == []


# Where is listened.


def listening():
    """Addresses at which this process listens."""
    return [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_store_listens_at_its_own_address_only():
    from torch.distributed import TCPStore

    arguments = {"host_name": "127.0.0.1", "world_size": 1, "is_master": True, "multi_tenant": True, "wait_for_workers": False}
    before = listening()
    upstreams = TCPStore(port=free_port(), **arguments)
    [address] = set(listening()) - set(before)
    assert address in ("::", "0.0.0.0"), "torch's own store listens everywhere: that is why there is ours"
    del upstreams

    before = listening()
    port = free_port()
    ours = loopback.store_at_its_address(TCPStore)(port=port, **arguments)
    assert sorted(listening()) == sorted([*before, "127.0.0.1"])
    client = loopback.store_at_its_address(TCPStore)(host_name="127.0.0.1", port=port, world_size=1, is_master=False)
    client.set("key", "value")
    assert ours.get("key") == b"value"


def test_the_weight_broadcast_listens_at_its_own_address_only(monkeypatch):
    import torch

    from openrlhf_sd.cpu.gloo_broadcast import GlooBroadcastGroup

    for name, value in loopback.ENV_VARS.items():
        monkeypatch.setenv(name, value)
    before = listening()
    group = GlooBroadcastGroup("127.0.0.1", free_port(), 0, 1)
    assert listening() != before and set(listening()) - set(before) <= {"127.0.0.1"}
    group.broadcast(torch.ones(2), src=0)


def test_torchs_rendezvous_is_patched_on_cpu():
    code = (
        "import sys; from openrlhf_sd.cpu import platform; platform.install(); import torch.distributed;"
        "store = sys.modules['torch.distributed.rendezvous'].TCPStore;"
        "assert store.__module__ == 'openrlhf_sd.cpu.loopback', store"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def ray_of_this_machine(monkeypatch):
    """Ray's choice of its address, as it is and put back after."""
    from ray._private import ray_constants, services

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return services


def start_ray(monkeypatch):
    """What OpenRLHF's `ray.init` becomes on a CPU."""
    monkeypatch.setattr(ray_start, "num_slots", lambda upstream: 2)
    called = {}
    init = ray_start.ray_init_on_cpu(lambda **kwargs: called.update(kwargs), None, "/tmp/session", "a.b")
    init(runtime_env={"env_vars": {"NCCL_DEBUG": "WARN"}})
    return called


def test_a_ray_of_our_own_listens_on_the_loopback_interface(monkeypatch, ray_of_this_machine):
    called = start_ray(monkeypatch)
    assert ray_of_this_machine.get_node_ip_address() == "127.0.0.1"
    assert (called["address"], called["include_dashboard"]) == ("local", False)
    assert called["runtime_env"]["env_vars"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert called["runtime_env"]["env_vars"]["NCCL_DEBUG"] == "WARN"


def test_a_cluster_that_is_joined_keeps_its_addresses(monkeypatch, ray_of_this_machine):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_of_this_machine, "node_ip_address_from_perspective", lambda address: "10.0.0.2")
    called = start_ray(monkeypatch)
    assert ray_of_this_machine.get_node_ip_address() == "10.0.0.2"
    assert "address" not in called and "GLOO_SOCKET_IFNAME" not in called["runtime_env"]["env_vars"]


def test_nobody_else_can_enter_rays_folder(monkeypatch, tmp_path):
    """Ray gives everyone write permission on the folder itself."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with ray_start.session_dir() as folder:
        closed = Path(folder).parent
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700
        Path(folder).mkdir()
    assert not closed.exists()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with ray_start.session_dir() as folder:
        assert folder == str(tmp_path)
    assert tmp_path.exists()


def test_the_users_interface_for_gloo_is_kept(monkeypatch, ray_of_this_machine):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert start_ray(monkeypatch)["runtime_env"]["env_vars"]["GLOO_SOCKET_IFNAME"] == "eth7"
