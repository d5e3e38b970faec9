"""The registry of adapters, in MLflow: chatbots, immutable versions with their manifests, and aliases.

Knows names, versions and files. Does not know how an adapter was made or who serves it.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.home import home_folder, new_folder
from cluster.standing import CANARY, Standing, Word, share_tag
from configs.errors import RegistryError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LIVE, PREVIOUS, CANDIDATE = "live", "previous", "candidate"
MAX_TAG_LETTERS = 5000
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MANIFEST_FILE = "manifest.json"
EVALUATION_FILE = "evaluation.html"  # of a version's run: the answers to the held-out questions, side by side
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
    data_sources: dict[str, str] = field(default_factory=dict)  # each source of the data with its hash, as DVC writes it
    precision: str = "auto"
    """What the base's linear layers multiplied in, as `train.precision` has it."""


@dataclass(frozen=True)
class Version:
    """One immutable version of a chatbot's adapter, written `helpdesk:3`."""

    chatbot: str
    number: int
    run_id: str
    tags: dict[str, str]
    aliases: tuple[str, ...] = ()
    canary_share: float = 0.0
    """The share of the chatbot's conversations that this version answers as its canary; 0 if it is none."""

    @property
    def name(self) -> str:
        """The name by which requests ask for exactly this version."""
        return f"{self.chatbot}:{self.number}"


def evaluation_page(version: Version) -> Path:
    """Return where this machine keeps the page of a version's evaluation, beside the one in MLflow."""
    return home_folder() / "evaluations" / f"{version.chatbot}-{version.number}.html"


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

    def of_run(self, run_id: str) -> Version | None:
        """Return the version that a run was registered as, if it was."""
        with mlflow_errors(self.url):
            found = self.client.search_model_versions(f"run_id = '{run_id}'")
        return _version(found[0]) if found else None

    def standings(self) -> dict[str, Standing]:
        """Return how each chatbot stands: one small request, equal to the last one's answer if `versions` would be."""
        return {
            entry.name: Standing(
                {alias: int(number) for alias, number in dict(entry.aliases).items()}, dict(entry.tags), entry.last_updated_timestamp
            )
            for entry in self._pages(self.client.search_registered_models)
        }

    def versions(self, standings: Mapping[str, Standing] | None = None) -> list[Version]:
        """Return every version of every chatbot, with the aliases that name it."""
        known = self.standings() if standings is None else standings
        found = [_version(entry, known.get(entry.name)) for entry in self._pages(self.client.search_model_versions)]
        return sorted(found, key=lambda entry: (entry.chatbot, entry.number))

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

    def live(self, chatbot: str) -> Version | None:
        """Return the chatbot's live version, if it has one."""
        return _with_alias(LIVE, chatbot, self.versions())

    def nominate(self, name: str) -> Version:
        """Name a version as its chatbot's candidate: it is to be let in, if it passes the gate; until then it stays so."""
        wanted = self.find(name)
        with mlflow_errors(self.url):
            self.client.set_registered_model_alias(wanted.chatbot, CANDIDATE, str(wanted.number))
        return wanted

    def note(self, version: Version, tags: Mapping[str, str]) -> None:
        """Write tags to a version."""
        with mlflow_errors(self.url):
            for key, text in tags.items():
                self.client.set_model_version_tag(version.chatbot, str(version.number), key, text[:MAX_TAG_LETTERS])

    def read_evaluation(self, version: Version) -> str:
        """Return the page of a version's evaluation; empty where it was never evaluated."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self.url), tempfile.TemporaryDirectory(prefix="tandem-evaluation-") as folder:
            try:
                names = {file.path for file in self.client.list_artifacts(version.run_id)}
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # the run itself may have been deleted for good
                    raise
                return ""
            if EVALUATION_FILE not in names:
                return ""
            return Path(self.client.download_artifacts(version.run_id, EVALUATION_FILE, folder)).read_text(encoding="utf-8")

    def write_evaluation(self, version: Version, page: str) -> None:
        """Keep a page with a version's run, in place of the one before."""
        with mlflow_errors(self.url):
            self.client.log_text(version.run_id, page, EVALUATION_FILE)

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
            self._end_candidacy(wanted, versions)
        self._spread_word()
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
            # The share first: the alias without it would mean a canary that nobody meets. The chatbot's tag: engines look at nothing else.
            self.client.set_registered_model_tag(wanted.chatbot, share_tag(wanted.number), f"{share:g}")
            self.client.set_registered_model_alias(wanted.chatbot, CANARY, str(wanted.number))
            self._end_candidacy(wanted, versions)
        self._spread_word()
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

    def _spread_word(self) -> None:
        """Tell the engines of this machine at once; they look each second anyway."""
        with suppress(OSError, RegistryError):  # what was promoted is live, whether or not it is said
            Word(self.url).spread(self.standings())

    def _end_candidacy(self, chosen: Version, versions: Iterable[Version]) -> None:
        if _with_alias(CANDIDATE, chosen.chatbot, versions) == chosen:
            self.client.delete_registered_model_alias(chosen.chatbot, CANDIDATE)

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


def _version(entry: Any, standing: Standing | None = None) -> Version:
    number = int(entry.version)
    aliases, share = (standing.aliases_of(number), standing.canary_share(number)) if standing else ((), 0.0)
    return Version(entry.name, number, entry.run_id, dict(entry.tags), aliases, share)
