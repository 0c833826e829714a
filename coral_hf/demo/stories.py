"""Short stories for the demo, put together from phrases: the same for a seed.

In: DemoSettings. Out: stories to train on, their training rows, and prompts that begin none of
them. A story is opened, somebody wants or finds something, it goes wrong, a friend helps. What was
lost, how, and who helped comes again later, so a model has to read back what was told.
"""

from functools import cache
from pathlib import Path
from random import Random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..measure.prompts import Prompt
from . import DemoSettings

PARTS = 2  # of the held-out prompts: what is measured, and what the head is chosen by

# of a story, one after the other; behind three of them a paragraph ends
COURSE = "opening habit find joy loss tears meeting talk rescue thanks end".split()
ENDS = (1, 3, 7)


@cache
def phrases() -> dict[str, list[str]]:
    """Read what stories are put together from, by its kind."""
    text = Path(__file__).with_name("phrases.txt").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return {kind.rstrip(":"): lines for kind, *lines in blocks}


def tell(chance: Random) -> str:
    """Tell a story."""
    of = phrases()
    name, friend = chance.sample(of["girl"] + of["boy"], 2)
    animal, other = chance.sample(of["animal"], 2)
    she, her = ("she", "her") if name in of["girl"] else ("he", "his")
    # how the thing is lost, and how it comes back
    loss, rescue = chance.choice(of["loss"]).split(" | ")
    facts = {
        **{"name": name, "friend": friend, "animal": animal, "other": other, "rescue": rescue},
        **{"she": she, "She": she.capitalize(), "her": her, "Her": her.capitalize()},
        **{kind: chance.choice(of[kind]) for kind in ("trait", "home", "food", "thing")},
    }
    told = ""
    for number, part in enumerate(COURSE):
        told += chance.choice([loss] if part == "loss" else of[part]).format_map(facts)
        told += "\n" if number in ENDS else " "
    return told.rstrip()


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
