"""Versions, aliases and files, on a real MLflow store."""

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.registry import Registry, Version
from configs.errors import RegistryError

FILES = ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def aliases(registry: Registry) -> dict[str, tuple[str, ...]]:
    return {version.name: version.aliases for version in registry.versions()}


def test_the_first_version_carries_its_manifest_as_tags(registry, make_run):
    made = make_run(rank=8)
    version = registry.register(made.manifest, made.adapter)
    assert (version.name, version.run_id, version.aliases) == ("helpdesk:1", made.manifest.run_id, ())
    assert registry.versions() == [version]
    assert version.tags["base_fingerprint"] == made.manifest.base_fingerprint
    assert version.tags["rank"] == "8"
    assert json.loads(version.tags["target_modules"]) == ["q_proj"]
    assert json.loads(version.tags["scores"]) == {"loss": 0.25}
    assert set(asdict(made.manifest)) - set(version.tags) == {"system_prompt"}, "a prompt may be longer than a tag"


def test_a_version_is_found_by_its_run(registry, register):
    register("helpdesk")
    version = register("helpdesk")
    assert registry.of_run(version.run_id) == version
    assert registry.of_run("0" * 32) is None


def test_versions_count_up_for_each_chatbot(registry, register):
    made = [register("helpdesk"), register("other"), register("helpdesk")]
    assert [version.name for version in made] == ["helpdesk:1", "other:1", "helpdesk:2"]
    assert [version.name for version in registry.versions()] == ["helpdesk:1", "helpdesk:2", "other:1"]


def test_only_the_adapter_and_its_manifest_are_stored(registry, make_run, tmp_path):
    made = make_run(system_prompt="Be brief.")
    for name in ("optimizer.pt", "training_args.bin", "README.md"):
        (made.adapter / name).write_text("not part of an adapter")
    version = registry.register(made.manifest, made.adapter)
    folder = registry.download(version)
    assert files(folder) == FILES
    assert files(tmp_path / "artifacts") == [f"{version.run_id}/artifacts/adapter/{name}" for name in FILES]
    assert (folder / FILES[1]).read_bytes() == (made.adapter / FILES[1]).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(asdict(made.manifest)))
    assert manifest["system_prompt"] == "Be brief."


def test_registering_leaves_no_second_copy_at_home(register, home):
    register()
    assert files(home) == []


def test_an_adapter_without_weights_is_not_registered(registry, make_run, home):
    made = make_run()
    (made.adapter / FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=FILES[1]):
        registry.register(made.manifest, made.adapter)
    assert registry.versions() == []
    assert files(home) == []


def test_a_downloaded_version_is_kept(registry, register, home, tmp_path):
    version = register()
    folder = registry.download(version)
    assert folder == home / "adapters" / "helpdesk" / f"1-{version.run_id[:8]}"
    (tmp_path / "artifacts").rename(tmp_path / "gone")
    assert registry.download(version) == folder
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_download_that_fails_leaves_nothing(registry, register, home, tmp_path):
    version = register()
    (tmp_path / "artifacts").rename(tmp_path / "gone")
    with pytest.raises(RegistryError, match="adapter"):
        registry.download(version)
    assert files(home / "adapters") == []
    assert list((home / "adapters" / "helpdesk").iterdir()) == []
    (tmp_path / "gone").rename(tmp_path / "artifacts")
    assert files(registry.download(version)) == FILES


def test_two_registries_that_number_alike_do_not_share_files(registry, register):
    version = register()
    other = replace(version, run_id="f" * 32)
    registry.download(version)
    with pytest.raises(RegistryError, match="f" * 32):
        registry.download(other)


def test_promotion_moves_live_and_keeps_the_previous_one(registry, register):
    for _ in range(3):
        register()
    assert registry.promote("helpdesk:1").name == "helpdesk:1"
    assert aliases(registry) == {"helpdesk:1": ("live",), "helpdesk:2": (), "helpdesk:3": ()}
    registry.promote("helpdesk:3")
    assert aliases(registry) == {"helpdesk:1": ("previous",), "helpdesk:2": (), "helpdesk:3": ("live",)}
    registry.promote("helpdesk:3")
    assert aliases(registry)["helpdesk:1"] == ("previous",), "promoting the live one again forgets nothing"
    registry.promote("helpdesk:2")
    assert aliases(registry) == {"helpdesk:1": (), "helpdesk:2": ("live",), "helpdesk:3": ("previous",)}


def test_rollback_makes_the_previous_one_live_and_another_undoes_it(registry, register):
    register()
    register()
    registry.promote("helpdesk:1")
    with pytest.raises(RegistryError, match="helpdesk has no version to go back to"):
        registry.rollback("helpdesk")
    registry.promote("helpdesk:2")
    assert registry.rollback("helpdesk").name == "helpdesk:1"
    assert aliases(registry) == {"helpdesk:1": ("live",), "helpdesk:2": ("previous",)}
    assert registry.rollback("helpdesk").name == "helpdesk:2"


def test_a_candidate_stays_one_until_it_is_let_in(registry, register):
    for _ in range(3):
        register()
    registry.promote("helpdesk:1")
    assert registry.live("helpdesk").name == "helpdesk:1"
    assert registry.live("other") is None
    registry.nominate("helpdesk:2")
    registry.promote("helpdesk:1")
    assert aliases(registry)["helpdesk:2"] == ("candidate",)
    registry.nominate("helpdesk:3")
    assert aliases(registry) == {"helpdesk:1": ("live",), "helpdesk:2": (), "helpdesk:3": ("candidate",)}, "there is one at a time"
    registry.canary("helpdesk:3", 0.5)
    assert aliases(registry)["helpdesk:3"] == ("canary",)
    registry.nominate("helpdesk:2")
    registry.promote("helpdesk:2")
    assert aliases(registry) == {"helpdesk:1": ("previous",), "helpdesk:2": ("live",), "helpdesk:3": ()}
    registry.note(registry.find("helpdesk:2"), {"gate": "passed"})
    assert registry.find("helpdesk").tags["gate"] == "passed"


def test_chatbots_do_not_touch_each_others_aliases(registry, register):
    register("helpdesk")
    register("other")
    registry.promote("helpdesk:1")
    registry.promote("other:1")
    assert aliases(registry) == {"helpdesk:1": ("live",), "other:1": ("live",)}


def test_names_find_versions(registry, register):
    register()
    register()
    with pytest.raises(RegistryError, match=r"(?s)helpdesk has no live version.*versions: 1, 2.*promote helpdesk:2"):
        registry.find("helpdesk")
    registry.promote("helpdesk:1")
    assert registry.find("helpdesk").name == "helpdesk:1"
    assert registry.find("helpdesk").aliases == ("live",)
    assert registry.find("helpdesk:2").name == "helpdesk:2"
    with pytest.raises(RegistryError, match=r"(?s)helpdesk has no version 7.*versions: 1, 2"):
        registry.find("helpdesk:7")
    for unknown in ("helpdsk", "helpdsk:1"):
        with pytest.raises(RegistryError, match=r"(?s)no chatbot named helpdsk\n.*serve status"):
            registry.find(unknown)


@pytest.mark.parametrize("name", ["", "Helpdesk", "bot:", "bot:0", "bot:01", "bot:one", "a/b:1", "../a", "bot:1:2", "bot:1 ", "bot:1\n"])
def test_what_is_no_name_is_refused(name, registry):
    with pytest.raises(RegistryError, match="names no version"):
        registry.find(name, versions=[])


def test_a_registry_that_does_not_answer_is_an_error_with_a_remedy(make_run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        registry = Registry(f"http://127.0.0.1:{held.getsockname()[1]}")
        made = make_run()
        version = Version("helpdesk", 1, made.manifest.run_id, {})
        asks = [registry.versions, lambda: registry.promote("helpdesk:1"), lambda: registry.rollback("helpdesk")]
        asks += [lambda: registry.register(made.manifest, made.adapter), lambda: registry.download(version)]
        for ask in asks:
            with pytest.raises(RegistryError, match="Try: "):
                ask()


def test_an_alias_that_the_registry_refuses_is_an_error_with_a_remedy(registry, register, monkeypatch):
    register()
    versions = registry.versions()
    registry.client.delete_registered_model("helpdesk")
    monkeypatch.setattr(registry, "versions", lambda: versions)  # as if it were deleted meanwhile
    with pytest.raises(RegistryError, match=r"(?s)helpdesk.*Try: "):
        registry.promote("helpdesk:1")


def named(registry) -> dict[str, tuple[str, ...]]:
    return {name: found for name, found in aliases(registry).items() if found}


def test_a_canary_has_a_share_until_a_promotion_or_a_rollback_ends_it(registry, register):
    for _ in range(3):
        register()
    with pytest.raises(RegistryError, match="has no live version beside it"):
        registry.canary("helpdesk:2", 0.1)
    registry.promote("helpdesk:1")
    with pytest.raises(RegistryError, match="is live already"):
        registry.canary("helpdesk:1", 0.1)
    registry.canary("helpdesk:2", 0.1)
    registry.canary("helpdesk:3", 0.25)
    assert named(registry) == {"helpdesk:1": ("live",), "helpdesk:3": ("canary",)}
    assert [entry.canary_share for entry in registry.versions()] == [0, 0, 0.25]
    assert registry.rollback("helpdesk").name == "helpdesk:1"
    assert named(registry) == {"helpdesk:1": ("live",)}, "the newest change was the canary"
    registry.canary("helpdesk:3", 0.5)
    registry.promote("helpdesk:3")
    assert named(registry) == {"helpdesk:1": ("previous",), "helpdesk:3": ("live",)}
    registry.canary("helpdesk:2", 0.5)
    registry.promote("helpdesk:3")
    assert named(registry) == {"helpdesk:1": ("previous",), "helpdesk:3": ("live",)}, "live for everybody"


@pytest.mark.parametrize("share", ["0", "0%", "100%", "1", "ten", "", "10 %", "nan"])
def test_a_share_that_is_none_is_refused(share, command):
    refused = command("serve", "canary", "helpdesk:1", "--share", share)
    assert refused.status == 2
    assert "is no share" in refused.err


def test_a_canary_made_for_another_base_is_refused(registry, register):
    register()
    register(base_fingerprint="f" * 16)
    registry.promote("helpdesk:1")
    with pytest.raises(RegistryError, match="another base model"):
        registry.canary("helpdesk:2", 0.1)


def test_what_changes_shows_in_one_look(registry, register):
    """Engines look each second, and read the versions only when the look is another."""
    register()
    seen = [registry.standings()]
    assert registry.standings() == seen[0]
    for change in (
        lambda: registry.promote("helpdesk:1"),
        register,
        lambda: registry.canary("helpdesk:2", 0.1),
        lambda: registry.canary("helpdesk:2", 0.5),
        lambda: registry.promote("helpdesk:2"),
        lambda: registry.rollback("helpdesk"),
    ):
        change()
        seen.append(registry.standings())
        assert seen[-1] != seen[-2]


@pytest.mark.parametrize("share", ["10%", "nan", "-1", "2", ""])
def test_a_share_that_somebody_else_wrote_is_no_canary(share, registry, register):
    register()
    register()
    registry.promote("helpdesk:1")
    registry.canary("helpdesk:2", 0.1)
    registry.client.set_registered_model_tag("helpdesk", "canary_share.2", share)
    assert [entry.canary_share for entry in registry.versions()] == [0, 0]


def test_the_command_line_starts_a_canary_and_shows_its_share(registry, register, command, up, monkeypatch):
    monkeypatch.setattr("serve.deploy.application_status", lambda session: ("NOT_STARTED", ""))
    up(mlflow_url=registry.url)
    register()
    register()
    registry.promote("helpdesk:1")
    assert command("serve", "canary", "helpdesk:2", "--share", "12.5%").out.startswith("canary  helpdesk:2 answers 12.5% of ")
    assert "canary 12.5%" in command("serve", "status").out
    assert command("serve", "rollback", "helpdesk").out == "live  helpdesk:1 again\n"


def test_the_command_line_promotes_rolls_back_and_lists(registry, register, command, up):
    register()
    register()
    up(mlflow_url=registry.url)
    assert command("serve", "promote", "helpdesk:1").out == "live  helpdesk:1\n"
    assert command("serve", "promote", "helpdesk:2").out == "live  helpdesk:2\n"
    assert command("serve", "rollback", "helpdesk").out == "live  helpdesk:1 again\n"
    refused = command("serve", "promote", "helpdesk:9")
    assert (refused.status, refused.err.splitlines()[0]) == (2, "error: helpdesk has no version 9")
