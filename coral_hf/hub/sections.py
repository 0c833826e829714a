"""The parts of a drafter's card as Markdown.

In: a drafter, its target's id, what its trainings recorded. Out: one section each.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..decoding.settings import TREE_DEFAULTS
from ..drafters.coral.configuration import CoralConfig
from ..drafters.coral.modeling import CoralDrafter

PAPER = "[CORAL (ACL 2025)](https://arxiv.org/abs/2502.16880)"
UNKNOWN = "not recorded"


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Two columns without a header, None as not recorded."""
    lines = (
        f"| {name} | {UNKNOWN if value is None else str(value).replace('|', chr(92) + '|')} |"
        for name, value in rows
    )
    return "\n".join(["| | |", "|---|---|", *lines])


def about_section(repo_id: str, target: str | None) -> str:
    """What this is."""
    whose = f"[`{target}`](https://huggingface.co/{target})" if target else "its target"
    return f"""\
# {repo_id.split("/")[-1]}

A drafter for {whose}.

It is a small model that guesses what the target will say, so that the target reads several tokens
in one pass. `target.generate(..., assistant_model=drafter)` uses it, and the text stays the
target's own. The method is {PAPER}."""


INSTALL = "pip install coral_hf"
CODE = """

The drafter's code is here too: `AutoModel.from_pretrained(..., trust_remote_code=True)` loads the
drafter where coral_hf is not installed. To generate with it, install coral_hf."""
NAMELESS = "# the id or folder of the target, which this drafter does not know\n"


def use_section(repo_id: str, target: str | None, chats: bool, has_code: bool = False) -> str:
    """Ten lines that run."""
    return f"""\
## Use

```bash
{INSTALL}
```

```python
import coral_hf  # lets AutoModel load the drafter and generate take it
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

{"" if target else NAMELESS}name = "{target or "the/target"}"
tokenizer = AutoTokenizer.from_pretrained(name)
target = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
drafter = AutoModel.from_pretrained("{repo_id}", dtype=target.dtype).to(target.device)
{CHAT if chats else PLAIN}
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=128)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```{CODE if has_code else ""}"""


CHAT = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
inputs = tokenizer.apply_chat_template(messages, **options).to(target.device)"""

PLAIN = """\
inputs = tokenizer("Why is the sky blue?", return_tensors="pt").to(target.device)"""


def target_section(drafter: CoralDrafter, target: str | None) -> str:
    """Which target, which tokenizer, which shape."""
    config = drafter.config
    folder = config.target_name_or_path
    name = f"`{target}`" if target else folder and f"a local folder, `{Path(folder).name}`"
    own = drafter.generation_config
    tree = {name: getattr(own, name, value) for name, value in TREE_DEFAULTS.items()}
    size = f"{drafter.num_parameters():,} parameters"
    layers = "1 layer" if config.num_hidden_layers == 1 else f"{config.num_hidden_layers} layers"
    rows = [
        ("target", name),
        ("its revision", _code(config.target_revision)),
        ("its tokenizer (SHA-256 of token → id)", _code(config.tokenizer_hash)),
        ("vocabulary", config.vocab_size),
        (
            "drafter",
            f"{layers} of width {config.hidden_size}, {size}",
        ),
        ("dtype", f"`{str(drafter.dtype).removeprefix('torch.')}`"),
        ("draft head", _head(config)),
        ("draft tree", ", ".join(f"`{key}` {value}" for key, value in tree.items())),
    ]
    return f"## Target and drafter\n\n{table(rows)}"


def _code(value: str | None) -> str | None:
    return None if value is None else f"`{value}`"


def _head(config: CoralConfig) -> str:
    if config.draft_head == "routed":
        groups = f"{config.num_active_groups} of {config.num_groups} {config.grouping} groups"
        return f"`routed`: reads {groups} of the target's LM head"
    return f"`{config.draft_head}`"


def training_section(stages: Sequence[dict]) -> str:
    """What was trained on what, and at what cost; one table a stage."""
    if not stages:
        return (
            "## Training\n\nNot recorded: the checkpoint does not say how it was trained, or what"
            " that cost."
        )
    return "\n\n".join(["## Training", *(_stage_section(stage) for stage in stages)])


def _stage_section(stage: dict) -> str:
    if stage["stage"] != "import":
        return f"### Stage `{stage['stage']}`\n\n{table(_training_rows(stage))}"
    source = stage["source"]
    if source is None:
        return "### Imported\n\nFrom an EAGLE or HASS checkpoint; which one is not recorded."
    link = f"[`{source}`](https://huggingface.co/{source})"
    return (
        f"### Imported\n\nFrom {link} at `{stage['revision']}`, whose page says how it was trained"
        " and under which license."
    )


def _training_rows(stage: dict) -> list[tuple[str, object]]:
    tokens, seconds = stage.get("trained_tokens"), stage.get("seconds")
    acceptance = stage.get("eval_acceptance_length")
    versions = stage.get("versions", {})
    # a stage of a head alone has no recipe
    recipe = [("recipe", _recipe(stage))] if stage.get("stage") in ("drafter", "joint") else []
    return [
        *recipe,
        ("datasets", ", ".join(f"`{name}`" for name in stage.get("datasets", [])) or None),
        ("rows", stage.get("rows")),
        ("optimizer steps", stage.get("steps")),
        ("epochs", stage.get("epochs")),
        ("trained tokens, each pass counted", None if tokens is None else f"{tokens:,}"),
        ("seconds", None if seconds is None else f"{seconds:.0f}"),
        ("hardware", stage.get("hardware")),
        ("precision", stage.get("precision")),
        ("batch", stage.get("batch")),
        ("learning rate", stage.get("learning_rate")),
        ("longest row, tokens", stage.get("max_length")),
        ("held-out tokens per target pass", acceptance and f"{acceptance:.2f}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    ]


def _recipe(stage: dict) -> str | None:
    if "recipe" not in stage:
        return None
    weights = {name: value for name, value in stage.get("weights", {}).items() if value}
    settings = ", ".join(f"`{name}` {value}" for name, value in weights.items())
    return f"`{stage['recipe']}`: {settings}" if settings else f"`{stage['recipe']}`"


def limits_section(config: CoralConfig, stages: Sequence[dict], is_measured: bool) -> str:
    """What not to expect."""
    lengths = [stage["max_length"] for stage in stages if stage.get("max_length")]
    rows = f"rows of at most {max(lengths)} tokens" if lengths else "rows of a length not recorded"
    speed = (
        "Speed was measured on the hardware named above, one text at a time unless it says"
        " otherwise; other hardware, batches and kinds of text give other numbers, less than 1x"
        " among them."
        if is_measured
        else "Speed has not been measured: it may be below that of the target alone."
    )
    return f"""\
## Limits

- It drafts for this target and its fine-tuned versions. With any other target of the same sizes the
  text is still the target's, and slower than without a drafter.
- It has no text of its own: what the target gets wrong, it gets wrong with a drafter too.
- It was trained on {rows}; fewer guesses are accepted beyond that, and on kinds
  of text that the training data lack.
- {speed}
- `generate` in one process, greedy or sampling; beam search is refused."""
