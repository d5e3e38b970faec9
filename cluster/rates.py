"""How fast cards train and answer: a small table of what was measured, and arithmetic from there to other models and settings.

Knows operations and bytes. Does not know memory. A card that is not in the table has no rate until it is measured (`plan --measure`).
"""

from dataclasses import dataclass

from cluster.memory import BF16_BYTES, NF4_DOUBLE_BYTES, Device, Step, weight_bytes
from cluster.shape import Shape
from configs.schema import TrainConfig

RECOMPUTE_TIME = 1.42  # of a step without: 14,432 against 10,158 tokens/s on one H100, 8B shape, 4 rows of 2,048, Liger's kernels
# Of a step that waits for launches, in three shapes with rows of 512 tokens (memory-h100-..-11-23.json).
RECOMPUTE_LAUNCHES, NF4_LAUNCHES = 1.7, 1.4
# Where steps are CUDA graphs, the least time of a block, and of one that is recomputed (memory-h200-..-11-30b.json, the 135M shape).
GRAPH_LAUNCH_S, RECOMPUTE_GRAPH = 0.00068, 1.23
# A GPU's products are the slower the narrower a model is: by this rule the three shapes of that file are told within a fifth.
RATED_WIDTH, HALF_WIDTH = 4096, 1400


@dataclass(frozen=True)
class Rate:
    """What one kind of card does, as measured."""

    train_flops_per_s: float
    """Useful operations in training, without those that are done twice."""
    launch_s: float = 0.0
    """Least time of a block's way forth and back, which the host needs to launch its kernels; small micro-batches wait for it."""
    read_bytes_per_s: float | None = None
    """Weights read while one request is answered; None where it was not measured."""
    source: str = ""
    precision: str = "auto"
    """What the base's linear layers multiplied in, as `train.precision` has it."""

    def is_of(self, train: TrainConfig) -> bool:
        """Whether it is the rate of such training; in FP8 only `plan --measure` has measured cards."""
        return train.precision == self.precision


# By a part of the accelerator's name. Each is made from a result in tests/benchmarks/results, which a test does anew.
RATES = {
    "H200": Rate(
        train_flops_per_s=4.86e14,  # LoRA, 8B shape, 2 rows of 4,096: 15,742 tokens/s
        launch_s=0.00477,  # rows of 512 tokens in three shapes, on average, without graphs; other hosts take half or twice as long
        read_bytes_per_s=3.18e12,  # 211 tokens/s of the same shape in bf16, one request at a time
        source="training-200-steps-h200-2026-11-30, memory-asked-h200-2026-11-30, serving-h200-2026-11-30",
    ),
    "H100": Rate(
        train_flops_per_s=4.25e14,  # LoRA, 8B shape, 4 rows of 2,048: 14,265 tokens/s
        # Rows of 512 tokens in three shapes, on average; twice that behind another host (sweep-shared-base-h100-..-11-23.json).
        launch_s=0.0076,
        read_bytes_per_s=2.27e12,  # 158 tokens/s of the same shape in bf16, one request at a time
        source="training-h100-80gb-hbm3-2026-11-22, memory-h100-80gb-hbm3-2026-11-23, serving-h100-80gb-hbm3-2026-11-23",
    ),
}
CPU_CORE = Rate(train_flops_per_s=5.7e10, source="training-cpu-2-cores-2026-11-22")  # LoRA on the MLP, 135M: 242 tokens/s on two cores
# By this much the quicker of two settings is chosen on a GPU without a rate: a desk's large card, which computes a third as fast as an
# H100 behind the same host. Nothing is told to anyone from it.
UNKNOWN = Rate(train_flops_per_s=1.4e14, launch_s=0.0076)


def find_rate(accelerator: str, num_cpus: int = 1) -> Rate | None:
    """Return the rate of a card, by its name; None where nobody measured such a card."""
    if accelerator == "cpu":
        return Rate(CPU_CORE.train_flops_per_s * num_cpus, source=CPU_CORE.source)
    words = accelerator.upper().replace("_", "-").replace(" ", "-").split("-")
    return next((rate for name, rate in RATES.items() if name in words), None)


def step_flops(step: Step) -> float:
    """Return the useful operations of a micro-batch: forth, and back where an adapter lies behind; frozen weights take no gradient."""
    shape = step.shape
    # A token's way forth.
    block = 2 * shape.num_linear_weights / shape.num_blocks + 2 * step.rows.longest_tokens * shape.query_width
    on_the_way_back = min(step.train.lora.num_layers or shape.num_blocks, shape.num_blocks)
    blocks = step.num_tokens * block * (shape.num_blocks + on_the_way_back)
    return blocks + 4 * shape.num_head_weights * step.size * step.rows.most_loss_tokens


def step_s(step: Step, rate: Rate) -> float:
    """Return the seconds of a micro-batch: what it computes takes, or what launching it takes."""
    computed, launched = step_flops(step) / rate.train_flops_per_s * overhead(step), rate.launch_s * step.shape.num_blocks
    if step.device.on_gpu:
        computed *= (1 + HALF_WIDTH / step.shape.width) / (1 + HALF_WIDTH / RATED_WIDTH)
        computed += unpack_s(step, rate)
    if step.may_be_graphs:
        return max(computed, min(rate.launch_s, GRAPH_LAUNCH_S * (RECOMPUTE_GRAPH if step.recomputes else 1)) * step.shape.num_blocks)
    launched *= NF4_LAUNCHES if step.train.quantization == "nf4" else 1
    return max(computed, launched * RECOMPUTE_LAUNCHES if step.recomputes else launched)


def unpack_s(step: Step, rate: Rate) -> float:
    """Return the seconds in which a base in 4 bit is read and written out in bf16, on the way forth and on the way back."""
    if step.train.quantization != "nf4" or rate.read_bytes_per_s is None:
        return 0.0
    return 2 * step.shape.num_linear_weights * (NF4_DOUBLE_BYTES + BF16_BYTES) / rate.read_bytes_per_s


def overhead(step: Step) -> float:
    """Return how many times longer a step computes for what is done twice."""
    return RECOMPUTE_TIME if step.recomputes else 1.0


def train_tokens_per_s(step: Step, rate: Rate) -> float:
    """Return how many tokens a card trains in a second, where all rows are as long as the longest."""
    return step.num_tokens / step_s(step, rate)


def answer_tokens_per_s(shape: Shape, device: Device, rate: Rate) -> float | None:
    """Return how fast one request is answered by itself, where nothing is quantised: each token reads all weights but the embedding."""
    if rate.read_bytes_per_s is None:
        return None
    embedding = 0 if shape.tied else shape.num_head_weights * device.value_bytes
    return rate.read_bytes_per_s / (weight_bytes(shape, device.value_bytes, device) - embedding)
