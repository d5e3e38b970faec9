"""One chatbot: how it learns, how it is served and measured, and what a version must show before it is let in."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Name, Port, Settings, Share
from configs.schema.training import DataConfig, ModelConfig, SweepConfig, TrainConfig

METRICS = ("perplexity", "accuracy", "exact", "general", "forgotten", "judge")


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
    """Thumbs of each version before they are judged: of the new one those of the watch, of the old one all that it ever got."""
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
