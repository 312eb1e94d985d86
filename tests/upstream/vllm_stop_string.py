"""vLLM 0.29.0: where a step has several tokens, the tokens behind a stop string stay in `token_ids`

With speculative decoding a step may complete a stop string and go on. The text is cut at the stop string; `token_ids` and `logprobs`
are not, so a reinforcement learner trains on tokens that are no part of the answer.

Expected: the token ids of the same answer sampled one token a step.
"""

import sys

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

WORDS = ["<unk>", "<p>", "call", "</", "tool", ">", " then", " more"]
ANSWER = [WORDS.index(word) for word in ("call", "</", "tool", ">", " then", " more")]


def answer(tokens_per_step: int):
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.decoder = decoders.Fuse()
    processor = OutputProcessor(PreTrainedTokenizerFast(tokenizer_object=words), log_stats=False)
    params = SamplingParams(stop=["</tool>"], skip_special_tokens=False)
    processor.add_request(EngineCoreRequest("r", [1], None, params, None, 0.0, None, None, None, external_req_id="r"), "<p>")
    for start in range(0, len(ANSWER), tokens_per_step):
        is_last = start + tokens_per_step >= len(ANSWER)
        step = EngineCoreOutput("r", ANSWER[start:][:tokens_per_step], finish_reason=FinishReason.LENGTH if is_last else None)
        for output in processor.process_outputs([step]).request_outputs:
            if output.finished:
                return output.outputs[0]


plain, speculated = answer(1), answer(len(ANSWER))
for name, output in (("one token a step", plain), ("six tokens a step", speculated)):
    print(f"{name}: text {output.text!r}, tokens {[WORDS[token] for token in output.token_ids]}")
if list(plain.token_ids) == list(speculated.token_ids):
    sys.exit("not reproduced")
