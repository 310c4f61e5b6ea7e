"""Batches of token ids from exercises: samples of like length together, loss on what the model has to say."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from exercises import Chat, Text, draw_chat, draw_drill, draw_text
from tokenizer import END_OF_TEXT, TURN_END, TURN_START, special_id
from tokenizers import Tokenizer

NO_LOSS = -100
# What one chunk holds: chats, bare sums, plain texts.
CHUNK_CHATS, CHUNK_DRILLS, CHUNK_TEXTS = 160, 220, 10
MAX_TOKENS = 640


@dataclass(frozen=True)
class Sample:
    """Token ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


def _pieces(item: Chat | Text) -> list[tuple[str, bool]]:
    """The text of a sample, cut where learning starts and stops."""
    if isinstance(item, Text):
        return [(item.prompt, False), (item.continuation + END_OF_TEXT, True)]
    pieces = [] if item.system is None else [(f"{TURN_START}system\n{item.system}{TURN_END}\n", False)]
    for turn in item.turns:
        pieces.append((f"{TURN_START}user\n{turn.question}{TURN_END}\n{TURN_START}assistant\n", False))
        pieces += [(turn.answer + TURN_END, True), ("\n", False)]
    return pieces


def encode(tokenizer: Tokenizer, items: list[Chat | Text]) -> list[Sample]:
    """Tokens of many samples. Pieces meet at special tokens or spaces, where the tokenizer cuts anyway."""
    pieces = [_pieces(item) for item in items]
    encoded = iter(tokenizer.encode_batch_fast([text for sample in pieces for text, _ in sample]))
    samples = []
    for sample in pieces:
        ids: list[int] = []
        learned: list[bool] = []
        for _, is_learned in sample:
            new = next(encoded).ids
            ids += new
            learned += [is_learned] * len(new)
        samples.append(Sample(ids[:MAX_TOKENS], learned[:MAX_TOKENS]))
    return samples


def padded(length: int) -> int:
    """The length that a sample is padded to: few different ones, so that kernels are reused."""
    for bound, step in ((64, 4), (128, 8), (256, 16)):
        if length <= bound:
            return -(-length // step) * step
    return -(-length // 32) * 32


def _tensors(samples: list[Sample], length: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets, [samples, length] each."""
    ids = torch.full((len(samples), length), pad_id)
    targets = torch.full((len(samples), length), NO_LOSS)
    for row, sample in enumerate(samples):
        count = len(sample.ids) - 1
        ids[row, :count] = torch.tensor(sample.ids[:-1])
        targets[row, :count] = torch.tensor(
            [
                token if learned else NO_LOSS
                for token, learned in zip(sample.ids[1:], sample.learned[1:], strict=True)
            ]
        )
    return ids, targets


def batches(tokenizer: Tokenizer, seed: int, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of about `tokens` padded tokens for ever; the same seed gives the same batches."""
    rng = random.Random(seed)
    pad_id = special_id(tokenizer, END_OF_TEXT)
    waiting: dict[int, list[Sample]] = {}
    while True:
        items: list[Chat | Text] = [draw_chat(rng) for _ in range(CHUNK_CHATS)]
        items += [draw_drill(rng) for _ in range(CHUNK_DRILLS)]
        items += [draw_text(rng) for _ in range(CHUNK_TEXTS)]
        rng.shuffle(items)
        for sample in encode(tokenizer, items):
            length = padded(len(sample.ids) - 1)
            row = waiting.setdefault(length, [])
            row.append(sample)
            if len(row) >= max(1, tokens // length):
                yield _tensors(row, length, pad_id)
                waiting[length] = []
