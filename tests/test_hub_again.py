"""Publishing where something is already: other models, cards that were edited, earlier weights."""

import json

import pytest
import torch
import yaml
from loopback_hub import Fault
from test_hub import (  # noqa: F401  fixtures
    MAKE,
    _as_ever,
    card_of,
    drafter,
    folder,
    metadata_of,
    publish,
)
from transformers import AutoTokenizer

from coral_hf import CoralDrafter
from coral_hf.identity import tokenizer_hash

OURS = {"auto_mapping": {"base_model_class": "CoralDrafter", "parent_library": "coral_hf.x"}}
NAMES_TARGET = {"base_model": "org/target"}


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        (
            "lora",
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w"},
            "adapter_model",
        ),
        ("diffusers", {"unet/weights.safetensors": b"w"}, "unet/weights.safetensors"),
        ("gguf", {"model-q4.gguf": b"w"}, "model-q4.gguf"),
    ],
)
def test_weights_of_any_other_kind_are_left_alone(
    hub,
    client,
    drafter,  # noqa: F811
    name,
    files,
    said,
):
    hub.put_files(f"org/foreign-{name}", files)
    with pytest.raises(RuntimeError, match=f"org/foreign-{name} holds another model's .*{said}"):
        publish(client, drafter, f"org/foreign-{name}")
    assert hub.files(f"org/foreign-{name}") == files


def test_a_tokenizer_or_an_adapter_of_a_drafter_may_be_there(hub, client, drafter):  # noqa: F811
    hub.put_files("org/tokenizer-first", {"tokenizer.json": b"{}", ".gitattributes": b""})
    publish(client, drafter, "org/tokenizer-first")
    adapter = {"adapter_config.json": json.dumps(OURS).encode(), "adapter_model.safetensors": b"w"}
    hub.put_files("org/adapted", adapter)
    publish(client, drafter, "org/adapted")
    assert not [name for name in hub.files("org/adapted") if name.startswith("adapter")]


@pytest.mark.slow  # the client tries for half a minute
def test_a_card_that_cannot_be_read_is_not_replaced(hub, client, drafter):  # noqa: F811
    hub.put_files("org/hand", {"README.md": b"# By hand\n"})
    hub.faults = [Fault("HEAD .*README.md", 500, times=9)]
    with pytest.raises(RuntimeError, match="(?s)HfHubHTTPError.*500"):
        publish(client, drafter, "org/hand")
    assert hub.files("org/hand") == {"README.md": b"# By hand\n"}


def test_each_branch_keeps_its_own_card(hub, client, drafter):  # noqa: F811
    hub.put_files("org/branches", {"README.md": b"# Main\n"})
    hub.repos["org/branches"].branches["dev"] = hub.repos["org/branches"].branches["main"]
    hub.repos["org/branches"].commit("dev", {"README.md": b"# Dev\n"})
    publish(client, drafter, "org/branches", revision="dev")
    assert hub.files("org/branches", "dev")["README.md"] == b"# Dev\n"
    (drafter / "README.md").unlink()
    publish(client, drafter, "org/branches", revision="new")
    assert hub.files("org/branches", "new")["README.md"] == b"# Main\n"


def test_a_generated_card_keeps_its_metadata_and_an_edited_one_is_kept(
    hub,
    client,
    drafter,  # noqa: F811
):
    publish(client, drafter, "org/kept", {"license": "apache-2.0", "language": "en"})
    text = card_of(hub, "org/kept")
    asked = text.replace("license: apache-2.0", "license: apache-2.0\nextra_gated_prompt: Please")
    hub.repos["org/kept"].commit("main", {"README.md": asked.encode()})
    (drafter / "README.md").unlink()  # published from another machine
    publish(client, drafter, "org/kept", {"license": "mit"})
    found = metadata_of(card_of(hub, "org/kept"))
    assert (found["license"], found["language"]) == ("mit", "en")
    assert found["extra_gated_prompt"] == "Please"
    ours = card_of(hub, "org/kept")
    for edited in (
        ours.replace("## Limits", "## Thanks\n\nTo all.\n\n## Limits"),
        f"{ours}Thanks.\n",
    ):
        hub.repos["org/kept"].commit("main", {"README.md": edited.encode()})
        (drafter / "README.md").unlink()
        publish(client, drafter, "org/kept")
        assert card_of(hub, "org/kept") == edited


def test_shards_that_are_pushed_after_a_single_file_are_what_is_loaded(
    hub,
    client,
    stranger,
):
    client.run(MAKE + "drafter.push_to_hub('org/pushed-twice')")
    client.run(
        MAKE
        + "import torch; torch.nn.init.zeros_(drafter.fc.weight);"
        + "drafter.push_to_hub('org/pushed-twice', max_shard_size='20KB')"
    )
    assert "model.safetensors" not in hub.files("org/pushed-twice")
    load = "from transformers import AutoModel; import coral_hf;"
    load += "print(float(AutoModel.from_pretrained('org/pushed-twice').fc.weight.abs().sum()))"
    assert stranger.run(load).strip() == "0.0"


def test_a_variant_stands_beside_the_weights_and_neither_deletes_the_other(hub, client, tmp_path):
    client.run(
        MAKE
        + "drafter.push_to_hub('org/variant');"
        + "drafter.half().save_pretrained(folder, variant='fp16', push_to_hub=True,"
        + " repo_id='org/variant'); drafter.float().push_to_hub('org/variant')",
        folder=tmp_path,
    )
    assert {"model.safetensors", "model.fp16.safetensors"} <= set(hub.files("org/variant"))


def test_a_repository_named_without_its_owner_is_protected_too(hub, client):  # noqa: F811
    hub.put_files("org/my-own", {"model.gguf": b"w"})
    with pytest.raises(RuntimeError, match="org/my-own holds another model's model.gguf"):
        client.run(MAKE + "drafter.push_to_hub('my-own')")


def test_a_local_target_is_named_by_its_hub_id_or_not_at_all(hub, client, drafter):  # noqa: F811
    config = json.loads((drafter / "config.json").read_text())
    config["target_name_or_path"] = str(drafter.parent)
    (drafter / "config.json").write_text(json.dumps(config))
    publish(client, drafter, "org/named", NAMES_TARGET)
    assert json.loads(hub.files("org/named")["config.json"])["target_name_or_path"] == "org/target"
    (drafter / "config.json").write_text(json.dumps(config))
    publish(client, drafter, "org/unnamed")
    assert json.loads(hub.files("org/unnamed")["config.json"])["target_name_or_path"] is None


def test_a_push_knows_the_targets_commit_and_its_tokenizer(hub, client, drafter):  # noqa: F811
    client.run(MAKE + "drafter.save_pretrained(folder)", folder=str(drafter))
    publish(client, drafter, "org/known")
    card, commit = card_of(hub, "org/known"), hub.repos["org/target"].branches["main"]
    assert f"| its revision | `{commit}` |" in card
    assert "| its tokenizer (SHA-256 of token → id) | `" in card
    assert "apply_chat_template" in card
    assert json.loads(hub.files("org/known")["config.json"])["tokenizer_hash"] in card


def test_a_push_takes_the_keywords_of_transformers(hub, client):  # noqa: F811
    client.run(MAKE + "drafter.push_to_hub('org/tagged', tags='tiny', commit_message='First')")
    assert metadata_of(card_of(hub, "org/tagged"))["tags"][-1] == "tiny"


def test_the_tokenizer_of_a_folder_is_the_drafters_own(hub, client, drafter, folder):  # noqa: F811
    publish(client, drafter, "org/hashed")
    own = tokenizer_hash(AutoTokenizer.from_pretrained(folder / "target"))
    assert json.loads(hub.files("org/hashed")["config.json"])["tokenizer_hash"] == own
    config = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps(config | {"tokenizer_hash": "another"}))
    with pytest.raises(RuntimeError, match="Pass the target's own tokenizer"):
        publish(client, drafter, "org/hashed")
    (drafter / "tokenizer.json").write_text("{")
    with pytest.raises(RuntimeError, match="Error: "):
        publish(client, drafter, "org/hashed")


def test_weights_that_are_not_finite_are_not_published(hub, client, drafter):  # noqa: F811
    broken = CoralDrafter.from_pretrained(drafter)
    with torch.no_grad():
        broken.fc.weight[0, 0] = float("nan")
    broken.save_pretrained(drafter)
    with pytest.raises(RuntimeError, match="not all finite .fc.weight."):
        publish(client, drafter, "org/nan")
    assert "org/nan" not in hub.repos


def test_a_card_without_a_target_names_what_to_fill_in(hub, client, drafter):  # noqa: F811
    config = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps(config | {"target_name_or_path": None}))
    publish(client, drafter, "org/nameless")
    assert "# the id or folder of the target, which this drafter does not know" in card_of(
        hub, "org/nameless"
    )
    assert "base_model" not in yaml.safe_load(card_of(hub, "org/nameless").split("---\n")[1])
