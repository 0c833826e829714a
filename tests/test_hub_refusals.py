"""A Hub that refuses, fails or breaks off, while a drafter is published or loaded."""

import shutil

import pytest
from loopback_hub import TOKEN, Fault
from test_hub import (  # noqa: F401  fixtures
    IS_LOADED,
    MAKE,
    _as_ever,
    drafter,
    folder,
    publish,
)


def test_the_hubs_own_error_reaches_the_user(hub, client, drafter):  # noqa: F811
    hub.faults = [Fault("POST /api/repos/create", 403, message="read-only token")]
    with pytest.raises(RuntimeError, match="(?s)HfHubHTTPError.*read-only token"):
        publish(client, drafter, "org/refused")
    assert "org/refused" not in hub.repos
    hub.faults = [Fault("POST .*/commit/", 403, message="read-only token")]
    with pytest.raises(RuntimeError, match="(?s)HfHubHTTPError.*read-only token"):
        client.run(MAKE + "drafter.push_to_hub('org/refused')")


def test_an_upload_is_repeated_after_one_failure(hub, client, drafter):  # noqa: F811
    hub.faults = [Fault("POST .*/preupload/", 503), Fault("PUT /large/", 500)]
    publish(client, drafter, "org/retried")
    assert hub.asked("^POST .*/preupload/") == 2 and hub.asked("^PUT /large/") == 2
    assert "model.safetensors" in hub.files("org/retried")


def test_another_model_is_not_overwritten(hub, client, drafter):  # noqa: F811
    before = hub.files("org/target")
    with pytest.raises(RuntimeError, match="org/target holds a llama model"):
        publish(client, drafter, "org/target")
    with pytest.raises(RuntimeError, match="org/target holds a llama model"):
        client.run(MAKE + "drafter.push_to_hub('org/target')")
    assert hub.files("org/target") == before


def test_another_owners_name_is_refused_and_a_dataset_of_that_name_is_kept(
    hub,
    client,
    drafter,  # noqa: F811
):
    with pytest.raises(RuntimeError, match="(?s)HfHubHTTPError.*403"):
        publish(client, drafter, "elsewhere/drafter")
    client.run("from huggingface_hub import HfApi;"
               "HfApi().create_repo('org/both', repo_type='dataset')")  # fmt: skip
    publish(client, drafter, "org/both")
    assert hub.files("datasets/org/both") == {}
    with pytest.raises(RuntimeError, match="no/such/name"):
        publish(client, drafter, "no/such/name")


def test_loading_a_missing_drafter_is_a_helpful_error(hub, client, stranger, drafter):  # noqa: F811
    load = "from transformers import AutoModel; import coral_hf; AutoModel.from_pretrained(*a, **k)"
    with pytest.raises(RuntimeError, match="(?s)is not a valid model identifier.*hf auth login"):
        stranger.run(load, a=["org/not-there"], k={})
    publish(client, drafter, "org/there")
    with pytest.raises(RuntimeError, match="nowhere is not a valid git identifier"):
        stranger.run(load, a=["org/there"], k={"revision": "nowhere"})
    in_the_way = drafter.parent / "file"
    in_the_way.write_text("no folder")
    with pytest.raises(RuntimeError, match=f"(?s)Error.*{in_the_way}"):
        stranger.run(load, a=["org/there"], k={"cache_dir": str(in_the_way / "cache")})


def test_folders_that_hold_something_else_are_refused(hub, client, drafter, folder):  # noqa: F811
    root = drafter.parent
    (root / "empty").mkdir()
    (root / "file").write_text("")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    damaged, cut = (
        shutil.copytree(drafter, root / "damaged"),
        shutil.copytree(drafter, root / "cut"),
    )
    (damaged / "config.json").write_text("{")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refusals = {
        root / "absent": "absent holds no drafter",
        root / "file": "file holds no drafter",
        root / "empty": "empty holds no drafter",
        root / "adapter": "holds no drafter.*merge it into its drafter",
        damaged: "not a valid JSON file",
        cut: "weights of .* cannot be read",
        folder / "target": "holds a llama model, not a drafter",
    }
    for path, reason in refusals.items():
        with pytest.raises(RuntimeError, match=f"Error: .*{reason}"):
            publish(client, path, "org/no-drafter")
    assert "org/no-drafter" not in hub.repos


def test_the_token_is_neither_logged_nor_written(hub, client, drafter):  # noqa: F811
    publish(client, drafter, "org/secret")
    hub.faults = [Fault("POST .*/commit/", 500), Fault("POST .*/commit/", 401)]
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            publish(client, drafter, "org/secret")
        assert TOKEN not in str(error.value)
    client.run(MAKE + f"drafter.push_to_hub('org/secret2', token={TOKEN!r})")
    assert "http" in client.log.read_text()  # requests are logged
    home = client.log.parent
    written = [path for root in (home, drafter) for path in root.rglob("*") if path.is_file()]
    assert client.log in written and len(written) > 10
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    for repo in ("org/secret", "org/secret2"):
        assert not any(TOKEN.encode() in content for content in hub.files(repo).values())
