"""A run's size: by its own rows and the smallest train card; what cannot fit is refused, and an unknown model is left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.models import read_config_file
from cluster.placement import CARDS_VARIABLE
from configs.errors import ClusterError, FitError
from configs.loader import ROOT, load_chatbot, with_settings
from configs.schema import ChatbotConfig
from data.prepare import Prepared
from train.sizing import require_room, size_prepared

SHAPES = ROOT / "configs" / "shapes"
MIXED = [
    {"card": "card0", "pool": "serve", "accelerator": "NVIDIA-GeForce-RTX-5060-Ti", "memory-gib": "15", "gpu-share": "1"},
    {"card": "card1", "pool": "train", "accelerator": "NVIDIA-H100-80GB-HBM3", "memory-gib": "79", "gpu-share": "1"},
    {"card": "card2", "pool": "train", "accelerator": "NVIDIA-GeForce-RTX-5090", "memory-gib": "31", "gpu-share": "1"},
]
CPU = [{"card": "card1", "pool": "train", "accelerator": "cpu", "memory-gib": "8"}]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder with nothing but its config.json."""
    (tmp_path / "config.json").write_text((SHAPES / "llama3_8b.json").read_text())
    return tmp_path


@pytest.fixture
def config(home) -> ChatbotConfig:
    return load_chatbot(ROOT / "configs" / "llama3_8b_lora.yaml")


def data(longest_tokens: int, most_loss_tokens: int) -> Prepared:
    return Prepared(Path(), 100, 10, 100 * longest_tokens, 50, 0, 0, 0, 0, 0, longest_tokens, most_loss_tokens, "fingerprint")


def test_the_smallest_train_card_and_the_rows_own_length_count(config, folder):
    sizes = []
    for longest, answered in ((2048, 2048), (2048, 200), (256, 100)):
        sizing = size_prepared(config, folder, data(longest, answered), MIXED)
        assert sizing is not None
        assert sizing.place.memory_gib == 31
        settled, step = sizing.settle(config)
        assert (settled.train.micro_batch_size, settled.train.gradient_checkpointing) == (step.size, step.recomputes)
        assert sizing.predict_gib(settled.train) == step.need().gib <= sizing.place.usable_gib
        assert f"{step.need().gib:.1f} of the 31 GiB of card2" in sizing.describe(step, data(longest, answered))
        sizes.append(step.size)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_job_of_the_queue_is_sized_for_the_cards_that_it_was_given(config, folder, monkeypatch):
    monkeypatch.setenv(CARDS_VARIABLE, "card0")
    nf4 = config.model_copy(update={"train": config.train.model_copy(update={"quantization": "nf4"})})
    sizing = size_prepared(nf4, folder, data(512, 512), MIXED)
    assert sizing.place.memory_gib == 15
    assert sizing.settle(nf4)[1].need().gib <= 15
    with pytest.raises(FitError):
        size_prepared(config, folder, data(512, 512), MIXED).settle(config)


def test_what_is_settled_stays_settled(config, folder):
    sizing = size_prepared(config, folder, data(512, 512), MIXED)
    settled, _ = sizing.settle(config)
    assert sizing.settle(settled)[0] == settled


def test_a_run_that_cannot_fit_is_refused(config, folder, tmp_path, monkeypatch):
    small = [{**MIXED[0], "pool": "train"}]
    with pytest.raises(ClusterError, match=r"(?s)does not fit its card, card0.*train\.quantization=nf4"):
        size_prepared(config, folder, data(2048, 2048), small).settle(config)
    local = config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder)})})
    with pytest.raises(ClusterError, match="rows of 64 tokens"):
        require_room(local, small)  # with the base not even there
    require_room(local, MIXED)


def test_how_long_a_run_in_fp8_takes_nobody_says_unmeasured(config, folder):
    prepared, cards = data(2048, 2048), [MIXED[1]]
    for precision, told in (("auto", True), ("fp8", False)):
        wanted = with_settings(config, {"train.precision": precision})
        sizing = size_prepared(wanted, folder, prepared, cards)
        assert ("min without pauses" in sizing.describe(sizing.settle(wanted)[1], prepared)) is told


def test_the_helpdesk_bot_takes_its_batch_at_once_on_a_cpu(home, tmp_path):
    helpdesk = load_chatbot(ROOT / "configs" / "helpdesk.yaml")
    (tmp_path / "config.json").write_text((SHAPES / "smollm2_135m.json").read_text())
    settled, _ = size_prepared(helpdesk, tmp_path, data(120, 60), CPU).settle(helpdesk)
    assert (settled.train.micro_batch_size, settled.train.gradient_checkpointing) == (4, False)
    shared = size_prepared(helpdesk, tmp_path, data(120, 60), CPU).settle_base(helpdesk, 4)
    assert shared.train.gradient_checkpointing is False


def test_many_adapters_on_one_base_recompute_where_they_must(config, folder):
    sizing = size_prepared(config, folder, data(2048, 2048), MIXED)
    assert sizing.settle_base(config, 4).train.gradient_checkpointing is True


def test_a_model_that_the_plan_does_not_know_is_sized_by_nobody(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 64}))
    assert read_config_file(tmp_path)["model_type"] == "gpt2"
    assert size_prepared(config, tmp_path, data(512, 512), MIXED) is None


def test_a_worker_imports_nothing_of_how_data_is_prepared():
    """It reads rows that are; a run starts the sooner."""
    words = "import sys, train.worker, train.sizing; sys.exit('data.prepare' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=False).returncode == 0
