"""Whether a server's greedy tokens are the model's: transformers reads them, teacher-forced."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch

from pagebus.bench.load import LoadError
from tests.bench.peer_servers import Peer

_PROMPT_LENGTHS = (5, 37, 128)
_NUM_TOKENS = 24
_LEAST_ID, _NUM_IDS = 32, 200
_SLACK = 4.0
"""Times what bf16 does to the logits of that place (root mean square over the vocabulary), as transformers'
own bf16 shows: so far behind the highest may a token be."""


class TokenCheck(msgspec.Struct, kw_only=True):
    """Of `num_tokens`, so many are the highest logit's, and so many at least as good as that."""

    num_tokens: int = 0
    num_highest: int = 0
    num_as_good: int = 0
    most_behind: float = 0.0  # the highest logit, in units of the noise
    flaw: str = ""

    @property
    def is_right(self) -> bool:
        """Whether every token is one that greedy decoding may give."""
        return not self.flaw and self.num_as_good == self.num_tokens > 0

    def words(self) -> str:
        """One line."""
        if self.flaw:
            return f"tokens not checked: {self.flaw}"
        return (
            f"{self.num_as_good} of {self.num_tokens} tokens right, {self.num_highest} the highest "
            f"exactly, at most {self.most_behind:.1f} times bf16's noise behind it"
        )


def check_tokens(model: Path, peers: Mapping[str, Peer]) -> dict[str, TokenCheck]:
    """By peer's name; one that gives no tokens has a flaw."""
    from transformers import AutoModelForCausalLM

    exact, rough = (
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    prompts = [[_LEAST_ID + 7 * at % _NUM_IDS for at in range(length)] for length in _PROMPT_LENGTHS]
    found = {}
    for name, peer in peers.items():
        check = found[name] = TokenCheck()
        try:
            made = peer.greedy(prompts, _NUM_TOKENS)
        except LoadError as error:
            check.flaw = str(error)
            continue
        for prompt, tokens in zip(prompts, made, strict=True):
            _compare(exact, rough, prompt, tokens, check)
    return found


@torch.inference_mode()
def _compare(
    exact: torch.nn.Module, rough: torch.nn.Module, prompt: list[int], made: list[int], check: TokenCheck
) -> None:
    ids = torch.tensor([prompt + made])
    logits, shaken = (model(ids).logits[0, len(prompt) - 1 : -1].float() for model in (exact, rough))
    noise = (logits - shaken).pow(2).mean(-1).sqrt()
    chosen = logits.gather(1, torch.tensor(made)[:, None])[:, 0]
    behind = logits.max(-1).values - chosen
    check.num_tokens += len(made)
    check.num_highest += int((behind == 0).sum())
    check.num_as_good += int((behind <= _SLACK * noise).sum())
    check.most_behind = max(check.most_behind, float((behind / noise).max()))
