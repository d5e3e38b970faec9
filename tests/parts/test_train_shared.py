"""Adapters that share a base learn as each does alone: the same losses as transformers' Trainer gives, on a tiny Llama."""

import json
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from configs.errors import ModelError
from configs.loader import with_settings
from configs.schema import ChatbotConfig, ModelConfig, TrainConfig
from data.prepare import prepare
from serve.adapters import check_adapter
from tests.helpers.data import chat, chatbot, write_rows
from tests.parts.test_train_model import rows, tiny
from tests.parts.test_train_step import one_thread  # noqa: F401 (a fixture)
from tests.ray.stack import make_tiny_model, wait_for
from train.attention import lay_end_to_end
from train.group import Group, why_apart
from train.model import add_adapter, load_base
from train.rows import Packer, Padder, RowOrder
from train.shared import SharedBase, share_base
from train.step import OrderedTrainer, training_arguments

ROWS, HELDOUT = rows([6 + place * 5 % 17 for place in range(22)]), rows([5 + place * 3 % 11 for place in range(9)], seed=3)
NUM_STEPS = 20
WAIT_S = 30
# Double precision but for the loss itself. In fp32 sums in another order differ in the seventh digit, and AdamW, which makes full steps of
# the smallest gradients, makes that the fifth within ten steps.
SAME = {"rel": 1e-6}
TRIALS = {
    "a": {"learning_rate": 0.02, "seed": 1, "lora": {"rank": 4, "alpha": 8}},
    "b": {"learning_rate": 0.005, "seed": 2, "schedule": "cosine", "weight_decay": 0.1, "batch_size": 6, "lora": {"rank": 16}},
    "c": {"learning_rate": 0.01, "seed": 1, "packing": True, "label_smoothing": 0.1, "lora": {"rank": 8, "use_rslora": True}},
    "d": {
        "learning_rate": 0.01,
        "seed": 3,
        "micro_batch_size": 2,
        "max_grad_norm": 0.1,
        "warmup_share": 0.3,
        "lora": {"rank": 3, "target_modules": ["q_proj", "down_proj"], "num_layers": 1},
    },
}


def config(trial: str) -> ChatbotConfig:
    settings = {"batch_size": 4, "max_steps": NUM_STEPS, "log_every_steps": 1, "checkpoint_every_steps": 10, "eval_every_steps": 10}
    return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": settings | TRIALS[trial]})


def shared(**settings) -> SharedBase:
    return SharedBase(Group(tiny().double(), ROWS, HELDOUT, **settings))


def alone(trial: str, folder: Path, resume: Path | None = None, base=None) -> tuple[dict[int, float], dict[int, float]]:
    """Train one adapter as `python -m train` does; return the training losses and the held-out ones, by step."""
    settings = config(trial)
    train = settings.train
    base = base or tiny().double()
    if train.packing:
        lay_end_to_end(base)
    set_seed(train.seed)
    model = add_adapter(base, train.lora, gradient_checkpointing=False, label_smoothing=train.label_smoothing)
    longest = max(len(row["input_ids"]) for row in ROWS + HELDOUT)
    trainer = OrderedTrainer(
        RowOrder(ROWS, train.batch_size, train.seed, by_length=not train.packing),
        model=model,
        args=training_arguments(settings, folder, 1, len(ROWS), longest, autocast=False),
        train_dataset=ROWS,
        eval_dataset=HELDOUT,
        data_collator=Packer() if train.packing else Padder(0),
    )
    trainer.args.save_total_limit = None
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    history = trainer.state.log_history
    return tuple({entry["step"]: entry[key] for entry in history if key in entry} for key in ("loss", "eval_loss"))


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, tuple[Path, dict[int, float], dict[int, float]]]:
    """Each trial alone: its folder of checkpoints, its losses and held-out losses."""
    folders = {trial: tmp_path_factory.mktemp(trial) for trial in TRIALS}
    return {trial: (folder, *alone(trial, folder)) for trial, folder in folders.items()}


def steps(base: SharedBase, trials: str, num_steps: int) -> dict[str, dict[int, float]]:
    """Take steps together, one at a time, and return each one's losses by step."""
    losses: dict[str, dict[int, float]] = {trial: {} for trial in trials}
    for _ in range(num_steps):
        with ThreadPoolExecutor(len(trials)) as pool:
            for trial, found in zip(trials, pool.map(lambda trial: base.advance(trial, 1), trials), strict=True):
                losses[trial][int(found["step"])] = found["loss"]
    return losses


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 40}, {"gradient_checkpointing": True}], ids=["whole", "parts", "recomputed"])
def test_losses_are_those_that_each_adapter_has_alone(settings, references):
    base = shared(**settings)
    for trial in TRIALS:
        assert base.join(trial, config(trial)) == {"step": 0, "num_steps": NUM_STEPS, "num_tokens": 0}
    losses = {trial: {} for trial in TRIALS}
    for half in (10, 20):
        for trial, found in steps(base, "abcd", 10).items():
            losses[trial] |= found
            assert base.evaluate(trial) == pytest.approx(references[trial][2][half], **SAME), trial
    for trial, found in losses.items():
        assert found == pytest.approx(references[trial][1], **SAME), trial


def test_adapters_come_and_go_midway(references):
    base = shared()
    for trial in "ab":
        base.join(trial, config(trial))
    losses = steps(base, "ab", 7)
    base.leave("a")
    base.join("d", config("d"))
    later = steps(base, "bd", 13)
    base.leave("b")
    base.leave("d")
    base.join("c", config("c"))  # after all have left
    assert losses["a"] == pytest.approx(first(references["a"], 7), **SAME)
    assert losses["b"] | later["b"] == pytest.approx(references["b"][1], **SAME)
    assert later["d"] == pytest.approx(first(references["d"], 13), **SAME)
    assert steps(base, "c", 5)["c"] == pytest.approx(first(references["c"], 5), **SAME)


def first(reference, num_steps: int) -> dict[int, float]:
    return {step: loss for step, loss in reference[1].items() if step <= num_steps}


def last(reference, num_steps: int) -> dict[int, float]:
    return {step: loss for step, loss in reference[1].items() if step > NUM_STEPS - num_steps}


def test_a_checkpoint_goes_on_shared_or_alone_as_if_unbroken(references, tmp_path):
    base = shared()
    for trial in "bd":
        base.join(trial, config(trial))
    steps(base, "bd", 10)
    for trial in "bd":
        base.save(trial, tmp_path / trial)
        base.leave(trial)
    base.join("a", config("a"))  # another one beside it than before
    joined = base.join("b", config("b"), tmp_path / "b")
    assert (joined["step"], joined["num_steps"]) == (10, NUM_STEPS)
    assert joined["num_tokens"] > 0
    assert steps(base, "ab", 10)["b"] == pytest.approx(last(references["b"], 10), **SAME)
    for trial in "bd":
        assert alone(trial, tmp_path / "alone", resume=tmp_path / trial)[0] == pytest.approx(references[trial][1], **SAME)
    other = shared()
    assert other.join("d", config("d"), references["d"][0] / "checkpoint-10")["step"] == 10
    assert steps(other, "d", 10)["d"] == pytest.approx(last(references["d"], 10), **SAME)


def test_what_is_saved_is_what_training_alone_saves(references, tmp_path):
    base = shared()
    for trial in "cb":
        base.join(trial, config(trial))
    steps(base, "cb", 10)
    base.evaluate("b")
    base.save("b", tmp_path / "b")
    check_adapter(tmp_path / "b", max_lora_rank=16)
    theirs = references["b"][0] / "checkpoint-10"
    wanted = {file.name for file in theirs.iterdir()} - {"training_args.bin", "rng_state.pth"}
    assert {file.name for file in (tmp_path / "b").iterdir()} == wanted
    name = "adapter_model.safetensors"
    torch.testing.assert_close(load_file(tmp_path / "b" / name), load_file(theirs / name), rtol=1e-4, atol=1e-6)
    ours, reference = (json.loads((folder / "trainer_state.json").read_text()) for folder in (tmp_path / "b", theirs))
    for name in ("global_step", "max_steps", "epoch", "num_train_epochs", "train_batch_size", "num_input_tokens_seen"):
        assert ours[name] == reference[name], name
    for entry, wanted in zip(ours["log_history"], reference["log_history"], strict=True):
        assert entry == pytest.approx({name: wanted[name] for name in entry}, **SAME)
    assert adapter_config(tmp_path / "b") == adapter_config(theirs)


def adapter_config(folder: Path) -> dict[str, object]:
    """Read what describes an adapter; PEFT writes sets in any order."""
    found = json.loads((folder / "adapter_config.json").read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in found.items()}


def test_each_takes_the_steps_it_asked_for_and_no_more_than_it_has(references):
    base = shared()
    for trial in "ab":
        base.join(trial, config(trial))
    with ThreadPoolExecutor(3) as pool:
        slow, quick = pool.submit(base.advance, "a", 15), pool.submit(base.advance, "b", 3)
        evaluated = pool.submit(base.evaluate, "b")  # does not wait for the other's fifteen steps
        assert quick.result()["step"] == 3
        assert evaluated.result() > 0
        assert slow.result()["step"] == 15
    mean = sum(first(references["a"], 15).values()) / 15
    assert slow.result()["loss"] == pytest.approx(mean, **SAME)
    assert base.advance("a", 100)["step"] == NUM_STEPS
    assert base.advance("a", 100) == {"step": NUM_STEPS, "num_steps": NUM_STEPS, "num_tokens": tokens("a")}


def tokens(trial: str) -> int:
    """All tokens of a trial's steps."""
    order = RowOrder(ROWS, 4, config(trial).train.seed, by_length=True)
    places: list[int] = []
    for epoch in range(NUM_STEPS):
        order.set_epoch(epoch)
        places += [*order, *[-1] * (-len(ROWS) % 4)]
    return sum(len(ROWS[place]["input_ids"]) for place in places[: NUM_STEPS * 4] if place >= 0)


@pytest.mark.parametrize("settings", [{"lora": {"dropout": 0.1}}, {"num_workers": 2, "batch_size": 4}], ids=["dropout", "several cards"])
def test_an_adapter_that_cannot_share_is_refused(settings):
    wanted = ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": settings})
    with pytest.raises(ModelError, match="cannot share a base"):
        shared().join("x", wanted)


def test_what_must_be_the_same_to_share_a_base():
    def wanted(**train):
        return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": train})

    other_data = ChatbotConfig.model_validate({"name": "bot", "data": {"source": "y"}})
    assert why_apart(wanted(learning_rate=0.1, batch_size=2, seed=4, lora={"rank": 64}, packing=True), wanted()) is None
    assert "train.quantization differs" in why_apart(wanted(quantization="nf4"), wanted())
    assert "data differs" in why_apart(other_data, wanted())
    assert "train.optimizer_bits=8" in why_apart(wanted(optimizer_bits=8))


@pytest.mark.parametrize(
    ("setting", "value"), [("logit_scale", 0.5), ("attention_dropout", 0.1), ("layer_types", ["full_attention", "linear_attention"])]
)
def test_a_base_that_cannot_be_shared_is_refused(setting, value):
    base = tiny()
    setattr(base.config, setting, value)
    with pytest.raises(ModelError, match="cannot be shared"):
        Group(base, ROWS, HELDOUT)


def begin(ask, *arguments) -> "Future[Any]":
    """Ask in a thread that nobody waits for, so that an answer that never comes is a test that fails."""
    answer: Future[Any] = Future()

    def wait() -> None:
        try:
            answer.set_result(ask(*arguments))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    return answer


def before_each_pass(base: SharedBase, look) -> None:
    """Call `look` with the inputs of each pass through the base: what it raises, the card raises."""
    decoder = base.group.base.get_decoder()
    decoder.register_forward_pre_hook(lambda module, args, inputs: look(inputs), with_kwargs=True)


def small_card(base: SharedBase, most_tokens: int) -> None:
    def refuse(inputs) -> None:
        if inputs["input_ids"].numel() > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    before_each_pass(base, refuse)


def test_adapters_that_are_too_many_for_the_card_at_once_go_one_after_another(references):
    base = shared()
    for trial in "abc":
        base.join(trial, config(trial))
    small_card(base, 140)
    for trial, found in steps(base, "abc", 5).items():
        assert found == pytest.approx(first(references[trial], 5), **SAME), trial


def test_an_adapter_that_does_not_fit_alone_fails_alone(references):
    base = shared()
    for trial in "ad":
        base.join(trial, config(trial))
    base.join("large", with_settings(config("a"), {"train.batch_size": len(ROWS)}))
    small_card(base, 140)
    go_on = threading.Event()
    base.card.submit(go_on.wait, WAIT_S)  # so that all three ask before the first step
    large, *others = [begin(base.advance, trial, 5) for trial in ("large", "a", "d")]
    wait_for(lambda: len(base.requests) == 3)
    go_on.set()
    with pytest.raises(torch.OutOfMemoryError):
        large.result(WAIT_S)
    base.leave("large")
    for trial, other in zip("ad", others, strict=True):
        mean = sum(first(references[trial], 5).values()) / 5
        assert other.result(WAIT_S)["loss"] == pytest.approx(mean, **SAME), trial


def test_an_adapter_whose_optimizer_fails_fails_alone(references):
    base = shared()
    for trial in "ab":
        base.join(trial, config(trial))

    def refuse(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    base.group.members["a"].learner.optimizer.register_step_pre_hook(refuse)
    failing, other = (begin(base.advance, trial, 5) for trial in "ab")
    with pytest.raises(torch.OutOfMemoryError):
        failing.result(WAIT_S)
    assert other.result(WAIT_S)["loss"] == pytest.approx(sum(first(references["b"], 5).values()) / 5, **SAME)


def test_one_that_cannot_join_leaves_the_others_as_they_were(references, tmp_path):
    base = shared()
    base.join("a", config("a"))
    losses = steps(base, "a", 2)["a"]
    shutil.copytree(references["d"][0] / "checkpoint-10", tmp_path / "broken")
    (tmp_path / "broken" / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError):
        base.join("d", config("d"), tmp_path / "broken")
    with pytest.raises(RuntimeError, match="has not joined"):
        base.advance("d", 1)
    losses |= steps(base, "a", 3)["a"]
    assert losses == pytest.approx(first(references["a"], 5), **SAME)
    base.join("d", config("d"))
    assert steps(base, "d", 2)["d"] == pytest.approx(first(references["d"], 2), **SAME)


def test_who_asks_while_a_step_fails_gets_the_next_one(references):
    base = shared()
    for trial in "ab":
        base.join(trial, config(trial))
    held, go_on = threading.Event(), threading.Event()

    def fail_once(batch) -> None:
        if not held.is_set():
            held.set()
            go_on.wait(WAIT_S)
            raise ValueError("this pass fails")

    before_each_pass(base, fail_once)
    failing = begin(base.advance, "a", 1)
    assert held.wait(WAIT_S)
    later = begin(base.advance, "b", 1)
    wait_for(lambda: "b" in base.requests)
    go_on.set()
    with pytest.raises(ValueError, match="this pass fails"):
        failing.result(WAIT_S)
    assert later.result(WAIT_S)["loss"] == pytest.approx(references["b"][1][1], **SAME)


def test_what_a_killed_process_asked_for_ends_when_its_trial_joins_again(references):
    base = shared()
    base.join("a", config("a"))
    before_each_pass(base, lambda batch: time.sleep(0.1))  # else all its steps may be done before we look
    killed = begin(base.advance, "a", NUM_STEPS)
    wait_for(lambda: base.group.members["a"].learner.step)
    base.join("a", config("a"))
    with pytest.raises(RuntimeError, match="taken away"):
        killed.result(WAIT_S)
    assert steps(base, "a", 3)["a"] == pytest.approx(first(references["a"], 3), **SAME)
    assert base.advance("a", 2)["step"] == 5


@pytest.mark.parametrize("again", ["asks", "leaves"])
def test_who_asks_anew_during_a_step_is_not_mistaken_for_who_asked_before(again):
    base = shared()
    base.join("a", config("a"))
    held, go_on = threading.Event(), threading.Event()

    def hold(batch) -> None:
        held.set()
        go_on.wait(WAIT_S)

    before_each_pass(base, hold)
    before = begin(base.advance, "a", 1)
    assert held.wait(WAIT_S)
    asked_s = base.requests["a"].began_s
    if again == "asks":
        after = begin(base.advance, "a", 1)
        wait_for(lambda: base.requests["a"].began_s > asked_s)
        go_on.set()
        with pytest.raises(RuntimeError, match="asked anew"):
            before.result(WAIT_S)
        assert after.result(WAIT_S)["step"] == 2
    else:
        gone = begin(base.leave, "a")
        go_on.set()
        gone.result(WAIT_S)
        assert before.result(WAIT_S)["step"] == 1, "it was done before"
        with pytest.raises(RuntimeError, match="has not joined"):
            base.advance("a", 1)


def test_a_pass_has_one_micro_batch_of_each():
    base = shared()
    passes: list[int] = []
    for trial in ("d", "another", "a"):  # two rows at once, two, and four
        base.join(trial, config("d" if trial == "another" else trial))
    before_each_pass(base, lambda inputs: passes.append(inputs["rows"].num_rows))
    base.group.step(["d", "another"])
    base.group.step(["d", "another", "a"])
    assert passes == [4, 4, 8, 4]


def test_a_step_that_fails_is_told_to_all_who_wait_for_it():
    base = shared()
    base.join("a", config("a"))
    base.group.base.get_output_embeddings().weight.data = torch.zeros(1, 1)
    with pytest.raises(RuntimeError):
        base.advance("a", 1)
    with pytest.raises(RuntimeError):
        base.advance("a", 1)


def test_a_base_in_4_bit(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(tmp_path / "model")
    bases = [
        load_base(tmp_path / "model", ModelConfig(precision="fp32"), TrainConfig(quantization="nf4", packing=True), 32) for _ in range(3)
    ]
    base = SharedBase(Group(bases.pop(), ROWS, HELDOUT))
    for trial in "ab":
        base.join(trial, config(trial))
    for trial, losses in steps(base, "ab", 5).items():
        reference = alone(trial, tmp_path / trial, base=bases.pop())
        assert losses == pytest.approx({step: loss for step, loss in reference[0].items() if step <= 5}, rel=1e-4)


def test_base_and_rows_are_loaded_as_a_run_of_its_own_loads_them(tmp_path, monkeypatch):
    """In bf16 too, in which the adapters stay fp32."""
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    folder = make_tiny_model(tmp_path / "model")
    source = write_rows(tmp_path / "rows.jsonl", [chat(f"How do I start {number}?", f"Run it {number}.") for number in range(20)])
    settings = chatbot(tmp_path, source, "data.split=row", "model.precision=bf16", "train.max_steps=6", "train.learning_rate=0.01")
    data = prepare(settings, folder)
    base = share_base(settings, folder, data.train_file, data.heldout_file)
    assert (len(base.group.rows), len(base.group.heldout)) == (data.num_train, data.num_heldout)
    for trial in "ab":
        base.join(trial, settings)
    before = base.evaluate("a")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda trial: base.advance(trial, 6), "ab"))
    assert base.evaluate("a") < before
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-3), "the same config, the same losses"
    base.save("b", tmp_path / "b")
    assert {weight.dtype for weight in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {torch.float32}
