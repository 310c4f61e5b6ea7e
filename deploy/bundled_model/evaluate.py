"""Accuracy of a bundled model on held-out exercises, measured with plain transformers.

python deploy/bundled_model/evaluate.py shared/pagebus/bundled --questions 200
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from exercises import SKILLS, Skill, Turn, stories

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 20_000_003


@dataclass(frozen=True)
class Score:
    """How many of the questions of one skill were answered exactly, and some that were not."""

    right: int
    asked: int
    wrong: tuple[tuple[str, str, str], ...]  # question, answer expected, answer given

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


def held_out_turns(skill: Skill, count: int, seed: int = SEED) -> list[Turn]:
    """Questions of the held-out split."""
    rng = random.Random(f"{seed} {skill.__name__}")
    return [skill(rng, True) for _ in range(count)]


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[list[dict[str, str]]],
    max_new: int = 96,
) -> list[str]:
    """Greedy answers of a transformers model to chats; an answer that does not stop by itself ends in `…`."""
    prompts = [
        str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats
    ]
    batch = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    made = model.generate(  # type: ignore[operator]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=max_new,
    )[:, batch["input_ids"].shape[1] :]
    ends = torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id])
    stopped = torch.isin(made, ends).any(dim=1).tolist()
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in made]
    return [text if is_stopped else text + "…" for text, is_stopped in zip(texts, stopped, strict=True)]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: Skill, count: int, max_new: int = 96
) -> Score:
    """The share of held-out questions of one skill that are answered exactly."""
    turns = sorted(held_out_turns(skill, count), key=lambda turn: len(turn.answer))
    wrong = []
    for start in range(0, len(turns), 100):
        part = turns[start : start + 100]
        given = answers(
            model, tokenizer, [[{"role": "user", "content": turn.question}] for turn in part], max_new
        )
        wrong += [
            (turn.question, turn.answer, text)
            for turn, text in zip(part, given, strict=True)
            if not is_right(skill, turn, text)
        ]
    return Score(len(turns) - len(wrong), len(turns), tuple(wrong))


def is_right(skill: Skill, turn: Turn, text: str) -> bool:
    """Exactly the answer; for what has several answers (small talk), any of them."""
    if skill.__name__ == "small_talk":
        from facts import SMALL_TALK

        return any(turn.answer in options and text in options for _, options in SMALL_TALK)
    return text == turn.answer


def score_all(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, Score]:
    """Every skill that has right answers (a story has none)."""
    return {skill.__name__: score(model, tokenizer, skill, count) for skill in SKILLS if skill is not stories}


def main() -> None:
    """Prints a table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--show", type=int, default=2, help="wrong answers to show for each skill")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.folder)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    for name, result in score_all(model, tokenizer, options.questions).items():
        print(f"{name:16} {result.right:4}/{result.asked}  {result.accuracy:7.2%}")
        for question, expected, given in result.wrong[: options.show]:
            print(f"    {question!r}: expected {expected!r}, got {given!r}")


if __name__ == "__main__":
    main()
