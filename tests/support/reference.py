"""What transformers itself says: greedy tokens, and whether given tokens are as good as the best (ties)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

TIE = 1e-4
"""Two choices closer than this in float32 log-probability count as a tie (DESIGN, the promise)."""


def load(path: Path) -> PreTrainedModel:
    """The model in float32, for evaluation. Eager: else transformers 5.17 drops Gemma 2's soft cap."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, prompt: Sequence[int], num_tokens: int, eos: Sequence[int] = ()
) -> list[int]:
    """`generate`'s greedy continuation, up to and including the first of `eos`."""
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=list(eos) or [-1],  # -1: never, whatever the model's own say
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def greedy_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """`generate`'s greedy continuations of a ragged batch, padded on the left as transformers wants it."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=[-1],
        pad_token_id=0,
    )
    return out[:, longest:].tolist()


@torch.inference_mode()
def worst_margin(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """How far below the best choice, in log-probability, the worst of `ids` lies (teacher-forced)."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    scores = logits.log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(list(ids))[:, None])[:, 0]
    return float((scores.max(-1).values - chosen).max())


def assert_greedy(
    model: PreTrainedModel,
    prompt: Sequence[int],
    ids: Sequence[int],
    num_tokens: int,
    eos: Sequence[int] = (),
) -> None:
    """`ids` are `generate`'s own, or part from them at a tie only and are as greedy throughout."""
    assert_same(model, prompt, ids, greedy(model, prompt, num_tokens, eos))
    assert len(ids) == num_tokens or ids[-1] in eos, "the stream ended early"


def assert_same(
    model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int], expected: Sequence[int]
) -> None:
    """`ids` are the expected greedy ones, or part from them at a tie only and are as greedy throughout."""
    if list(ids) == list(expected):
        return
    margin = worst_margin(model, prompt, ids)
    assert margin <= TIE, f"{list(ids)} differ from {expected} by {margin} where there is no tie"
