"""Arithmetic of the benchmark on literal calls, its report, and one complete run."""

import json
import subprocess
import sys

import pytest
import torch
from bigram import BigramDrafter, BigramDrafting
from conftest import tiny_target
from rich.console import Console
from rich.markdown import Markdown
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import coral_hf
from coral_hf.decoding import TreeShape
from coral_hf.measure import (
    BenchmarkSettings,
    Call,
    Prompt,
    Report,
    call_generate,
    left_padded,
    pad_target,
    run_benchmark,
)
from coral_hf.measure.benchmark import (
    Mismatch,
    benchmark_report,
    first_difference,
    top2_logits,
)
from coral_hf.measure.report import describe_environment
from coral_hf.measure.summary import accepted_depths, summarise_tasks, tau_per_item, tau_per_token
from coral_hf.target import read_target

VOCAB = 40
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    fast = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="w0")


@pytest.fixture(scope="module")
def report(target, tokenizer) -> Report:
    prompts = [
        Prompt("story", "a", text="w1 w2 w3 w1 w2"),
        Prompt("chat", "b", ({"role": "user", "content": "w4 w5"},), turns=("w6", "w7")),
        Prompt("chat", "long", text="w1 " * 60),
    ]
    settings = BenchmarkSettings(
        methods=["plain", "coral", "prompt_lookup", "assisted"],
        max_new_tokens=12,
        repeats=2,
        max_turns=2,
        tree_depth=3,
        tree_top_k=2,
        tree_nodes=6,
    )
    drafter = coral_hf.CoralDrafter.from_target(target)
    padded = pad_target(target, 4)
    return run_benchmark(padded, drafter, tokenizer, prompts, settings, target)


def literal_call(item: int, method: str, seconds: float, lengths: list[int], **other) -> Call:
    stages = {"prefill": 0.5, "draft": 0.2, "verify": 0.3, "other": 0.1}
    fields = {
        "tokens": [[7] * (1 + sum(lengths))],
        "num_rounds": len(lengths),
        "task": "chat",
        "stage_seconds": {"prefill": 1.0} if method == "plain" else stages,
        "num_equal_rows": 1,
    }
    return Call(
        item=item, method=method, seconds=seconds, round_lengths=lengths, **(fields | other)
    )


# the calls of summary.py's drawing, and a second item
CALLS = [
    literal_call(0, "plain", 7.0, [1] * 6),
    literal_call(0, "coral", 3.5, [3, 1, 2]),
    literal_call(1, "plain", 5.0, [1] * 4, task="story"),
    literal_call(1, "coral", 1.25, [4], task="story", num_equal_rows=0),
]


def test_tau_weighs_tokens_or_items():
    calls = [literal_call(0, "coral", 1.0, lengths) for lengths in ([3, 1, 2], [4], [])]
    assert tau_per_token(calls) == 10 / 4
    assert tau_per_item(calls) == (2 + 4) / 2
    assert tau_per_token(calls[2:]) is None


def test_rows_hold_medians_ratios_and_shares():
    overall = summarise_tasks(CALLS)[-1]
    assert (overall.task, overall.method, overall.num_items) == ("overall", "coral", 2)
    assert overall.speedup == 3.0  # the median of 2 and 4
    # (6 / 6) / (3 / 6) and (4 / 4) / (0.75 / 4), the prompt's pass and token left out
    assert overall.decoding_speedup == pytest.approx((2 + 16 / 3) / 2)
    assert overall.tau_per_token == 2.5
    assert overall.speedup_per_tau == 3.0 / 2.5
    assert overall.tokens_per_second == 12 / 4.75
    assert overall.exact_match == 0.5
    expected = {"prefill": 500, "draft": 100, "verify": 150, "other": 50}  # 2 calls, 4 rounds
    assert overall.stage_milliseconds == pytest.approx(expected)


def test_every_task_has_a_row_for_every_method():
    rows = [(row.task, row.method) for row in summarise_tasks(CALLS)]
    assert rows == [(t, m) for t in ("chat", "story", "overall") for m in ("plain", "coral")]


def test_repeats_of_an_item_count_once_in_the_speedup():
    repeats = [literal_call(0, "coral", seconds, [3, 1, 2], repeat=1) for seconds in (3.5, 70.0)]
    assert summarise_tasks(CALLS[:2] + repeats)[-1].speedup == 2.0


def test_acceptance_by_depth_is_a_share_of_all_rounds_and_of_those_that_reach_it():
    depths = [
        (entry.depth, entry.share, entry.share_given_parent) for entry in accepted_depths(CALLS)
    ]
    assert depths == [(1, 3 / 4, 3 / 4), (2, 2 / 4, 2 / 3), (3, 1 / 4, 1 / 2)]


def test_the_first_difference_counts_missing_tokens():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def test_the_gap_is_between_the_logits_after_the_shared_tokens(target):
    ids = torch.tensor([[1, 2]])
    logits = target(torch.tensor([[1, 2, 3]])).logits[0, -1].sort(descending=True).values
    assert top2_logits(target, ids, [3]) == pytest.approx(logits[:2].tolist(), abs=1e-5)
    assert top2_logits(target, torch.tensor([[1, 2, 3]]), []) == top2_logits(target, ids, [3])


def test_rounds_of_transformers_own_methods_are_its_target_passes(target):
    passes = []
    handle = target.register_forward_pre_hook(lambda *_: passes.append(1))
    ids = torch.tensor([[1, 2, 3, 1, 2, 3]])
    call = call_generate(target, left_padded(ids, 0), GREEDY | {"prompt_lookup_num_tokens": 3})
    handle.remove()
    assert len(call.round_lengths) == call.num_rounds == len(passes) - 1
    assert sum(call.round_lengths) < call.num_tokens == 16


def test_bigrams_are_counted_with_distinct_successors_best_first():
    drafter = BigramDrafter.from_texts([torch.tensor([0, 1, 0, 2, 0, 1]), torch.tensor([3])], 4, 2)
    assert drafter.successors.tolist() == [[1, 2], [0, 1], [0, 1], [0, 1]]  # 0 and 1 fill up
    assert drafter.log_probs[0].exp().tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-3)


def test_a_bigram_table_is_saved_and_loaded(tmp_path):
    drafter = BigramDrafter.from_texts([torch.tensor([0, 1, 0, 2, 0, 1])], 4, 2)
    drafter.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert loaded.device == drafter.device and loaded.dtype == drafter.dtype == torch.float32
    for name, table in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], table)


def test_a_bigram_tree_follows_the_most_probable_pairs():
    drafting = BigramDrafting(
        BigramDrafter.from_texts([torch.tensor([0, 1, 0, 2, 0, 1])], 4, 2),
        read_target(tiny_target("llama", vocab_size=4)),
    )
    features, positions = torch.zeros(1, 2, 8), torch.tensor([[0, 1]])
    drafting.begin(torch.tensor([[2, 3, 0]]), features, positions)
    tree = drafting.propose(torch.tensor([0]), TreeShape(depth=2, top_k=2, nodes=4))
    assert tree.tokens.tolist() == [[0, 1, 2, 0]]
    assert tree.parents.tolist() == [[0, 0, 0, 1]]


def test_all_methods_run_on_all_turns_and_agree_with_the_target(report):
    overall = [row for row in report.numbers["rows"] if row.task == "overall"]
    assert [row.method for row in overall] == report.settings.methods
    assert {(row.num_items, row.exact_match) for row in overall} == {(3, 1.0)}
    assert report.numbers["mismatches"] == []
    assert overall[0].tau_per_token == overall[0].speedup == 1.0
    assert all(row.tau_per_token >= 1 for row in overall)
    assert set(overall[1].stage_milliseconds) == {"prefill", "draft", "verify", "other"}


def test_prompts_beyond_the_context_are_listed(report):
    assert report.numbers["skipped"] == ["chat/long"]
    assert "chat/long" in report.to_markdown()


def test_later_turns_are_asked_after_the_targets_own_answer(report):
    lengths = {call.turn: call.prompt_length for call in report.calls if call.task == "chat"}
    assert lengths == {0: 2, 1: 2 + 12 + 1}


def test_a_drafter_that_agrees_with_the_target_has_a_high_tau(target, tokenizer):
    ids = torch.tensor([[5]])
    tokens = target.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0]
    drafter = BigramDrafter.from_texts([tokens], VOCAB, top_k=8)
    settings = BenchmarkSettings(max_new_tokens=16, tree_depth=3)
    prompts = [Prompt("text", "0", text="w5")]
    report = run_benchmark(target, drafter, tokenizer, prompts, settings)
    assert report.numbers["rows"][-1].tau_per_token > 2
    assert report.numbers["acceptance"][0].share > 0.5


def test_sampled_tokens_are_not_compared(target, tokenizer):
    settings = BenchmarkSettings(
        methods=["plain", "prompt_lookup"], max_new_tokens=8, temperature=0.5
    )
    before = torch.random.get_rng_state()
    report = run_benchmark(target, None, tokenizer, [Prompt("text", "0", text="w5 w6")], settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (report.numbers["rows"][-1].exact_match, report.numbers["mismatches"]) == (None, [])


def test_json_holds_every_call_and_the_numbers_that_are_computed_from_them(report):
    found = json.loads(report.to_json())
    assert len(found["calls"]) == len(report.calls) == 3 * 4 * 2
    assert found["calls"][0]["num_tokens"] == 12 and "tokens" not in found["calls"][0]
    assert [(row["task"], row["method"]) for row in found["rows"]] == [
        (row.task, row.method) for row in report.numbers["rows"]
    ]
    assert found["settings"]["tree_depth"] == 3
    assert found["environment"]["num_padded_layers"] == 2


def test_markdown_lists_hardware_versions_dtype_seed_and_both_depths(report):
    text, environment = report.to_markdown(), report.environment
    assert environment.hardware in text
    assert f"torch {torch.__version__}" in text and f"coral_hf {coral_hf.__version__}" in text
    assert "| dtype | float32 |" in text and "| seed | 0 |" in text
    assert "| num_target_layers | 4 |" in text and "| num_padded_layers | 2 |" in text
    assert "| overall | coral | 3 |" in text


def test_markdown_lists_mismatches_with_their_gap(target):
    mismatch = Mismatch("chat", "7", 0, "coral", 12, 1.5e-7)
    environment = describe_environment(target)
    report = benchmark_report(BenchmarkSettings(), environment, CALLS, [mismatch])
    assert "| chat | 7 | 0 | coral | 12 | 1.5e-07 |" in report.to_markdown()


def test_a_report_writes_json_markdown_and_plots(report, tmp_path):
    report.write(tmp_path / "new" / "folder")
    files = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert set(files) == {"report.json", "report.md", "acceptance.png", "speedup.png"}
    assert all(files[name].startswith(b"\x89PNG") for name in ("acceptance.png", "speedup.png"))


def test_the_terminal_shows_a_row_for_each_task_and_method(report):
    console = Console(width=200, record=True)
    console.print(Markdown(report.tables[0].to_markdown()))
    lines = [line.split()[:2] for line in console.export_text().splitlines()]
    assert all([row.task, row.method] in lines for row in report.numbers["rows"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ["coral"]}, "`methods` is .'coral'."),
        ({"methods": ["plain", "medusa"]}, "`methods` is"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
    ],
)
def test_invalid_benchmark_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**fields)


def test_a_method_without_its_model_is_refused(target, tokenizer):
    with pytest.raises(ValueError, match="'assisted', but `assistant` is None"):
        settings = BenchmarkSettings(methods=["plain", "assisted"])
        run_benchmark(target, None, tokenizer, [Prompt("text", "0", text="w5")], settings)


def test_a_benchmark_without_a_fitting_prompt_is_refused(target, tokenizer):
    with pytest.raises(ValueError, match="none of the 1 `prompts` fits"):
        settings = BenchmarkSettings(methods=["plain"])
        run_benchmark(target, None, tokenizer, [Prompt("text", "0", text="w5")], settings)


@pytest.mark.slow
def test_importing_the_benchmark_imports_no_plotting_library():
    check = "import sys, coral_hf.measure; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
