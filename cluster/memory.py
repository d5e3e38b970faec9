"""How much memory a step of training, or an engine, takes of a card: arithmetic on a model's shape, without its weights.

Knows what stays in memory from the forward to the backward pass of `train`, and what vLLM sets aside. Does not choose settings.

The peak that is predicted is what a process takes of its card: all that torch's allocator holds there (`max_memory_reserved`, so what is
lost between tensors too), and the CUDA context. That is what runs out, and the allocator's part no other process on the card can blur. On
a CPU it is the process's resident memory. Every constant stands at the top, with its source.
"""

from dataclasses import dataclass, fields

from cluster.home import BYTES_PER_GIB
from cluster.shape import ATTENTION, MLP, Shape
from configs.schema import ServeConfig, TrainConfig

MIB = 2**20
# On two CPU cores plain attention trained the 135M model at 343 against SDPA's 300 tokens/s on rows of 50 tokens, 386 against 362 on
# rows of 256, and 290 against 325 on rows of 512.
MAX_PLAIN_ATTENTION_TOKENS = 256
FP32_BYTES, BF16_BYTES = 4, 2
# PEFT holds an adapter in fp32 beside a base in bf16; torch's AdamW has two moments in fp32.
OPTIMIZER_BYTES = {32: 8.0, 8: 2 + 2 * 4 / 256}  # a weight; 8 bit as bitsandbytes has it, with a scale for each 256
NF4_BYTES = 0.5 + 4 / 64  # a weight, with a scale in fp32 for each 64
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # the scales in 8 bit, with one in fp32 for each 256 of them
# Logits of so many tokens lie in memory at once that they take so much in fp32, and their log-softmax as much again; see `train.loss`.
CHUNK_BYTES = 256 * MIB
CHUNK_LOGIT_BYTES = 2 * FP32_BYTES
# Of models that change their logits, all are upcast; their log-softmax is kept, and beside it lie two gradients of its size when the
# backward pass begins.
LOGIT_BYTES = 12
EVALUATION_LOGIT_BYTES = 10  # bf16, fp32, and the log-softmax, at once
EVALUATION_TOKENS = 2048  # of a batch; micro-batches of a few short rows would leave a processor idle
# What a compiled block keeps of a token beyond ours, in widths: the 8B shape held 2.74 GiB more of 8,192 tokens, which is 1.37
# (results/step-profile-h200-..-11-29.json), with Liger's kernels, which it no longer has. One that is recomputed was never measured.
COMPILED_WIDTHS = 1.4
# What torch's allocator holds beyond the tensors that are planned, with segments that grow: two workspaces of cuBLAS (32 MiB each on
# Hopper), what lies between tensors, and as much as the largest layer's weight twice. Context: driver, cuBLAS and kernels of a training
# process. Steps that are CUDA graphs have a memory of their own, and what the driver keeps of them: with the 135M shape 100 MiB for one
# length of rows, and 255 MiB with the 16 graphs that there may be. See results/memory-h200-*, memory-asked-h200-*.
LOST_BYTES, LOST_LAYERS = 235 * MIB, 2
CUDA_CONTEXT_BYTES = 770 * MIB
STEP_GRAPHS_BYTES = 250 * MIB
GRAPH_ANSWER_PARTS = 4  # of a batch's tokens so many parts may carry loss where steps are graphs, so that there are few shapes
# Python with torch, transformers and Ray's worker: what the 135M model's run is above its tensors (1.90 GiB in training-cpu-..-11-22.json).
CPU_PROCESS_BYTES = 1150 * MIB

# Of a card with 79.18 GiB, nine tenths its own, vLLM 0.26 (eager, 4 adapters of rank 64) on an H100 left 54.23 GiB to the cache of the 8B
# shape in bf16, 60.73 in fp8, and 67.68 to that of the 1B shape: as planned within 0.05. CUDA graphs and 4 bit are not measured yet.
FP8_BYTES = 1.0
VLLM_NF4_BYTES = NF4_BYTES  # it takes double quantisation apart as it loads
PREFILL_TOKENS, LARGE_CARD_PREFILL_TOKENS, LARGE_CARD_GIB = 2048, 8192, 70  # `max_num_batched_tokens`, by default
SAMPLER_BYTES = 16  # a logit in fp32, its probability, and their sorted order with places
CUDA_GRAPHS_BYTES = 1024 * MIB
ENGINE_CONTEXT_BYTES = 240 * MIB  # beyond what vLLM takes for a card's own
CPU_ENGINE_BYTES = 3000 * MIB  # two processes without a model: the 135M engine of 4 GB in FACTS, less weights and cache


@dataclass(frozen=True)
class Device:
    """What of a card counts here."""

    on_gpu: bool
    value_bytes: int = BF16_BYTES
    """Of a weight or activation: 2 in bf16, 4 in fp32."""


@dataclass(frozen=True)
class Rows:
    """Training rows, by the worst that a micro-batch can be."""

    longest_tokens: int
    most_loss_tokens: int
    """Of one row."""


@dataclass(frozen=True)
class Need:
    """Bytes that a process takes of a card at its worst moment."""

    weights: float = 0.0
    adapter: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    lost: float = 0.0
    """Between tensors, and in workspaces."""
    process: float = 0.0
    """CUDA context; on a CPU, the process without its tensors."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def gib(self) -> float:
        """All of it, in GiB."""
        return self.total_bytes / BYTES_PER_GIB


@dataclass(frozen=True)
class Step:
    """One micro-batch of training on one card; `train` names its size and whether activations are recomputed."""

    shape: Shape
    train: TrainConfig
    rows: Rows
    device: Device

    @property
    def size(self) -> int:
        """Rows of the micro-batch."""
        assert isinstance(self.train.micro_batch_size, int), "the plan has not chosen yet"
        return self.train.micro_batch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch, with those that fill up its rows."""
        return self.size * self.rows.longest_tokens

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.train.gradient_checkpointing is True

    @property
    def may_be_graphs(self) -> bool:
        """Whether steps may be CUDA graphs; see `train.model.pick_graphs`."""
        varies = not self._fuses or self.shape.changes_logits
        return self.device.on_gpu and self.train.cuda_graphs is not False and self.train.num_workers == 1 and not varies

    def need(self) -> Need:
        """Return what is needed at the worst of the step's moments."""
        return max(self._moments(), key=lambda moment: moment.total_bytes)

    def _moments(self) -> list[Need]:
        """The loss, the first and the last block on the way back, the optimizer's turn, and an evaluation."""
        kept, block, grads = self._kept_bytes(), self._backward_bytes(), self._num_adapter * FP32_BYTES
        held = grads if self._accumulates or self.may_be_graphs else 0  # gradients of the micro-batches before, or where graphs add
        num_rows = max(self.size, EVALUATION_TOKENS / self.rows.longest_tokens)
        return [
            self._moment(kept, held, self._logit_bytes(self.size)),
            self._moment(kept + block, held),
            self._moment(block, grads),
            self._moment(0, grads),
            self._moment(0, held, self._logit_bytes(num_rows, learns=False)),
        ]

    def _moment(self, activations: float, gradients: float, logits: float = 0.0) -> Need:
        in_bf16 = self.device.value_bytes == BF16_BYTES  # as which the adapter is copied; see `train.fused`
        return Need(
            weights=weight_bytes(self.shape, self._linear_bytes, self.device) + self._scratch_bytes(),
            adapter=self._num_adapter * (FP32_BYTES + (BF16_BYTES if self._fuses and in_bf16 else 0)),
            optimizer=self._num_adapter * OPTIMIZER_BYTES[self.train.optimizer_bits],
            # With several workers, gradients lie in buckets too, which are sent.
            gradients=gradients + (self._num_adapter * FP32_BYTES if self.train.num_workers > 1 else 0),
            activations=activations,
            logits=logits,
            lost=self._lost_bytes() if self.device.on_gpu else 0.0,
            process=self._process_bytes(),
        )

    def _lost_bytes(self) -> float:
        of_logits = self._num_logits(self.size) * BF16_BYTES if self.shape.changes_logits else 0  # which come and go among larger things
        largest = max(inputs * outputs for inputs, outputs in self.shape.linear_layers.values()) * self.device.value_bytes
        return LOST_BYTES + LOST_LAYERS * largest + of_logits

    def _process_bytes(self) -> float:
        if not self.device.on_gpu:
            return CPU_PROCESS_BYTES
        return CUDA_CONTEXT_BYTES + (STEP_GRAPHS_BYTES if self.may_be_graphs else 0)

    @property
    def _num_adapter(self) -> int:
        return self.shape.num_adapter_weights(self.train.lora)

    @property
    def _accumulates(self) -> bool:
        return self.train.batch_size // self.train.num_workers > self.size

    @property
    def _linear_bytes(self) -> float:
        if self.train.precision == "fp8":
            return 2 * FP8_BYTES  # as it is and transposed; see `train.fp8`
        if self.train.quantization == "none":
            return self.device.value_bytes
        return NF4_DOUBLE_BYTES if self.train.double_quantization else NF4_BYTES

    def _kept_bytes(self) -> float:
        """What the forward pass leaves for the backward pass: each block's insides, or its input alone where it is recomputed."""
        if self.recomputes:
            return self.shape.num_blocks * self.num_tokens * self.shape.width * self.device.value_bytes
        # Under autocast PEFT multiplies each matrix of the adapter as a copy in bf16, which the backward pass wants too.
        copies = self._num_adapter * BF16_BYTES if self.device.value_bytes == BF16_BYTES and not self._fuses else 0
        return self.shape.num_adapted_blocks(self.train.lora) * self._block_bytes() + copies

    def _block_bytes(self) -> float:
        """What one block keeps of a micro-batch."""
        compiled = COMPILED_WIDTHS * self.shape.width * self.device.value_bytes if self.train.compile and self.device.on_gpu else 0
        return self.num_tokens * (self._norm_bytes() + self._attention_bytes() + self._mlp_bytes() + self._adapter_bytes() + compiled)

    def _norm_bytes(self) -> float:
        """The inputs of two norms, which without fused kernels are kept in fp32, and their outputs where an adapter reads them."""
        adapted, value = self.shape.adapted_layers(self.train.lora), self.device.value_bytes
        read = bool({"q_proj", "k_proj", "v_proj"} & set(adapted)) + bool({"gate_proj", "up_proj"} & set(adapted))
        read = 0 if self.train.lora.dropout else read  # each adapter then keeps an input of its own
        return self.shape.width * (2 * (value if self.device.on_gpu else FP32_BYTES) + read * value)

    def _attention_bytes(self) -> float:
        """Queries, keys, values and the outcome; in plain attention keys and values stand there once for each head."""
        shape, value = self.shape, self.device.value_bytes
        plain = not self.device.on_gpu and not self.train.packing and self.rows.longest_tokens <= MAX_PLAIN_ATTENTION_TOKENS
        kv_width = shape.query_width if plain else shape.kv_width
        found = (2 * shape.query_width + 2 * kv_width) * value + FP32_BYTES * shape.num_heads
        if shape.has_qk_norm:
            found += (shape.query_width + shape.kv_width) * value
        if self.train.packing:  # the outcome of rows that are filled up, and of their tokens alone
            found += shape.query_width * value
        if plain:  # the softmax in fp32, and in the model's format
            return found + shape.num_heads * self.rows.longest_tokens * (FP32_BYTES + (value if value == BF16_BYTES else 0))
        return found

    def _mlp_bytes(self) -> float:
        """Gate, up, and their product where an adapter reads it; without fused kernels the activated gate too."""
        read = "down_proj" in self.shape.adapted_layers(self.train.lora) and not self.train.lora.dropout
        kept = 2 + read + (not self.device.on_gpu)
        return kept * self.shape.inner_width * self.device.value_bytes

    def _adapter_bytes(self) -> float:
        """What the adapter's first matrices give; with dropout each has an input of its own, and the places that were zeroed."""
        lora, value = self.train.lora, self.device.value_bytes
        adapted = self.shape.adapted_layers(lora)
        zeroed = 1 if self.device.on_gpu else value  # a CPU multiplies by noughts and ones
        dropped = sum(inputs for inputs, _ in adapted.values()) * (value + zeroed) if lora.dropout else 0
        return len(adapted) * lora.rank * value + dropped

    def _backward_bytes(self) -> float:
        """What a block's way back takes beside what was kept: gradients inside the MLP or attention, and a weight taken out of 4 bit."""
        shape, value = self.shape, self.device.value_bytes
        # Liger's kernel writes the gradients of gate and up where those were.
        mlp = (1 if self.device.on_gpu else 3) * shape.inner_width + shape.width
        attention = 5 * shape.query_width + shape.width
        found: float = self.num_tokens * max(mlp, attention) * value
        if self.train.quantization == "nf4":
            found += self._unpacked_bytes()
        if self.train.precision == "fp8":
            found += self.num_tokens * shape.inner_width * FP8_BYTES  # a gradient as it is multiplied
        return found + self._block_bytes() if self.recomputes else found

    @property
    def _fuses(self) -> bool:
        """Whether ours multiply, and not PEFT's own layers; see `train.fused`."""
        return not self.train.lora.dropout and not (self.train.compile and self.device.on_gpu)

    @property
    def _unpacks_by_block(self) -> bool:
        """Whether the layers with an adapter are taken out of 4 bit a block at a time; see `train.unpacked`."""
        return self.train.quantization == "nf4" and self._fuses

    def _scratch_bytes(self) -> float:
        """What a block's weights are unpacked to, which stays."""
        adapted = self.shape.adapted_layers(self.train.lora).values() if self._unpacks_by_block else ()
        return float(sum(inputs * outputs for inputs, outputs in adapted) * self.device.value_bytes)

    def _unpacked_bytes(self) -> float:
        """What a layer's weight is unpacked to where that is done by itself; on a CPU a block's are once more."""
        has_all = self.shape.num_adapted_blocks(self.train.lora) == self.shape.num_blocks
        together = set(self.shape.adapted_layers(self.train.lora)) if self._unpacks_by_block and has_all else set()
        alone = [inputs * outputs for name, (inputs, outputs) in self.shape.linear_layers.items() if name not in together]
        return max(max(alone, default=0) * self.device.value_bytes, 0 if self.device.on_gpu else self._scratch_bytes())

    @property
    def _loss_tokens(self) -> int:
        """Of one row; with those that fill them up where steps are graphs."""
        most, longest = self.rows.most_loss_tokens, self.rows.longest_tokens
        part = -(-longest // GRAPH_ANSWER_PARTS)
        return min(longest, -(-most // part) * part) if self.may_be_graphs else most

    def _num_logits(self, num_rows: float) -> float:
        """How many logits of so many rows are there at once: those of some tokens that carry loss; of a model that changes them, all."""
        shape = self.shape
        if shape.changes_logits:
            return num_rows * self.rows.longest_tokens * shape.vocabulary
        return min(num_rows * self._loss_tokens, chunk_tokens(shape.vocabulary)) * shape.vocabulary

    def _logit_bytes(self, num_rows: float, learns: bool = True) -> float:
        """The logits, and where a step learns, what they are made of and its gradient, which on the way back is there in fp32 too."""
        number, value = self._num_logits(num_rows), self.device.value_bytes
        if self.shape.changes_logits:
            return number * (LOGIT_BYTES + 2 * value if learns else EVALUATION_LOGIT_BYTES)
        states = num_rows * self._loss_tokens * self.shape.width if learns else 0
        return max(number * CHUNK_LOGIT_BYTES, states * FP32_BYTES) + 2 * states * value


def chunk_tokens(vocabulary: int) -> int:
    """Return how many tokens' logits are made at once in training."""
    return max(1, CHUNK_BYTES // (vocabulary * FP32_BYTES))


def weight_bytes(shape: Shape, linear_bytes: float, device: Device) -> float:
    """Return the bytes of a base whose linear layers take so many a weight; the rest stays in full precision."""
    return shape.num_linear_weights * linear_bytes + shape.num_other_weights * device.value_bytes


def served_bytes(quantization: str, device: Device) -> float:
    """Return the bytes of a weight of a linear layer, as the engine holds it; without a GPU it quantises none."""
    return {"fp8": FP8_BYTES, "bitsandbytes": VLLM_NF4_BYTES}.get(quantization, device.value_bytes) if device.on_gpu else device.value_bytes


def kv_bytes(shape: Shape, device: Device) -> int:
    """Return the bytes of one token in the key-value cache."""
    return 2 * shape.num_blocks * shape.kv_width * device.value_bytes


@dataclass(frozen=True)
class Engine:
    """What an engine on a card has room for."""

    need: Need
    """All but the cache."""
    cache_bytes: float
    """What is left for the cache, of what the engine may take; under zero where it does not even start."""
    token_bytes: int

    @property
    def num_cache_tokens(self) -> int:
        """Tokens of all requests together that the cache holds."""
        return max(0, int(self.cache_bytes // self.token_bytes))


def plan_engine(shape: Shape, serve: ServeConfig, device: Device, card_gib: float) -> Engine:
    """Return what an engine takes of a card, or of its share of one, and what that leaves for the cache."""
    need, token_bytes = _engine_need(shape, serve, device, card_gib), kv_bytes(shape, device)
    if not device.on_gpu:
        left = card_gib * BYTES_PER_GIB - need.total_bytes
        return Engine(need, min(serve.kv_cache_gib * BYTES_PER_GIB, left), token_bytes)
    return Engine(need, serve.gpu_memory_share * card_gib * BYTES_PER_GIB - need.total_bytes, token_bytes)


def _engine_need(shape: Shape, serve: ServeConfig, device: Device, card_gib: float) -> Need:
    slot = shape.num_blocks * serve.max_lora_rank * sum(sum(shape.linear_layers[name]) for name in (*ATTENTION, *MLP))
    batch = LARGE_CARD_PREFILL_TOKENS if card_gib >= LARGE_CARD_GIB else PREFILL_TOKENS
    batch = max(batch, serve.max_num_seqs)
    process = CPU_ENGINE_BYTES
    if device.on_gpu:
        process = ENGINE_CONTEXT_BYTES + (0 if serve.enforce_eager else CUDA_GRAPHS_BYTES)
    return Need(
        weights=weight_bytes(shape, served_bytes(serve.quantization, device), device),
        adapter=serve.max_loras * slot * device.value_bytes,
        activations=batch * (4 * shape.width + 7 * shape.inner_width) * device.value_bytes,
        logits=serve.max_num_seqs * shape.vocabulary * SAMPLER_BYTES,
        process=process,
    )
