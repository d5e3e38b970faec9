"""What the tests share: a home of their own, command lines, adapters, an MLflow store; and each folder's mark."""

import gc
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.cards import find_gpus
from cluster.home import write_text
from cluster.processes import Process
from cluster.registry import Manifest, Registry, Version
from cluster.session import Session, token_file
from configs.cli import run_app
from tests.helpers.environment import OWN
from tests.helpers.front import ask, engine, keys, observers, quotas, shelf  # noqa: F401

FINGERPRINT = "0123456789abcdef"


# `make test` has two processes (`-n 2`). On a machine without a GPU these files have a cluster of their own, beside that of the others:
# what a cluster does in tests is mostly to start processes, and each keeps one core busy.
JOBS = (
    "test_1_cluster.py", "test_5_tune.py", "test_6_circle.py", "test_6_hosts.py", "test_7_queue.py", "test_8_chaos.py",
    "test_9_containers.py", "test_9_pods.py",
)  # fmt: skip
ON_CLUSTER = ("ray", "gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by its folder, so that `-m "not ray"` and the like choose among them; in several processes, the longest come first."""
    for item in items:
        item.add_marker(item.path.parent.name)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent.name not in ON_CLUSTER)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep in one process what shares a cluster, and else each file."""
    from xdist.scheduler import LoadScopeScheduling

    jobs = () if find_gpus() else JOBS

    class ByCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            if file.parent.name not in ON_CLUSTER:
                return file.name
            return "jobs" if file.name in jobs else "chat"

    config.option.loadscopereorder = False
    return ByCluster(config, log)


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder of its own for all that a run leaves behind; nothing of the developer's environment or `.env` gets in."""
    monkeypatch.chdir(tmp_path)
    for name in OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def command(home, monkeypatch, capsys) -> Callable[..., Ended]:
    """Run `python -m MODULE WORDS` through its own door, but in this process: a new one takes a second."""

    def run(module: str, *words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"python -m {module}", *words])
        with pytest.raises(SystemExit) as ended:
            run_app(importlib.import_module(f"{module}.__main__").app, module)
        gc.unfreeze()  # a process that ends would not need it
        shown = capsys.readouterr()
        return Ended(int(ended.value.code or 0), shown.out, shown.err)

    return run


def write_adapter(folder: Path, rank: int = 4, **settings: Any) -> Path:
    """Write the two files that PEFT would leave for one linear layer."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A.weight": np.ones((rank, 8), "float32"), f"{layer}.lora_B.weight": np.ones((8, rank), "float32")}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "target_modules": ["q_proj"], "bias": "none", "use_dora": False, "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


@pytest.fixture(name="write_adapter")
def write_adapter_fixture() -> Callable[..., Path]:
    return write_adapter


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An empty MLflow database; it takes seconds to make, so each test copies this one."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def registry(home, tmp_path, empty_store) -> Registry:
    """A registry on a real MLflow store, without its server."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Registry(f"sqlite:///{tmp_path}/mlflow.db")


@dataclass(frozen=True)
class Made:
    """A finished run, as `register` takes it."""

    manifest: Manifest
    adapter: Path


@pytest.fixture
def make_run(registry, tmp_path) -> Callable[..., Made]:
    """Start a run in the store and write an adapter as a trained one would be; keywords change the manifest."""

    def make(chatbot: str = "helpdesk", rank: int = 4, **changes: Any) -> Made:
        experiment = registry.client.get_experiment_by_name(chatbot)
        artifacts = str(tmp_path / "artifacts")
        experiment_id = experiment.experiment_id if experiment else registry.client.create_experiment(chatbot, artifact_location=artifacts)
        run_id = registry.client.create_run(experiment_id).info.run_id
        manifest = Manifest(
            chatbot=chatbot,
            base_model="smollm2-135m",
            base_fingerprint=FINGERPRINT,
            rank=rank,
            target_modules=["q_proj"],
            quantization="none",
            data_fingerprint="d" * 16,
            config_fingerprint="c" * 16,
            git_commit="unknown",
            run_id=run_id,
            finished_s=1.5,
            scores={"loss": 0.25},
        )
        return Made(replace(manifest, **changes), write_adapter(tmp_path / "trained" / run_id, rank))

    return make


@pytest.fixture
def register(registry, make_run) -> Callable[..., Version]:
    """Register an adapter in the real store; keywords change the manifest."""

    def register_one(chatbot: str = "helpdesk", **changes: Any) -> Version:
        made = make_run(chatbot, **changes)
        return registry.register(made.manifest, made.adapter)

    return register_one


@pytest.fixture
def up(home) -> Callable[..., Session]:
    """Leave a session as `up` does, at addresses of the test's own; this process stands for those that it started."""

    def leave(dashboard_url: str = "http://127.0.0.1:9", mlflow_url: str = "http://127.0.0.1:9", **machine: Any) -> Session:
        me = Process("card0", os.getpid(), psutil.Process().create_time())
        pools = ("serve", "train")
        cards = tuple({"card": f"card{at}", "pool": pool, "accelerator": "cpu", "memory-gib": "8"} for at, pool in enumerate(pools))
        session = Session((me,), cards, "127.0.0.1:9", dashboard_url, mlflow_url, machine, versions={"commit": "abc"})
        write_text(home / "cluster.json", json.dumps(asdict(session)))
        write_text(token_file(), "token", mode=0o600)
        return session

    return leave
