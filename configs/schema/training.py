"""How a chatbot learns: its base model, data, adapter, training, and the search for better settings."""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Count, Settings, Share


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
    precision: Literal["auto", "fp8"] = "auto"
    """What the frozen base's linear layers multiply in: the base's own number format, or FP8 on a GPU that has it."""
    compile: bool = False
    """Have torch compile the model's blocks, on a GPU: some time at a run's beginning, for steps that ask less of the host."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Ask a GPU for a whole step at once, as a CUDA graph, where batches of its shape come again; `auto` where it waits for the host."""
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
    optimizer_bits: Literal[32, 8] = 32
    """Format of the optimizer's two numbers for each of the adapter's weights; 8 bit, by bitsandbytes, take a quarter of the memory."""
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
    def _one_format(self) -> Self:
        if self.precision == "fp8" and self.quantization != "none":
            raise ValueError(
                f"train.precision=fp8 needs the base's own weights, not train.quantization={self.quantization}; set one of them"
            )
        return self

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
    share: float = Field(0.33, gt=0.0, le=1.0)
    """Of what every trial to its end would cost, where `asha` can count them: when halving is done, the best that wait go on to the end as
    long as it stays within this. Halving itself (0.26 of nine trials, more with `reduction: 2`) and one to the end are done in any case."""


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
