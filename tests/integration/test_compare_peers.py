"""The comparison as a whole: pagebus beside an engine without HTTP, on a tiny model."""

import sys

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from pagebus.bench.load import LoadError
from tests.bench.compare_peers import main
from tests.bench.peer_checkpoint import write_tokenizer
from tests.bench.peer_results import OURS, STATIC, Results
from tests.bench.peer_tokens import check_tokens
from tests.support.models import VOCAB_SIZE, make_model

ENGINE = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM

question = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
answers = []
with torch.inference_mode():
    for prompt, num in zip(question["prompts"], question["num_output"]):
        ids, sent_s, times_s = list(prompt), time.perf_counter(), []
        for _ in range(num):
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(best)
            times_s.append(time.perf_counter())
        answers.append({"sent_s": sent_s, "times_s": times_s, "tokens": ids[len(prompt):]})
print(json.dumps({"answers": answers, "version": "5"}))
"""


@pytest.mark.slow
def test_tokens_are_checked_and_everybody_is_measured_in_turn(tmp_path):
    model = make_model("llama", tmp_path / "tiny", has_tokenizer=False)
    write_tokenizer(model, VOCAB_SIZE)
    (tmp_path / "engine.py").write_text(ENGINE)
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:{at},80,{16 + 8 * (at % 2)}" for at in range(10, 16)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    words = f"run {model} --streams 2 --waves 1 --input-len 8 --output-len 4 --prefill 40 --num-prefills 1"
    words += f" --trace {trace} --batch 3 --rounds 1 --out {tmp_path / 'out.json'}"
    command = f"other={sys.executable} {tmp_path / 'engine.py'} {model}"
    assert main([*words.split(), "--command", command, "--serve", "--kv-cache-memory", "16MiB"]) == 0
    found = msgspec.json.decode((tmp_path / "out.json").read_bytes(), type=Results)
    assert [(run.row, run.server) for run in found.runs] == [
        *(("2 streams", name) for name in (OURS, "other", OURS)),
        *(("prefill of 40", name) for name in (OURS, "other", OURS)),
        *(("trace, batch 3", name) for name in (OURS, STATIC, OURS)),
    ]
    assert found.servers[OURS].tokens.is_right
    assert found.servers["other"].tokens.is_right
    assert [run.tokens for run in found.runs] == [12] * 3 + [1] * 3 + [15] * 3
    assert all(run.tokens_per_s > 0 for run in found.runs)
    assert found.servers[OURS].idle_cores == []  # nobody else was there to be warmed up over HTTP


class Greedy:
    """transformers itself as a peer; `flip`: each token's id is changed by these bits."""

    def __init__(self, model, flip):
        self.model, self.flip = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), flip

    @torch.inference_mode()
    def greedy(self, prompts, num_tokens):
        found = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(num_tokens):
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()) ^ self.flip)
            found.append(ids[len(prompt) :])
        return found


class Silent:
    """A peer that gives no ids."""

    def greedy(self, prompts, num_tokens):
        raise LoadError("no token ids")


def test_wrong_tokens_are_seen(tmp_path):
    model = make_model("llama", tmp_path / "tiny", has_tokenizer=False)
    peers = {"right": Greedy(model, 0), "wrong": Greedy(model, 1), "silent": Silent()}
    right, wrong, silent = check_tokens(model, peers).values()
    assert right.is_right
    assert right.num_highest > 0.9 * right.num_tokens
    assert not wrong.is_right
    assert wrong.num_as_good < 0.5 * wrong.num_tokens
    assert (silent.is_right, silent.flaw) == (False, "no token ids")
