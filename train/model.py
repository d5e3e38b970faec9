"""The base model with its adapter, ready for training.

Knows transformers, PEFT and bitsandbytes. Does not know the step or where the data comes from.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from cluster.memory import MAX_PLAIN_ATTENTION_TOKENS
from cluster.shape import LOGIT_SETTINGS
from configs.errors import ModelError
from configs.schema import LoraConfig, ModelConfig, TrainConfig
from data.template import NO_LOSS
from train.attention import attend_without_masks, lay_end_to_end, take
from train.fp8 import quantise_base, require_fp8
from train.fused import fuse_adapter
from train.loss import sum_losses
from train.rows import answer_places
from train.unpacked import pack_by_block

MAX_VARIANTS = 64  # of a compiled block; up to 20 were seen
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def pick_dtype(config: ModelConfig) -> torch.dtype:
    """Return the number format of the base: bf16 where the device computes in it, unless the config says otherwise."""
    if config.precision != "auto":
        return torch.bfloat16 if config.precision == "bf16" else torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_base(folder: Path, model: ModelConfig, train: TrainConfig, longest_tokens: int) -> Any:
    """Load the frozen base, in 4 bit or FP8 if the config says so, on the worker's one device, for rows of at most `longest_tokens`.

    Raises:
        ClusterError: This GPU has no FP8.
        ModelError: The base cannot be read, or does not suit FP8.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if train.precision == "fp8":
        require_fp8()
    let_segments_grow()
    dtype = pick_dtype(model)
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if train.quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=train.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    if torch.cuda.is_available():
        settings["device_map"] = {"": 0}
    try:
        attention = pick_attention(train, longest_tokens)
        base, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation=attention, **settings)
        if loaded["missing_keys"]:  # transformers makes them up at random
            raise ValueError(f"its files lack {', '.join(sorted(loaded['missing_keys'])[:5])}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the base model from {folder}", str(error), "python -m cluster doctor") from error
    base.config.use_cache = False
    finish_base(base, train)
    return base


def finish_base(base: Any, train: TrainConfig) -> None:
    """Give a base the kernels that it trains with, and put it in FP8 if the config says so.

    Raises:
        ModelError: It does not suit FP8.
    """
    if torch.cuda.is_available() and not is_compiled(train):  # torch makes its own
        fuse_kernels(base)
    if train.precision == "fp8":
        quantise_base(base)


def pick_attention(train: TrainConfig, longest_tokens: int) -> str | None:
    """Return the implementation of attention that is quickest for rows of at most so many tokens; None leaves it to transformers."""
    return None if torch.cuda.is_available() or train.packing or longest_tokens > MAX_PLAIN_ATTENTION_TOKENS else "eager"


def let_segments_grow() -> None:
    """Let torch's allocator grow its segments in place: batches of many lengths then leave few holes, and the peak can be told before.

    Where the driver cannot, or the environment says something else, all stays as it is.
    """
    if not torch.cuda.is_available() or any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", torch.cuda.memory._set_allocator_settings)
    change("expandable_segments:True")
    try:
        torch.empty(1, device="cuda")
    except RuntimeError:
        change("expandable_segments:False")


def fuse_kernels(base: Any) -> None:
    """Put Liger's fused norms, rotations and gates into a model that it knows; the loss stays ours."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        return
    _apply_liger_kernel_to_instance(model=base, fused_linear_cross_entropy=False, cross_entropy=False)


def add_adapter(base: Any, lora: LoraConfig, gradient_checkpointing: bool, label_smoothing: float = 0.0, compiles: bool = False) -> Any:
    """Put a fresh adapter beside the base's linear layers, and make its forward pass compute only the logits that carry loss."""
    if gradient_checkpointing:
        # torch's older way asks a fifth less of the host, but several workers' gradients come too soon in it.
        is_alone = not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1)
        draws = bool(lora.dropout or draws_numbers(base))
        base.gradient_checkpointing_enable({"use_reentrant": is_alone, "preserve_rng_state": draws})
        base.enable_input_require_grads()
    model = insert_adapter(base, lora)
    if compiles:
        # Each of a few numbers of rows, of lengths and of modes is a variant, and past the limit (8) blocks are not compiled any more.
        torch._dynamo.config.recompile_limit = MAX_VARIANTS
        # Of PEFT's own layers: torch 2.11 loses the gradient of functions that, as ours do, change a tensor (pytorch issue 180642).
        for block in blocks(base):
            block.compile()
    else:
        fuse_adapter(model)
        if not lora.dropout:  # else PEFT multiplies
            pack_by_block(blocks(base))
    # An instance attribute: forward() of this one model, not of its class.
    base.forward = MethodType(_answer_forward(type(base).forward, has_logit_settings(base), label_smoothing), base)
    return model


def insert_adapter(base: Any, lora: LoraConfig, model: Any = None, adapter: str = "default") -> Any:
    """Put fresh matrices beside the base's linear layers; given PEFT's `model` of that base, beside the adapters it has."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=_left_out(base, lora),
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    names = {name for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear | LoraLayer) and ".lora_" not in name}
    names = {name for name in names if not name.endswith(".base_layer")}
    wanted = [] if isinstance(lora.target_modules, str) else lora.target_modules
    try:
        if unknown := [name for name in wanted if not any(f".{entry}".endswith(f".{name}") for entry in names)]:
            raise ValueError(f"no linear layer is named {', '.join(unknown)}")  # PEFT refuses only where no name fits
        if model is None:
            model = get_peft_model(base, settings, adapter_name=adapter)
        else:
            model.add_adapter(adapter, settings)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name in names})
        remedy = f"train.lora.target_modules=all-linear, or some of: {', '.join(linear)}"
        raise ModelError("train.lora.target_modules names no layer of this model", str(error), remedy) from error
    for layer in model.modules():
        # PEFT would copy each input to the adapter's fp32; under autocast the product is bf16 anyway.
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = base.dtype == torch.float32
    return model


def is_compiled(train: TrainConfig) -> bool:
    """Whether torch compiles the blocks: on a GPU alone, for on a CPU bitsandbytes packs weights anew in the midst of it."""
    return train.compile and bool(torch.cuda.is_available())


def blocks(base: Any) -> list[Any]:
    """Return the model's blocks, as transformers names their kinds."""
    kinds = set(base._no_split_modules or ())
    return [module for module in base.modules() if type(module).__name__ in kinds]


def draws_numbers(base: Any) -> bool:
    """Whether the base itself draws random numbers: drops out, or chooses its experts by some jitter."""
    settings = base.config.to_dict().items()
    return any(value for name, value in settings if isinstance(value, float) and ("drop" in name or "jitter" in name))


def pick_graphs(base: Any, train: TrainConfig, num_workers: int) -> Literal["auto"] | bool:
    """Return whether steps may be CUDA graphs: what is done must be the same each time, and depend on the batch's shape alone."""
    varies = train.lora.dropout or is_compiled(train) or draws_numbers(base) or has_logit_settings(base)
    return train.cuda_graphs if torch.cuda.is_available() and num_workers == 1 and not varies else False


def has_logit_settings(base: Any) -> bool:
    """Whether the model changes its logits after the head."""
    return any(getattr(base.config, name, None) for name in LOGIT_SETTINGS)


def _left_out(base: Any, lora: LoraConfig) -> str | None:
    """Match the modules of the first blocks where only the last `num_layers` get an adapter; a block's number comes first in a name."""
    num_blocks = int(base.config.get_text_config().num_hidden_layers)
    if lora.num_layers is None or lora.num_layers == num_blocks:
        return None
    if lora.num_layers > num_blocks:
        why = f"train.lora.num_layers is {lora.num_layers}, and this model has {num_blocks} blocks"
        raise ModelError("the adapter does not fit the model", why, f"train.lora.num_layers={num_blocks}, or leave it out")
    return rf"\D*\.({'|'.join(map(str, range(num_blocks - lora.num_layers)))})\..*"


def packs_safely(base: Any) -> bool:
    """Whether rows packed in one stay blind to each other: pure attention through SDPA, for which ours may stand in (`train.attention`)."""
    kinds = set(getattr(base.config, "layer_types", None) or ["full_attention"])
    others = any(getattr(base.config, name, None) for name in ("block_types", "layers_block_type"))
    is_pure = kinds <= {"full_attention", "sliding_attention"} and not others and base.config._attn_implementation == "sdpa"
    return bool(is_pure and base._supports_attention_backend)


def suit_attention(base: Any, packing: bool, longest_tokens: int) -> bool:
    """Have rows attended to as they come, end to end or filled up; return False where a model would let packed ones see each other."""
    if not packs_safely(base):
        return not packing
    if packing:
        return lay_end_to_end(base)
    attend_without_masks(base, longest_tokens)  # or as before
    return True


def _answer_forward(full_forward: Callable[..., Any], changes_logits: bool, label_smoothing: float) -> Callable[..., Any]:
    """Wrap a causal model's forward pass: given labels, compute logits only where the next token carries loss.

    On chat rows a third of the tokens carry loss; the loss is the same. Where they are may be given as `answers`: then nobody waits for
    a GPU to say it.
    Smoothing is for training alone, so that held-out losses stay comparable.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(
        self: Any,
        labels: torch.Tensor | None = None,
        answers: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **inputs: Any,
    ) -> Any:
        if labels is None:
            return full_forward(self, **inputs)
        inputs.pop("return_dict", None)
        if answers is None:  # a GPU is waited for here
            answers = answer_places(labels)
        smoothing = label_smoothing if self.training else 0.0
        targets = labels.flatten().index_select(0, answers + 1)
        if changes_logits:
            logits = take(full_forward(self, **inputs).logits.flatten(0, 1), answers)  # (loss tokens, vocabulary)
            total = cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
        else:
            hidden = self.get_decoder()(**inputs).last_hidden_state  # (rows, tokens, width)
            total = sum_losses(take(hidden.flatten(0, 1), answers), self.get_output_embeddings(), targets, smoothing)
        count = (targets != NO_LOSS).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    return forward
