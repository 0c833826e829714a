"""The page, in Gradio: a prompt and settings, two panes, the rounds of the answer.

In: `Models`. Out: a page that is served until it is interrupted. It fetches nothing: analytics are
off, and fonts are the reader's own.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from ..measure.prompts import room_for_prompt
from ..measure.settings import Head, Rule
from . import drawing
from .race import Models, Race

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
import gradio as gr  # noqa: E402

PLAIN, DRAFTED = "The target alone", "With the drafter"
OWN = "the drafter's own"
EVERY = 0.1  # seconds between two pictures of a race
# greys that stand out from their background enough to be read
BUTTON = [f"button_primary_background_fill{end}" for end in ("", "_hover", "_dark", "_hover_dark")]
READABLE = dict.fromkeys(("body_text_color_subdued", "input_placeholder_color"), "*neutral_600")
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class Page:
    """The elements of the page, and what they do."""

    def __init__(self, models: Models, title: str) -> None:
        self.models = models
        with gr.Blocks(title="coral_hf playground", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# Playground\n{title}")
            self._question()
            self.race = gr.State()
            self.alert, self.result = (gr.HTML(elem_classes=[one]) for one in ("alert", "result"))
            with gr.Row():
                with gr.Column(min_width=300):
                    self.plain = gr.HTML(drawing.pane(PLAIN))
                with gr.Column(min_width=300):
                    self.drafted = gr.HTML(drawing.pane(DRAFTED))
            gr.HTML(drawing.legend())
            self.bars = gr.HTML(drawing.bars([]))
            self.round = gr.Slider(1, 2, 1, step=1, label="Round")
            self.tree = gr.HTML(self.drawn(None, 1))
            self._listen()

    def _listen(self) -> None:
        """Say what happens when something is pressed or chosen."""
        asked = [self.prompt, *self.sampling, self.drafter, *self.drafting]
        shown = [self.race, self.alert, self.result, self.plain, self.drafted]
        shown += [self.bars, self.round, self.tree]
        triggers = [self.run.click, self.prompt.submit]
        gr.on(triggers, self.answer, asked, shown, concurrency_limit=None, **PRIVATE)
        self.stop.click(lambda race: race and race.stop(), self.race, **PRIVATE)
        self.round.change(self.drawn, [self.race, self.round], self.tree, **PRIVATE)

    def _question(self) -> None:
        """The prompt, how tokens are chosen, and how they are drafted."""
        info = "The target answers it, by its chat template."
        if self.models.tokenizer.chat_template is None:
            info = "The target has no chat template: it continues the text as it stands."
        self.prompt = gr.Textbox(
            label="Prompt", info=info, lines=4, max_lines=12, placeholder="Shift+Enter runs."
        )
        with gr.Row():
            self.run = gr.Button("Run", variant="primary")
            self.stop = gr.Button("Stop")
        most = int(min(room_for_prompt(self.models.target, 1), 1024))
        with gr.Accordion("Sampling", open=False), gr.Row():
            self.sampling = [
                gr.Slider(1, most, min(128, most // 2), step=1, label="New tokens"),
                gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy."),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top-p"),
                gr.Number(0, precision=0, minimum=0, label="Top-k", info="0: all tokens."),
                gr.Number(0, precision=0, minimum=0, maximum=2**32, label="Seed"),
            ]
        names = [*self.models.drafters]
        with gr.Accordion("Drafting", open=False), gr.Row():
            self.drafter = gr.Radio(names, value=names[0], label="Drafter")
            self.drafting = [gr.Radio([OWN, *get_args(Head)], value=OWN, label="Draft head")]
            shared = {"precision": 0, "minimum": 0, "info": f"0: {OWN}."}
            for label in ("Depth of the tree", "Children of a node", "Nodes of the tree"):
                self.drafting.append(gr.Number(0, label=label, **shared))
            rules = [OWN, *get_args(Rule)]
            self.drafting.append(gr.Radio(rules, value=OWN, label="Rule", info="When sampling."))

    def answer(self, prompt: str, *chosen: Any) -> Iterator[dict]:
        """Show a race while it is run; whoever leaves the page stops it.

        `chosen`: the values of the elements, from the number of new tokens on.
        """
        length, temperature, top_p, top_k, seed, name, *drafting = chosen
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        names = ("draft_head", "tree_depth", "tree_top_k", "tree_nodes", "verification")
        values = (None if one == OWN else one or None for one in drafting)
        settings = dict(zip(names, values, strict=True))
        try:
            race = self.models.race(prompt, length, sampling, name, settings)
        except ValueError as error:
            yield {self.alert: alert(error)}
            return
        try:
            while race.is_running:
                yield self.shown(race)
                time.sleep(EVERY)
            first = gr.Slider(maximum=max(len(race.drafted.rounds), 2), value=1)
            rounds = {self.bars: drawing.bars(race.drafted.rounds), self.round: first}
            yield self.shown(race) | rounds | {self.tree: self.drawn(race, 1)}
        finally:
            race.stop()

    def shown(self, race: Race) -> dict:
        """What of an answer is seen while it is written."""
        panes = (self.plain, PLAIN, race.plain), (self.drafted, DRAFTED, race.drafted)
        texts = {element: drawing.pane(name, side) for element, name, side in panes}
        said = {self.alert: alert(race.error), self.result: drawing.result(race)}
        return {self.race: race, **said, **texts}

    def drawn(self, race: Race | None, number: int) -> str:
        """The tree of a round."""
        return drawing.tree(race.drafted.rounds if race else [], number, self.models.tokenizer)


def alert(error: object) -> str:
    """A sentence that says what went wrong; nothing without one."""
    return f'<p role="alert">{drawing.escape(str(error))}</p>' if str(error) else ""


def launch(models: Models, title: str) -> gr.Blocks:
    """Begin to serve the page, on this machine or as GRADIO_SERVER_NAME and _PORT say."""
    blocks = Page(models, title).blocks
    style = Path(__file__).with_name("style.css")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(**fonts).set(**READABLE, **dict.fromkeys(BUTTON, "*primary_700"))
    quiet: dict[str, Any] = {"quiet": True, "prevent_thread_lock": True, "share": False}
    quiet |= {"ssr_mode": False, "run_history": False, "mcp_server": False, "pwa": False}
    blocks.launch(css_paths=style, theme=theme, footer_links=[], **quiet)
    return blocks


def serve(models: Models, title: str) -> None:
    """Serve the page until it is interrupted."""
    blocks = launch(models, title)
    print(f"The playground is at {blocks.local_url} (Ctrl+C ends it).", flush=True)
    blocks.block_thread()
