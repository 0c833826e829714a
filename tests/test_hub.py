"""Publishing and loading by id, against a Hub on this machine that keeps what it is sent."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_target
from loopback_hub import Client, Fault
from test_examples import folder  # noqa: F401  a saved target with its tokenizer

from coral_hf import CoralConfig, CoralDrafter

MAKE = """
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
import coral_hf
target = AutoModelForCausalLM.from_pretrained("org/target")
drafter = coral_hf.CoralDrafter.from_target(target).eval()
"""
IS_LOADED = """
import torch
from transformers import AutoModel
import coral_hf
one = coral_hf.CoralDrafter.from_pretrained(folder)
other = AutoModel.from_pretrained(repo)
for a, b in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
    assert a[0] == b[0] and torch.equal(a[1], b[1])
"""


@pytest.fixture(autouse=True)
def _as_ever(request):
    """Each test begins with a Hub that does its work."""
    if "hub" in request.fixturenames:
        hub = request.getfixturevalue("hub")
        hub.faults, hub.part_size, hub.requests = [], None, []


@pytest.fixture
def drafter(folder, tmp_path):  # noqa: F811
    """A folder with a drafter of the published target, and its tokenizer."""
    save_drafter(tmp_path / "drafter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "target" / name, tmp_path / "drafter" / name)
    return tmp_path / "drafter"


def save_drafter(to: Path) -> None:
    """Save a drafter of the published target."""
    target = tiny_target("llama", torch.float32, vocab_size=256)
    CoralDrafter.from_target(target, target_name_or_path="org/target").save_pretrained(to)


PUBLISH = """
from coral_hf.hub import CardFacts, publish
facts = CardFacts(repo, **facts)
print(publish(folder, repo, facts=facts, **options).oid)
"""


def publish(client, folder, repo, facts=None, **options):  # noqa: F811
    return client.run(PUBLISH, folder=folder, repo=repo, facts=facts or {}, options=options).strip()


def card_of(hub, repo) -> str:
    return hub.files(repo)["README.md"].decode()


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def snippet_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


# ---- publishing


def test_a_pushed_drafter_is_loaded_by_its_id_and_its_card_is_filled_in(hub, client, stranger):
    client.run(MAKE + "drafter.push_to_hub('org/pushed')")
    files = hub.files("org/pushed")
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert hub.asked("POST .*/commit/") == 1
    assert expected <= set(files)
    card = card_of(hub, "org/pushed")
    assert metadata_of(card) == {
        "base_model": "org/target",
        "base_model_relation": "adapter",
        "library_name": "coral_hf",
        "pipeline_tag": "text-generation",
        "tags": ["coral", "speculative-decoding", "drafter"],
    }
    assert "[More Information Needed]" not in card
    assert "Not measured" in card and "Not recorded" in card
    stranger.run(snippet_of(card))


OTHERS = {
    "Eagle3": (
        "eagle-3",
        "| draft head | its own, over 256 tokens |",
        "| hidden states of the target that it reads | 0, 1, 2 |",
        "[EAGLE-3 (NeurIPS 2025)]",
    ),
    "Medusa": ("medusa", "| heads | 5, each with an LM head of its own |", "[Medusa (ICML 2024)]"),
}


@pytest.mark.parametrize("family", ["Eagle3", pytest.param("Medusa", marks=pytest.mark.slow)])
def test_a_drafter_of_another_family_is_pushed_and_published_as_any_other(
    hub, client, stranger, tmp_path, family
):
    tag, *facts = OTHERS[family]
    make = (
        MAKE.replace("CoralDrafter", f"{family}Drafter")
        + f"drafter.save_pretrained({str(tmp_path)!r})"
    )
    client.run(f"{make}\ndrafter.push_to_hub('org/{tag}')")
    publish(client, tmp_path, f"org/{tag}-folder")
    for repo in (f"org/{tag}", f"org/{tag}-folder"):
        card = card_of(hub, repo)
        assert metadata_of(card)["tags"] == [tag, "speculative-decoding", "drafter"]
        assert all(fact in card for fact in facts) and "CORAL" not in card
        code = f"import {family}Config, {family}Drafter".encode()
        assert code in hub.files(repo)["modeling_coral.py"]
        stranger.run(snippet_of(card))
        loads = IS_LOADED.replace("CoralDrafter", f"{family}Drafter")
        stranger.run(loads, folder=tmp_path, repo=repo)


def test_a_folder_is_published_whole_in_one_commit_with_large_files_in_parts(
    hub, client, stranger, drafter
):
    hub.part_size = 10_000
    (drafter / "optimizer.pt").write_bytes(b"state")
    (drafter / "checkpoint-2").mkdir()
    (drafter / "checkpoint-2" / "config.json").write_text("{}")
    publish(client, drafter, "org/parts", {"license": "apache-2.0", "language": "en"})
    assert hub.asked("^PUT /large/") > 2 and hub.asked("^POST /complete/") == 1
    assert hub.asked("POST .*/commit/") == 1
    assert set(hub.files("org/parts")) == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_coral.py"),
    }
    data = metadata_of(card_of(hub, "org/parts"))
    assert (data["license"], data["language"]) == ("apache-2.0", "en")
    stranger.run(IS_LOADED, folder=drafter, repo="org/parts")
    stranger.run(snippet_of(card_of(hub, "org/parts")))
    assert "apply_chat_template" in card_of(hub, "org/parts")


def test_large_files_that_have_arrived_are_not_sent_twice(hub, client, drafter):
    hub.faults = [Fault("POST .*/commit/", 500)]
    with pytest.raises(RuntimeError, match="500"):
        publish(client, drafter, "org/again")
    assert "README.md" not in hub.files("org/again")
    publish(client, drafter, "org/again")
    assert hub.asked("^PUT /large/") == 1
    assert "model.safetensors" in hub.files("org/again")


@pytest.mark.slow
def test_a_stranger_loads_shards_and_a_revision_and_works_offline(
    hub, client, stranger, drafter, tmp_path
):
    first = publish(client, drafter, "org/sharded")
    loaded = CoralDrafter.from_pretrained(drafter)
    torch.nn.init.zeros_(loaded.fc.weight)
    loaded.save_pretrained(drafter, max_shard_size="20KB")
    with pytest.raises(RuntimeError, match="holds two checkpoints"):
        publish(client, drafter, "org/sharded")
    (drafter / "model.safetensors").unlink()
    second = publish(client, drafter, "org/sharded")
    publish(client, drafter, "org/sharded", revision="trial")
    names = hub.files("org/sharded")
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    load = """
from transformers import AutoModel
import coral_hf
for revision in revisions:
    model = AutoModel.from_pretrained("org/sharded", revision=revision)
    print(float(model.fc.weight.abs().sum()))
"""
    sums = stranger.run(load, revisions=[first, second, None, "trial"]).split()
    assert float(sums[0]) > 0 and [float(value) for value in sums[1:]] == [0, 0, 0]
    hub.requests = []
    stranger.run(load, revisions=[first, second])
    assert hub.asked("GET .*(resolve|large)") == 0  # all is in the cache
    home = stranger.log.parent
    offline = Client("http://127.0.0.1:9", home / "offline", HF_HUB_OFFLINE="1",
                     HF_HUB_CACHE=str(home / "hub"))  # fmt: skip
    try:
        assert offline.run(load, revisions=[first, None, "trial"]).split() == [
            sums[0],
            "0.0",
            "0.0",
        ]
        with pytest.raises(RuntimeError, match="couldn't connect"):
            offline.run(
                "from transformers import AutoModel; AutoModel.from_pretrained('org/never')"
            )
    finally:
        offline.close()


def test_an_interrupted_download_resumes_where_it_stopped(hub, client, stranger, tmp_path):
    # the client writes ten megabytes at a time, and goes on from what it has written
    sizes = {"hidden_size": 800, "intermediate_size": 800, "num_attention_heads": 8}
    drafter = tmp_path / "drafter"
    CoralDrafter(CoralConfig(**sizes)).save_pretrained(drafter)
    publish(client, drafter, "org/broken")
    hub.requests = []
    hub.faults = [Fault("GET /large/")]  # breaks off halfway
    stranger.run(IS_LOADED, folder=drafter, repo="org/broken")
    assert hub.asked(r"GET /large/\w+$") == 1
    assert hub.asked(r"GET /large/\w+ bytes=[1-9]\d*-") == 1


def test_only_its_owner_sees_a_private_drafter(hub, client, stranger, drafter):
    publish(client, drafter, "org/private", private=True)
    client.run(IS_LOADED, folder=drafter, repo="org/private")
    with pytest.raises(RuntimeError, match="(?s)private.*hf auth login"):
        stranger.run(IS_LOADED, folder=drafter, repo="org/private")
    with pytest.raises(RuntimeError, match="is public, and `private` only makes new"):
        publish(client, drafter, "org/target2") and publish(
            client, drafter, "org/target2", private=True
        )


BY_ID = (
    MAKE
    + """
import torch
given = {"do_sample": False, "max_new_tokens": 6}
ids = torch.tensor([[70, 71, 72]])
plain = target.generate(ids, **given)
assert torch.equal(plain, target.generate(ids, assistant_model="org/by-id", **given))
"""
)


def test_generate_takes_a_drafter_by_its_id(hub, client, drafter):
    publish(client, drafter, "org/by-id")
    client.run(BY_ID)
    assert hub.asked("org/by-id.*model.safetensors")


WITHOUT_IMPORT = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "coral_hf":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

from transformers import AutoModel, AutoModelForCausalLM

sys.meta_path.insert(0, NotInstalled())
try:
    AutoModel.from_pretrained("org/code", trust_remote_code=True)
except ImportError as error:
    print(error)
del sys.meta_path[0]
drafter = AutoModel.from_pretrained("org/code", trust_remote_code=True)
print(type(drafter).__module__)
assistant = AutoModelForCausalLM.from_pretrained("org/code", trust_remote_code=True)
assert type(assistant) is type(drafter)
drafter.save_pretrained(saved)
"""


def test_published_code_loads_a_drafter_without_an_import_or_says_what_to_install(hub, stranger):
    files = hub.files("org/code")
    assert [name for name in files if name.endswith(".py")] == ["modeling_coral.py"]
    assert b"from coral_hf import CoralConfig, CoralDrafter" in files["modeling_coral.py"]
    missing, found = stranger.first.strip().splitlines()
    assert "Run `pip install coral_hf`" in missing
    assert found == "coral_hf.drafters.coral"
    saved = [path.name for path in (stranger.log.parent / "saved").iterdir()]
    assert "model.safetensors" in saved and not any(name.endswith(".py") for name in saved)


# ---- the command, and cards that people write


@pytest.mark.slow
def test_the_command_publishes_a_folder_with_its_report(
    hub,
    client,
    stranger,
    drafter,
    folder,  # noqa: F811
):
    command = """
from coral_hf.cli import run
name, *words = map(str, arguments)
run(name, words)
"""
    source = drafter.parent / "source"
    client.run("""
from huggingface_hub import snapshot_download
snapshot_download("org/target", local_dir=source)
""", source=source)  # fmt: skip
    measure = ["benchmark", "--target", source, "--drafter", drafter, "--max-new-tokens", 6]
    measure += [
        "--prompts",
        folder / "talk.jsonl",
        "--limit",
        "1",
        "--output",
        drafter.parent / "r",
    ]
    client.run(command, arguments=measure)
    config = json.loads((drafter / "config.json").read_text())
    config["target_name_or_path"] = str(source)
    (drafter / "config.json").write_text(json.dumps(config))
    go = ["publish", drafter, "--repo", "org/command", "--base-model", "org/target"]
    go += ["--report", drafter.parent / "r" / "report.json", "--license", "mit"]
    printed = client.run(command, arguments=[*go, "--dataset", "org/talk", "--language", "en"])
    assert f"Published: {hub.url}/org/command/commit/" in printed
    card = card_of(hub, "org/command")
    report = json.loads(hub.files("org/command")["results/report.json"])
    [overall] = [row for row in report["rows"] if row["method"] == "coral"][-1:]
    assert f"| overall | 1 | {overall['tau_per_token']:.2f} |" in card
    assert metadata_of(card)["base_model"] == "org/target"
    assert metadata_of(card)["datasets"] == ["org/talk"]
    published = json.loads(hub.files("org/command")["config.json"])
    assert published["target_name_or_path"] == "org/target"
    stranger.run(snippet_of(card))


def test_a_card_written_by_hand_on_the_hub_is_kept(hub, client, drafter):
    publish(client, drafter, "org/edited")
    by_hand = "---\nlicense: mit\n---\n# By hand\n"
    hub.repos["org/edited"].commit("main", {"README.md": by_hand.encode()})
    (drafter / "README.md").unlink()
    publish(client, drafter, "org/edited")
    assert card_of(hub, "org/edited") == by_hand
    client.run(MAKE + "drafter.push_to_hub('org/edited')")
    assert card_of(hub, "org/edited") == by_hand
