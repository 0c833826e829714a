"""The page, in Gradio: a prompt and settings, two panes, the rounds of the answer.

In: `Models`. Out: a page that is served until it is interrupted. It fetches nothing: analytics are
off, and fonts are the reader's own.
"""

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ..measure.prompts import room_for_prompt
from ..measure.settings import Rule
from . import drawing
from .models import Models
from .race import Race

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
import gradio as gr  # noqa: E402

PLAIN, DRAFTED = "The target alone", "With the drafter"
OWN = "the drafter's own"
EVERY = 0.1  # seconds between two pictures of a race
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# greys that stand out from their background enough to be read
BUTTON = [f"button_primary_background_fill{end}" for end in ("", "_hover", "_dark", "_hover_dark")]
READABLE = {
    **dict.fromkeys(("body_text_color_subdued", "input_placeholder_color"), "*neutral_600"),
    **dict.fromkeys(BUTTON, "*primary_700"),
}


class Page:
    """The elements of the page, and what they do."""

    def __init__(self, models: Models, title: str) -> None:
        self.models, self.first = models, models.names[0]
        with gr.Blocks(title="coral_hf playground", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# Playground\n{title}")
            self._question()
            self.answers = [gr.State()]  # the race
            self.answers += [gr.HTML(elem_classes=["alert"]), gr.HTML(elem_classes=["result"])]
            with gr.Row():
                for name in (PLAIN, DRAFTED):
                    with gr.Column(min_width=300):
                        self.answers.append(gr.HTML(drawing.pane(name)))
            gr.HTML(drawing.legend())
            with gr.Row():
                with gr.Column(min_width=300, scale=1):
                    self.answers.append(gr.HTML(drawing.bars([])))
                with gr.Column(min_width=300, scale=3):
                    self._rounds()
            asked = [self.prompt, *self.sampling, self.drafter, *self.drafting]
            triggers = [self.run.click, self.prompt.submit]
            private = {"api_visibility": "private", "show_progress": "hidden"}
            gr.on(triggers, self.answer, asked, self.answers, concurrency_limit=None, **private)
            self.stop.click(lambda race: race and race.stop(), self.answers[0], **private)
            heads = [self.drafting[0], self.answers[1]]
            self.drafter.change(self.choose, self.drafter, heads, **private)
            shown = partial(drawing.tree, tokenizer=models.tokenizer)
            self.round.change(
                lambda race, number: shown(race.drafted.rounds if race else [], number),
                [self.answers[0], self.round],
                self.answers[-1],
                **private,
            )
            for button, step in ((self.back, -1), (self.on, 1)):
                button.click(
                    lambda race, number, step=step: self.at(race, number + step),
                    [self.answers[0], self.round],
                    self.round,
                    **private,
                )

    def _question(self) -> None:
        """The prompt, how tokens are chosen, and how they are drafted."""
        has_template = self.models.tokenizer.chat_template is not None
        info = "The target answers it, by its chat template."
        if not has_template:
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
        with gr.Accordion("Drafting", open=False), gr.Row():
            self.drafter = gr.Radio([*self.models.names], value=self.first, label="Drafter")
            heads = [OWN, *self.models.heads(self.first)]
            self.drafting = [gr.Radio(heads, value=OWN, label="Draft head")]
            shared = {"precision": 0, "minimum": 0, "info": f"0: {OWN}."}
            for label in ("Depth of the tree", "Children of a node", "Nodes of the tree"):
                self.drafting.append(gr.Number(0, label=label, **shared))
            rules = [OWN, *get_args(Rule)]
            self.drafting.append(gr.Radio(rules, value=OWN, label="Rule", info="When sampling."))

    def _rounds(self) -> None:
        """The tree of a round, and the steps to the next."""
        self.round = gr.Slider(1, 2, 1, step=1, label="Round")
        with gr.Row():
            self.back, self.on = gr.Button("Round before"), gr.Button("Next round")
        self.answers += [self.round, gr.HTML(drawing.tree([], 1, self.models.tokenizer))]

    def answer(self, prompt: str, *chosen: Any) -> Iterator[Sequence[Any]]:
        """Show a race while it is run; whoever leaves the page stops it.

        `chosen`: the values of the elements, from the number of new tokens on.
        """
        length, temperature, top_p, top_k, seed, name, head, depth, width, nodes, rule = chosen
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        settings = {"tree_depth": depth, "tree_top_k": width, "tree_nodes": nodes}
        settings |= {"draft_head": head, "verification": rule}
        settings = {key: None if one == OWN else one or None for key, one in settings.items()}
        try:
            race = self.models.race(prompt, length, sampling, name, settings)
        except (ValueError, OSError) as error:
            yield gr.skip(), alert(error), *[gr.skip()] * (len(self.answers) - 2)
            return
        try:
            is_running = True
            while is_running:
                time.sleep(EVERY)
                is_running = race.is_running
                yield self.shown(race, is_running)
        finally:
            race.stop()

    def shown(self, race: Race, is_running: bool) -> Sequence[Any]:
        """What the elements of an answer show."""
        panes = drawing.pane(PLAIN, race.plain), drawing.pane(DRAFTED, race.drafted)
        rounds = race.drafted.rounds
        common = race, alert(race.error), drawing.result(race), *panes
        if is_running:
            return *common, *[gr.skip()] * 3
        drawn = drawing.tree(rounds, 1, self.models.tokenizer)
        return *common, drawing.bars(rounds), self.at(race, 1), drawn

    def at(self, race: Race | None, number: int) -> Any:
        """The slider of rounds, at one of them."""
        last = max(len(race.drafted.rounds) if race else 0, 1)
        return gr.Slider(maximum=max(last, 2), value=min(max(number, 1), last))

    def choose(self, name: str) -> Sequence[Any]:
        """Offer the draft heads of another drafter."""
        try:
            return gr.Radio([OWN, *self.models.heads(name)], value=OWN), ""
        except (ValueError, OSError) as error:
            return gr.Radio([OWN], value=OWN), alert(error)


def alert(error: object) -> str:
    """A sentence that says what went wrong; nothing without one."""
    return f'<p role="alert">{drawing.escape(str(error))}</p>' if str(error) else ""


def launch(models: Models, title: str, port: int | None = None) -> gr.Blocks:
    """Begin to serve the page, on this machine or where GRADIO_SERVER_NAME says."""
    blocks = Page(models, title).blocks
    quiet = {"quiet": True, "prevent_thread_lock": True, "share": False, "ssr_mode": False}
    plain = {"footer_links": [], "run_history": False, "mcp_server": False, "pwa": False}
    style = Path(__file__).with_name("style.css")
    theme = gr.themes.Default(**FONTS).set(**READABLE)
    blocks.launch(server_port=port, css_paths=style, theme=theme, **quiet, **plain)
    return blocks


def serve(models: Models, title: str, port: int | None = None) -> None:
    """Serve the page until it is interrupted."""
    blocks = launch(models, title, port)
    print(f"The playground is at {blocks.local_url} (Ctrl+C ends it).", flush=True)
    blocks.block_thread()
