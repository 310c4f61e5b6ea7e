"""Short and long stories put together from hand-written pieces, so that a load test has something to read."""

from __future__ import annotations

import random

from words import ADJECTIVES, ANIMALS, NAMES, PEOPLE

HEROES = (*ANIMALS, *PEOPLE)
PLACES = (
    "at the edge of a dark forest", "by a slow green river", "on a small windy island", "in a quiet valley",
    "in an old stone tower", "under the roots of a big tree", "near the harbour", "on top of a round hill",
    "in a village with only one street", "behind the mill", "in a garden full of roses", "beside a cold lake",
    "in the middle of a busy city", "at the end of a long road", "in a house with a blue door",
)
WISHES = (
    "to see the sea", "to find a friend", "to learn how to sing", "to build a boat", "to count all the stars",
    "to bake the best bread in the land", "to climb the highest mountain", "to find the lost key",
    "to grow a giant pumpkin", "to hear the oldest story of all", "to send a letter to the moon",
    "to paint the morning sky", "to know where the wind sleeps", "to repair the broken clock",
    "to bring a lantern to every house",
)
TROUBLES = (
    "a storm came and the bridge fell down", "the path was covered with deep snow", "the map got wet in "
    "the rain",
    "a thick fog hid the way", "the wheel of the wagon broke", "the lantern went out", "the river was too "
    "wide",
    "nobody knew the answer", "the gate was locked", "the night was colder than ever", "the rope was too "
    "short",
    "the basket had a hole in it", "the bell would not ring", "all the birds were silent",
)
HELPS = (
    "knew a secret path", "had a ladder that was just long enough", "shared some warm soup",
    "found a candle in an old box", "told a joke, and suddenly nothing seemed hard", "carried the heavy bag",
    "drew a new map in the sand", "waited all night and kept watch", "lent a strong rope",
    "asked one good question", "had seen the same trouble before", "brought bread and honey",
)
LESSONS = (
    "that two can do what one cannot", "that a long road is made of short steps", "that asking is not weak",
    "that patience is a kind of magic", "that a small light is enough", "that every answer begins with a "
    "question",
    "that good friends wait", "that the best things are shared", "that even a slow walk arrives",
)
ENDINGS = (
    "And they lived happily ever after.", "And if you listen at night, you can still hear them laugh.",
    "The end.", "Then everybody went home and slept until noon.", "And that is why the lantern is still "
    "burning.",
    "From that day on, nobody in the place was lonely.", "And the next morning, it all began again.",
)
MIDDLES = (
    "On the way, {they} met {other}.", "After an hour, {they} sat down to rest and met {other}.",
    "In the afternoon, {other} came along.", "Behind a tall tree stood {other}.", "There {they} saw {other}.",
)
TALKS = (
    '"Where are you going?" asked {other}. "I want {wish}," said {they}.',
    '"You look tired," said {other}. "I am," said {they}, "but I want {wish}."',
    '"Can I come with you?" asked {other}. "Of course," said {they}.',
    '"Good morning," said {other}. "Good morning," said {they}. "Do you know the way?"',
)
DAYS = (
    "The first day was easy. The sun was warm and the road was dry.",
    "On the second day it rained, and the two of them hid under a leaf as big as a roof.",
    "On the third day they crossed a field of yellow flowers.",
    "In the evening they made a small fire and counted the sparks.",
    "At night the moon was so bright that they could read the map without a lamp.",
    "Early in the morning a robin woke them with a song.",
    "They walked past a mill, a barn and an old castle without a roof.",
    "Once they took the wrong turn and had to go all the way back.",
    "They told each other stories, and the hours went by like clouds.",
    "An old farmer gave them apples and wished them luck.",
    "They slept in a boat that smelled of salt and paint.",
    "A cold wind came from the north, but they kept on walking.",
)
ASKS = (
    "Tell me a story about {a}.", "Tell me a story about {a}!", "Please tell me a story about {a}.",
    "Write a story about {a}.", "Can you tell me a story about {a}?", "Write a short story about {a}.",
    "I would like to hear a story about {a}.", "A story about {a}, please.", "Story about {a}",
    "Tell me about {a} in a little story.", "Make up a story about {a}.",
)
ASKS_LONG = (
    "Tell me a long story about {a}.", "Write a long story about {a}.", "Please write a long story about "
    "{a}.",
    "Can you tell me a very long story about {a}?", "A long story about {a}, please.",
)
ASKS_ANY = ("Tell me a story.", "Tell me a story, please.", "Write a story.",
            "Do you know a story?", "Story time!")
ASKS_ANY_LONG = ("Tell me a long story.", "Write a long story.", "Write me a very long story.",
                 "Tell a long story.")


def with_article(noun: str) -> str:
    """`a fox`, `an owl`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def tell(rng: random.Random, hero: str, long: bool) -> str:
    """One story about `hero`; a long one takes a few days more."""
    name = rng.choice(NAMES)
    adjective = rng.choice(ADJECTIVES)
    helper = rng.choice([h for h in HEROES if h != hero])
    other, they = f"the {helper}", name
    wish = rng.choice(WISHES)
    opening = rng.choice(("Once upon a time", "Long ago", "Once", "One day", "Many years ago"))
    parts = [
        f"{opening} there was {with_article(adjective)} {hero} called {name} who lived {rng.choice(PLACES)}.",
        rng.choice((f"{name} wanted {wish}.", f"More than anything, {name} wanted {wish}.",
                    f"Every night {name} dreamed the same dream: {wish}.")),
        rng.choice(MIDDLES).format(they=they, other=with_article(rng.choice(ADJECTIVES)) + " " + helper),
    ]
    if long or rng.random() < 0.3:
        parts.append(rng.choice(TALKS).format(they=they, other=other, wish=wish))
    if long:
        parts.append(f"So {name} and {other} went on together.")
        parts += rng.sample(DAYS, rng.randint(2, 6))
    parts.append(f"But then {rng.choice(TROUBLES)}.")
    parts.append(f"Luckily, {other} {rng.choice(HELPS)}.")
    if long:
        parts.append(f"But that was not all: {rng.choice(TROUBLES)}.")
        parts.append(f"This time it was {name} who {rng.choice(HELPS)}.")
    if long or rng.random() < 0.7:
        parts.append(f"So {name} learned {rng.choice(LESSONS)}.")
    parts.append(rng.choice(ENDINGS))
    return " ".join(parts)


def story_question(rng: random.Random) -> tuple[str, str]:
    """A request for a story, and the story."""
    hero = rng.choice(HEROES)
    long = rng.random() < 0.35
    if rng.random() < 0.15:
        return rng.choice(ASKS_ANY_LONG if long else ASKS_ANY), tell(rng, hero, long)
    subject = with_article(hero)
    if rng.random() < 0.2:
        subject = with_article(f"{rng.choice(ADJECTIVES)} {hero}")
    return rng.choice(ASKS_LONG if long else ASKS).format(a=subject), tell(rng, hero, long)
