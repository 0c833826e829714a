"""The examples run as their first lines say."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import shared_file, tiny_target
from eagle_checkpoint import eagle_tensors, write_checkpoint
from loopback_hub import Client, running_hub
from test_demo import TINY
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.ragged_cache import RaggedCache
from coral_hf.measure import Prompt

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """See `save_target_and_talk`."""
    folder = tmp_path_factory.mktemp("examples")
    save_target_and_talk(folder)
    return folder


def save_target_and_talk(folder: Path) -> None:
    """A tiny target with a byte-level tokenizer, and a few conversations."""
    alphabet = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE({byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=alphabet[0])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder / "target")
    tiny_target("llama", vocab_size=len(alphabet)).float().save_pretrained(folder / "target")
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello there."}]
    rows = [json.dumps({"messages": talk})] * 4
    (folder / "talk.jsonl").write_text("\n".join(rows))


def run(monkeypatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_train_generate_and_chat(folder, monkeypatch, capsys):
    names = ["--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    run(monkeypatch, "train.py", *names, "--output", folder / "drafter", "--max-steps", 2)
    names = ["--target", folder / "target", "--drafter", folder / "drafter"]
    run(monkeypatch, "generate.py", *names, "--max-new-tokens", 8, "Hello")
    assert "tokens per target pass" in capsys.readouterr().out
    run(monkeypatch, "chat.py", *names, "--max-new-tokens", 8, "Hello", "And then?")
    assert capsys.readouterr().out.count("tokens per target pass") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_a_target_is_fine_tuned_and_starts_of_its_drafter_compared(folder, monkeypatch, capsys):
    data = ["--dataset", folder / "talk.jsonl", "--hold-out", 1]
    short = ["--max_steps", 1, "--use_cpu", True, "--disable_tqdm", True]
    names = ["--target", folder / "target", "--output_dir", folder / "tuned"]
    run(monkeypatch, "fine_tune.py", *data, *names, *short)
    target = AutoModelForCausalLM.from_pretrained(folder / "tuned")
    CoralDrafter.from_target(target).save_pretrained(folder / "first")
    names = ["--target", folder / "tuned", "--output_dir", folder / "runs", "--num-prompts", 1]
    starts = ["random", str(folder / "first"), f"lora2:{folder / 'first'}"]
    names += [part for start in starts for part in ("--start", start)]
    names += ["--rows", folder / "starts.jsonl", "--share", 0.5, "--share", 1]
    run(monkeypatch, "compare_starts.py", *data, *names, *short)
    rows = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    pairs = [(share, start) for share in (0.5, 1.0) for start in starts]
    assert [(row["share"], row["start"]) for row in rows] == pairs
    assert rows[0]["rows"] < rows[-1]["rows"]
    assert all(row["tau"] >= 1 for row in rows)
    assert all((row["tau_before"] is None) == (row["start"] == "random") for row in rows)
    first = capsys.readouterr().out
    run(monkeypatch, "compare_starts.py", *data, *names, *short)  # all rows are there
    assert capsys.readouterr().out.splitlines()[-8:] == first.splitlines()[-8:]


@pytest.mark.parametrize(
    "families",
    [
        ["medusa", "prompt_lookup"],
        pytest.param(
            ["one_step_first", "eagle3", "parallel", "recurrent", "language_model", "bigram"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_families_are_compared_and_a_run_that_was_stopped_resumes(
    families, folder, tmp_path, monkeypatch, capsys
):
    story = "Once upon a time there was a small {} who lived in a house by the sea."
    stories = [story.format(hero) for hero in ("cat", "dog", "hen", "dog", "fox")]
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(stories))
    files = ["--target", folder / "target", "--dataset", tmp_path / "stories.txt"]
    files += ["--work", tmp_path / "work", "--rows", tmp_path / "rows.jsonl"]
    short = ["--hold-out", 2, "--num-words", 12, "--max-new-tokens", 6, "--minutes", 0.004]
    short += ["--clock", "processor", "--max_length", 24, "--family", *families, "--seeds", 2]
    seeds = [1 if family in ("bigram", "prompt_lookup") else 2 for family in families]
    every = 2 * sum(seeds)  # at T = 0 and 1
    for seconds, expected in ((0, 0), (600, every), (600, every)):  # begun, finished, as it was
        run(monkeypatch, "compare_drafters.py", *files, *short, "--seconds", seconds)
        printed = capsys.readouterr().out
        assert ("Time is up" in printed) == (seconds == 0)
        assert seconds == 0 or printed.count(" ± ") == 2 * seeds.count(2)
        path = tmp_path / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if expected else []
        assert len(rows) == expected
        steps = [path.name for path in (tmp_path / "work").glob("*-run/checkpoint-*")]
        assert seconds or steps == ["checkpoint-1"]
    firsts = [row for row in rows if row["seed"] == 0]
    assert [row["family"] for row in firsts[::2]] == families
    for row in rows:
        assert row["prompts"] == 1 and row["tokens"] == 6  # of the fox: a dog was trained on
        assert row["tau"] >= 1 and row["exact_match"] == (None if row["temperature"] else 1.0)
    assert rows[0]["trained_tokens"] > 0 and rows[0]["steps"] == rows[1]["steps"] > 1
    assert rows[0]["efficiency"] == pytest.approx(rows[0]["speedup"] / rows[0]["tau"])
    assert [row["draft_ms"] is None for row in firsts[::2]] == [
        family == "prompt_lookup" for family in families
    ]


def test_a_family_is_averaged_over_the_seeds_that_have_a_number(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = runpy.run_path(str(EXAMPLES / "compare_drafters.py"))
    row = {
        "family": "medusa",
        "temperature": 1.0,
        "tau": 2.0,
        "steps": 7,
        "draft_ms": 6.0,
        "speedup": 0.5,
    }
    row |= {"stage_ms": {"prefill": 9.0, "draft": 6.0, "verify": 3.0, "other": 1.0}}
    seeds = [row | {"widest_tie": None}, row | {"tau": 3.0, "widest_tie": 1e-6}]
    (found,) = script["over_seeds"](seeds)
    assert (found["tau"], found["steps"], found["seeds"]) == (2.5, 7, 2)
    assert (found["widest_tie"], found["draft_ms"]) == (1e-6, 6.0)
    assert found["deeper"] == 0.5 * 10.0 * 4 / (3.0 * 4 + 7.0)
    assert found["spread"] == " ± 6.35"  # 12.706 / √2 · 0.7071


@pytest.mark.slow
def test_training_cost_compares_two_implementations_of_one_loss(capsys, monkeypatch):
    sizes = ["--vocab-size", 50, "--length", 20, "--hidden-size", 64, "--repeats", 1]
    run(monkeypatch, "training_cost.py", *sizes)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[3].strip() for row in rows] == ["library", "straightforward"]
    assert rows[0][-2].strip() == rows[1][-2].strip()


def test_patience_is_worth_more_than_it_costs_where_tokens_vary(capsys, monkeypatch):
    sizes = ["--cost", 2, "--gain", 0.6, 1.25, "--length", 512, "--spreads", 0, 4, "--calls", 200]
    run(monkeypatch, "patience.py", *sizes)
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    (lost, less_lost), (won, more_won) = ([float(cell) for cell in row[4:6]] for row in lines[2:])
    assert 0.98 < less_lost <= lost < 1 < won < 1.1 < more_won < 1.25


@pytest.mark.slow
def test_planned_memory_is_put_beside_what_a_run_allocates(folder, monkeypatch, capsys):
    case = ["--case", folder / "target", folder / "talk.jsonl", "--recipe", "eagle"]
    run(monkeypatch, "plan_accuracy.py", *case, "--rows", 4)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "eagle" in line]
    assert [row[2] for row in rows] == ["online", "cached"]
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows)


@pytest.mark.parametrize("groups", [[], ["--random-groups"]])
def test_heads_are_timed_and_their_reads_counted(groups, monkeypatch, capsys):
    sizes = ["--shape", "tiny:96000:8", "--groups", 4, "--share", 2, "--share", 4, *groups]
    sizes += ["--rows", 3, "--dtype", "float32", "--repeats", 2, "--top-k", 3, "--device", "cpu"]
    run(monkeypatch, "time_heads.py", *sizes)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = ["all: full head", "all, quantized", "2 of 4", "1 of 4"]
    assert [row[3] for row in rows] == names
    # 32 bytes a row of the head: 2.93 MiB, a half, a quarter; 12 with a scale in eight bits
    assert [row[4] for row in rows] == ["3", "1", "1", "1"]
    assert rows[0][6] == "1.00x" and all(float(row[5].split()[0]) > 0 for row in rows)


@pytest.mark.slow
def test_what_a_call_holds_beside_its_caches_hardly_grows_with_the_prompt(monkeypatch, capsys):
    monkeypatch.setattr(RaggedCache, "commit", RaggedCache.commit)  # which the script watches
    sizes = ["--widths", "published", "--patterns", "llama", "--layers", 2, "--new", 6]
    run(monkeypatch, "memory.py", *sizes, "--lengths", 128, 640, "--chunk", 128)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[1] for row in rows] == ["128", "640"]
    assert float(rows[1][6]) <= 1.02  # of plain `generate`'s cache
    short, long = (int(row[8].split()[0]) for row in rows)  # KiB
    assert 0 < short <= long <= short + 128  # a token has 4096 bytes in a layer's cache


@pytest.mark.slow
def test_static_rounds_hold_what_growing_ones_do_at_the_same_capacity(monkeypatch, capsys):
    monkeypatch.setattr(RaggedCache, "commit", RaggedCache.commit)  # which the script watches
    sizes = ["--widths", "published", "--patterns", "llama", "--layers", 2, "--new", 6]
    run(monkeypatch, "memory.py", *sizes, "--lengths", 1000, "--chunk", 256, "--static")
    row = capsys.readouterr().out.splitlines()[3].strip("| ").split(" | ")
    assert max(map(float, row[-1].split(", "))) <= 1.10


def test_operators_of_a_round_are_listed_by_way(folder, tmp_path, monkeypatch, capsys):
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    CoralDrafter.from_target(target).save_pretrained(tmp_path / "drafter")
    names = ["--target", folder / "target", "--drafter", tmp_path / "drafter", "--new", 6]
    ways = ["--way", "growing", "static", "--tree", 2, 2, 4, "--context", 9, "--top", 2]
    run(monkeypatch, "round_operators.py", *names, *ways)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == 3 * ["growing"] + 3 * ["static"]
    assert rows[2][1] == rows[5][1] == "all" and float(rows[5][2]) > float(rows[3][2]) > 0


def test_parts_of_a_head_are_timed_beside_torchs_own(monkeypatch, capsys):
    sizes = ["--vocab", 300, "--rows", 2, "--shape", "640:8", "--top-k", 3, "--repeats", 1]
    run(monkeypatch, "time_head_parts.py", *sizes)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert [row[0] for row in rows] == ["rows × logits", *2 * ["2 × 300"], "head", *4 * ["640 × 8"]]
    assert all(float(cell.split()[0]) > 0 for cell in rows[1][2:] + rows[4][3:])


def test_the_mass_of_the_best_groups_is_tabled_by_grouping(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("What is the sum of two and three? " * 8)
    names = ["--target", folder / "target", "--dataset", folder / "talk.jsonl", "--hold-out", 1]
    names += ["--prompts", tmp_path / "prompts.txt", "--groups", "8:2", "--groups", "8:8"]
    run(monkeypatch, "group_mass.py", *names, "--positions", 40)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = ["contiguous", "frequency", "kmeans"]
    assert [line[1] for line in lines] == names * 2
    masses = [[float(cell.split(",")[0]) for cell in line[2:4]] for line in (lines[0], lines[3])]
    assert all(0.25 <= part <= 1 for part in masses[0])
    assert masses[1] == [1.0, 1.0]  # all groups hold everything


def test_an_eagle_drafter_is_exported_for_vllm_and_sglang(folder, tmp_path, monkeypatch, capsys):
    target = AutoModelForCausalLM.from_pretrained(folder / "target").config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = {name: getattr(target, name) for name in (*sizes, "num_key_value_heads")}
    config |= {"model_type": "llama", "num_hidden_layers": 1, "bias": False}
    (tmp_path / "eagle").mkdir()
    write_checkpoint(tmp_path / "eagle", config, eagle_tensors(config))
    names = ["--target", folder / "target", "--eagle", tmp_path / "eagle"]
    run(monkeypatch, "serve.py", *names, "--output", tmp_path / "served")
    printed = capsys.readouterr().out
    assert "vllm: vllm serve" in printed and "sglang: python" in printed
    for name in ("coral", "vllm", "sglang"):
        assert (tmp_path / "served" / name / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_measured_drafter_is_published(folder, tmp_path):
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    drafter = CoralDrafter.from_target(target, target_name_or_path="org/target")
    drafter.save_pretrained(tmp_path / "drafter")
    names = ["--target", folder / "target", "--drafter", tmp_path / "drafter"]
    names += ["--prompts", folder / "talk.jsonl", "--repo", "org/example", "--max-new-tokens", 6]
    script = "import runpy, sys; sys.argv = [str(part) for part in argv]"
    with running_hub() as hub:
        client = Client(hub.url, tmp_path / "home")  # huggingface_hub reads its URL when imported
        try:
            printed = client.run(
                f"{script}\nrunpy.run_path(argv[0], run_name='__main__')",
                argv=[EXAMPLES / "publish.py", *names],
            )
        finally:
            client.close()
        assert "loaded by its id" in printed
        assert "results/report.json" in hub.files("org/example")
        assert b"Speed was measured" in hub.files("org/example")["README.md"]


@pytest.mark.slow
def test_drafters_of_a_thinking_target_are_compared_by_their_rows(tmp_path, monkeypatch, capsys):
    data = ["--target", shared_file("targets/coral-bench"), "--output", tmp_path]
    data += ["--dialogues", shared_file("train/sgd/sgd_train.jsonl.gz")]
    short = ["--taught", 8, "--taught-steps", 1, "--answered", 2, "--steps", 1, "--prompts", 2]
    for _ in range(2):  # the second run finds all of it done
        run(monkeypatch, "exact_rows.py", *data, *short)
        found = capsys.readouterr().out.splitlines()
        kinds = [line.split(":")[0] for line in found if "of them trained" in line]
        assert kinds == ["whole", "exact", "shared"]
        rows = (tmp_path / "results.jsonl").read_text().splitlines()
        assert len(rows) == 3 * 2 * 2
    assert found[-1].startswith(("| shared less whole", "2 prompts, none"))


@pytest.mark.slow
def test_a_drafter_of_own_answers_is_trained_and_its_rounds_are_timed(
    folder, tmp_path, monkeypatch, capsys
):
    talk = (folder / "talk.jsonl").read_text().splitlines()[0]
    (tmp_path / "talks.jsonl").write_text(f"{talk}\n" * 202)
    start = "Once upon a time there was a small {} who lived in a house."
    for name, heroes in (("stories", ("cat", "dog")), ("held-out", ("dog", "hen", "fox"))):
        text = "<|endoftext|>".join(start.format(hero) for hero in heroes)
        (tmp_path / f"{name}.txt").write_text(text)
    data = ["--dialogues", tmp_path / "talks.jsonl", "--stories", tmp_path / "stories.txt"]
    data += ["--held-out-stories", tmp_path / "held-out.txt", "--every", 1]
    shutil.copytree(folder / "target", tmp_path / "target")
    config = tmp_path / "target" / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": 1024}
    config.write_text(json.dumps(longer))
    names = ["--target", tmp_path / "target"]
    made = tmp_path / "mixed"
    short = ["--max_steps", 1, "--router-steps", 1, "--output", made]
    run(monkeypatch, "train_mixed.py", *names, *data, *short)
    prompts = [path.read_text() for path in (made / "stories.jsonl", made / "dialogues.jsonl")]
    assert "hen" in prompts[0] and "dog" not in prompts[0] and prompts[1].count("Hi.") == 1
    assert CoralDrafter.from_pretrained(made).config.is_router_trained
    rows = tmp_path / "rows.jsonl"
    (made / "dialogues.jsonl").write_text(prompts[1] * 9)
    names += ["--drafter", made, "--prompts", made / "dialogues.jsonl", "--rows", rows]
    names += ["--work", tmp_path / "work", "--num-prompts", 1, "--backend", "eager"]
    names += ["--max-new-tokens", 18]
    names += ["--task", "dialogues", "--layers", 2, "--batch-size", 1, "--temperature", 0.0]
    names += ["--way", "growing", "compiled"]
    for seconds, expected in ((0, 0), (600, 2), (600, 2)):  # begun, finished, nothing left to do
        run(monkeypatch, "round_speed.py", *names, "--seconds", seconds)
        table = capsys.readouterr().out
        assert ("Time is up" in table) == (seconds == 0)
        found = [json.loads(line) for line in rows.read_text().splitlines()] if expected else []
        assert [row["way"] for row in found] == ["growing", "compiled"][:expected]
    for row in found:
        assert row["num_tokens"] >= 16 and row["tau"] >= 1
        for name in ("eager", "compiled"):
            speed = row["tokens_per_second"]
            assert row["speedup"][name] == pytest.approx(speed["drafted"] / speed[name])
            assert row["efficiency"][name] == pytest.approx(row["speedup"][name] / row["tau"])


def test_prompts_go_to_sets_by_their_plain_answers():
    speed = runpy.run_path(str(EXAMPLES / "round_speed.py"))
    story, turn = Prompt("stories", "0"), Prompt("dialogues", "0")
    fresh, thrice, more = [*range(40)], [1, 2, 3, 4] * 3, [1, 2, 3, 4] * 4
    tasks = [speed["task_of"](story, answer) for answer in (fresh, thrice, more)]
    assert tasks == ["stories", "stories", "repetitive stories"]
    tasks = [speed["task_of"](turn, answer) for answer in (fresh[:15], fresh[:16], more)]
    assert tasks == [None, "dialogues", "dialogues"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "coral_in_ten_minutes.ipynb").read_text())["cells"]
    names = {"TINY": TINY}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]).replace("compile=False", "**TINY"), names)
    shown = capsys.readouterr().out
    assert shown.count("tokens a pass") == 3 and "Lossless: " in shown
    assert names["trainer"].state.global_step == 20
