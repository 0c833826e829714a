"""What the site adds to the pages: reference tables made from code, and a check of what it loads.

In: the pages of docs/. Out: tables in the place of comments such as `<!-- commands -->`; a warning,
which `--strict` makes an error, for a page or style that loads a file from elsewhere.
"""

import inspect
import logging
import pkgutil
import re
from argparse import Action
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import coral_hf
from coral_hf.cli import GROUPS, name_of
from coral_hf.cli.parser import Command, make_parser, settings_of
from coral_hf.training.arguments import RECIPES, Recipe

log = logging.getLogger("mkdocs.hooks")
# titles of the API page, by the part of the package that a public name comes from
TITLES = {
    "checkpoints": "Import and export",
    "decoding": "Generate",
    "drafters": "Drafters",
    "hub": "Publish",
    "measure": "Verify and tune",
    "training": "Train",
}


def table(head: str, rows: Iterable[str]) -> str:
    """A table of Markdown, of cells that are joined by ` | `."""
    return "\n".join([head, re.sub("[^|]+", "---", head), *rows]) + "\n"


def commands() -> str:
    """All commands, with their options."""
    return "\n".join(
        f"## {group.capitalize()}\n\n" + "\n".join(map(command, members))
        for group, members in GROUPS.items()
    )


def command(one: Command) -> str:
    """One command: what it does, how it is typed, its options."""
    parser = make_parser(name_of(one), one)
    rows = [option(action) for action in parser._actions if action.dest != "help"]
    kinds = [kind for kind in settings_of(one).values() if ".cli." not in kind.__module__]
    python = "".join(f"In Python: `{kind.__module__}.{kind.__name__}`.\n\n" for kind in kinds)
    return (
        f"### coral-hf {name_of(one)}\n\n{inspect.getdoc(one)}\n\n"
        f"```bash\n{parser.usage}\n```\n\n{python}{table('| option | |', rows)}"
    )


def option(action: Action) -> str:
    """The line of an option."""
    names = ", ".join(f"`{name}`" for name in action.option_strings or [action.dest])
    choices = ", ".join(f"`{choice}`" for choice in action.choices or [])
    needed = "Required. " if action.required and action.option_strings else ""
    said = f"{needed}{(action.help or '').replace('%%', '%')}"
    return f"| {names} | {escaped(said)}{choices and f' One of {choices}.'} |"


def settings(name: str) -> str:
    """The fields of a dataclass of this package that have a help text, with their defaults."""
    kind: Any = pkgutil.resolve_name(name)
    own = [base for base in kind.__mro__ if base.__module__.startswith("coral_hf.")]
    names = {field for base in own for field in vars(base).get("__annotations__", {})}
    shown = [one for one in fields(kind) if one.name in names and "help" in one.metadata]
    rows = [f"| `{one.name}` | {default(one)} | {escaped(one.metadata['help'])} |" for one in shown]
    return table("| setting | default | |", rows)


def default(one: Field[Any]) -> str:
    """The default of a field."""
    if one.default is MISSING:
        return "" if one.default_factory is MISSING else f"`{one.default_factory()}`"
    return "" if one.default is None else f"`{one.default!r}`"


def recipes() -> str:
    """Steps and weights of each recipe."""
    head = ["recipe", *(f"`{name}`" for name in Recipe._fields)]
    lines = [[f"`{name}`", *map(str, recipe)] for name, recipe in RECIPES.items()]
    return table(f"| {' | '.join(head)} |", [f"| {' | '.join(cells)} |" for cells in lines])


def names() -> str:
    """The public names of the package, each as mkdocstrings shows it."""
    parts: dict[str, list[str]] = {}
    for module, public in coral_hf._MODULES.items():
        parts.setdefault(module.split(".")[0], []).extend(public)
    return "\n".join(
        f"## {TITLES.get(part, part)}\n\n"
        + "".join(f"::: coral_hf.{name}\n\n" for name in sorted(public))
        for part, public in parts.items()
    )


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


MADE = {"commands": commands, "settings": settings, "recipes": recipes, "names": names}


def filled(markdown: str) -> str:
    """A page whose comments `<!-- name argument -->` are replaced by what is made of the code."""
    made = re.compile(rf"<!-- ({'|'.join(MADE)})(?: (\S+))? -->")
    return made.sub(lambda found: MADE[found[1]](*filter(None, [found[2]])), markdown)


def on_config(config: Any) -> Any:
    """Name headings as GitHub does, so that links reach them in both."""
    from pymdownx.slugs import slugify

    config["mdx_configs"].setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Make the reference tables; GitHub wants `\\|` in the code of a table, Python-Markdown `|`."""
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace("\\|", "|"), filled(markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Show names as code that docstrings mark for transformers' own pages, [`like_this`]."""
    return re.sub(r"\[<code>~?([\w.]+)</code>\]", r"<code>\1</code>", html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn of a page that loads a file from elsewhere."""
    for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", output):
        if re.search(r'(?:src|href)="?(?:https?:)?//', tag) and 'rel="canonical"' not in tag:
            log.warning("%s loads a file from elsewhere: %s", page.file.src_uri, tag)
    return output


def on_post_build(config: Any) -> None:
    """Warn of a style that loads a file from elsewhere."""
    for style in Path(config["site_dir"]).rglob("*.css"):
        for found in re.findall(r"url\([\"']?(?:https?:)?//[^)]*", style.read_text()):
            log.warning("%s loads a file from elsewhere: %s", style.name, found)
