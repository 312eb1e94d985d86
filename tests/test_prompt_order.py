"""One seed, one order of prompts, whatever the process has drawn before. tests/engine/test_grpo_end_to_end.py shows it over whole runs."""

from types import ModuleType, SimpleNamespace

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from openrlhf_sd.prompt_order import seed_prompt_order

PROMPTS = list(range(50))


def trainer_module():
    """With a `prepare_datasets` that shuffles as OpenRLHF's does (`DeepspeedStrategy.setup_dataloader` outside of a process group)."""
    module = ModuleType("trainer")
    module.prepare_datasets = lambda strategy, tokenizer: StatefulDataLoader(PROMPTS, batch_size=1, shuffle=True)
    return module


def orders(module, seeds):
    found = []
    for process, seed in enumerate(seeds):
        torch.manual_seed(process)  # what an unseeded process starts with is anything
        loader = module.prepare_datasets(SimpleNamespace(args=SimpleNamespace(train=SimpleNamespace(seed=seed))), None)
        found.append([[int(batch) for batch in loader] for _ in range(2)])
    return found


def test_upstream_orders_prompts_by_chance():
    first, second = orders(trainer_module(), [42, 42])
    assert first != second


def test_a_seed_is_an_order_in_every_episode():
    module = trainer_module()
    with seed_prompt_order(module):
        pass
    first, again, other = orders(module, [42, 42, 43])
    assert first == again and first != other
    assert first[0] != first[1] and sorted(first[0]) == PROMPTS
