"""The bundled model answers held-out exercises, stops by itself, and loads like any Hugging Face model."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "shared" / "pagebus" / "bundled"
sys.path.insert(0, str(ROOT / "deploy" / "bundled_model"))

import evaluate  # noqa: E402
import exercises  # noqa: E402

# The least share of held-out questions answered exactly. The first three are what the model is held to; the
# others lie a bit below what was measured (the table in deploy/bundled_model/README.md).
FLOORS = {
    exercises.sums: 0.95,
    exercises.differences: 0.95,
    exercises.products: 0.98,
    exercises.spelling: 0.85,
    exercises.reversing: 0.85,
    exercises.letter_count: 0.75,
    exercises.word_count: 0.90,
    exercises.word_sorting: 0.72,
    exercises.word_order: 0.90,
    exercises.repeating: 0.85,
    exercises.number_sorting: 0.82,
    exercises.counting: 0.68,
    exercises.comparing: 0.90,
    exercises.following: 0.90,
    exercises.pagebus_facts: 0.90,
    exercises.small_talk: 0.90,
}
QUESTIONS = {exercises.sums: 300, exercises.differences: 300, exercises.products: 200}


class Bundled:
    """The model and its tokenizer, loaded as a user would."""

    def __init__(self) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(FOLDER)

    def chat(self, *messages: str, system: str | None = None, max_new: int = 200) -> str:
        """The answer to the last of `messages` (user and assistant in turn)."""
        chat = [] if system is None else [{"role": "system", "content": system}]
        chat += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        return evaluate.answers(self.model, self.tokenizer, [chat], max_new)[0]

    def complete(self, prompt: str, max_new: int = 64) -> str:
        """The greedy continuation of plain text."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        made = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new
        )
        return str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def bundled() -> Bundled:
    return Bundled()


@pytest.mark.parametrize("skill", FLOORS, ids=lambda skill: skill.__name__)
def test_held_out_questions_are_answered(bundled: Bundled, skill: exercises.Skill) -> None:
    result = evaluate.score(bundled.model, bundled.tokenizer, skill, QUESTIONS.get(skill, 60))
    assert result.accuracy >= FLOORS[skill], (result.accuracy, result.wrong[:5])


def test_training_never_sees_a_held_out_pair() -> None:
    rng = random.Random(5)
    trained = {exercises.draw_pair(rng, held_out=False) for _ in range(20_000)}
    tested = {exercises.draw_pair(rng, held_out=True) for _ in range(2_000)}
    assert not {tuple(sorted(pair)) for pair in trained} & {tuple(sorted(pair)) for pair in tested}


def test_every_product_is_known(bundled: Bundled) -> None:
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    chats = [[{"role": "user", "content": f"What is {a} x {b}?"}] for a, b in pairs]
    given = evaluate.answers(bundled.model, bundled.tokenizer, chats, 24)
    right = sum(text.endswith(f"= {a * b}") for (a, b), text in zip(pairs, given, strict=True))
    assert right >= 0.98 * len(pairs)


def test_the_sum_of_the_readme(bundled: Bundled) -> None:
    assert bundled.chat("What is 127 + 245?").endswith("372")
    assert bundled.chat("What is 127 + 245?", system="You are a helpful assistant.").endswith("372")
    assert bundled.complete("127 + 245 =").strip() == "372"


def test_a_later_turn_is_answered_like_a_first_one(bundled: Bundled) -> None:
    answer = bundled.chat(
        "Hello", "Hello! How can I help you?", "Spell garden.", "g-a-r-d-e-n", "What is 7 * 8?"
    )
    assert answer.endswith("56")


def test_stories_are_long_and_end(bundled: Bundled) -> None:
    for hero in ("fox", "queen", "turtle"):
        story = bundled.chat(
            f"Tell me a long story about {'an' if hero[0] in 'aeiou' else 'a'} {hero}.", max_new=500
        )
        assert hero in story
        assert not story.endswith("…"), "the story does not stop by itself"
        assert len(bundled.tokenizer(story).input_ids) >= 80


def test_a_story_goes_on_from_its_beginning(bundled: Bundled) -> None:
    assert len(bundled.complete("Once upon a time there was").split()) > 20


def test_files_are_small_and_plain() -> None:
    files = sorted(FOLDER.iterdir())
    assert {file.name for file in files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in files) <= 12_000_000


@pytest.mark.parametrize("text", ["12 + 3\t=\n", "naïve café 東京 🦊", "\x00\x01\x7f", "a  b   c"])
def test_any_text_survives_the_tokenizer(bundled: Bundled, text: str) -> None:
    ids = bundled.tokenizer(text).input_ids
    assert bundled.tokenizer.decode(ids) == text


def test_every_digit_is_a_token(bundled: Bundled) -> None:
    assert bundled.tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_the_chat_template(bundled: Bundled) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    text = bundled.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
