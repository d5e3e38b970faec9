"""One machine: its cards, where its services listen, lending, logs, and what a Kubernetes cluster needs to be told."""

import re
from collections import Counter
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from configs.schema.base import Name, Port, Settings

RAY_WORKER_PORTS = range(10002, 20000)
CORES = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")  # one, or from one to another


@lru_cache(maxsize=64)  # it is asked at each request
def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone; a name other than localhost counts as open."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class CardConfig(Settings):
    """One card: a GPU, or a share of the CPU."""

    pool: Literal["serve", "train"]
    """What the card is for."""
    gpu: str | None = Field(None, coerce_numbers_to_str=True)
    """Part of the GPU's name (`RTX 5090`) or its number; a share of the CPU if empty."""
    cores: str | None = Field(None, coerce_numbers_to_str=True)
    """Cores on which the card computes, and no other card, such as `'0-3,8'`; each card has its own, or all cards share all of them."""

    @property
    def core_numbers(self) -> tuple[int, ...]:
        """Which cores these are; none if it shares them all."""
        ranges = CORES.findall(self.cores or "")
        return tuple(number for first, last in ranges for number in range(int(first), int(last or first) + 1))

    @field_validator("cores")
    @classmethod
    def _names_cores(cls, cores: str | None) -> str | None:
        parts = [] if cores is None else [CORES.fullmatch(part) for part in cores.split(",")]
        if not all(part and int(part[2] or part[1]) >= int(part[1]) for part in parts):
            raise ValueError(f"{cores!r} names no cores; write them like '0-3,8'")
        return cores


class LendingConfig(Settings):
    """Who may use a card, and for how long at least."""

    enabled: bool = False
    """Lend serve cards to queued jobs while chat is quiet; a request takes them back, and waits until its engine is back."""
    idle_engine: Literal["auto", "sleep", "stop"] = "auto"
    """What an engine does that leaves its card. `sleep`: it moves its weights into the machine's memory, and need not start anew;
    `stop`: it ends, and starts anew; `auto` sleeps on a GPU, and stops elsewhere: without a GPU one that sleeps keeps its memory, and
    gives back the cores alone. Where there may be more than one engine (`serve.scaling`), or one on a train card, they stop."""
    quiet_after_s: float = Field(300.0, ge=0.0)
    """How long chat must have had no request before an engine leaves its card to a job that waits, in seconds."""
    min_hold_s: float = Field(60.0, ge=0.0)
    """How long a job keeps its cards before one that goes before it may take them, in seconds; chat takes its own cards at once."""
    max_attempts: int = Field(3, ge=1)
    """How often a job is begun whose process, card or machine is lost; then it has failed."""


class PoolConfig(Settings):
    """The pods of one pool on Kubernetes, each with one card."""

    min_cards: int = Field(1, ge=0)
    """Pods that always run."""
    max_cards: int = Field(1, ge=1)
    """Most pods; the autoscaler starts them when work waits for a card, and ends those that are idle."""
    num_cpus: int = Field(4, ge=1)
    """CPU cores of a pod."""
    memory_gib: int = Field(16, ge=1)
    """Memory of a pod, in GiB."""
    gpu: str | None = "nvidia.com/gpu"
    """Kubernetes' name for the GPU that a pod gets one of; a card is the pod's CPUs if empty."""
    node_labels: dict[str, str] = {}
    """Labels that a node must have, to choose a kind of GPU."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_cards > self.max_cards:
            raise ValueError(f"min_cards={self.min_cards} is over max_cards={self.max_cards}")
        return self


class DeployConfig(Settings):
    """What `python -m cluster manifests` needs to know of a Kubernetes cluster."""

    image: str = Field("tandem:gpu", min_length=1)
    """Image of the pods with cards, as the nodes pull it."""
    head_image: str = Field("tandem:cpu", min_length=1)
    """Image of the head and of MLflow, which compute nothing."""
    serve: PoolConfig = PoolConfig()
    """Pods that answer."""
    train: PoolConfig = PoolConfig()
    """Pods that train."""
    storage_class: str | None = None
    """Class of the volume that all pods share, which must allow ReadWriteMany; the cluster's default if empty."""
    storage_gib: int = Field(100, ge=1)
    """Size of that volume, in GiB."""
    secret: str = Field("tandem", max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$")
    """Name of the Secret, as Kubernetes allows it, with `auth_token`, `redis_password`, and whatever of `.env` is wanted."""


class LogConfig(Settings):
    """What is logged, and how much of it is kept; LOG_DIR says where."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least weight of what is logged."""
    prompts: bool = False
    """Log what is asked too; without it neither prompts nor messages of errors that may quote them are written anywhere."""
    max_file_mib: int = Field(64, ge=1)
    """A log file that grows larger is put aside, in MiB."""
    num_files_kept: int = Field(4, ge=1)
    """Files put aside of each stream; the oldest is deleted."""
    sample_every_s: float = Field(15.0, ge=1.0)
    """How often use, memory, temperature and watts of host and cards are logged, in seconds."""


class MachineConfig(Settings):
    """The cards of one machine, and where its services listen."""

    cards: Literal["auto"] | list[CardConfig] = "auto"
    """`auto` makes a card of each GPU, or two of the CPU, and gives the largest to training."""
    name: Name | None = None
    """Name of a machine that joins, in the names of its cards; its host name if empty. The first machine is `head`."""
    listen_host: str = "127.0.0.1"
    """This machine's address, at which dashboard and job API listen, and ask for the token. Other machines join at any but loopback."""
    http_proxy: Literal["auto", "python"] = "auto"
    """What stands before the engines: HAProxy where it runs, else Ray Serve's own proxy, which is slower; `python` is always the latter."""
    ray_port: Port = 6379
    """Port of Ray's global control service."""
    dashboard_port: Port = 8265
    """Port of Ray's dashboard and job API."""
    mlflow_port: Port = 5000
    """Port of MLflow, on loopback; at any other `listen_host` joined machines reach it there, through a gate that asks for the token."""
    storage: str | None = Field(None, min_length=1)
    """Folder, or URL such as `s3://bucket/tandem`, that every machine reaches, for data and checkpoints of runs; TANDEM_HOME if empty."""
    object_store_gib: float = Field(0.25, ge=0.1)
    """Shared memory for Ray's objects, each card, in GiB."""
    min_disk_free_gib: float = Field(2.0, ge=0.0)
    """`up` and `train` refuse to start with less room than this, in GiB."""
    job_stop_wait_s: int = Field(60, ge=3)
    """How long a run that is asked to leave its card, or stopped by `ray job stop`, has to save its checkpoint, in seconds."""
    lending: LendingConfig = LendingConfig()
    """Who may use a card, and for how long at least."""
    deploy: DeployConfig = DeployConfig()
    """What `python -m cluster manifests` needs to know of a Kubernetes cluster."""
    logs: LogConfig = LogConfig()
    """What is logged, and how much of it is kept."""

    @model_validator(mode="after")
    def _both_pools(self) -> Self:
        if self.cards == "auto":
            return self
        # Where other machines may join, they may bring the other pool, or all cards.
        if is_loopback(self.listen_host) and {card.pool for card in self.cards} != {"serve", "train"}:
            raise ValueError("cards: at least one card of each pool is needed, serve and train")
        return self

    @model_validator(mode="after")
    def _own_cores(self) -> Self:
        if self.cards == "auto":
            return self
        if any(card.cores for card in self.cards) and not all(card.cores for card in self.cards):
            raise ValueError("cards: each has `cores` of its own, or none has")
        counted = Counter(number for card in self.cards for number in card.core_numbers)
        if twice := sorted(number for number, times in counted.items() if times > 1):
            raise ValueError(f"cards: core {twice[0]} is named twice; each belongs to one card")
        return self

    @model_validator(mode="after")
    def _whole_path(self) -> Self:
        if self.storage and "://" not in self.storage and not Path(self.storage).is_absolute():
            raise ValueError(f"storage={self.storage} is neither a whole path, the same on every machine, nor a URL")
        if self.storage and "?" in self.storage:
            raise ValueError(
                "storage: folders are named below it, so it has no ?; the address of a store like S3 goes into AWS_ENDPOINT_URL"
            )
        return self

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        if self.listen_host in ("0.0.0.0", "::", ""):  # noqa: S104 (names, not sockets)
            raise ValueError(f"listen_host={self.listen_host!r} is no address at which others reach this machine; name one of its own")
        return self

    @model_validator(mode="after")
    def _one_port_each(self) -> Self:
        ports = {"ray_port": self.ray_port, "dashboard_port": self.dashboard_port, "mlflow_port": self.mlflow_port}
        for name, port in ports.items():
            if port in RAY_WORKER_PORTS:
                raise ValueError(f"{name}={port}: Ray's workers take the ports from {RAY_WORKER_PORTS[0]} to {RAY_WORKER_PORTS[-1]}")
        if len(set(ports.values())) < len(ports):
            same = [name for name, port in ports.items() if list(ports.values()).count(port) > 1]
            raise ValueError(f"{same[-1]}={ports[same[-1]]} is also {' and '.join(same[:-1])}; each service needs a port of its own")
        return self
