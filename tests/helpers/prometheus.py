"""A real Prometheus over the repository's own configuration, looking each second instead of each quarter of a minute."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.boards import BOARDS, FOLDER, RATE
from cluster.processes import free_port

COMPARES = re.compile(r" (==|!=|<=|>=|<|>) ")
MONITORING = Path("cluster/deploy/monitoring")


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def seen(self, expression: str, window_s: float = 300) -> list[dict[str, Any]]:
        """What the expression gave at any moment of the last minutes: gauges of what has ended are forgotten meanwhile."""
        now_s = time.time()
        return self.get("query_range", query=expression, start=now_s - window_s, end=now_s, step=2)["result"]

    def names(self) -> set[str]:
        return set(self.get("label/__name__/values"))


@contextmanager
def own_prometheus(folder: Path, home: Path, every: str = "1s") -> Iterator[Prometheus]:
    """Start one in a folder that is laid out as a checkout, with another home folder as its `.tandem`."""
    shutil.copytree(FOLDER, folder / MONITORING)
    (folder / ".tandem").symlink_to(home)
    file, port = folder / MONITORING / "prometheus.yml", free_port()
    file.write_text(re.sub(r"_interval: \d+s", f"_interval: {every}", file.read_text()))
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 60
        while not _is_ready(prometheus.url):
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def board_queries(window: str = "1m") -> Iterator[tuple[str, str, bool]]:
    """Give each query of our boards with its place, over a window of its own, and whether it wants a GPU."""
    for name, panels in BOARDS.items():
        for panel in panels:
            for query in panel.queries.values():
                yield f"{name}: {panel.title}", query.replace(RATE, window), panel.needs_gpu


def rule_expressions(as_data: bool = False) -> Iterator[tuple[str, str]]:
    """Give each expression of our rules; `as_data` with 1 and 0 where an alert's comparison would give nothing."""
    for file in ("recording.yml", "alerts.yml"):
        for group in yaml.safe_load((FOLDER / "rules" / file).read_text())["groups"]:
            for rule in group["rules"]:
                expression = COMPARES.sub(r" \1 bool ", rule["expr"]) if as_data and "alert" in rule else rule["expr"]
                yield rule.get("alert") or rule["record"], expression
