"""Short stories for the demo, put together from phrases: the same for a seed.

In: DemoSettings. Out: stories to train on, their training rows, and prompts that begin none of
them. A story is opened, somebody wants or finds something, it goes wrong, a friend helps. What was
lost, how, and who helped comes again later, so a model has to read back what was told.
"""

from random import Random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..measure.prompts import Prompt
from . import DemoSettings

PARTS = 2  # of the held-out prompts: what is measured, and what the head is chosen by

NAMES = {
    **dict.fromkeys(
        "Ada Bella Clara Dora Ella Frida Greta Hanna Ida Kira Lena Mina".split(), "she"
    ),
    **dict.fromkeys("Anton Bruno Carlo Emil Felix Hugo Jakob Leo Max Nils Oskar Tim".split(), "he"),
}
FORMS = {"she": ("She", "her"), "he": ("He", "his")}
ANIMALS = "mouse fox rabbit hedgehog squirrel badger kitten bear otter beaver duck frog".split()
TRAITS = "brave shy curious cheerful clever sleepy hungry gentle".split()
HOMES = (
    "in a hollow oak at the edge of the forest",
    "in a small house by the river",
    "under the roots of an old apple tree",
    "behind the mill, where the tall grass grows",
    "in a warm den on the side of a green hill",
    "by the pond with the white water lilies",
)
FOODS = "red berries,sweet apples,honey cake,warm bread,ripe plums,hazelnuts".split(",")
THINGS = (
    "a shiny silver key",
    "a little golden bell",
    "a round blue stone",
    "a red balloon",
    "a tiny wooden boat",
    "a green glass bottle",
    "a soft woollen hat",
    "a paper kite",
)
OPENINGS = (
    "Once upon a time, a {trait} little {animal} named {name} lived {home}.",
    "There was once a {trait} {animal} called {name}, who lived {home}.",
    "{name} was a {trait} little {animal}. {She} lived {home}.",
    "Long ago, {home}, there lived a {trait} {animal}. {Her} name was {name}.",
)
HABITS = (
    "Every morning {she} went out to look for {food}.",
    "{She} loved {food} more than anything else in the world.",
    "What {she} liked best was to sit in the sun and eat {food}.",
    "On Sundays {she} always had {food} for breakfast.",
)
FINDS = (
    "One sunny day {name} found {thing} in the grass.",
    "One windy morning {she} saw {thing} lying beside the path.",
    "After the rain, {name} dug up {thing} in the garden.",
    "One evening there was {thing} in front of {her} door.",
)
JOYS = (
    '"What a treasure!" {she} said, and danced around it three times.',
    "It was the most beautiful thing that {she} had ever seen.",
    '"I will keep it for ever," {she} thought, and ran home with it.',
    "{She} laughed out loud and showed it to the moon.",
)
# how it is lost, and how it comes back
LOSSES = (
    (
        "But a gust of wind took it and blew it into the river.",
        "jumped into the cold water and swam until the river gave it back",
    ),
    (
        "But a big black crow swooped down and carried it to its nest.",
        "climbed the tall tree, branch by branch, and asked the crow to give it back",
    ),
    (
        "But it slipped from {her} paws and rolled into a deep dark hole.",
        "dug and dug with both paws, until there it lay",
    ),
    (
        "But on the way home {she} lost it somewhere in the snow.",
        "followed the tracks in the snow, all the way back, and found it under a bush",
    ),
)
TEARS = (
    "{name} sat down on a stone and cried.",
    "{name} did not know what to do, and a big tear ran down {her} nose.",
    '"Oh no!" cried {name}. "Now it is gone!"',
)
MEETINGS = (
    "Then {friend} the {other} came along.",
    "Just then {friend} the {other} looked out from behind a tree.",
    "{friend} the {other} heard it and came running.",
)
TALKS = (
    '"Why are you so sad?" asked {friend}. "I have lost {thing}," said {name}.',
    '"What has happened?" asked {friend}, and {name} told the whole story.',
    '"Do not cry," said {friend}. "We will find {thing} together."',
)
RESCUES = ("So {friend} {rescue}.", "And {friend} {rescue}, while {name} watched.")
THANKS = (
    '"Thank you!" said {name}, and gave {friend} half of {her} {food}.',
    "{name} was so happy that {she} shared all {her} {food} with {friend}.",
    "Then the two friends sat down and ate {food} until the stars came out.",
)
ENDS = (
    "From that day on, {name} and {friend} were best friends.",
    "And {name} never forgot what a good friend {friend} was.",
    "That night {name} dreamed of {thing}.",
    "And if you listen in the evening, you can still hear {name} and {friend} laughing.",
)


def tell(chance: Random) -> str:
    """Tell a story."""
    name, friend = chance.sample([*NAMES], 2)
    animal, other = chance.sample(ANIMALS, 2)
    she = NAMES[name]
    capital, her = FORMS[she]
    loss, rescue = chance.choice(LOSSES)
    facts = {
        **{"name": name, "friend": friend, "animal": animal, "other": other, "rescue": rescue},
        **{"she": she, "She": capital, "her": her, "Her": her.capitalize()},
        **{"trait": chance.choice(TRAITS), "home": chance.choice(HOMES)},
        **{"food": chance.choice(FOODS), "thing": chance.choice(THINGS)},
    }
    parts = OPENINGS, HABITS, FINDS, JOYS, (loss,), TEARS, MEETINGS, TALKS, RESCUES, THANKS, ENDS
    told = [chance.choice(part).format_map(facts) for part in parts]
    for number in (2, 4, 8):  # paragraphs
        told[number] = "\n" + told[number]
    return " ".join(told).replace(" \n", "\n")


def opening(story: str) -> str:
    """The first paragraph of a story."""
    return story.split("\n")[0] + "\n"


def stories(seed: int, count: int, held_out: int) -> tuple[list[str], list[str]]:
    """Tell stories to train on, and others, of which none begins like one of those."""
    chance = Random(seed)
    apart = [tell(chance) for _ in range(held_out)]
    begun = {opening(story) for story in apart}
    told = (tell(chance) for _ in range(count))
    return [story for story in told if opening(story) not in begun], apart


def told(settings: DemoSettings) -> tuple[list[str], list[str]]:
    """Return the stories to train on, and those that are held out."""
    return stories(settings.seed, settings.num_stories, PARTS * settings.num_prompts)


def story_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a row of `input_ids` (length,) for each text, between BOS and EOS."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Dataset.from_dict({"input_ids": [[start, *row, end] for row in rows]})


def held_out_prompts(settings: DemoSettings, part: int = 0) -> list[Prompt]:
    """Return prompts that begin no training row; those of another part are others."""
    prompts = [Prompt("stories", str(i), text=opening(x)) for i, x in enumerate(told(settings)[1])]
    return prompts[part::PARTS]
