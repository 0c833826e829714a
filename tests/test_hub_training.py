"""`CoralTrainer` with `push_to_hub`: what goes to the Hub while and after training."""

import json
import re

import pytest
from loopback_hub import TOKEN, Fault
from test_hub import (  # noqa: F401  fixtures
    _as_ever,
    card_of,
    folder,
    metadata_of,
    snippet_of,
)

TRAIN = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments

tokenizer = AutoTokenizer.from_pretrained(name)
target = AutoModelForCausalLM.from_pretrained(name)
rows = load_dataset("json", data_files=f"{folder}/talk.jsonl", split="train")
# as `datasets` notes it for rows of the Hub
rows.info.download_checksums = {"hf://datasets/org/talk@abc/talk.jsonl": {"num_bytes": 1}}
args = CoralTrainingArguments(
    output_dir=output, hub_model_id=repo, push_to_hub=True, use_cpu=True, report_to="none",
    per_device_train_batch_size=2, dataloader_pin_memory=False,
    **{"max_steps": 2, "save_steps": 1, **settings},
)
if adapts:
    from peft import LoraConfig
    lora = LoraConfig(r=2, target_modules=["fc"])
trainer = CoralTrainer(
    model=CoralDrafter.from_target(target), target_model=target, args=args, train_dataset=rows,
    processing_class=tokenizer, peft_config=lora if adapts else None,
)
trainer.train(resume_from_checkpoint=resume)
if pushes:
    trainer.push_to_hub(license="mit", tags=["tiny"])
"""


def train(client, folder, output, repo, **settings):  # noqa: F811
    """Train two steps on a target of the Hub; keywords that are no settings steer the script."""
    steer = {"name": "org/target", "adapts": False, "resume": False, "pushes": False}
    steer |= {key: settings.pop(key) for key in steer if key in settings}
    client.run(TRAIN, folder=folder, output=output, repo=repo, settings=settings, **steer)


def test_a_trained_drafter_is_pushed_with_its_training_record_in_the_card(
    hub,
    client,
    stranger,
    folder,  # noqa: F811
    tmp_path,
):
    train(client, folder, tmp_path, "org/trained", hub_strategy="end", pushes=True)
    assert hub.asked("POST .*/commit/") == 1
    files = hub.files("org/trained")
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert expected <= set(files)
    assert not any("checkpoint" in name or name.startswith("_") for name in files)
    card = card_of(hub, "org/trained")
    data = metadata_of(card)
    assert (data["base_model"], data["datasets"]) == ("org/target", ["org/talk"])
    assert data["license"] == "mit" and "tiny" in data["tags"]
    [record] = json.loads(files["training_record.json"])
    # four conversations that are one and the same are a row
    assert (record["steps"], record["rows"], record["stage"]) == (2, 1, "drafter")
    assert record["seconds"] > 0 and record["trained_tokens"] > 0 and record["hardware"]
    for line in (
        "| recipe | `one_step_first`: `num_steps` 3",
        "| optimizer steps | 2 |",
        f"| trained tokens, each pass counted | {record['trained_tokens']:,} |",
        f"| hardware | {record['hardware']} |",
        "| held-out tokens per target pass | not recorded |",
        "Not measured. `coral-hf benchmark`",
    ):
        assert line in card
    assert re.search(r"tokenizer .* \| `[0-9a-f]{64}` \|", card)
    stranger.run(snippet_of(card))
    loaded = stranger.run(
        "import coral_hf, json; from transformers import AutoModel;"
        "print(json.dumps(AutoModel.from_pretrained('org/trained').training_record))"
    )
    assert json.loads(loaded) == [record]


def test_checkpoints_are_pushed_while_training_and_hold_no_token(
    hub,
    client,
    folder,  # noqa: F811
    tmp_path,
):
    settings = {"hub_strategy": "all_checkpoints", "hub_always_push": True, "hub_token": TOKEN}
    train(client, folder, tmp_path, "org/going", **settings)
    files = hub.files("org/going")
    assert {"README.md", "model.safetensors", "training_args.bin"} <= set(files)
    assert {"checkpoint-1/model.safetensors", "checkpoint-2/trainer_state.json"} <= set(files)
    assert not any("_incomplete" in name or "lock" in name for name in files)
    assert "| optimizer steps | 2 |" in card_of(hub, "org/going")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert not any(TOKEN.encode() in content for content in files.values())


def test_a_failed_push_is_logged_and_training_continues(hub, client, folder, tmp_path):  # noqa: F811
    # of large files huggingface_hub raises an error whose cause alone has the reason
    hub.faults = [Fault("PUT /large/", 403, times=2, message="read-only token")]
    train(client, folder, tmp_path, "org/failing", hub_strategy="every_save", save_steps=2)
    log = client.log.read_text()
    assert "A push to org/failing failed" in log and "read-only token" in log
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_a_run_that_may_not_push_stops_before_its_first_step(hub, client, folder, tmp_path):  # noqa: F811
    with pytest.raises(RuntimeError, match="holds a llama model"):
        train(client, folder, tmp_path, "org/target")
    hub.faults = [Fault("POST /api/repos/create", 401)]
    with pytest.raises(RuntimeError, match="(?s)HfHubHTTPError.*401"):
        train(client, folder, tmp_path, "org/locked")
    assert not (tmp_path / "checkpoint-1").exists()


def test_the_training_record_adds_up_over_a_resumed_run(hub, client, folder, tmp_path):  # noqa: F811
    # pushed by name at the end: in the background the last push may find the one before it going
    pushed = {"hub_strategy": "end", "pushes": True}
    train(client, folder, tmp_path / "whole", "org/whole", **pushed)
    train(client, folder, tmp_path / "parts", "org/parts2", **pushed, max_steps=1)
    first = json.loads(hub.files("org/parts2")["training_record.json"])[0]
    train(client, folder, tmp_path / "parts", "org/parts2", **pushed, resume=True)
    records = [
        json.loads(hub.files(repo)["training_record.json"]) for repo in ("org/whole", "org/parts2")
    ]
    assert [len(record) for record in records] == [1, 1]
    assert records[0][0]["trained_tokens"] == records[1][0]["trained_tokens"]
    assert records[1][0]["trained_tokens"] == 2 * first["trained_tokens"]
    assert records[1][0]["seconds"] >= first["seconds"]


def test_local_folders_are_not_named_in_the_card(hub, client, folder, tmp_path):  # noqa: F811
    where = str(folder / "target")
    train(client, folder, tmp_path, "org/local", hub_strategy="checkpoint", name=where)
    files = hub.files("org/local")
    assert "base_model" not in metadata_of(card_of(hub, "org/local"))
    assert "a local folder, `target`" in card_of(hub, "org/local")
    texts = [content for name, content in files.items() if name.endswith((".json", ".md"))]
    assert not any(str(folder.parent).encode() in content for content in texts)
    assert "last-checkpoint/config.json" in files


def test_a_card_written_by_hand_in_the_folder_is_kept(hub, client, folder, tmp_path):  # noqa: F811
    (tmp_path / "README.md").write_text("# Mine\n")
    train(client, folder, tmp_path, "org/mine", hub_strategy="end", pushes=True)
    assert card_of(hub, "org/mine") == "# Mine\n"
    assert "was written by hand and stays as it is" in client.log.read_text()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_drafter_has_pefts_card(hub, client, folder, tmp_path):  # noqa: F811
    train(client, folder, tmp_path, "org/lora", hub_strategy="end", pushes=True, adapts=True)
    assert "adapter_model.safetensors" in hub.files("org/lora")
    assert metadata_of(card_of(hub, "org/lora"))["library_name"] == "peft"


def test_the_training_command_publishes_drafter_and_router_together(
    hub,
    client,
    stranger,
    folder,  # noqa: F811
    tmp_path,
):
    command = """
from coral_hf.cli import run
name, *words = map(str, arguments)
run(name, words)
"""
    go = ["train", "--target", "org/target", "--dataset", folder / "talk.jsonl"]
    go += ["--output", tmp_path, "--router-epochs", 1, "--max_steps", 2, "--use_cpu", True]
    go += ["--push_to_hub", True]
    with pytest.raises(RuntimeError, match="--push-to-hub needs --hub-model-id"):
        client.run(command, arguments=go)
    client.run(command, arguments=[*go, "--hub_model_id", "org/command2"])
    config = json.loads(hub.files("org/command2")["config.json"])
    assert config["is_router_trained"]
    record = json.loads(hub.files("org/command2")["training_record.json"])
    assert [entry["stage"] for entry in record] == ["drafter", "router"]
    assert config["target_revision"] == hub.repos["org/target"].branches["main"]
    card = card_of(hub, "org/command2")
    assert f"| its revision | `{config['target_revision']}` |" in card
    assert "### Stage `router`" in card
    stranger.run(snippet_of(card))


def test_a_training_run_keeps_a_card_written_by_hand_on_the_hub(hub, client, folder, tmp_path):  # noqa: F811
    hub.put_files("org/by-hand", {"README.md": b"# By hand\n"})
    train(client, folder, tmp_path / "run", "org/by-hand", save_steps=2)
    assert hub.files("org/by-hand")["README.md"] == b"# By hand\n"
    assert "model.safetensors" in hub.files("org/by-hand")
