"""The playground: turns, races, drawings, bad input; and, marked slow, the page in a browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from conftest import invoke, printed, tiny_target
from test_examples import EXAMPLES, save_target_and_talk
from transformers import AutoTokenizer

from coral_hf import CoralDrafter, LanguageModelDrafter
from coral_hf.decoding import DraftStreamer
from coral_hf.measure.calls import sampling_arguments
from coral_hf.measure.prompts import Prompt, encode, left_padded, user_message
from coral_hf.playground import drawing
from coral_hf.playground.race import Models, Race, Round, Side, Turn, Turns

# Gradio reads options of pandas that go away
pytestmark = [
    pytest.mark.filterwarnings("ignore:.future.no_silent_downcasting"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
    # and leaves a socket open where its first port is taken
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

GREEDY = {"temperature": 0, "top_p": 1, "top_k": 0, "seed": 0}
LENGTH = 24  # new tokens
ROOT = EXAMPLES.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny target of bytes, which drafts for itself, so that all is accepted; and a stranger."""
    folder = tmp_path_factory.mktemp("playground")
    save_target_and_talk(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    target = tiny_target("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    drafters = {
        "itself": LanguageModelDrafter(target),
        "untrained": CoralDrafter.from_target(target).eval(),
        "a stranger": CoralDrafter.from_target(tiny_target("llama", hidden_size=16)),
    }
    return Models(target, tokenizer, drafters)


def finished(race: Race) -> Race:
    """A race whose calls have ended."""
    while race.is_running:
        time.sleep(0.005)
    assert not race.error
    return race


def text(side: Side) -> str:
    return "".join(character for character, _ in side.parts)


def alone(models: Models, prompt: str) -> list[int]:
    """What the target answers."""
    ids = encode(Prompt("said", "0", (user_message(prompt),)), models.tokenizer)  # (1, length)
    arguments = sampling_arguments(0.0, LENGTH) | {"pad_token_id": 0}
    return models.target.generate(**left_padded(ids, 0), **arguments)[0, ids.shape[1] :].tolist()


def test_both_sides_of_a_race_write_the_targets_own_answer(models):
    race = finished(models.race("Hello", LENGTH, GREEDY, "itself", {}))
    assert race.plain.tokens == race.drafted.tokens == alone(models, "Hello")
    assert text(race.plain) == text(race.drafted) == models.tokenizer.decode(race.plain.tokens)
    assert race.ratio > 0 and not models.turns.calls
    assert f"the same {LENGTH} of {LENGTH} tokens" in drawing.result(race)


def test_every_round_has_its_tree_and_the_path_that_was_accepted(models):
    settings = {"tree_depth": 3, "tree_top_k": 2, "tree_nodes": 7}
    race = finished(models.race("Hello", LENGTH, GREEDY, "itself", settings))
    told, rounds = race.drafted.tokens[1:], race.drafted.rounds  # the first is the prefill's
    assert told == [
        token for one in rounds for token in (*one.accepted, one.own) if token is not None
    ]
    assert {len(one.accepted) for one in rounds} & {1, 2, 3}
    for one in rounds:
        path = one.path()
        assert [one.tokens[node] for node in path[1:]] == one.accepted
        assert [one.parents[node] for node in path[1:]] == path[:-1]
        chances = [1.0, *one.confidences]
        assert len(chances) == len(one.tokens) <= 7
        assert all(chances[i] <= chances[p] <= 1 for i, p in enumerate(one.parents) if i)


@pytest.mark.parametrize("rounds", ["growing", "static", "drawn"])
def test_a_streamer_sees_the_tree_of_which_the_next_tokens_come(models, rounds):
    class Watching(DraftStreamer):
        trees, told = [], []

        def take_tree(self, tree):
            self.trees.append(tree._replace(tokens=tree.tokens.clone(), depths=tree.depths.clone()))

        def put(self, value):
            self.told.append((len(self.trees), self.depth, value.flatten()[-1].item()))

        def end(self):
            self.told.append("end")

    drafting = {"assistant_model": models.drafters["itself"], "tree_depth": 2, "pad_token_id": 0}
    if rounds == "static":
        drafting["cache_implementation"] = "static"
    sampled = sampling_arguments(1.0, 9) | {"verification": "traversal"}
    arguments = sampled if rounds == "drawn" else sampling_arguments(0.0, 9)
    watching = Watching()
    models.target.generate(torch.arange(40, 45)[None], streamer=watching, **arguments, **drafting)
    prompt, first, *told, end = watching.told
    assert (prompt[0], first[0], end) == (0, 0, "end") and len(told) == 8
    drafted = [one for one in told if one[1]]
    assert drafted
    for number, depth, token in drafted:
        tree = watching.trees[number - 1]
        assert token in tree.tokens[0, tree.depths[0] == depth].tolist()


def test_calls_that_take_turns_never_overlap(monkeypatch):
    monkeypatch.setattr("coral_hf.playground.race.SLICE", 0.002)
    turns, now, seen = Turns(), [], []
    first = [Turn(turns) for _ in range(2)]

    def work(turn):
        with turn:
            torch.manual_seed(0)
            for _ in range(20):
                now.append(turn)
                time.sleep(0.001)
                seen.append({*now})
                now.remove(turn)
                turn.pass_on()
            turn.drawn = torch.rand(1).item()

    threads = [threading.Thread(target=work, args=(turn,)) for turn in first]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(holders) == 1 for holders in seen) and len(seen) == 40
    changes = sum(a != b for a, b in zip(seen, seen[1:], strict=False))
    assert changes > 5
    assert first[0].drawn == first[1].drawn  # each has its own random numbers
    assert not turns.calls
    assert Turn(turns).used == 0.0


def test_two_races_at_once_give_each_its_own_answer(models):
    prompts = ["Hello", "Good night", "One, two"]
    races = [models.race(prompt, LENGTH, GREEDY, "untrained", {}) for prompt in prompts]
    for race, prompt in zip(races, prompts, strict=True):
        assert finished(race).drafted.tokens == race.plain.tokens == alone(models, prompt)


def test_a_race_that_is_stopped_ends_after_its_next_token(models):
    race = models.race("Hello", 400, GREEDY, "itself", {})
    while not race.drafted.tokens:
        time.sleep(0.001)
    race.stop()
    finished(race)
    assert len(race.plain.tokens) < 400 and "the same" not in drawing.result(race)


def test_sampled_answers_follow_the_seed(models):
    settings = {"verification": "traversal"}
    sampling = GREEDY | {"temperature": 1.0, "top_k": 20}
    runs = [
        finished(models.race("Hello", 12, sampling | {"seed": seed}, "itself", settings))
        for seed in (3, 3, 4)
    ]
    assert runs[0].drafted.tokens == runs[1].drafted.tokens
    assert runs[0].plain.tokens == runs[1].plain.tokens
    assert runs[0].drafted.tokens != runs[2].drafted.tokens


def test_a_target_without_chat_template_continues_the_text(models):
    plain = AutoTokenizer.from_pretrained(models.tokenizer.name_or_path)
    plain.chat_template = None
    without = Models(models.target, plain, models.drafters)
    race = finished(without.race("Hello", LENGTH, GREEDY, "itself", {}))
    ids = plain("Hello", return_tensors="pt")  # (1, length)
    arguments = sampling_arguments(0.0, LENGTH) | {"pad_token_id": 0}
    expected = models.target.generate(**ids, **arguments)[0, ids["input_ids"].shape[1] :]
    assert race.drafted.tokens == race.plain.tokens == expected.tolist()
    assert race.plain.tokens != alone(models, "Hello")


@pytest.mark.parametrize(
    ("prompt", "length", "name", "settings", "message"),
    [
        (" \n", 8, "itself", {}, "The prompt is empty"),
        ("a" * 600, 8, "itself", {}, "but beside 8 new ones the target has room for 504"),
        ("Hi", 8, "untrained", {"draft_head": "routed"}, "this drafter has no trained router"),
        ("Hi", 8, "a stranger", {}, "the drafter was made for a target with"),
        ("Hi", 8, "itself", {"tree_depth": -1}, "`tree_depth` is -1"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_sentence(
    models, prompt, length, name, settings, message
):
    try:
        race = models.race(prompt, length, GREEDY, name, settings)
        while race.is_running:
            time.sleep(0.005)
        said = race.error
    except ValueError as error:
        said = str(error)
    assert message in said and not models.turns.calls


def test_the_command_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coral_hf.cli.measure.find_spec", lambda name: None)
    result = invoke("playground")
    assert result.exit_code == 1 and "or coral_hf[playground]" in printed(result)
    monkeypatch.setattr("coral_hf.cli.measure.find_spec", lambda name: True)
    result = invoke("playground")
    assert result.exit_code == 1 and "run `coral-hf demo` here first" in printed(result)
    result = invoke("playground", "--target", "t")
    assert result.exit_code == 2 and "--target goes with --drafter" in printed(result)


def test_a_tree_is_drawn_with_its_path_and_its_confidences(models):
    #        0 ── 1 ── 3          a, b drafted below the root, c below a; a and c accepted
    #          └─ 2
    one = Round([40, 65, 66, 67, 0], [0, 0, 0, 1, -1], [0.9, 0.05, 0.5, 0.0], [65, 67], 68)
    assert one.path() == [0, 1, 3]
    drawn = drawing.tree([one], 9, models.tokenizer)
    assert "Round 1 of 1: 3 tokens drafted, 2 accepted, then the target's own" in drawn
    tags = r'(<ul class="tree">|<ul>|</ul>|</li>)|class="(\w+)"><span title="(\S+) '
    nodes = re.findall(tags, drawn)
    assert "".join(tag or f"{kind} {text} " for tag, kind, text in nodes) == (
        '<ul class="tree">accepted I <ul>accepted b <ul>accepted d </li></ul></li>'
        "rejected c </li></ul></li></ul>"
    )
    assert " 90%<" in drawn and " 5%<" in drawn and " 50%<" in drawn
    assert "are drawn here" in drawing.tree([], 1, models.tokenizer)
    shares = re.findall(r"<td>(\d+)%</td>", drawing.bars([one, Round([1], [0], [], [], 2)]))
    assert shares == ["50", "50"]


def test_text_is_shown_as_it_stands_with_the_colours_of_its_depths():
    parts = [("<", ""), ("b", "green"), ("&", "green"), (">", "cyan")]
    assert "".join(drawing.coloured(parts)) == (
        '&lt;<span class="green" title="depth 1">b&amp;</span>'
        '<span class="cyan" title="depth 2">&gt;</span>'
    )


# ---- in a browser


@pytest.fixture(scope="module")
def chromium():
    """The browser of this system, driven by Playwright."""
    pytest.importorskip("gradio", reason="the page is made with Gradio")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser")
    if (program := shutil.which("chromium")) is None:
        pytest.skip("there is no `chromium` on this system")
    quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def connected():
    """The addresses to which this process connects."""
    found = []
    sys.addaudithook(lambda event, args: event == "socket.connect" and found.append(args[1]))
    return found


@pytest.fixture(scope="module")
def url(chromium, models, connected):
    """Where the page is served, from this process."""
    from coral_hf.playground.page import launch

    blocks = launch(models, "A tiny target.")
    yield blocks.local_url
    blocks.close()


@contextmanager
def visiting(chromium, url, **how):
    """A reader's page, ready to be used, and what it has fetched."""
    context = chromium.new_context(**how)
    page, page_fetched = context.new_page(), []
    page.set_default_timeout(20_000)
    context.on("request", lambda request: page_fetched.append(request.url))
    page.goto(url)
    page.get_by_label("Prompt").wait_for()
    yield page, page_fetched
    context.close()


def ask(page, prompt: str, length: int = LENGTH) -> None:
    """Type a prompt, choose the length of the answer, run."""
    page.get_by_label("Prompt").fill(prompt)
    if not page.get_by_label("number input for New tokens").is_visible():
        page.get_by_role("button", name="Sampling").click()
    number = page.get_by_label("number input for New tokens")
    number.fill(str(length))
    number.press("Tab")
    page.get_by_role("button", name="Run", exact=True).click()


def panes(page) -> list[str]:
    """The texts of both sides, once both have ended."""
    page.get_by_text(re.compile("the same .* tokens")).wait_for()
    names = ("The target alone", "With the drafter")
    return [page.get_by_role("region", name=name).inner_text() for name in names]


def serious(page) -> list[str]:
    """What axe finds serious or critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not here")
    found = axe.Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    return [f"{one['id']}: {node['html']}" for one in serious for node in one["nodes"]]


@pytest.mark.slow
def test_a_prompt_is_answered_twice_and_its_rounds_are_stepped_through(chromium, url, models):
    with visiting(chromium, url) as (page, _):
        ask(page, "Hello")
        plain, drafted = panes(page)
        assert plain and plain == drafted
        assert page.get_by_text(re.compile(rf"the same {LENGTH} of {LENGTH} tokens")).is_visible()
        heading = page.get_by_text(re.compile("Round 1 of"))
        assert re.search("[1-6] accepted", heading.inner_text())
        last = int(re.search(r"of (\d+)", heading.inner_text())[1])
        page.get_by_label("range slider for Round").focus()
        for number in range(2, last + 1):
            page.keyboard.press("ArrowRight")
            page.get_by_text(f"Round {number} of {last}").wait_for()
        page.keyboard.press("ArrowLeft")
        page.get_by_text(f"Round {last - 1} of {last}").wait_for()
        assert page.locator(".tree .accepted").count() > 1
        assert page.get_by_role("rowheader", name="depth 1").is_visible()


@pytest.mark.slow
def test_the_page_needs_no_mouse(chromium, url):
    with visiting(chromium, url) as (page, _):
        page.get_by_label("Prompt").focus()
        page.keyboard.type("Hi")
        page.keyboard.press("Shift+Enter")
        plain, drafted = panes(page)
        assert plain and plain == drafted
        page.get_by_label("range slider for Round").focus()
        page.keyboard.press("ArrowRight")
        page.get_by_text("Round 2 of").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_and_nothing_hinders_a_reader(chromium, url, scheme):
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
    with visiting(chromium, url, **phone) as (page, _):
        page.get_by_role("button", name="Drafting").click()
        ask(page, "Hello")
        panes(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", shade)[:3])) < 200) == (scheme == "dark")
        assert not serious(page)


@pytest.mark.slow
def test_two_readers_at_once_get_their_own_answers(chromium, url, models):
    with visiting(chromium, url) as (one, _), visiting(chromium, url) as (other, _):
        ask(one, "Good morning", 60)
        ask(other, "Good night", 60)
        first, second = panes(one), panes(other)
    assert first[0] == first[1] != second[0] == second[1]


@pytest.mark.slow
def test_the_page_of_a_target_without_chat_template_says_so(chromium, models):
    from coral_hf.playground.page import launch

    plain = AutoTokenizer.from_pretrained(models.tokenizer.name_or_path)
    plain.chat_template = None
    blocks = launch(Models(models.target, plain, models.drafters), "No template.")
    with visiting(chromium, blocks.local_url) as (page, _):
        assert page.get_by_text("it continues the text as it stands").is_visible()
        ask(page, "Hello")
        text, drafted = panes(page)
        assert text and text == drafted
    blocks.close()


@pytest.mark.slow
def test_a_reader_who_leaves_ends_the_generation(chromium, url, models):
    slow = models.target.register_forward_pre_hook(lambda *_: time.sleep(0.1))  # 45 s in all
    with visiting(chromium, url) as (page, _):
        ask(page, "Hello", 450)
        page.wait_for_function("document.body.innerText.match(/[1-9]\\d* tokens, [1-9]/)")
        assert models.turns.calls
    begun = time.monotonic()
    while models.turns.calls and time.monotonic() - begun < 20:
        time.sleep(0.01)
    slow.remove()
    assert not models.turns.calls


@pytest.mark.slow
def test_mistakes_are_answered_by_a_sentence_and_the_page_goes_on(chromium, url):
    with visiting(chromium, url) as (page, _):
        for prompt, said in ((" ", "The prompt is empty"), ("a" * 600, "shorten it, or ask for")):
            ask(page, prompt)
            page.get_by_role("alert").get_by_text(said).wait_for()
        page.get_by_role("button", name="Drafting").click()
        page.get_by_role("radio", name="a stranger").click()
        ask(page, "Hello")
        page.get_by_role("alert").get_by_text("the drafter was made for a target with").wait_for()
        page.get_by_role("radio", name="untrained").click()
        page.get_by_role("radio", name="quantized").click()
        page.get_by_role("radio", name="traversal").click()
        ask(page, "Hello")
        plain, drafted = panes(page)
        assert plain and plain == drafted and not page.get_by_role("alert").count()


@pytest.mark.slow
def test_nothing_but_loopback_is_connected_to(chromium, url, connected):
    with visiting(chromium, url) as (page, fetched):
        ask(page, "Hello")
        panes(page)
        page.wait_for_timeout(1000)
        fonts = page.evaluate("[...document.fonts].length")
    assert fetched and all(one.startswith((url, "data:", "blob:")) for one in fetched), fetched
    hosts = {address[0] for address in connected if isinstance(address, tuple)}
    assert hosts <= {"127.0.0.1", "::1", "localhost"}
    assert not [one for one in fetched if re.search(r"\.(woff2?|ttf)", one)] and fonts is not None


def test_a_space_installs_what_the_package_needs():
    package = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)^\]", package, re.DOTALL | re.MULTILINE)[1]
    needed += re.search(r"^playground = (.*)$", package, re.MULTILINE)[1]
    comment, *lines = (EXAMPLES / "space" / "requirements.txt").read_text().splitlines()
    assert lines == re.findall('"(.*?)"', needed) and "torch" in lines[0]
    sdk = re.search(r"sdk_version: (\S+)\.\d+", (EXAMPLES / "space" / "README.md").read_text())[1]
    assert lines[-1] == f"gradio>={sdk}"


@pytest.mark.slow
def test_the_space_serves_the_same_page_until_it_is_interrupted(tmp_path):
    if find_spec("gradio") is None:
        pytest.skip("the page is made with Gradio")
    save_target_and_talk(tmp_path)
    target, here = str(tmp_path / "target"), tmp_path / "space"
    shutil.copytree(EXAMPLES / "space", here)
    shutil.copytree(ROOT / "coral_hf", here / "coral_hf")  # as it is pushed: nothing is installed
    names = {"TARGET": target, "DRAFTER": target, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    space = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=here,
        env=os.environ | names,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(space.stdout.readline, "")
        found = next(line for line in lines if "The playground is at" in line)
        page = urllib.request.urlopen(re.search(r"http\S+", found)[0]).read().decode()
        assert "coral_hf playground" in page
    finally:
        space.send_signal(signal.SIGINT)
        space.communicate(timeout=20)
    assert space.returncode == 0
