"""One run of vLLM with two ranks: `python serve.py MODEL OUT COMPILATION [OTHERS]`.

Writes to OUT, as JSON: the greedy tokens of three prompts, their log probabilities, and what each rank's ringfence says
of itself. COMPILATION is vLLM's compilation_config, and OTHERS more of LLM's arguments, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = 12
PROMPTS = [[1, 17, 99, 203], [1, 400, 8, 3, 250, 77, 5], [1, 31]]


def serve(model: str, compilation: dict[str, Any], **others: Any) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    llm = LLM(
        model=model,
        tensor_parallel_size=2,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        seed=0,
        compilation_config=compilation,
        disable_log_stats=True,
        **others,
    )
    ready = time.monotonic()
    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    done = time.monotonic()
    answers = [one.outputs[0] for one in outputs]
    return {
        "tokens": [list(a.token_ids) for a in answers],
        "logprobs": [[step[t].logprob for t, step in zip(a.token_ids, a.logprobs, strict=True)] for a in answers],
        "ranks": _ranks(llm),
        "seconds": {"start": round(ready - began, 1), "serve": round(done - ready, 1)},
    }


def _ranks(llm: Any) -> list[Any]:
    try:
        return list(llm.collective_rpc("ringfence"))
    except Exception:  # nothing was asked for
        return []


if __name__ == "__main__":
    model, out, *settings = sys.argv[1:]
    compilation, others = (*map(json.loads, settings), {})[:2]
    result = serve(model, compilation, **others)
    Path(out).write_text(json.dumps(result))
