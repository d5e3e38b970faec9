"""The registry of adapters, in MLflow: chatbots, immutable versions with their manifests, and aliases.

Knows names, versions and files. Does not know how an adapter was made or who serves it.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.home import home_folder, new_folder
from configs.errors import RegistryError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LIVE, PREVIOUS, CANARY, CANDIDATE = "live", "previous", "canary", "candidate"
SHARE_TAG = "canary_share"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MANIFEST_FILE = "manifest.json"
VERSION_NAME = re.compile(r"^(?P<chatbot>[a-z0-9][a-z0-9._-]{0,63})(:(?P<number>[1-9][0-9]{0,8}))?\Z")


@dataclass(frozen=True)
class Manifest:
    """What a version was made from; kept beside the adapter, and as tags of the version."""

    chatbot: str
    base_model: str
    base_fingerprint: str
    rank: int
    target_modules: list[str]
    quantization: str
    data_fingerprint: str
    config_fingerprint: str
    git_commit: str
    run_id: str
    finished_s: float
    system_prompt: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """One immutable version of a chatbot's adapter, written `helpdesk:3`."""

    chatbot: str
    number: int
    run_id: str
    tags: dict[str, str]
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name by which requests ask for exactly this version."""
        return f"{self.chatbot}:{self.number}"

    @property
    def canary_share(self) -> float:
        """The share of the chatbot's conversations that this version answers as its canary; 0 if it is none, or its tag says nonsense."""
        try:
            share = float(self.tags.get(SHARE_TAG, 0)) if CANARY in self.aliases else 0.0
        except ValueError:  # anyone may write tags in MLflow
            return 0.0
        return share if 0 < share < 1 else 0.0


@contextmanager
def mlflow_errors(url: str) -> Iterator[None]:
    """Turn whatever MLflow and its HTTP client raise into an error with a remedy."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise RegistryError(f"the registry at {url} does not answer as it should", str(error)[:500], "python -m cluster status") from error


class Registry:
    """The registry behind one MLflow server; every method raises RegistryError with a remedy."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client: MlflowClient | None = None

    @property
    def client(self) -> "MlflowClient":
        """The MLflow client, made at its first use: importing MLflow takes seconds."""
        if self._client is None:
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(self.url)
        return self._client

    def register(self, manifest: Manifest, adapter: Path) -> Version:
        """Store an adapter and its manifest under its run, and make the next version of it.

        Args:
            manifest: What the adapter was made from.
            adapter: Folder with PEFT's config and safetensors; only these two files are taken.
        """
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory(prefix="tandem-register-") as made:
            draft = Path(made)
            for name in ADAPTER_FILES:
                (draft / name).write_bytes((adapter / name).read_bytes())
            (draft / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=2))
            with mlflow_errors(self.url):
                self.client.log_artifacts(manifest.run_id, str(draft), "adapter")
        tags = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(manifest).items() if key != "system_prompt"
        }
        source = f"runs:/{manifest.run_id}/adapter"
        with mlflow_errors(self.url):
            try:
                self.client.create_registered_model(manifest.chatbot)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            return _version(self.client.create_model_version(manifest.chatbot, source, run_id=manifest.run_id, tags=tags))

    def versions(self) -> list[Version]:
        """Return every version of every chatbot, with the aliases that name it; one request."""
        aliases: dict[str, list[str]] = {}
        for chatbot in self._pages(self.client.search_registered_models):
            for alias, number in dict(chatbot.aliases).items():
                aliases.setdefault(f"{chatbot.name}:{number}", []).append(alias)
        found = [_version(entry) for entry in self._pages(self.client.search_model_versions)]
        return [
            Version(entry.chatbot, entry.number, entry.run_id, entry.tags, tuple(sorted(aliases.get(entry.name, []))))
            for entry in sorted(found, key=lambda entry: (entry.chatbot, entry.number))
        ]

    def find(self, name: str, versions: Iterable[Version] | None = None) -> Version:
        """Return the version that `helpdesk:3` names, or for `helpdesk` the live one."""
        match = VERSION_NAME.match(name)
        if not match:
            raise RegistryError(f"{name!r} names no version", "", "python -m serve status lists the versions; one is named like helpdesk:3")
        known = _of(match["chatbot"], self.versions() if versions is None else versions)
        numbers = ", ".join(str(entry.number) for entry in known)
        wanted = [entry for entry in known if (match["number"] or LIVE) in (str(entry.number), *entry.aliases)]
        if not wanted:
            missing = f"version {match['number']}" if match["number"] else "live version"
            raise RegistryError(f"{match['chatbot']} has no {missing}", f"versions: {numbers}", f"python -m serve promote {known[-1].name}")
        return wanted[0]

    def nominate(self, name: str) -> Version:
        """Name a version as its chatbot's candidate: it is to be let in, if it passes the gate; until then it stays so."""
        wanted = self.find(name)
        with mlflow_errors(self.url):
            self.client.set_registered_model_alias(wanted.chatbot, CANDIDATE, str(wanted.number))
        return wanted

    def promote(self, name: str) -> Version:
        """Make a version live for everybody: the one that was live becomes `previous`, and a canary ends."""
        versions = self.versions()
        wanted = self.find(name, versions)
        live = _with_alias(LIVE, wanted.chatbot, versions)
        with mlflow_errors(self.url):
            if live is None or live.number != wanted.number:
                if live:
                    self.client.set_registered_model_alias(wanted.chatbot, PREVIOUS, str(live.number))
                self.client.set_registered_model_alias(wanted.chatbot, LIVE, str(wanted.number))
            if _with_alias(CANARY, wanted.chatbot, versions):
                self.client.delete_registered_model_alias(wanted.chatbot, CANARY)
        return wanted

    def canary(self, name: str, share: float) -> Version:
        """Let a version answer a share (0 to 1) of its chatbot's conversations; the live one answers the others."""
        versions = self.versions()
        wanted = self.find(name, versions)
        live = _with_alias(LIVE, wanted.chatbot, versions)
        if live is None or live.number == wanted.number:
            why = f"{wanted.name} is live already" if live else f"{wanted.chatbot} has no live version beside it"
            raise RegistryError(f"{wanted.name} cannot be a canary", why, f"python -m serve promote {wanted.name}")
        if not 0 < share < 1:
            raise RegistryError(f"a canary cannot have a share of {share:g}", "a share is over 0 and under 1", "0.1 is a tenth")
        if wanted.tags.get("base_fingerprint") != live.tags.get("base_fingerprint"):
            why = f"it was made for another base model than {live.name}, which is live; one engine serves one base"
            raise RegistryError(f"{wanted.name} cannot be a canary", why, "python -m serve status lists the bases")
        with mlflow_errors(self.url):
            # The share first: the alias without it would mean a canary that nobody meets.
            self.client.set_model_version_tag(wanted.chatbot, str(wanted.number), SHARE_TAG, f"{share:g}")
            self.client.set_registered_model_alias(wanted.chatbot, CANARY, str(wanted.number))
        return wanted

    def rollback(self, chatbot: str) -> Version:
        """Undo the last change: end the canary if there is one, or else make the previous version live again; return the live one."""
        versions = self.versions()
        own = _of(chatbot, versions)
        live = _with_alias(LIVE, chatbot, versions)
        if live and _with_alias(CANARY, chatbot, versions):
            return self.promote(live.name)
        previous = _with_alias(PREVIOUS, chatbot, versions)
        if not previous:
            why = "no other version of it was ever live"
            raise RegistryError(f"{chatbot} has no version to go back to", why, f"python -m serve promote {own[-1].name}")
        return self.promote(previous.name)

    def download(self, version: Version) -> Path:
        """Return the local folder of a version's adapter, fetched at its first use; versions never change, so it never goes stale."""
        target = home_folder() / "adapters" / version.chatbot / str(version.number)
        # Two registries may number alike; the run's id tells them apart.
        target = target.with_name(f"{version.number}-{version.run_id[:8]}")
        if not target.is_dir():
            from mlflow.artifacts import download_artifacts

            with mlflow_errors(self.url), new_folder(target) as draft:
                download_artifacts(artifact_uri=f"runs:/{version.run_id}/adapter", dst_path=str(draft), tracking_uri=self.url)
                for file in (draft / "adapter").iterdir():
                    file.rename(draft / file.name)
                (draft / "adapter").rmdir()
        return target

    def _pages(self, search: Any) -> list[Any]:
        """Collect all pages of a search."""
        found, token = [], None
        with mlflow_errors(self.url):
            while True:
                page = search(max_results=1000, page_token=token)
                found += list(page)
                token = page.token
                if not token:
                    return found


def _of(chatbot: str, versions: Iterable[Version]) -> list[Version]:
    known = [entry for entry in versions if entry.chatbot == chatbot]
    if not known:
        raise RegistryError(f"no chatbot named {chatbot}", "the registry has no version of it", "python -m serve status")
    return known


def _with_alias(alias: str, chatbot: str, versions: Iterable[Version]) -> Version | None:
    return next((entry for entry in versions if entry.chatbot == chatbot and alias in entry.aliases), None)


def _version(entry: Any) -> Version:
    return Version(entry.name, int(entry.version), entry.run_id, dict(entry.tags))
