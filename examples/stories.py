"""A small grammar that tells short children's stories, the text on which `train_stories.py` trains its model.

A story is an opening, one plot and an ending. A plot is a sequence of beats, and one sentence (or a short exchange) is
picked for each beat. All slots of a story are filled once, before the telling, so that names, pronouns, animals and
objects agree from the first sentence to the last: that agreement is what a small model can learn from the text.

    python examples/stories.py        prints three stories
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T")


def stories(seed: int) -> Iterator[str]:
    """Tells stories without end; the same seed tells the same stories in every process and every Python version."""
    rng = random.Random(seed)
    while True:
        yield _story(rng)


@dataclass(frozen=True)
class Character:
    """An animal of the story; written as `{hero}` in a template it is its name, and `{hero.he}` is its pronoun."""

    name: str
    kind: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:
        return self.name


class Plot(NamedTuple):
    """One kind of story.

    Attributes:
        words: alternatives of the slots that hint at the plot from the first sentence.
        facts: sets of slots that belong together.
        beats: the alternatives of each step, in order.
    """

    words: dict[str, Sequence[str]]
    facts: Sequence[dict[str, str]]
    beats: Sequence[Sequence[str]]


class Habitat(NamedTuple):
    """Where some kinds of animals live, and the words and plots that fit there."""

    kinds: Sequence[str]
    words: dict[str, Sequence[str]]
    plots: Sequence[Plot]


def _story(rng: random.Random) -> str:
    habitat = _pick(rng, HABITATS)
    plot = _pick(rng, habitat.plots)
    hero, friend = _characters(rng, habitat.kinds)
    words = WORDS | habitat.words | plot.words
    slots = {slot: _pick(rng, options) for slot, options in words.items()} | _pick(rng, plot.facts)
    beats = *_pick(rng, FRAMES), *plot.beats, ENDINGS
    sentences = [_spell(_pick(rng, beat).format(hero=hero, friend=friend, **slots)) for beat in beats]
    return " ".join(filter(None, sentences))


def _characters(rng: random.Random, kinds: Sequence[str]) -> tuple[Character, Character]:
    """The hero and the friend differ in pronoun and in kind, so "he", "her" and "the fox" always mean one of them."""
    kind = _pick(rng, kinds)
    other = _pick(rng, [each for each in CAST if each != kind])
    hero, friend = _pick(rng, ((0, 1), (1, 0)))
    return Character(CAST[kind][hero], kind, *PRONOUNS[hero]), Character(CAST[other][friend], other, *PRONOUNS[friend])


def _spell(sentences: str) -> str:
    """Writes "an" before a vowel and begins every sentence with a capital, so that templates need do neither."""
    sentences = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentences)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), sentences)


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    # Python promises to keep the sequence of random() across versions, not that of choice().
    return options[int(rng.random() * len(options))]


# ---- Words ----

PRONOUNS = ("she", "her", "her"), ("he", "him", "his")

# Each name has an animal of its own: a small model takes names that could all replace one another for one and the same
# word, and never learns to carry the right one through a story.
CAST = {
    "fox": ("Ruby", "Felix"),
    "bear": ("Bella", "Bruno"),
    "deer": ("Fern", "Jasper"),
    "badger": ("Nora", "Max"),
    "hedgehog": ("Hazel", "Otto"),
    "lamb": ("Lily", "Sam"),
    "pony": ("Daisy", "Jack"),
    "goat": ("Tilly", "Hugo"),
    "donkey": ("Clara", "Ned"),
    "piglet": ("Rosie", "Ben"),
    "mouse": ("Mia", "Pip"),
    "cat": ("Luna", "Oscar"),
    "dog": ("Molly", "Toby"),
    "kitten": ("Ivy", "Leo"),
    "puppy": ("Poppy", "Milo"),
    "hamster": ("Emma", "Theo"),
    "rabbit": ("Anna", "Tom"),
    "panda": ("Sophie", "Finn"),
    "lion": ("Zoe", "Noah"),
    "monkey": ("Lola", "Gus"),
}

# Places that may meet in one story come from separate lists, so that the same one is never named twice.
WORDS = {
    "weather": "sunny warm bright windy cool quiet fine".split(),
    "part": ("morning", "morning", "afternoon", "day"),
    "thing": (
        "red ball",
        "blue kite",
        "shiny button",
        "woolly scarf",
        "little bell",
        "toy boat",
        "silver key",
        "straw hat",
        "green marble",
        "wooden whistle",
        "yellow umbrella",
        "picture book",
    ),
    "here": ("under the leaves", "behind the big rock", "in the tall grass", "by the old gate", "around the well"),
    "there": ("next to the pond", "under the bench", "between the roots", "near the fence", "along the wall"),
    "found": (
        "in a bush",
        "under a pile of hay",
        "behind a log",
        "in an empty nest",
        "beside the path",
        "inside a hollow tree",
        "on top of a stump",
    ),
    "shelter": ("in a dry cave", "in an old barn", "under a stone bridge", "inside a hollow tree", "in an empty hut"),
    "goal": ("the old oak tree", "the wooden bridge", "the top of the hill", "the red barn", "the big rock"),
    "food": (
        "basket of berries",
        "loaf of bread",
        "bag of nuts",
        "big red apple",
        "piece of cheese",
        "bowl of soup",
        "plate of pancakes",
        "bunch of carrots",
    ),
    "treat": ("jar of honey", "slice of cake", "sweet pear", "warm cookie", "plum pie", "bag of cherries"),
    "cake": ("chocolate cake", "honey cake", "cake with seven candles", "cake as tall as a chair", "strawberry cake"),
    "broken": ("blue cup", "flower pot", "glass lamp", "clay bowl", "wooden chair", "little clock"),
    "gift": ("bunch of flowers", "pot of soup", "funny drawing", "basket of plums", "soft pillow"),
}

# ---- Openings and endings ----

# "Once upon a time" is the commonest opening because it has the most variants.
OPENINGS = (
    "Once upon a time, there was a {trait} {hero.kind} named {hero}.",
    "Once upon a time, there was a {trait} {hero.kind} called {hero}.",
    "Once upon a time, there was a {trait} {hero.kind} named {hero} who lived {home}.",
    "Once upon a time, a {trait} {hero.kind} named {hero} lived {home}.",
    "Once upon a time, a {hero.kind} called {hero} lived {home}.",
    "Once upon a time, {home}, there lived a {trait} {hero.kind} named {hero}.",
    "Once upon a time, {hero} the {hero.kind} lived {home}.",
    "Once upon a time there was a {trait} {hero.kind} named {hero}.",
    "Once upon a time there lived a {trait} {hero.kind} called {hero}.",
    "Long ago, there was a {trait} {hero.kind} named {hero}.",
    "A long time ago, there was a {trait} {hero.kind} called {hero}.",
    "Once there was a {trait} {hero.kind} named {hero}.",
    "There once was a {trait} {hero.kind} called {hero}.",
    "There was once a {trait} {hero.kind} named {hero} who lived {home}.",
    "{home}, there lived a {trait} {hero.kind} named {hero}.",
    "{home} lived a {trait} {hero.kind} called {hero}.",
    "{hero} was a {trait} {hero.kind} who lived {home}.",
    "{hero} the {hero.kind} lived {home}.",
    "{hero} the {trait} {hero.kind} lived {home}.",
    "A {trait} {hero.kind} named {hero} lived {home}.",
    "The {trait} {hero.kind} who lived {home} was called {hero}.",
    "This is the story of {hero}, a {trait} {hero.kind} who lived {home}.",
    "Everyone knew {hero}, the {trait} {hero.kind} who lived {home}.",
    "My story is about a {trait} {hero.kind} named {hero}.",
)

HABITS = (
    "",
    "{hero} loved {joy}.",
    "{hero.he} loved {joy}.",
    "More than anything, {hero} loved {joy}.",
)

DAYS = (
    "One {weather} {part}, {hero} went for a walk {out}.",
    "One {weather} {part}, {hero.he} went for a walk {out}.",
    "One {weather} {part}, {hero.he} went out to play.",
    "One {weather} morning, {hero} woke up early and ran outside.",
    "One {part}, {hero} was playing {out}.",
)

# An opening that begins with the day itself and introduces the hero on the way.
DAY_OPENINGS = (
    "One {weather} {part}, a {trait} {hero.kind} named {hero} went for a walk {out}.",
    "One {weather} {part}, {hero} the {hero.kind} went out to play.",
    "One {part}, {hero} the {trait} {hero.kind} was walking {out}.",
    "It was a {weather} {part}. {hero} the {hero.kind} went for a walk {out}.",
    "It was a {weather} {part}, and {hero} the {trait} {hero.kind} was playing {out}.",
    "On a {weather} {part}, {hero} the {trait} {hero.kind} went out to play.",
    "One day, a {trait} {hero.kind} named {hero} went for a walk {out}.",
    "The {trait} {hero.kind} woke up early. {hero.his} name was {hero}, and {hero.he} loved {joy}.",
    "The birds were singing when {hero} the {trait} {hero.kind} woke up. {hero.he} ran outside to play.",
    'A {hero.kind} named {hero} looked at the sky. "What a {weather} {part}!" {hero.he} said.',
    '"What a {weather} {part}!" said {hero}, a {trait} {hero.kind}.',
    '"Good morning!" sang {hero} the {hero.kind}. {hero.he} went for a walk {out}.',
)

FRAMES = (
    (OPENINGS, HABITS, DAYS),
    (OPENINGS, HABITS, DAYS),
    (OPENINGS, HABITS, DAYS),
    (DAY_OPENINGS,),
)

ENDINGS = (
    "From that day on, {hero} and {friend} were the best of friends.",
    "From then on, {hero} and {friend} played together every day.",
    "It was the best day {hero} had ever had.",
    "The next day, {hero} told {hero.his} mother all about it.",
    "{hero} smiled, and {friend} smiled too.",
    "They were both very happy.",
    "And they all lived happily ever after.",
    "The end.",
)

# ---- Plots ----

LOST = Plot(
    words={"trait": ("little", "small", "funny"), "joy": ("to play outside", "to play with toys")},
    facts=({},),
    beats=(
        (
            "Then {hero.he} saw that {hero.his} {thing} was gone.",
            "{hero.he} wanted to play with {hero.his} {thing}, but it was not there.",
            "On the way, {hero} lost {hero.his} {thing}.",
        ),
        (
            "{hero.he} looked {here} and {there}, but {hero.he} could not find it.",
            "First {hero.he} looked {here}. Then {hero.he} looked {there}. It was not there.",
            "{hero} looked {here} and {there}, but the {thing} was nowhere to be seen.",
        ),
        (
            "{hero} sat down and began to cry.",
            "A big tear rolled down {hero.his} cheek.",
            "{hero} felt very sad.",
        ),
        (
            'Just then, {friend} the {friend.kind} came by. "What is wrong?" {friend.he} asked.',
            '{friend} the {friend.kind} heard {hero.him}. "Why are you so sad?" asked {friend}.',
            'Soon {hero.he} met {friend} the {friend.kind}. "Can I help you?" asked {friend}.',
        ),
        (
            '"I lost my {thing}," said {hero}. "I will help you look," said {friend}.',
            '"I cannot find my {thing}," said {hero}. "Let us look together," said {friend}.',
        ),
        (
            "{friend} looked {found}, and there was the {thing}!",
            "They looked everywhere. At last, {friend} found the {thing} {found}.",
            "They walked back together, and soon they saw the {thing} {found}.",
        ),
        (
            '"Thank you!" said {hero}, and {hero.he} hugged {friend}.',
            '"You found it!" cried {hero}. {hero.he} jumped for joy.',
            "{hero} learned that it is easier to look together.",
        ),
    ),
)

NEW_FRIEND = Plot(
    words={"trait": ("little", "shy", "lonely"), "joy": ("to play games", "to make new friends")},
    facts=(
        {"play": "play hide and seek", "played": "played hide and seek"},
        {"play": "play ball", "played": "played ball"},
        {"play": "fly a kite", "played": "flew a kite"},
        {"play": "climb trees", "played": "climbed trees"},
        {"play": "roll down the hill", "played": "rolled down the hill"},
        {"play": "build a sand castle", "played": "built a sand castle"},
        {"play": "throw stones into the pond", "played": "threw stones into the pond"},
    ),
    beats=(
        (
            "Under a tree, {hero.he} saw a {friend.kind} sitting all alone.",
            "By the gate, {hero.he} saw a {friend.kind} {hero.he} did not know.",
            "{hero.he} saw that a new {friend.kind} had moved in next door.",
        ),
        (
            "The {friend.kind} looked lonely.",
            "The {friend.kind} had no one to play with.",
            "{hero} felt shy at first, but {hero.he} took a step closer.",
        ),
        (
            '"Hello," said {hero}. "What is your name?"',
            '"Hello, I am {hero}," {hero.he} said. "Who are you?"',
        ),
        (
            '"I am {friend}," said the {friend.kind}. "I am new here."',
            '"My name is {friend}," said the {friend.kind} with a small smile.',
        ),
        (
            '"Do you want to {play} with me?" asked {hero}. "Yes, please!" said {friend}.',
            '"Let us {play}!" said {hero}. {friend} liked that very much.',
        ),
        (
            "They {played} until the sun went down.",
            "They {played} and laughed all day long.",
            "They {played}, and then they shared a {treat}.",
        ),
        (
            '"You are my first friend here," said {friend}.',
            '"Will you come again?" asked {friend}. "Of course," said {hero}.',
            "{hero} was glad that {hero.he} had said hello.",
        ),
    ),
)

STORM = Plot(
    words={"trait": ("little", "brave", "cheerful"), "joy": ("to be out in the wind", "to watch the clouds")},
    facts=({},),
    beats=(
        (
            "{friend} the {friend.kind} came along, and they played together.",
            "There {hero.he} met {friend} the {friend.kind}, and they picked berries together.",
            "{hero.his} friend {friend} the {friend.kind} was there too.",
        ),
        (
            "Suddenly dark clouds filled the sky, and it began to rain.",
            "Then the wind began to blow, and big drops of rain fell.",
            "All at once the sky turned dark, and thunder rolled over the hills.",
        ),
        (
            '"A storm is coming!" cried {friend}. "Run!"',
            '"We must find a dry place!" said {hero}.',
            '"I am scared," said {friend}. "Stay close to me," said {hero}.',
        ),
        (
            "They ran as fast as they could and hid {shelter}.",
            "Wet and cold, they found a dry place {shelter}.",
        ),
        (
            "They sat close together and sang songs to be brave.",
            "{friend} was shaking, so {hero} told {friend.him} a funny story.",
            "{hero} shared a {treat} with {friend}, and they listened to the rain.",
        ),
        (
            "At last the rain stopped, and the sun came out.",
            "After a while, the storm went away.",
        ),
        (
            '"Look, a rainbow!" said {friend}.',
            "A bright rainbow stretched across the sky.",
            "They jumped in every puddle on the way home.",
        ),
    ),
)

RACE = Plot(
    words={"trait": ("little", "quick", "cheerful"), "joy": ("to run", "to run in the tall grass")},
    facts=({"bump": "a stone"}, {"bump": "a root"}, {"bump": "a stick"}),
    beats=(
        (
            "{hero.he} met {friend} the {friend.kind}, who was very fast.",
            "{friend} the {friend.kind} came running by.",
        ),
        (
            '"Let us race to {goal}!" said {friend}.',
            '"I can run to {goal} faster than you," said {friend}.',
        ),
        (
            '"One, two, three, go!" they called, and off they ran.',
            "They counted to three and began to run.",
        ),
        (
            "{friend} was soon far ahead.",
            "{hero} ran as fast as the wind.",
            "They ran side by side for a long time.",
        ),
        (
            "But then {friend} tripped over {bump} and fell down.",
            "Suddenly {friend} slipped on {bump} and hurt {friend.his} leg.",
        ),
        (
            "{hero} could have won, but {hero.he} stopped to help.",
            '{hero} stopped at once. "Are you all right?" {hero.he} asked.',
        ),
        (
            "{hero.he} helped {friend} up, and they walked to {goal} side by side.",
            "{hero.he} took {friend} by the arm, and together they came to {goal}.",
        ),
        (
            '"We both won," said {hero}.',
            '"You are kind," said {friend}. "That is better than being fast."',
            "{friend} learned that a good friend is better than a prize.",
        ),
    ),
)

SHARING = Plot(
    words={"trait": ("little", "kind", "hungry"), "joy": ("to eat", "to cook")},
    facts=({},),
    beats=(
        (
            "{hero.he} had a {food} for lunch.",
            "{hero.he} was carrying a {food}.",
            "{hero.his} mother had given {hero.him} a {food}.",
        ),
        (
            "On the path {hero.he} met {friend} the {friend.kind}, who looked tired and hungry.",
            "{friend} the {friend.kind} was sitting by the road with an empty bag.",
        ),
        (
            '"I have not eaten all day," said {friend}.',
            '"I am so hungry," said {friend} in a small voice.',
        ),
        (
            "{hero} was hungry too, but {hero.he} wanted to be kind.",
            "{hero} looked at the {food} and thought for a moment.",
            "{hero} felt sorry for {friend}.",
        ),
        (
            '"You can have half of mine," said {hero}.',
            '"Sit down with me," said {hero}. "We can share."',
        ),
        (
            "They sat on the grass and ate together, and it tasted better than ever.",
            "They shared the {food} and told each other stories.",
        ),
        (
            'The next day, {friend} came to the door with a {treat}. "This is for you," {friend.he} said.',
            '"Thank you," said {friend}. "You have a good heart."',
            "{hero} learned that food tastes better when it is shared.",
        ),
    ),
)

LEARNING = Plot(
    words={"trait": ("little", "young", "clever"), "joy": ("to try new things", "to learn new things")},
    facts=(
        {"skill": "swim", "failed": "went under with a splash", "did": "swam across the pond"},
        {"skill": "whistle", "failed": "only made a puff of air", "did": "whistled a long and happy song"},
        {"skill": "ride a bike", "failed": "fell into a bush", "did": "rode all the way down the lane"},
        {"skill": "climb a tree", "failed": "slid down with a bump", "did": "climbed to the highest branch"},
        {"skill": "bake bread", "failed": "burned the first loaf", "did": "baked a big golden loaf"},
        {"skill": "read", "failed": "mixed up all the letters", "did": "read a whole page without help"},
        {"skill": "row a boat", "failed": "went round and round", "did": "rowed to the other side of the lake"},
        {"skill": "skip rope", "failed": "stepped on the rope", "did": "skipped ten times in a row"},
        {"skill": "play the drum", "failed": "dropped both sticks", "did": "played a merry tune"},
    ),
    beats=(
        (
            "{hero} wanted to learn how to {skill}.",
            "{hero.he} had always wanted to {skill}.",
            "All the others could {skill}, but {hero} could not.",
        ),
        (
            "{hero.he} tried very hard, but {hero.he} {failed}.",
            "The first time {hero.he} tried, {hero.he} {failed}.",
        ),
        (
            '"I will never learn," said {hero}.',
            '"It is too hard," said {hero}, and {hero.he} wanted to give up.',
        ),
        (
            '{friend} the {friend.kind} saw {hero.him} and smiled. "I can show you," {friend.he} said.',
            '"Do not give up," said {friend} the {friend.kind}. "It was hard for me too."',
        ),
        (
            "Every day {friend} came to help, and every day {hero} tried again.",
            "{friend} showed {hero} what to do, and {hero} tried again and again.",
        ),
        (
            "At last, {hero} {did}!",
            "Then one day, {hero} {did}!",
        ),
        (
            '"I did it!" {hero.he} shouted.',
            '"You did it!" cheered {friend}.',
            "{hero} learned that you can do hard things if you keep trying.",
        ),
    ),
)

FEAR = Plot(
    words={"trait": ("little", "small", "shy"), "joy": ("to be with friends", "to hear about brave animals")},
    facts=(
        {"fear": "the dark", "trouble": "lost in a dark cave", "deed": "lit a candle and walked into the cave"},
        {"fear": "high places", "trouble": "stuck on a high branch", "deed": "climbed up, one branch at a time"},
        {"fear": "water", "trouble": "stuck on a rock in the stream", "deed": "walked through the cold water"},
        {"fear": "thunder", "trouble": "alone in the storm", "deed": "ran out into the thunder and the rain"},
        {"fear": "the deep forest", "trouble": "lost in the deep forest", "deed": "walked in between the tall trees"},
        {"fear": "the old bridge", "trouble": "hurt on the other side of the bridge", "deed": "crossed the old bridge"},
    ),
    beats=(
        (
            "But {hero} had a secret. {hero.he} was afraid of {fear}.",
            "There was only one thing {hero} did not like. {hero.he} was afraid of {fear}.",
        ),
        (
            "Then {hero.he} heard that {friend} the {friend.kind} was {trouble}.",
            "That evening, {hero.his} friend {friend} the {friend.kind} was {trouble}.",
        ),
        (
            '"Help!" called {friend}. "Please help me!"',
            '"Is anyone there?" called {friend}. {friend.he} was crying.',
        ),
        (
            "{hero} was scared, but {hero.he} took a deep breath.",
            "{hero.his} heart beat fast, but {hero.he} wanted to be brave.",
        ),
        (
            "{hero.he} {deed}, and there was {friend}.",
            "Slowly, {hero.he} {deed}. At last {hero.he} found {friend}.",
        ),
        (
            '"You came!" said {friend}. "Were you not afraid?"',
            '{friend} hugged {hero.him}. "How brave you are!" {friend.he} said.',
        ),
        (
            '"I was afraid," said {hero}, "but you needed me."',
            "{hero} was not afraid of {fear} any more.",
            "{hero} learned that being brave means helping even when you are scared.",
        ),
    ),
)

BIRTHDAY = Plot(
    words={"trait": ("little", "young", "cheerful"), "joy": ("parties", "to dance and sing")},
    facts=({},),
    beats=(
        (
            "It was {hero.his} birthday, but no one said a word about it.",
            "Today was {hero.his} birthday, but everyone seemed to be busy.",
        ),
        (
            "{hero.he} went to see {friend} the {friend.kind}, but {friend.he} was not at home.",
            '{hero.he} met {friend} the {friend.kind}. "I have no time today," said {friend} and ran away.',
        ),
        (
            '"They all forgot," said {hero}.',
            "{hero} felt sad and all alone.",
        ),
        (
            "In the evening, {hero.he} walked home slowly and opened the door.",
            "When it was dark, {hero.he} came home. The house was very quiet.",
        ),
        (
            '"Surprise!" shouted {friend} and all the others.',
            '"Happy birthday!" called {friend}, and all the lights went on.',
        ),
        (
            "On the table stood a {cake}.",
            "There were balloons and songs and a {cake}.",
        ),
        (
            'Then {friend} gave {hero.him} a {thing}. "This is for you," {friend.he} said.',
            '"We could never forget you," said {friend}.',
            "{hero} laughed and danced with everyone.",
        ),
    ),
)

RESCUE = Plot(
    words={"trait": ("little", "brave", "clever"), "joy": ("to help others", "to hear about brave animals")},
    facts=(
        {"where": "in the deep mud", "tool": "a strong rope"},
        {"where": "in a deep hole", "tool": "a long ladder"},
        {"where": "on the roof of the barn", "tool": "a long ladder"},
        {"where": "in a thorn bush", "tool": "a pair of thick gloves"},
        {"where": "between two rocks", "tool": "a long pole"},
        {"where": "under a fallen branch", "tool": "a small saw"},
    ),
    beats=(
        (
            "Suddenly {hero.he} heard a cry for help.",
            "Then {hero.he} heard a small voice.",
        ),
        (
            "It was {friend} the {friend.kind}, who was stuck {where}.",
            "{friend} the {friend.kind} was stuck {where}!",
        ),
        (
            '"I cannot get out," said {friend}.',
            '"Please help me," cried {friend}.',
        ),
        (
            '"Do not worry," said {hero}. "I have an idea."',
            '"Wait for me," said {hero}. "I will be back soon."',
        ),
        (
            "{hero.he} ran home and came back with {tool}.",
            "{hero.he} ran to the farm and found {tool}.",
        ),
        (
            "It was hard work, but soon {friend} was free.",
            "{hero} worked and worked, and at last {friend} was free.",
        ),
        (
            '"You saved me!" said {friend}.',
            '"Thank you," said {friend}. "What can I do for you?" "Be my friend," said {hero}.',
            "{friend} was so happy that {friend.he} gave {hero} a {thing}.",
        ),
    ),
)

HONESTY = Plot(
    words={"trait": ("little", "curious", "young"), "joy": ("pretty things", "to look for pretty things")},
    facts=({},),
    beats=(
        (
            "{hero.he} found a {thing} {found}.",
            "There was a {thing} lying {found}.",
        ),
        (
            '"How pretty!" said {hero}. "I want to keep it."',
            "{hero.he} liked it very much and wanted to keep it.",
        ),
        (
            "Then {hero.he} saw {friend} the {friend.kind}, who was looking for something.",
            "A little later, {hero.he} met {friend} the {friend.kind}. {friend.he} was crying.",
        ),
        (
            '"I lost my {thing}," said {friend}. "Have you seen it?"',
            '"Have you seen my {thing}?" asked {friend}.',
        ),
        (
            "{hero} wanted to say no, but that would not be right.",
            "{hero} was quiet for a moment.",
        ),
        (
            '"Is this yours?" {hero.he} asked, and {hero.he} gave the {thing} back.',
            '"Yes, I found it," said {hero}, and {hero.he} gave it to {friend}.',
        ),
        (
            '"Thank you for telling the truth," said {friend}.',
            "{friend} was so happy that {friend.he} gave {hero} a {treat}.",
            "{hero} felt much better than before.",
        ),
    ),
)

GARDEN = Plot(
    words={"trait": ("little", "gentle", "quiet"), "joy": ("flowers", "to watch things grow")},
    facts=(
        {"plant": "sunflower", "size": "taller than the fence"},
        {"plant": "pumpkin", "size": "bigger than a wheel"},
        {"plant": "bean plant", "size": "higher than the roof"},
        {"plant": "rose bush", "size": "full of red roses"},
        {"plant": "strawberry plant", "size": "full of sweet berries"},
    ),
    beats=(
        (
            "{friend} the {friend.kind} gave {hero.him} a tiny seed.",
            "{hero.he} found a tiny seed and showed it to {friend} the {friend.kind}.",
        ),
        (
            '"Put it in the ground and wait," said {friend}.',
            '"Give it water every day," said {friend}.',
        ),
        (
            "{hero} dug a small hole and put the seed in it.",
            "{hero} planted the seed in the garden.",
        ),
        (
            "Every day {hero.he} gave it water, but nothing happened.",
            "{hero.he} waited and waited, but there was nothing to see.",
        ),
        (
            '"It does not grow," said {hero}. "Be patient," said {friend}.',
            '{hero} was sad, but {friend} said, "Good things need time."',
        ),
        (
            "Then one morning, there was a green leaf!",
            "After many days, a little green leaf came out.",
        ),
        (
            "It grew into a {plant}, {size}.",
            "By the end of the summer, there was a {plant}, {size}.",
        ),
        (
            "{hero} and {friend} danced around it.",
            '"We did it together," said {hero}.',
            "{hero} learned that it is good to be patient.",
        ),
    ),
)

BROKEN = Plot(
    words={"trait": ("little", "funny", "quick"), "joy": ("to jump and run", "to visit friends")},
    facts=({},),
    beats=(
        (
            "{hero.he} went to visit {friend} the {friend.kind}.",
            "On the way, {friend} the {friend.kind} asked {hero.him} to come in and play.",
        ),
        (
            "While {friend} was in the kitchen, {hero} bumped into the table.",
            "{hero} ran around the room and did not look where {hero.he} was going.",
        ),
        (
            "Crash! The {broken} fell and broke.",
            "Down fell the {broken}, and it broke.",
        ),
        (
            "{hero} wanted to run away and hide.",
            "{hero} was afraid that {friend} would be angry.",
        ),
        (
            '"I am sorry," {hero.he} said. "I broke your {broken}."',
            'But {hero.he} told the truth. "It was me," {hero.he} said. "I am so sorry."',
        ),
        (
            '"I am not angry," said {friend}. "Thank you for telling me."',
            '"It is all right," said {friend}. "We can fix it."',
        ),
        (
            "Together they fixed the {broken}, and it looked as good as new.",
            "They took some glue and put the {broken} back together.",
        ),
        (
            "{hero} learned that it is best to tell the truth.",
            "Then they shared a {treat} and laughed about it.",
            "{hero} felt light and happy again.",
        ),
    ),
)

SNOW = {"weather": "snowy", "out": "in the snow"}

BUILDING = Plot(
    words={"trait": ("little", "clever", "busy"), "joy": ("to make things", "to work with wood")},
    facts=(
        {"work": "tree house", "from": "old boards and a rope", "use": "sat high up in the leaves"},
        {"work": "boat", "from": "logs and a rope", "use": "sailed across the pond"},
        {"work": "bridge", "from": "stones and logs", "use": "walked over the stream with dry feet"},
        {"work": "snow house", "from": "blocks of snow", "use": "sat inside and kept warm", **SNOW},
        {"work": "snowman", "from": "snow and a carrot", "use": "danced around it", **SNOW},
        {"work": "swing", "from": "a board and a rope", "use": "flew up and down in the air"},
        {"work": "tent", "from": "sticks and a blanket", "use": "sat inside and told stories"},
    ),
    beats=(
        (
            '{hero.he} met {friend} the {friend.kind}. "Let us build a {work}!" said {hero}.',
            '{friend} the {friend.kind} had an idea. "We can build a {work}!" {friend.he} said.',
        ),
        (
            "They made it from {from}.",
            "They worked all morning with {from}.",
        ),
        (
            "But the {work} fell down with a crash.",
            "But it was not strong, and soon it fell apart.",
        ),
        (
            '"It is no good," said {friend}. {friend.he} was sad.',
            '{friend} was angry. "I do not want to build it any more," {friend.he} said.',
        ),
        (
            '"We can try again," said {hero}. "This time we will go slowly."',
            '"Let us think," said {hero}. "I know what we did wrong."',
        ),
        (
            "They helped each other, and this time the {work} was strong.",
            "They worked side by side, and by evening the {work} was ready.",
        ),
        (
            "They {use}, and they were very proud.",
            "They {use} until it was time to go home.",
        ),
    ),
)

SICK = Plot(
    words={"trait": ("little", "kind", "gentle"), "joy": ("to help others", "to be with friends")},
    facts=({},),
    beats=(
        (
            "{hero.he} wanted to play with {friend} the {friend.kind}, but {friend} was sick in bed.",
            "{friend} the {friend.kind} did not come out to play. {friend.he} was sick.",
        ),
        (
            '"Poor {friend}," said {hero}. "What can I do?"',
            "{hero} was worried about {hero.his} friend.",
        ),
        (
            "{hero.he} went home and got a {gift}.",
            "{hero.he} had an idea and got a {gift}.",
        ),
        (
            "Then {hero.he} knocked at the door very softly.",
            "{hero.he} carried it all the way to {friend} and knocked at the door.",
        ),
        (
            '"I have something for you," said {hero}.',
            '"Are you feeling better?" asked {hero}.',
        ),
        (
            'When {friend} saw the {gift}, {friend.he} smiled. "How kind of you!" {friend.he} said.',
            '"A {gift}!" said {friend}. "Now I feel much better."',
        ),
        (
            "{hero} sat by the bed and told {friend.him} a story.",
            "{hero} sang a soft song until {friend} fell asleep.",
        ),
        (
            "A few days later, {friend} was well again, and they played outside.",
            "Soon {friend} was well again.",
        ),
    ),
)

BEDTIME = Plot(
    words={"trait": ("little", "tiny", "curious"), "joy": ("the moon and the stars", "to count the stars")},
    facts=(
        {"sound": "a tapping sound at the window", "cause": "a branch in the wind"},
        {"sound": "a strange sound outside", "cause": "an owl in the old tree"},
        {"sound": "a soft sound under the floor", "cause": "a cricket singing its song"},
        {"sound": "a drip, drip, drip", "cause": "the rain on the roof"},
    ),
    beats=(
        (
            "{hero.his} friend {friend} the {friend.kind} came to stay for the night.",
            "That night, {hero} slept in a tent with {friend} the {friend.kind}.",
        ),
        (
            "The moon was bright, but {hero} could not sleep.",
            "{hero} closed {hero.his} eyes, but sleep did not come.",
        ),
        (
            "{hero.he} heard {sound}.",
            "Then there was {sound}.",
        ),
        (
            '"What was that?" whispered {hero}.',
            '"{friend}, are you awake?" asked {hero}. "I am scared."',
        ),
        (
            '"Let us go and see," said {friend}, and {friend.he} took a lamp.',
            '{friend} sat up and listened. "Do not be afraid," {friend.he} said.',
        ),
        (
            "It was only {cause}.",
            "They looked, and it was only {cause}!",
        ),
        (
            "They laughed and laughed.",
            "Now {hero} was not scared any more.",
        ),
        (
            "Then they counted the stars until they fell asleep.",
            "{friend} told a long story, and soon they were both asleep.",
        ),
    ),
)

BABY_BIRD = Plot(
    words={"trait": ("little", "tiny", "gentle"), "joy": ("to listen to the birds", "to climb trees")},
    facts=({},),
    beats=(
        (
            "{hero.he} found a baby bird on the ground.",
            "A baby bird had fallen out of its nest.",
        ),
        (
            '"Peep, peep," said the baby bird. It was cold and afraid.',
            "The baby bird was too small to fly.",
        ),
        (
            "{hero} put it in {hero.his} hat to keep it warm.",
            "{hero} wrapped it in a soft scarf.",
        ),
        (
            "The nest was high up in a tree, and {hero} could not reach it.",
            "{hero} looked up and saw the nest. It was too high.",
        ),
        (
            'Then {friend} the {friend.kind} came by. "Stand on my back," {friend.he} said.',
            '"Can you help us?" {hero.he} asked {friend} the {friend.kind}. "Of course," said {friend}.',
        ),
        (
            "{friend} held {hero} up, and {hero} put the baby bird back into the nest.",
            "Together they lifted the baby bird back into its nest.",
        ),
        (
            "The mother bird sang a song to thank them.",
            "The mother bird came back and was very happy.",
        ),
        (
            "Every morning after that, the birds sang for {hero} and {friend}.",
            "Even small friends can do big things when they work together.",
            '"We make a good team," said {friend}.',
        ),
    ),
)

# ---- Habitats ----

HABITATS = (
    Habitat(
        kinds="fox bear deer badger hedgehog".split(),
        words={
            "home": ("in a warm den in the woods", "under an old oak tree", "at the edge of a big forest"),
            "out": ("in the woods", "among the tall trees", "along the forest path"),
        },
        plots=(STORM, FEAR, HONESTY, BABY_BIRD, LOST),
    ),
    Habitat(
        kinds="lamb pony goat donkey piglet".split(),
        words={
            "home": ("on a farm with a red barn", "in a green valley", "behind a tall stone wall"),
            "out": ("on the hill", "in the meadow", "near the old mill"),
        },
        plots=(RACE, RESCUE, GARDEN, SHARING, LEARNING),
    ),
    Habitat(
        kinds="mouse cat dog kitten puppy hamster".split(),
        words={
            "home": ("in a small house on a hill", "in a little village by the sea", "in a house with a blue door"),
            "out": ("in the garden", "in the park", "on the beach"),
        },
        plots=(NEW_FRIEND, BIRTHDAY, BROKEN, SICK, BEDTIME, LOST),
    ),
    Habitat(
        kinds="rabbit panda lion monkey".split(),
        words={
            "home": ("near a quiet river", "beside a blue lake", "in a valley full of flowers"),
            "out": ("by the river", "by the lake", "in the tall grass"),
        },
        plots=(BUILDING, LEARNING, SHARING, NEW_FRIEND, STORM, RACE),
    ),
)


if __name__ == "__main__":
    for story in itertools.islice(stories(seed=0), 3):
        print(story, end="\n\n")
