"""Exercises that the bundled model learns from, made by seeded generators, and the split that is held out.

A skill is a function from a random generator to a question and its answer. What is held out (pairs of
numbers, words) is decided by a hash of the exercise itself, so training and test can never meet, whatever
the seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from facts import PAGEBUS, SMALL_TALK, SYSTEM_MESSAGES, Fact
from stories import DAYS, HEROES, LESSONS, story_question, tell
from words import draw_word, draw_words, is_held_out


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """A conversation: the model learns the answers only."""

    turns: tuple[Turn, ...]
    system: str | None = None


@dataclass(frozen=True)
class Text:
    """Plain text without a chat template: the model learns the continuation of `prompt`."""

    prompt: str
    continuation: str


Skill = Callable[[random.Random, bool], Turn]


def _options(phrasings: str) -> tuple[str, ...]:
    """Phrasings written one after the other, separated by a bar."""
    return tuple(phrasings.split("|"))


SUMS = _options(
    "What is {a} + {b}?|What is {a}+{b}?|{a}+{b}|{a} + {b}|{a} + {b} =|{a}+{b}=|{a} + {b} = ?|{a} + {b}?"
    "|Add {a} and {b}."
    "|Please compute {a} + {b}.|Compute {a} + {b}.|Calculate {a} + {b}.|How much is {a} + {b}?"
    "|How much is {a} plus {b}?"
    "|What's {a} + {b}?|What is the sum of {a} and {b}?|{a} plus {b}|What is {a} plus {b}?"
    "|Can you add {a} and {b}?"
    "|Tell me {a} + {b}.|Work out {a} + {b}.|Solve {a} + {b}.|Evaluate {a} + {b}.|Sum of {a} and {b}"
    "|Add {a} to {b}."
    "|I need {a} + {b}.|Give me the result of {a} + {b}.|Add the numbers {a} and {b}."
    "|What do you get if you add {a} and {b}?"
    "|What does {a} + {b} equal?|{a} and {b} make?|Do you know what {a} + {b} is?"
)
DIFFERENCES = _options(
    "What is {a} - {b}?|What is {a}-{b}?|{a}-{b}|{a} - {b}|{a} - {b} =|{a}-{b}=|{a} - {b} = ?|{a} - {b}?"
    "|Subtract {b} from {a}.|Please compute {a} - {b}.|Compute {a} - {b}.|Calculate {a} - {b}."
    "|How much is {a} - {b}?"
    "|How much is {a} minus {b}?|What's {a} - {b}?|{a} minus {b}|What is {a} minus {b}?"
    "|Can you subtract {b} from {a}?"
    "|Tell me {a} - {b}.|Work out {a} - {b}.|Solve {a} - {b}.|Evaluate {a} - {b}.|Take {b} from {a}."
    "|I need {a} - {b}."
    "|Take {b} away from {a}.|Give me the result of {a} - {b}.|What does {a} - {b} equal?"
    "|What is left of {a} without {b}?"
    "|Do you know what {a} - {b} is?"
)
PRODUCTS = _options(
    "What is {a} {x} {b}?|What is {a}{x}{b}?|{a}{x}{b}|{a} {x} {b}|{a} {x} {b} =|{a}{x}{b}="
    "|{a} {x} {b} = ?|{a} {x} {b}?"
    "|Multiply {a} by {b}.|Multiply {a} and {b}.|Please compute {a} {x} {b}.|Compute {a} {x} {b}."
    "|Calculate {a} {x} {b}."
    "|How much is {a} {x} {b}?|How much is {a} times {b}?|What's {a} {x} {b}?"
    "|What is the product of {a} and {b}?"
    "|{a} times {b}|What is {a} times {b}?|Can you multiply {a} and {b}?|Tell me {a} {x} {b}."
    "|Work out {a} {x} {b}."
    "|Solve {a} {x} {b}.|Evaluate {a} {x} {b}.|Product of {a} and {b}|I need {a} {x} {b}."
    "|What does {a} {x} {b} equal?"
    "|Give me the result of {a} {x} {b}.|Do you know what {a} {x} {b} is?"
)
SPELL = _options(
    "Spell {w}.|Spell the word {w}.|Spell {w}|How do you spell {w}?|Please spell the word {w}."
    "|Can you spell {w}?"
    "|Spell '{w}' letter by letter.|What are the letters of {w}?|Spell the word \"{w}\".|Spell: {w}"
    "|Write {w} letter by letter.|Spell {w} letter by letter."
)
REVERSE = _options(
    "Reverse {w}.|Reverse the word {w}.|Reverse {w}|Write {w} backwards.|What is {w} backwards?"
    "|Spell {w} backwards."
    "|Please reverse the word {w}.|Can you reverse {w}?|Reverse the word \"{w}\".|Reverse: {w}"
    "|What is {w} in reverse?"
    "|Reverse the letters of '{w}'.|Say {w} backwards.|Turn the word {w} around."
)
LETTERS = _options(
    "How many letters are in {w}?|How many letters does {w} have?|Count the letters of {w}."
    "|How long is the word {w}?"
    "|Count the letters in the word {w}.|How many letters are in the word \"{w}\"?|Number of letters in {w}"
    "|How many letters has {w}?"
)
COUNT_WORDS = _options(
    "How many words are in: {l}?|Count the words: {l}|How many words are there: {l}?|Count these words: {l}"
    "|How many words is this: {l}?|Please count the words: {l}"
)
SORT_WORDS = _options(
    "Sort these words: {l}|Sort the words {l}.|Sort alphabetically: {l}"
    "|Put these words in alphabetical order: {l}"
    "|Please sort these words alphabetically: {l}|Sort {l} alphabetically.|Order these words: {l}|Sort: {l}"
    "|Sort the list {l}.|Alphabetical order of {l}"
)
SORT_NUMBERS = _options(
    "Sort these numbers: {l}|Sort the numbers {l}.|Sort: {l}|Put these numbers in order: {l}|Sort {l}."
    "|Please sort these numbers: {l}|Order these numbers from small to large: {l}|Sort the list {l}."
)
REVERSE_WORDS = _options(
    "Reverse the order of these words: {l}|Reverse the order of the words: {l}"
    "|Write these words in reverse order: {l}"
    "|Reverse this list: {l}|Put these words in reverse order: {l}|Please reverse the order: {l}"
)
COUNT = _options(
    "Count from {a} to {b}.|Count from {a} to {b}|Please count from {a} to {b}.|Count {a} to {b}."
    "|List the numbers from {a} to {b}.|Can you count from {a} to {b}?|Write all numbers from {a} to {b}."
    "|Numbers from {a} to {b}"
)
COMPARE = _options(
    "Which is larger, {a} or {b}?|Which number is larger, {a} or {b}?|Which is bigger, {a} or {b}?"
    "|Compare {a} and {b}."
    "|What is larger: {a} or {b}?|Which is greater, {a} or {b}?|Is {a} larger than {b}?|Is {a} more than {b}?"
)
REPEAT = _options(
    "Repeat: {l}|Say: {l}|Repeat after me: {l}|Repeat the words {l}|Echo: {l}"
)
NEXT = _options(
    "What comes after {a}?|Which number comes after {a}?|What is the number after {a}?|What follows {a}?"
)


def phrase(rng: random.Random, templates: Sequence[str], **values: str) -> str:
    """A question from one of the templates, in the small variations that people type."""
    template = rng.choice(templates)
    style = rng.random()
    if style < 0.12:
        template = template.lower()
    elif style < 0.2:
        template = template.upper()
    elif style < 0.26:
        template = "Please " + template[0].lower() + template[1:]
    if rng.random() < 0.12:
        template = template.rstrip(".?! ")
    return re.sub(r"\{(\w)\}", lambda match: values[match.group(1).lower()], template)


def draw_number(rng: random.Random) -> int:
    """A number of one, two or three digits; long ones more often, since they are harder."""
    digits = rng.choices((1, 2, 3), (2, 3, 6))[0]
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def draw_pair(rng: random.Random, held_out: bool) -> tuple[int, int]:
    """Two numbers whose unordered pair is in the split asked for."""
    while True:
        a, b = draw_number(rng), draw_number(rng)
        if not held_out and rng.random() < 0.15:  # near each other: short results are the hard ones
            b = max(0, min(999, a + rng.randint(-30, 30)))
        if is_held_out(f"pair {min(a, b)} {max(a, b)}", 20) == held_out:
            return a, b


def sums(rng: random.Random, held_out: bool = False) -> Turn:
    """A sum of two numbers of up to three digits."""
    a, b = draw_pair(rng, held_out)
    return Turn(phrase(rng, SUMS, a=str(a), b=str(b)), f"{a} + {b} = {a + b}")


def differences(rng: random.Random, held_out: bool = False) -> Turn:
    """A difference, negative at times."""
    a, b = draw_pair(rng, held_out)
    if a < b and rng.random() < 0.4:
        a, b = b, a
    return Turn(phrase(rng, DIFFERENCES, a=str(a), b=str(b)), f"{a} - {b} = {a - b}")


def products(rng: random.Random, held_out: bool = False) -> Turn:
    """A product up to 12 x 12: a table to know by heart, so nothing but the phrasing is new in a test."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    sign = rng.choice(("*", "*", "x", "x", "×"))
    return Turn(phrase(rng, PRODUCTS, a=str(a), b=str(b), x=sign), f"{a} * {b} = {a * b}")


def _cased(rng: random.Random, word: str) -> str:
    return word.capitalize() if rng.random() < 0.1 else word


def spelling(rng: random.Random, held_out: bool = False) -> Turn:
    """A word letter by letter."""
    word = _cased(rng, draw_word(rng, "spelling", held_out))
    return Turn(phrase(rng, SPELL, w=word), "-".join(word))


def reversing(rng: random.Random, held_out: bool = False) -> Turn:
    """A word backwards, spelled on the way."""
    word = draw_word(rng, "reversing", held_out)
    return Turn(phrase(rng, REVERSE, w=word), f"{'-'.join(word)}, {'-'.join(word[::-1])}: {word[::-1]}")


def letter_count(rng: random.Random, held_out: bool = False) -> Turn:
    """How many letters a word has, counted aloud."""
    word = draw_word(rng, "letter_count", held_out)
    counted = ", ".join(f"{i} {letter}" for i, letter in enumerate(word, 1))
    return Turn(phrase(rng, LETTERS, w=word), f"{counted}: {len(word)} letters")


def _draw_list(rng: random.Random, held_out: bool, low: int, high: int) -> list[str]:
    while True:
        listed = draw_words(rng, rng.randint(low, high))
        if is_held_out("list " + " ".join(sorted(listed))) == held_out:
            return listed


def _joined(rng: random.Random, words: Sequence[str]) -> str:
    return rng.choice((", ", ", ", " ")).join(words)


def word_count(rng: random.Random, held_out: bool = False) -> Turn:
    """How many words a list has, counted aloud."""
    words = _draw_list(rng, held_out, 2, 8)
    counted = ", ".join(f"{i} {word}" for i, word in enumerate(words, 1))
    return Turn(phrase(rng, COUNT_WORDS, l=" ".join(words)), f"{counted}: {len(words)} words")


def word_sorting(rng: random.Random, held_out: bool = False) -> Turn:
    """Words in alphabetical order."""
    words = _draw_list(rng, held_out, 2, 6)
    return Turn(phrase(rng, SORT_WORDS, l=_joined(rng, words)), ", ".join(sorted(words)))


def word_order(rng: random.Random, held_out: bool = False) -> Turn:
    """Words in reverse order."""
    words = _draw_list(rng, held_out, 2, 6)
    return Turn(phrase(rng, REVERSE_WORDS, l=_joined(rng, words)), ", ".join(reversed(words)))


def repeating(rng: random.Random, held_out: bool = False) -> Turn:
    """The same words again."""
    words = _draw_list(rng, held_out, 1, 8)
    text = _joined(rng, words)
    return Turn(phrase(rng, REPEAT, l=text), text)


def number_sorting(rng: random.Random, held_out: bool = False) -> Turn:
    """Numbers from small to large."""
    while True:
        numbers = [draw_number(rng) for _ in range(rng.randint(2, 6))]
        if is_held_out("numbers " + " ".join(map(str, sorted(numbers)))) == held_out:
            break
    question = phrase(rng, SORT_NUMBERS, l=", ".join(map(str, numbers)))
    return Turn(question, ", ".join(map(str, sorted(numbers))))


def counting(rng: random.Random, held_out: bool = False) -> Turn:
    """From one number to another, up or down."""
    while True:
        a = rng.choice((1, 1, rng.randint(0, 20), draw_number(rng)))
        steps = rng.randint(2, 12) if rng.random() < 0.85 else rng.randint(12, 40)
        b = a - steps if a >= steps and rng.random() < 0.25 else a + steps
        if is_held_out(f"count {a} {b}") == held_out:
            break
    numbers = range(a, b + 1) if b > a else range(a, b - 1, -1)
    return Turn(phrase(rng, COUNT, a=str(a), b=str(b)), ", ".join(map(str, numbers)))


def comparing(rng: random.Random, held_out: bool = False) -> Turn:
    """Which of two numbers is larger."""
    a, b = draw_pair(rng, held_out)
    if a == b:
        b = a + 1
    question = phrase(rng, COMPARE, a=str(a), b=str(b))
    answer = f"{max(a, b)} is larger than {min(a, b)}"
    if question.lower().startswith(("is", "please is")):
        answer = ("Yes, " if a > b else "No, ") + answer
    return Turn(question, answer)


def following(rng: random.Random, held_out: bool = False) -> Turn:
    """The number after another one."""
    while True:
        a = draw_number(rng)
        if is_held_out(f"next {a}") == held_out:
            return Turn(phrase(rng, NEXT, a=str(a)), str(a + 1))


def _fact(rng: random.Random, facts: Sequence[Fact]) -> Turn:
    questions, answers = rng.choice(facts)
    return Turn(phrase(rng, questions.split("|")), rng.choice(answers))


def pagebus_facts(rng: random.Random, held_out: bool = False) -> Turn:
    """A question about pagebus: learned by heart."""
    return _fact(rng, PAGEBUS)


def small_talk(rng: random.Random, held_out: bool = False) -> Turn:
    """Greetings, thanks, jokes, and what the model does not know."""
    return _fact(rng, SMALL_TALK)


def stories(rng: random.Random, held_out: bool = False) -> Turn:
    """A story about somebody."""
    return Turn(*story_question(rng))


# skill: its share of the chat turns
SKILLS: dict[Skill, float] = {
    sums: 10, differences: 12, products: 6, spelling: 7, reversing: 7, letter_count: 5, word_count: 2,
    word_sorting: 16, word_order: 4, repeating: 4, number_sorting: 16, counting: 18, comparing: 8,
    following: 2, pagebus_facts: 8, small_talk: 6, stories: 1.5,
}
_CHOICES, _WEIGHTS = tuple(SKILLS), tuple(SKILLS.values())


def draw_turn(rng: random.Random) -> Turn:
    """One exercise of the training split."""
    return rng.choices(_CHOICES, _WEIGHTS)[0](rng, False)


def draw_system(rng: random.Random, share: float = 0.2) -> str | None:
    """No system message, a usual one, or any sentence at all."""
    if rng.random() > share:
        return None
    if rng.random() < 0.8:
        return rng.choice(SYSTEM_MESSAGES)
    return f"{rng.choice(DAYS)} You know {rng.choice(LESSONS)}."


def draw_chat(rng: random.Random) -> Chat:
    """A chat of one turn, or of several that have nothing to do with each other."""
    turns = 1 if rng.random() < 0.75 else rng.randint(2, 6)
    return Chat(tuple(draw_turn(rng) for _ in range(turns)), draw_system(rng))


def draw_drill(rng: random.Random) -> Text:
    """A bare sum or difference: the cheapest way to practise what takes the most practice."""
    turn = rng.choices((sums, differences, products), (3, 6, 1))[0](rng, False)
    prompt, _, result = turn.answer.rpartition(" = ")
    if rng.random() < 0.1:
        return Text(prompt.replace(" ", "") + "=", result)
    return Text(prompt + " =", " " + result)


def draw_text(rng: random.Random) -> Text:
    """Plain text: a story that goes on, or a question with its answer."""
    if rng.random() < 0.5:
        story = tell(rng, rng.choice(HEROES), rng.random() < 0.3)
        cut = story.index(" ")  # between words, where the tokenizer cuts as well
        return Text(story[:cut], story[cut:])
    turn = draw_turn(rng)
    if rng.random() < 0.4:
        return Text(turn.question, "\n" + turn.answer)
    before, between = rng.choice((("Q: ", "\nA:"), ("Question: ", "\nAnswer:"), ("", "\n")))
    return Text(before + turn.question + between, (" " if between != "\n" else "") + turn.answer)
