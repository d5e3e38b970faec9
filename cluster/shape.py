"""The shape of a language model, from its config.json alone.

Knows which linear layers a block of each family has, and counts weights. Does not know cards, or what is done with a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import ModelError
from configs.schema import LoraConfig

# Families whose blocks are Llama's (attention, a gated MLP, two norms), with what transformers takes where their config.json is silent.
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {},
    "llama": {},
    "ministral": {"num_key_value_heads": 8},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32, "attention_bias": True},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
WITH_QK_NORM = ("qwen3",)
# Settings with which a model changes its logits after the head.
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")
WANTED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, in numbers and not in bytes."""

    width: int
    """Of the hidden state."""
    inner_width: int
    """Of the MLP."""
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    vocabulary: int
    max_context_tokens: int
    tied: bool
    """Whether the head is the embedding's own matrix."""
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    changes_logits: bool = False
    """Whether the model scales or caps its logits after the head."""

    @property
    def query_width(self) -> int:
        """Width of all heads' queries together."""
        return self.num_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all heads' keys together; values are as wide."""
        return self.num_kv_heads * self.head_width

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a block."""
        width, inner, query, kv = self.width, self.inner_width, self.query_width, self.kv_width
        sizes = [(width, query), (width, kv), (width, kv), (query, width), (width, inner), (width, inner), (inner, width)]
        return dict(zip((*ATTENTION, *MLP), sizes, strict=True))

    @property
    def num_linear_weights(self) -> int:
        """Weights of all blocks' linear layers: those that are quantised."""
        return self.num_blocks * sum(inputs * outputs for inputs, outputs in self.linear_layers.values())

    @property
    def num_head_weights(self) -> int:
        """Weights of the head, which may be the embedding's."""
        return self.vocabulary * self.width

    @property
    def num_other_weights(self) -> int:
        """Weights that stay in full precision whatever is quantised: embedding, head, norms, biases."""
        norms = 2 * self.width + (2 * self.head_width if self.has_qk_norm else 0)
        biases = self.query_width + 2 * self.kv_width if self.has_qkv_bias else 0
        return self.num_head_weights * (1 if self.tied else 2) + self.num_blocks * (norms + biases) + self.width

    @property
    def num_weights(self) -> int:
        """All weights."""
        return self.num_linear_weights + self.num_other_weights

    def num_adapted_blocks(self, lora: LoraConfig) -> int:
        """Return how many blocks, the last ones, get an adapter."""
        return min(lora.num_layers or self.num_blocks, self.num_blocks)

    def adapted_layers(self, lora: LoraConfig) -> dict[str, tuple[int, int]]:
        """Return the linear layers of a block that get an adapter.

        Raises:
            ModelError: The config names a layer that there is not.
        """
        layers = self.linear_layers
        if isinstance(lora.target_modules, str):
            return layers
        wanted = [name.rpartition(".")[2] for name in lora.target_modules]
        if unknown := [name for name in wanted if name not in layers]:
            remedy = f"train.lora.target_modules=all-linear, or some of: {', '.join(layers)}"
            raise ModelError(
                "train.lora.target_modules names no layer of this model", f"no linear layer is named {', '.join(unknown)}", remedy
            )
        return {name: size for name, size in layers.items() if name in wanted}

    def num_adapter_weights(self, lora: LoraConfig) -> int:
        """Count an adapter's weights, as PEFT makes it."""
        return self.num_adapted_blocks(lora) * lora.rank * sum(sum(size) for size in self.adapted_layers(lora).values())


def read_shape(config: Mapping[str, Any], named: str) -> Shape:
    """Read a model's config.json; `named` says in errors whose it is.

    Raises:
        ModelError: The plan does not know such a model.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES or config.get("num_local_experts"):
        why = f"it is a {family}, and the plan knows {', '.join(FAMILIES)}"
        raise ModelError(f"no plan for {named}", why, "set train.micro_batch_size and train.gradient_checkpointing by hand")
    said = FAMILIES[family] | {name: value for name, value in config.items() if value is not None}
    if wrong := [name for name in WANTED if type(said.get(name)) is not int or said[name] < 1]:
        raise ModelError(f"no plan for {named}", f"its config.json has no usable {', '.join(wrong)}", "fetch its config.json again")
    return Shape(
        width=said["hidden_size"],
        inner_width=said["intermediate_size"],
        num_blocks=said["num_hidden_layers"],
        num_heads=said["num_attention_heads"],
        num_kv_heads=int(said.get("num_key_value_heads", said["num_attention_heads"])),
        head_width=int(said.get("head_dim", said["hidden_size"] // said["num_attention_heads"])),
        vocabulary=said["vocab_size"],
        max_context_tokens=int(said.get("max_position_embeddings", 2048)),
        tied=bool(said.get("tie_word_embeddings", False)),
        has_qkv_bias=bool(said.get("attention_bias", False)),
        has_qk_norm=family in WITH_QK_NORM,
        changes_logits=any(said.get(name) for name in LOGIT_SETTINGS),
    )
