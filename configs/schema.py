"""Every setting of Tandem, each declared once: name, type, unit, bound, default.

A chatbot is one `ChatbotConfig`, a machine one `MachineConfig`, secrets and places one `Environment`.
"""

import math
import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from configs.errors import ConfigError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1, strict=True)]
SECRETS_FOLDER = Path("/run/secrets")  # where containers find theirs, a file each
METRICS = ("perplexity", "accuracy", "exact", "general", "forgotten", "judge")


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone; a name other than localhost counts as open."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Settings(BaseModel):
    """What all groups of settings share: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ModelConfig(Settings):
    """The base model that adapters are made for."""

    name: str = Field("smollm2-135m", min_length=1)
    """Hub id, local folder, or `smollm2-135m`, the small model that comes with Tandem's packages."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the hub's default if empty."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the base weights; `auto` takes bf16 wherever the card computes in it."""


class DataConfig(Settings):
    """The conversations, and how they become training rows."""

    source: str = Field(min_length=1)
    """File, folder, or Hugging Face dataset id (`owner/name`)."""
    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "question_answer"] = "auto"
    """Shape of a row; `auto` recognises it by its columns."""
    system_prompt: str | None = None
    """System message put before conversations that have none; the model's own default if empty."""
    split: Literal["row", "group", "marked"] = "row"
    """What held-out conversations are drawn by: rows, whole groups, or the rows' own `split` field."""
    heldout_share: Share = 0.1
    """Share of rows or groups held out of training; of no effect with `split: marked`."""
    split_seed: int = Field(0, ge=0)
    """Seed of the split."""
    max_length_tokens: int = Field(2048, ge=16, le=1_048_576)
    """Longest training row, in tokens."""
    too_long: Literal["drop", "cut"] = "drop"
    """What happens to a longer conversation: left out, or cut at the end."""
    deduplicate: bool = True
    """Keep one of several equal conversations."""
    skip_bad: bool = False
    """Set bad rows aside with their reason, instead of refusing the file."""
    feedback: bool = True
    """Train on the feedback too that a person accepted (`python -m data accept`)."""
    scrub: bool = False
    """Take personal data out of every row; out of feedback it is always taken."""
    scrub_keep: list[str] = []
    """Words that are no personal data here, such as names of products."""


class LoraConfig(Settings):
    """The shape of the adapter."""

    rank: int = Field(16, ge=1, le=512)
    """Rank of the two small matrices beside each weight."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapter: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of adapter inputs zeroed in training."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers that get an adapter."""
    num_layers: int | None = Field(None, ge=1)
    """Only the last so many of the model's blocks get an adapter; the steps skip the way back through the others."""
    use_rslora: bool = False
    """Rank-stabilised scale; better at high ranks."""
    use_dora: bool = False
    """Refused: vLLM cannot serve DoRA."""
    modules_to_save: list[str] = []
    """Refused: vLLM cannot serve fully trained extra modules."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Anything but `none` is refused: vLLM cannot serve trained biases."""

    @model_validator(mode="after")
    def _servable(self) -> Self:
        """Refuse before training what vLLM would refuse after it."""
        reasons = []
        if self.use_dora:
            reasons.append("train.lora.use_dora: vLLM cannot serve DoRA; use plain LoRA or use_rslora")
        if self.modules_to_save:
            reasons.append("train.lora.modules_to_save: vLLM cannot serve fully trained modules; leave it empty")
        if self.bias != "none":
            reasons.append(f"train.lora.bias={self.bias}: vLLM cannot serve trained biases; use none")
        if reasons:
            raise ValueError("\n".join(reasons))
        return self


class TrainConfig(Settings):
    """How the adapter is trained."""

    lora: LoraConfig = LoraConfig()
    """The shape of the adapter."""
    quantization: Literal["none", "nf4"] = "none"
    """Format of the frozen base in training; `nf4` is QLoRA (4 bit, by bitsandbytes)."""
    double_quantization: bool = True
    """Quantise the scales of an nf4 base too; saves 0.4 bit a weight."""
    learning_rate: float = Field(2e-4, gt=0.0, le=1.0)
    """Highest learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup_share: float = Field(0.03, ge=0.0, lt=1.0)
    """Share of the steps in which the rate rises."""
    num_epochs: float = Field(3.0, gt=0.0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many steps, whatever `num_epochs` says."""
    batch_size: int = Field(16, ge=1)
    """Conversations a step, over all workers."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Conversations computed at once on one worker; `auto` takes the quickest number that the card has memory for."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations to save memory, about 30 % slower; `auto` does so only where it is needed, or lets more be computed at once."""
    max_memory_gib: float | None = Field(None, gt=0.0)
    """Most memory that a run may take of each train card, in GiB; nearly all of the card's if empty, which of a single GPU is half."""
    packing: bool = False
    """Join a batch's conversations to one row without padding, each blind to the others; else rows of like length go together."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decay of the adapter's weights."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients are clipped to this norm."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of each target spread over the whole vocabulary; helps a small data set generalise."""
    seed: int = Field(0, ge=0)
    """Seed of the adapter's start and of the order of rows."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Measure the held-out loss each so many steps; at the end only, if empty."""
    log_every_steps: int = Field(10, ge=1)
    """Report loss and speed each so many steps."""
    checkpoint_every_steps: int = Field(50, ge=1)
    """Save adapter, optimizer and position each so many steps."""
    num_checkpoints_kept: int = Field(2, ge=1)
    """Older checkpoints are deleted."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better held-out loss, and register the best checkpoint."""
    num_workers: int = Field(1, ge=1)
    """Train cards used at once, each with its share of the batch."""
    max_failures: int = Field(2, ge=0)
    """Restarts from the last checkpoint after a worker died."""

    def count_steps(self, num_rows: int) -> int:
        """Return how many steps a run over so many rows has."""
        return self.max_steps or max(1, math.ceil(math.ceil(num_rows / self.batch_size) * self.num_epochs))

    @model_validator(mode="after")
    def _stops_by_measure(self) -> Self:
        if self.early_stopping_patience and not self.eval_every_steps:
            raise ValueError(
                f"train.early_stopping_patience={self.early_stopping_patience} counts evaluations; set train.eval_every_steps too"
            )
        return self


class Dimension(Settings):
    """The values of one setting that a sweep tries; exactly one of these."""

    choice: list[Any] | None = Field(None, min_length=1)
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """Any number between these two."""
    log: tuple[float, float] | None = None
    """Any number between these two, each tenfold as likely as the next."""
    integer: tuple[int, int] | None = None
    """Any whole number from the first to the second."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = ("choice", "uniform", "log", "integer")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(kinds)} is wanted, not {' and '.join(given) or 'none'}")
        if bounds := self.uniform or self.log or self.integer:
            if bounds[0] >= bounds[1]:
                raise ValueError(f"{given[0]} wants the lower end first, not {list(bounds)}")
            if self.log and bounds[0] <= 0:
                raise ValueError(f"log wants ends over 0, not {list(bounds)}")
        return self


class BudgetConfig(Settings):
    """When a sweep ends; the first limit that is reached counts."""

    trials: int | None = Field(None, ge=1)
    """Most trials begun; where all settings are choices and this is empty, every combination is tried once."""
    tokens: int | None = Field(None, ge=1)
    """Tokens trained by all trials together; looked at when a trial is measured."""
    hours: float | None = Field(None, gt=0.0)
    """Hours of training, added up over all cards."""


class SweepConfig(Settings):
    """How `python -m tune` searches for better settings of `train`."""

    space: dict[str, Dimension] = {}
    """Settings to vary, by dotted path: `train.lora.rank: {choice: [8, 16]}`, `train.learning_rate: {log: [1.0e-5, 1.0e-3]}`."""
    scheduler: Literal["asha", "pbt", "optuna", "grid"] = "asha"
    """`asha` trains all a little and the best ones on; `pbt` lets bad ones copy good ones and change; `optuna` proposes settings by what
    it saw, and stops bad ones; `grid` trains every one to its end."""
    metric: Literal["eval_loss", "loss"] = "eval_loss"
    """What trials are compared by: the held-out loss, or the loss in training."""
    mode: Literal["min", "max"] = "min"
    """Whether a small or a large metric is good."""
    budget: BudgetConfig = BudgetConfig()
    """When a sweep ends."""
    trials_per_card: int | None = Field(None, ge=1)
    """Trials that train on one card at once, on one base in memory. If empty, one; or several on a GPU, where their steps are small,
    they differ in nothing that the base has, and all stays within one and a half times its memory."""
    num_looks: int = Field(9, ge=1)
    """Times that a trial is measured and saved over its whole run; a kill costs each trial at most the training between two of them."""
    reduction: int = Field(3, ge=2)
    """Of so many trials one goes on (asha, optuna); the first look is at the share 1 / reduction², the next at 1 / reduction of a run."""
    seed: int = Field(0, ge=0)
    """Seed of what is drawn from the space."""


class ScalingConfig(Settings):
    """How many engines answer, each on a card of its own."""

    min_replicas: int = Field(1, ge=0)
    """Engines that always run; with 0 the last one leaves its card in quiet, and the next request waits until one has started."""
    max_replicas: int = Field(1, ge=1)
    """Most engines at once."""
    requests_per_replica: int | None = Field(None, ge=1)
    """Requests in flight that one engine is to have; beyond it another starts. `serve.max_num_seqs` if empty."""
    up_after_s: float = Field(10.0, ge=0.0)
    """How long there must be more requests than that before another engine starts, in seconds."""
    down_after_s: float = Field(300.0, ge=0.0)
    """How long there must be fewer before an engine leaves, in seconds."""
    use_train_cards: bool = False
    """Engines may also take train cards that are idle; a run then waits until chat is quiet again."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is over max_replicas={self.max_replicas}")
        return self


class FeedbackConfig(Settings):
    """What people say of answers, and whether what was said is kept; FEEDBACK_URL names the database."""

    keep_conversations: bool = False
    """Store each chat, response and message with its answer, so that feedback can become training data; the page then shows `consent`."""
    consent: str = Field(
        "Conversations here are stored, and may be used to improve this chatbot. Do not enter personal data.", min_length=1
    )
    """What the chat page says while conversations are kept."""
    max_letters: int = Field(4000, ge=1, le=100_000)
    """Longest comment, and longest better answer, in letters."""


class ServeConfig(Settings):
    """How the base model and its adapters are served."""

    host: str = "127.0.0.1"
    """Address that the chat endpoint listens on; others than loopback need a key (`python -m serve keys create`)."""
    port: Port = 8000
    """Port of the chat endpoint."""
    max_model_len_tokens: int = Field(2048, ge=16, le=1_048_576)
    """Longest prompt plus answer, in tokens."""
    max_num_seqs: int = Field(32, ge=1)
    """Requests that the engine computes at once."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Highest adapter rank that the engine makes room for."""
    max_loras: int = Field(4, ge=1)
    """Adapters that one batch may mix."""
    max_cpu_loras: int = Field(16, ge=1)
    """Adapters kept in host memory; the least used leaves first."""
    kv_cache_gib: int = Field(1, ge=1)
    """Memory for the key-value cache on a card without a GPU, in whole GiB."""
    quantization: Literal["none", "fp8", "bitsandbytes"] = "none"
    """Format of the base in serving, on a card with a GPU: 8 bit (fp8) or 4 bit (bitsandbytes)."""
    gpu_memory_share: Share = 0.9
    """Share of the card's memory that the engine takes, on a card with a GPU."""
    enforce_eager: bool = False
    """Skip torch.compile and CUDA graphs: starts sooner, answers slower. Without a GPU always so."""
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    """Largest request body."""
    max_waiting_requests: int = Field(256, ge=0)
    """Requests of one replica that wait for the engine, beyond `max_num_seqs` that it computes; more are answered with 503."""
    max_answer_tokens: int | None = Field(None, ge=1)
    """Longest answer, in tokens, whatever a request asks for; what the context leaves, if empty."""
    max_choices: int = Field(8, ge=1)
    """Answers that one request may ask for (`n`)."""
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    """Temperature of requests that name none; 0 gives the likeliest answer. The model's own, or 1, if empty."""
    scaling: ScalingConfig = ScalingConfig()
    """How many engines answer, each on a card of its own."""
    feedback: FeedbackConfig = FeedbackConfig()
    """What people say of answers, and whether conversations are kept."""
    tool_parser: str = Field("auto", pattern=r"^[a-z0-9_-]+$")
    """vLLM's parser of tool calls (`hermes`, `llama3_json`, ...); `auto` chooses by the model's family, `none` refuses tools."""

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(f"serve.max_cpu_loras={self.max_cpu_loras} must be at least serve.max_loras={self.max_loras}")
        return self


class JudgeConfig(Settings):
    """A model that says which of two answers is better, asked in both orders; JUDGE_API_KEY is its key."""

    address: str | None = None
    """Address of any OpenAI-compatible endpoint, such as `https://host/v1`; no judge if empty."""
    model: str | None = None
    """The judging model's name there."""
    rubric: str = Field("data/rubric.md", min_length=1)
    """File that says what makes an answer better."""
    num_questions: int = Field(50, ge=2)
    """Most held-out questions that it judges, evenly spread."""

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.address and not self.model:
            raise ValueError("evaluation.judge.address needs evaluation.judge.model")
        return self


class EvaluationConfig(Settings):
    """How a version is measured, on the engine that serves it."""

    num_questions: int | None = Field(None, ge=2)
    """Most held-out conversations that are asked, evenly spread; all, if empty."""
    max_answer_tokens: int = Field(128, ge=1)
    """Longest answer, in tokens."""
    num_at_once: int = Field(32, ge=1)
    """Questions in flight; fewer leave more of the engine to people who chat meanwhile."""
    general: str | None = "data/general.jsonl"
    """Questions of general knowledge with key strings, which show what the base could do before and cannot now; none if empty."""
    lm_eval_tasks: list[str] = []
    """Task files of lm-eval (YAML, with local data), asked through our endpoint; lm-eval must be installed."""
    judge: JudgeConfig = JudgeConfig()
    """A model that says which of two answers is better."""


class GateRule(Settings):
    """What one metric must show; a difference counts in the direction that is better."""

    minimum: float | None = None
    """Least value."""
    maximum: float | None = None
    """Largest value."""
    must_beat_live_by: float | None = Field(None, ge=0.0)
    """Least that it must be better than the live version by."""
    may_lose_at_most: float | None = Field(None, ge=0.0)
    """Most that it may be worse than the live version by."""


class WatchConfig(Settings):
    """A look at a version that was let in, beside the one that was live: where it is worse, it is taken back by itself."""

    minutes: float = Field(0.0, ge=0.0)
    """How long to watch, in minutes; not at all with 0."""
    every_s: float = Field(15.0, ge=0.1)
    """Pause between two rounds, in seconds; in each, both versions are asked held-out questions."""
    num_questions: int = Field(4, ge=1)
    """Questions of one round."""
    min_answers: int = Field(20, ge=1)
    """Answers of each version before errors and latency are judged."""
    errors_more: Share = 0.05
    """How much larger its share of failed requests may be."""
    latency_times: float = Field(2.0, gt=1.0)
    """How many times as long its median answer may take."""
    min_thumbs: int = Field(10, ge=1)
    """Thumbs of each version, given during the watch, before they are judged."""
    thumbs_down_more: Share = 0.2
    """How much larger its share of thumbs down may be."""

    @model_validator(mode="after")
    def _sees_enough(self) -> Self:
        most = (int(self.minutes * 60 / self.every_s) + 1) * self.num_questions
        if self.minutes and most < self.min_answers:
            why = f"in {self.minutes:g} minutes it sees {most} answers at most, and judges from min_answers={self.min_answers} on"
            raise ValueError(f"gate.watch.minutes={self.minutes:g} is too short: {why}")
        return self


class GateConfig(Settings):
    """What a version must show before it is let in (`python -m train CONFIG --promote`)."""

    metrics: dict[str, GateRule] = {"perplexity": GateRule(may_lose_at_most=0.1)}
    """Rules by metric: perplexity, accuracy, exact, general, forgotten, judge, or `lm_eval.TASK`."""
    certain: bool = False
    """Judge by the worse end of the 95 % interval instead of the mean, so that no lucky draw of questions is let in."""
    action: Literal["promote", "canary"] = "promote"
    """What becomes of a version that passes."""
    canary_share: Share = 0.1
    """Share of the conversations that a canary answers."""
    watch: WatchConfig = WatchConfig()
    """A look at the version after it was let in."""


class ChatbotConfig(Settings):
    """One chatbot: its base model, data, training and serving."""

    name: Name
    """Name in the registry and in requests: small letters, digits, dots and dashes."""
    model: ModelConfig = ModelConfig()
    """The base model that adapters are made for."""
    data: DataConfig
    """The conversations, and how they become training rows."""
    train: TrainConfig = TrainConfig()
    """How the adapter is trained."""
    tune: SweepConfig = SweepConfig()
    """How `python -m tune` searches for better settings of `train`."""
    serve: ServeConfig = ServeConfig()
    """How the base model and its adapters are served."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How a version is measured."""
    gate: GateConfig = GateConfig()
    """What a version must show before it is let in."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Check across groups: what is trained must be served."""
        lora, reasons = self.train.lora, []
        if lora.rank > self.serve.max_lora_rank:
            reasons.append(
                f"train.lora.rank={lora.rank} is over serve.max_lora_rank={self.serve.max_lora_rank}; lower the one or raise the other"
            )
        if self.data.max_length_tokens > self.serve.max_model_len_tokens:
            reasons.append(
                f"data.max_length_tokens={self.data.max_length_tokens} is over "
                f"serve.max_model_len_tokens={self.serve.max_model_len_tokens}: the engine could not answer what was trained"
            )
        if self.train.batch_size % self.train.num_workers:
            reasons.append(f"train.batch_size={self.train.batch_size} must be a multiple of train.num_workers={self.train.num_workers}")
        micro_batch = self.train.micro_batch_size
        if micro_batch != "auto" and (self.train.batch_size // self.train.num_workers) % micro_batch:
            reasons.append(f"train.micro_batch_size={micro_batch} must divide a worker's share of train.batch_size={self.train.batch_size}")
        reasons += self._unmeasured()
        if reasons:
            raise ValueError("\n".join(reasons))
        return self

    def _unmeasured(self) -> list[str]:
        """Name the gate's metrics that the evaluation would not bring."""
        measured = {*METRICS, *(f"lm_eval.{Path(task).stem}" for task in self.evaluation.lm_eval_tasks)}
        known = f"known: {', '.join(sorted(measured))}"
        reasons = [f"gate.metrics.{name}: no such metric; {known}" for name in self.gate.metrics if name not in measured]
        if "judge" in self.gate.metrics and not self.evaluation.judge.address:
            reasons.append("gate.metrics.judge: there is no judge; set evaluation.judge.address and model")
        judged = self.gate.metrics.get("judge", GateRule())
        if judged.must_beat_live_by is not None or judged.may_lose_at_most is not None:
            reasons.append("gate.metrics.judge: it compares with the live version already, and 0.5 is a draw; set minimum")
        if {"general", "forgotten"} & set(self.gate.metrics) and not self.evaluation.general:
            reasons.append("gate.metrics: general and forgotten want evaluation.general")
        return reasons


class CardConfig(Settings):
    """One card: a GPU, or a share of the CPU."""

    pool: Literal["serve", "train"]
    """What the card is for."""
    gpu: str | None = Field(None, coerce_numbers_to_str=True)
    """Part of the GPU's name (`RTX 5090`) or its number; a share of the CPU if empty."""


class LendingConfig(Settings):
    """Who may use a card, and for how long at least."""

    enabled: bool = False
    """Lend serve cards to queued jobs while chat is quiet; a request takes them back, and waits until an engine has started."""
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
    secret: Name = "tandem"  # noqa: S105 (its name)
    """Name of the Secret with `auth_token`, `redis_password`, and whatever of `.env` is wanted."""


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
    def _whole_path(self) -> Self:
        if self.storage and "://" not in self.storage and not Path(self.storage).is_absolute():
            raise ValueError(f"storage={self.storage} is neither a whole path, the same on every machine, nor a URL")
        return self

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        if self.listen_host in ("0.0.0.0", "::", ""):  # noqa: S104 (names, not sockets)
            raise ValueError(f"listen_host={self.listen_host!r} is no address at which others reach this machine; name one of its own")
        return self

    @model_validator(mode="after")
    def _one_port_each(self) -> Self:
        ports = {"ray_port": self.ray_port, "dashboard_port": self.dashboard_port, "mlflow_port": self.mlflow_port}
        if len(set(ports.values())) < len(ports):
            same = [name for name, port in ports.items() if list(ports.values()).count(port) > 1]
            raise ValueError(f"{same[-1]}={ports[same[-1]]} is also {' and '.join(same[:-1])}; each service needs a port of its own")
        return self


class SecretFiles(SecretsSettingsSource):
    """A container's secrets, a file each."""

    def __call__(self) -> dict[str, Any]:
        """Read those that are there.

        Raises:
            ConfigError: One of ours cannot be read.
        """
        try:
            return super().__call__()
        except SettingsError as error:
            why = f"{error.__cause__ or error}"
            raise ConfigError(f"a secret in {SECRETS_FOLDER} cannot be read", why, f"let user {os.getuid()} read the file") from None


class Environment(BaseSettings):
    """Secrets and places, from the environment or from `.env`."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read `.env` of the checkout, whose copy in a Ray job has none: secrets are not uploaded; and a container's secret files."""
        checkout = Path(os.environ.get("TANDEM_CHECKOUT", "."))
        dotenv = DotEnvSettingsSource(settings_cls, env_file=checkout / ".env", env_ignore_empty=True)
        # A machine may have such a folder for others than us.
        has_files = SECRETS_FOLDER.is_dir() and os.access(SECRETS_FOLDER, os.R_OK | os.X_OK)
        files = (SecretFiles(settings_cls, secrets_dir=SECRETS_FOLDER),) if has_files else ()
        return init_settings, env_settings, dotenv, *files

    huggingface_token: SecretStr | None = None
    """Token for gated models of the Hugging Face hub."""
    mlflow_tracking_uri: str | None = None
    """Another MLflow server; `up` starts none then."""
    feedback_url: SecretStr | None = None
    """SQLAlchemy URL of the database for feedback; `feedback.db` inside TANDEM_HOME if empty."""
    tandem_token: SecretStr | None = None
    """Token of the cluster, 32 letters or more, the same on each machine; `up` makes one in TANDEM_HOME if empty."""
    tandem_api_key: SecretStr | None = None
    """Key for our own endpoint; on the cluster's machine none is needed."""
    judge_api_key: SecretStr | None = None
    """Key for the endpoint of `evaluation.judge`."""
    base_model_name: str | None = None
    """Overrides `model.name` of every config."""
    tandem_home: Path = Path(".tandem")
    """Folder for everything that a run leaves behind."""
    log_dir: Path | None = None
    """Folder for logs; `logs` inside TANDEM_HOME if empty."""
