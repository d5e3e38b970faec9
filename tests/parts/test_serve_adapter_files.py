"""Adapters whose files are broken, or do not fit the engine: refused with the reason, while others go on."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve.adapters import Adapters, BrokenAdapterError, check_adapter
from tests.helpers.shelf import BASE, CONFIG, MANIFEST, WEIGHTS, run, why_broken

pytestmark = pytest.mark.usefixtures("look_each_time")


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def cut_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:20])


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


def without_lora(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"lm_head.weight": np.ones((2, 2), "float32")}, folder / WEIGHTS)


def with_a_scalar(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a.lora_A.weight": np.array(1.0, "float32")}, folder / WEIGHTS)


BROKEN = {
    "weights cut short": (cut, "its files cannot be read: "),
    "header cut short": (cut_header, "its files cannot be read: "),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "its files cannot be read: "),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors missing"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json missing"),
    "bad JSON": (lambda folder: (folder / CONFIG).write_text("{"), "its files cannot be read: "),
    "config in Latin-1": (lambda folder: (folder / CONFIG).write_bytes(b'{"peft_type": "\xe9"}'), "its files cannot be read: "),
    "config is a list": (lambda folder: (folder / CONFIG).write_text("[]"), ""),
    "another kind of adapter": (lambda folder: change(folder, peft_type="IA3"), "it is no LoRA adapter"),
    "weights of no adapter": (without_lora, "it is no LoRA adapter"),
    "a weight without a rank": (with_a_scalar, ""),
    "DoRA": (lambda folder: change(folder, use_dora=True), "it has parts that vLLM cannot serve"),
    "extra modules": (lambda folder: change(folder, modules_to_save=["lm_head"]), "it has parts that vLLM cannot serve"),
    "biases": (lambda folder: change(folder, bias="all"), "it has parts that vLLM cannot serve"),
    "bad JSON in the manifest": (lambda folder: (folder / MANIFEST).write_text("{"), ""),
    "manifest is a list": (lambda folder: (folder / MANIFEST).write_text("[]"), ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_with_the_reason_while_others_go_on(name, adapter_shelf, put):
    damage, reason = BROKEN[name]
    damage(put(adapter_shelf, "helpdesk:2"))
    adapters = Adapters(adapter_shelf, BASE)
    assert why_broken(adapters, "helpdesk:2").startswith(reason)
    assert adapters.fetched("helpdesk:2") is None
    assert run(adapters.resolve("helpdesk:1")) == "helpdesk:1"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_that_is_live_does_not_end_the_watch(name, adapter_shelf, put):
    put(adapter_shelf, "helpdesk:2")
    BROKEN[name][0](put(adapter_shelf, "broken:1"))
    adapter_shelf.live["broken"] = 1
    adapters = Adapters(adapter_shelf, BASE)
    run(adapters.refresh())
    adapter_shelf.live["helpdesk"] = 2
    run(adapters.refresh())
    assert run(adapters.resolve("helpdesk")) == "helpdesk:2"


def test_a_rank_over_the_engines_is_refused_with_both_figures(tmp_path, write_adapter):
    check_adapter(write_adapter(tmp_path / "fits", rank=16), 16)
    with pytest.raises(BrokenAdapterError, match=r"its rank is 17, and the engine makes room for 16 \(serve.max_lora_rank\)"):
        check_adapter(write_adapter(tmp_path / "larger", rank=17), 16)


def test_the_rank_is_read_from_the_weights_not_from_the_config(tmp_path, write_adapter):
    folder = write_adapter(tmp_path / "lies", rank=32)
    change(folder, r=8)
    with pytest.raises(BrokenAdapterError, match="its rank is 32"):
        check_adapter(folder, 16)


def test_a_truncated_download_can_be_replaced(adapter_shelf, put):
    cut(put(adapter_shelf, "helpdesk:2"))
    adapters = Adapters(adapter_shelf, BASE)
    why_broken(adapters, "helpdesk:2")
    put(adapter_shelf, "helpdesk:2")
    assert run(adapters.resolve("helpdesk:2")) == "helpdesk:2"
