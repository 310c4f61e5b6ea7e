"""The vocabulary that exercises and stories draw from: common words, names, and made-up words."""

from __future__ import annotations

import hashlib
import random


def _listed(words: str) -> tuple[str, ...]:
    """Words written one after the other."""
    return tuple(words.split())


ANIMALS = _listed(
    "fox owl bear wolf hare mouse cat dog horse cow sheep goat pig duck goose hen crow raven robin sparrow "
    "eagle hawk swan frog toad newt snake turtle lizard whale seal otter beaver badger hedgehog squirrel "
    "mole "
    "rabbit deer elk moose lion tiger panda koala monkey zebra camel donkey elephant giraffe penguin parrot "
    "dragon snail bee ant spider butterfly"
)

PEOPLE = _listed(
    "girl boy king queen baker farmer sailor painter teacher robot gardener clockmaker knight miller"
)

NAMES = _listed(
    "Ada Ben Clara Dora Emil Finn Greta Hugo Ida Jonas Karl Lena Mara Nils Otto Paula Rosa Sam Tilda Udo "
    "Vera "
    "Willa Yara Zoe Anna Bruno Edith Felix Hanna Leo Mila Nora Oscar Pip Ruby Theo"
)

FOODS = _listed(
    "apple pear plum cherry fig grape lemon melon peach orange banana berry bread cheese butter honey "
    "soup cake "
    "pie rice bean corn onion potato carrot pumpkin tomato garlic pepper salt sugar milk tea coffee juice egg"
)

THINGS = _listed(
    "lamp table chair door window key clock book pencil paper letter box basket bottle cup plate spoon "
    "fork knife "
    "bell drum flute violin guitar piano kite ball rope boat ship wagon wheel train bridge tower house "
    "castle barn "
    "mill garden fence gate road path map compass coin ring crown sword shield hammer nail ladder bucket "
    "broom "
    "candle mirror blanket pillow coat hat glove shoe scarf button needle thread lantern puzzle engine "
    "rocket "
    "computer keyboard screen network server message planet comet star moon sun cloud rain snow storm wind "
    "thunder river lake ocean island mountain valley forest meadow desert beach cave hill field stone sand"
)

VERBS = _listed(
    "walk run jump swim fly sing dance play work sleep dream think read write draw paint build carry "
    "climb dig "
    "find follow give help hide hold hope keep laugh learn listen look love make open pull push reach "
    "rest ride "
    "search share shout sit smile speak stand start stop talk teach throw touch travel turn wait wander watch"
)

ADJECTIVES = _listed(
    "small big old young quick slow brave shy clever kind quiet loud happy sad bright dark warm cold soft "
    "hard "
    "round flat long short tall deep high low red blue green yellow black white brown purple silver golden "
    "gentle honest hungry lazy lonely lucky patient polite proud curious strange simple strong tiny wild wise"
)

OTHERS = _listed(
    "morning evening night summer winter spring autumn monday friday january april music number letter "
    "word story "
    "question answer friend brother sister mother father child village city country school market kitchen "
    "library "
    "hello world python science history nature energy circle square triangle language picture window holiday "
    "memory minute second hour today tomorrow yesterday always never often together between around under "
    "above "
    "because before after again almost another anything beautiful important different possible wonderful "
    "strawberry chocolate birthday mountain elephant umbrella dictionary adventure telescope orchestra "
    "hospital "
    "scheduler executor gateway attention token block batch bus page model prompt stream request "
    "level noon radar civic kayak banana letter coffee bottle silly rhythm queue jazz quiz zoo yes no up "
    "of it"
)

COMMON: tuple[str, ...] = tuple(
    sorted({*ANIMALS, *PEOPLE, *FOODS, *THINGS, *VERBS, *ADJECTIVES, *OTHERS, *(n.lower() for n in NAMES)})
)

_ONSETS = _listed(
    "b c d f g h j k l m n p r s t v w y z br ch cl cr dr fl fr gl gr pl pr qu sc sh sl sn sp st sw th tr "
    "wh"
)
_VOWELS = _listed("a e i o u a e i o ai ea ee oo ou ie y")
_CODAS = ("", *_listed("b ck d ft g k l ld ll m mp n nd ng nt p r rd rn rt s ss st t th x"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def is_held_out(key: str, one_in: int = 12) -> bool:
    """Whether an exercise about `key` is kept for testing: decided by a hash, so the split never moves."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % one_in == 0


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word that no dictionary has, so that spelling is learned letter by letter."""
    parts = rng.choices((1, 2, 3), (2, 5, 2))[0]
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(parts))
    return word[:12]


def random_letters(rng: random.Random) -> str:
    """Two to seven letters in no order at all."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 7)))


LETTER_SKILLS = ("spelling", "reversing", "letter_count")


def is_word_held_out(word: str, skill: str) -> bool:
    """One word in twelve is held out in one skill about letters; the others teach what it is made of."""
    turn = int.from_bytes(hashlib.sha256(f"skill {word}".encode()).digest()[:4], "big") % len(LETTER_SKILLS)
    return is_held_out("word " + word) and LETTER_SKILLS[turn] == skill


def draw_word(rng: random.Random, skill: str, held_out: bool) -> str:
    """One word of the training split of a skill about letters, or of the held-out one."""
    while True:
        kind = rng.random()
        if kind < 0.6:
            word = rng.choice(COMMON)
        elif kind < 0.92:
            word = made_up_word(rng)
        else:
            word = random_letters(rng)
        if is_word_held_out(word, skill) == held_out and len(word) >= 2:
            return word


def draw_words(rng: random.Random, count: int) -> list[str]:
    """Different common words, for lists."""
    return rng.sample(COMMON, count)
