"""OpenVINO GenAI's continuous batching as a command peer; needs only `openvino_genai` and numpy.

```
VENV/bin/python tests/bench/peer_openvino.py IR_DIR < question.json
```

Reads one `Question` of `peer_servers.py` as JSON, and prints one `Reply` as its last line.
"""

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai

_CACHE_GB = 2
_NUM_WARMUP_TOKENS = 4


def main() -> None:
    """Load, warm up, and keep `num_streams` requests running until all are answered."""
    question = json.load(sys.stdin)
    config = genai.SchedulerConfig()
    config.cache_size = _CACHE_GB
    config.max_num_seqs = 64
    config.max_num_batched_tokens = 2048
    config.enable_prefix_caching = False
    began_s = time.perf_counter()
    pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], config, "CPU")
    ready_after_s = time.perf_counter() - began_s
    prompts, num_output = question["prompts"], question["num_output"]
    num_streams = question["num_streams"]
    warmup = [[one + 1 for one in prompt] for prompt in prompts[:num_streams]]
    run(pipeline, warmup, [_NUM_WARMUP_TOKENS] * len(warmup), num_streams, first_id=1 << 20)
    answers = run(pipeline, prompts, num_output, num_streams, first_id=0)
    reply = {"version": genai.get_version(), "ready_after_s": ready_after_s, "answers": answers}
    print(json.dumps(reply), flush=True)


def run(pipeline, prompts, num_output, num_streams, first_id):
    """For each prompt when it was sent and when each token was there (seconds), and the tokens."""
    answers, handles = [], {}
    while len(answers) < len(prompts) or handles:
        while len(handles) < num_streams and len(answers) < len(prompts):
            at = len(answers)
            settings = genai.GenerationConfig()
            settings.max_new_tokens = num_output[at]
            settings.set_eos_token_id(0)  # a checkpoint without one is refused; it is ignored
            settings.ignore_eos = True
            settings.do_sample = False
            answers.append({"sent_s": time.perf_counter(), "times_s": [], "tokens": []})
            ids = ov.Tensor(np.array([prompts[at]], dtype=np.int64))
            handles[at] = pipeline.add_request(first_id + at, ids, settings)
        pipeline.step()
        now_s = time.perf_counter()
        for at, handle in list(handles.items()):
            while handle.can_read():
                for output in handle.read().values():
                    answers[at]["tokens"] += output.generated_ids
                    answers[at]["times_s"] += [now_s] * len(output.generated_ids)
            if len(answers[at]["tokens"]) >= num_output[at]:
                del handles[at]
    return answers


if __name__ == "__main__":
    main()
