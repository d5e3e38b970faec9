"""What fits on a card, who does what, and what is said where nothing fits."""

import json
import re
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.assign import assign, offers_of
from cluster.cards import Card, Gpu
from cluster.measure import Measured
from cluster.memory import Device, Rows, Step
from cluster.placement import CARDS_VARIABLE, is_usable
from cluster.plan import Place, choose, longest_row, place_on, require_fit, require_precision
from cluster.plan_table import make_tables, show_assignment
from cluster.rates import CPU_CORE, RATES, find_rate, train_tokens_per_s
from cluster.shape import read_shape
from cluster.survey import parse_cards, place_of
from configs.errors import ClusterError, ConfigError
from configs.loader import ROOT, load_chatbot, with_overrides, with_settings
from configs.schema import TrainConfig
from tests.unit.test_cluster_memory import LLAMA_FILE, ONE_B_FILE, SMALL_FILE

SHAPE_FILE = ROOT / "configs" / "shapes" / "llama3_8b.json"
LORA_FILE = ROOT / "configs" / "llama3_8b_lora.yaml"
LLAMA = read_shape(json.loads(SHAPE_FILE.read_text()), "llama")
SMALL = read_shape(json.loads((ROOT / "configs" / "shapes" / "smollm2_135m.json").read_text()), "small")
ROWS = Rows(2048, 2048)
RESULTS = ROOT / "tests" / "benchmarks" / "results"


@pytest.fixture
def config(home):
    return load_chatbot(LORA_FILE)


def place(gib: float, name: str = "card") -> Place:
    return Place(name, gib, Device(on_gpu=True), find_rate(name))


def test_the_desk_with_31_and_15_gib(config):
    """LoRA fits the large card and not the small one, which serves in 8 or 4 bit and not in bf16."""
    large, small = (offers_of(LLAMA, config, found) for found in parse_cards("rtx5090:31,rtx5060ti:15", "auto"))
    assert {offer.quantization: offer.fits for offer in large.training} == {"none": True, "nf4": True}
    assert {offer.quantization: offer.fits for offer in small.training} == {"none": False, "nf4": True}
    assert {offer.quantization: offer.fits for offer in small.serving} == {"none": False, "fp8": True, "bitsandbytes": True}
    best = assign([small, large])
    [(trains, trained)], [(answers, served)] = best.training, best.serving
    assert (trains.name, answers.name) == ("rtx5090", "rtx5060ti")
    assert trained is not None
    assert served is not None
    assert (trained.quantization, served.quantization) == ("none", "fp8")
    assert served.num_at_once >= 4


def test_what_does_not_fit_is_refused_with_the_nearest_setting_that_does(config):
    with pytest.raises(ClusterError) as refused:
        require_fit(LLAMA, config, ROWS, place(15))
    assert "train.quantization=nf4" in refused.value.remedy
    assert re.search(r"need 1[6-9]\.\d GiB|need 2\d\.\d GiB", refused.value.why)


def test_4_bit_is_proposed_without_fp8(config):
    in_fp8 = with_overrides(config, ["train.precision=fp8"], "here")
    with pytest.raises(ClusterError) as refused:
        require_fit(LLAMA, in_fp8, ROWS, place(15))
    proposal = refused.value.remedy.split(", or ")[0].split()
    assert {"train.quantization=nf4", "train.precision=auto"} <= set(proposal)
    with_overrides(in_fp8, proposal, "here")  # they fit each other


@pytest.mark.parametrize("gib", [7, 10, 15, 20, 24, 31])
@pytest.mark.parametrize(
    "overrides", [["train.micro_batch_size=16"], ["train.gradient_checkpointing=false"], ["train.lora.rank=512", "serve.max_lora_rank=512"]]
)
def test_whatever_is_proposed_fits(config, gib, overrides):
    asked, rows = with_overrides(config, overrides, "here"), Rows(2048, 2000)
    if choose(LLAMA, asked.train, rows, place(gib)):
        return
    with pytest.raises(ClusterError) as refused:
        require_fit(LLAMA, asked, rows, place(gib))
    proposals = refused.value.remedy.split(", or ")
    if "=" not in proposals[0]:  # a smaller model, or a larger card
        assert gib < 10
        return
    for proposal in proposals:
        mended = with_overrides(asked, proposal.split(), "here")
        length = min(rows.longest_tokens, mended.data.max_length_tokens)
        assert choose(LLAMA, mended.train, Rows(length, min(length, rows.most_loss_tokens)), place(gib)), proposal


def test_a_limit_set_by_hand_takes_the_place_of_the_cards_memory(config):
    limited = with_overrides(config, ["train.max_memory_gib=21"], "here")
    own, half = offers_of(LLAMA, limited, place(80)).training[0], offers_of(LLAMA, limited, place(15)).training[0]
    assert own.choice is not None
    assert 20 < own.choice.need.gib <= 21
    assert half.choice is None, "a card has no more than it has"
    part = offers_of(LLAMA, limited, replace(place(15), whole_gib=30)).training[0]
    assert part.choice is not None, "of a part of a GPU a run may take more"


def test_hand_set_sizes_are_kept(config):
    asked = with_overrides(config, ["train.micro_batch_size=1", "train.gradient_checkpointing=true"], "here")
    step = require_fit(LLAMA, asked, ROWS, place(80)).step
    assert (step.size, step.recomputes) == (1, True)


def test_a_small_model_on_a_cpu_takes_its_whole_batch_at_once(home):
    helpdesk = load_chatbot(ROOT / "configs" / "helpdesk.yaml")
    cpu = Place("card1", 8, Device(on_gpu=False), find_rate("cpu", 2))
    step = require_fit(SMALL, helpdesk, Rows(128, 128), cpu).step
    assert (step.size, step.recomputes) == (helpdesk.train.batch_size, False)


def test_recomputing_is_chosen_only_where_it_is_needed():
    train = TrainConfig(batch_size=16)
    assert not choose(LLAMA, train, ROWS, place(80)).step.recomputes
    assert choose(LLAMA, train, ROWS, place(24)).step.recomputes


@settings(deadline=None)  # of a busy machine
@given(st.floats(8, 200), st.floats(0, 100), st.integers(64, 8192))
def test_a_larger_card_is_never_slower_nor_shorter(gib, more, length):
    train, rows = TrainConfig(batch_size=8), Rows(length, length)
    small, large = choose(LLAMA, train, rows, place(gib)), choose(LLAMA, train, rows, place(gib + more))
    assert small is None or (large is not None and large.step_s <= small.step_s)
    assert small is None or small.need.gib <= gib


def test_the_longest_row_fits_and_a_longer_one_does_not():
    train = TrainConfig(batch_size=1)
    longest = longest_row(LLAMA, train, place(20))
    assert 64 <= longest < LLAMA.max_context_tokens
    assert choose(LLAMA, train, Rows(longest, longest), place(20))
    assert not choose(LLAMA, train, Rows(longest + 64, longest + 64), place(20))


def test_micro_batches_divide_a_workers_share():
    step = choose(LLAMA, TrainConfig(batch_size=12, num_workers=2), ROWS, place(60)).step
    assert 6 % step.size == 0


@pytest.mark.parametrize(
    "text", ["", "rtx5090", "rtx5090:", ":31", "rtx5090:31,", "rtx5090:-1", "rtx5090:0", "a:1,b:x", "a:nan", ",".join(["a:1"] * 9)]
)
def test_misspelt_cards_are_refused(text):
    with pytest.raises(ConfigError, match="names no cards"):
        parse_cards(text, "auto")


def test_cards_are_named_apart_and_one_is_shared():
    assert [found.name for found in parse_cards("rtx3090:24, rtx3090:24", "auto")] == ["rtx3090 #1", "rtx3090 #2"]
    assert [found.memory_gib for found in parse_cards("h100:79", "auto")] == [39.5, 39.5]
    assert parse_cards("cpu:8,h100:80", "fp32")[0].device == Device(on_gpu=False, value_bytes=4)


def test_a_running_card_is_known_by_its_labels():
    card = Card("card1", "train", 8, 79.6, Gpu("0", "NVIDIA H100 80GB HBM3", 79.6, 79.0, "580", 9.0))
    found = place_on(card.labels, load_chatbot(LORA_FILE))
    assert (found.device, found.rate) == (Device(on_gpu=True), RATES["H100"])
    assert found.memory_gib <= card.memory_gib
    assert place_of(card, "auto").memory_gib == 79.6


@pytest.mark.parametrize(
    ("name", "known"), [("NVIDIA-H100-80GB-HBM3", True), ("h100", True), ("NVIDIA GeForce RTX 5090", False), ("GH1005", False)]
)
def test_a_card_without_a_measurement_has_no_rate(name, known):
    assert (find_rate(name) is not None) == known


def test_the_rates_are_those_of_the_results():
    """Each rate is made anew from the files that its source names."""

    def figure(file: str, name: str) -> float:
        return json.loads((RESULTS / f"{file}.json").read_text())["figures"][name]

    shape = read_shape({**json.loads(SHAPE_FILE.read_text()), "vocab_size": 49152}, "bench")
    files = {
        "H100": ("training-h100-80gb-hbm3-2026-11-22", "lora_8b_seq2048_tokens_per_s", "memory-h100-80gb-hbm3-2026-11-23", 4, 2048),
        "H200": ("training-200-steps-h200-2026-11-30", "lora_8b_seq4096_tokens_per_s", "memory-asked-h200-2026-11-30", 2, 4096),
    }
    assert set(files) == set(RATES)
    for name, (training, speed, memory, size, length) in files.items():
        rate, rows = RATES[name], Rows(length, length - 18)
        step = Step(shape, TrainConfig(micro_batch_size=size, batch_size=size), rows, Device(on_gpu=True))
        assert train_tokens_per_s(step, rate) == pytest.approx(figure(training, speed), rel=0.03)
        measured = json.loads((RESULTS / f"{memory}.json").read_text())["notes"]["rows"]
        speeds = {row["setting"]: row["tokens_per_s"] for row in measured}
        sizes = (("135m", 8, 30), ("1b", 4, 16), ("8b", 2, 32))
        blocks_s = [num * 512 / speeds[f"lora_{which}_512"] / blocks for which, num, blocks in sizes]
        assert rate.launch_s == pytest.approx(sum(blocks_s) / len(blocks_s), rel=0.03)
    assert CPU_CORE.train_flops_per_s > 0
    sources = [name for rate in (*RATES.values(), CPU_CORE) for name in rate.source.split(", ")]
    assert [name for name in sources if not (RESULTS / f"{name}.json").is_file()] == []


def test_speeds_on_an_h200_are_told_within_a_fifth():
    """Three shapes, two lengths, in 4 bit or not, recomputed or not, steps as CUDA graphs: what `tests/benchmarks/memory.py` measured."""
    measured = json.loads((RESULTS / "memory-h200-2026-11-30b.json").read_text())["notes"]["rows"]
    speeds, off = {row["setting"]: row["tokens_per_s"] for row in measured}, {}
    for name, file, size in (("135m", SMALL_FILE, 8), ("1b", ONE_B_FILE, 4), ("8b", LLAMA_FILE, 2)):
        shape = read_shape({**file, "vocab_size": 49152}, name)
        for quantization, length, recomputes in product(("none", "nf4"), (512, 2048), (False, True)):
            how = {"gradient_checkpointing": recomputes, "quantization": quantization, "micro_batch_size": size, "batch_size": size}
            step = Step(shape, TrainConfig(**how), Rows(length, length - 1), Device(on_gpu=True))
            setting = f"{'qlora' if quantization == 'nf4' else 'lora'}_{name}_{length}{'_recomputed' * recomputes}"
            off[setting] = train_tokens_per_s(step, RATES["H200"]) / speeds[setting] - 1
    assert len(off) == 24
    assert {setting: value for setting, value in off.items() if abs(value) > 0.2} == {}


def test_a_measured_card_trains_as_fast_as_it_did():
    step = Step(LLAMA, TrainConfig(micro_batch_size=2, batch_size=2, gradient_checkpointing=True), ROWS, Device(on_gpu=True))
    assert train_tokens_per_s(step, Measured(1234.0, 20.0).rate(step)) == pytest.approx(1234.0)


COMMAND = ("plan", str(LORA_FILE), "--model-config", str(SHAPE_FILE))


def test_the_command_tells_what_fits(command):
    ended = command("cluster", *COMMAND, "--cards", "rtx5090:31,rtx5060ti:15")
    assert ended.status == 0
    assert "rtx5090 trains: LoRA" in ended.out
    assert "rtx5060ti answers: 8 bit" in ended.out
    assert "8.03 billion weights" in ended.out


def test_a_job_that_fits_nowhere_is_exit_status_1(command):
    ended = command("cluster", *COMMAND, "--cards", "gtx1060:6,gtx1050:4")
    assert ended.status == 1
    assert "nothing fits it" in ended.out


def test_the_settings_that_fit_are_named(command):
    ended = command("cluster", *COMMAND, "--cards", "rtx4080:16,rtx4060:12", "serve.quantization=none")
    assert "set: train.quantization=nf4 serve.quantization=fp8" in ended.out
    ended = command("cluster", *COMMAND, "--cards", "rtx4080:16,rtx4060:12", "serve.quantization=none", "train.precision=fp8")
    assert "set: train.quantization=nf4 train.precision=auto serve.quantization=fp8" in ended.out


CPU = Card("card1", "train", 8, 8)
NEW = Card("card1", "train", 8, 79.6, Gpu("0", "NVIDIA H100 80GB HBM3", 79.6, 79.0, "580", 9.0))
OLD = Card("card2", "train", 8, 79.6, Gpu("1", "NVIDIA A100", 79.6, 79.0, "580", 8.0))


@pytest.mark.parametrize(
    ("cards", "named"), [((NEW, OLD), r"card2 \(NVIDIA-A100\)"), ((CPU,), r"card1 \(cpu\)")], ids=["an older GPU", "a CPU"]
)
@pytest.mark.parametrize(
    "settings",
    [{"train.precision": "fp8"}, {"tune.space": {"train.precision": {"choice": ["auto", "fp8"]}}}],
    ids=["a run", "a sweep"],
)
def test_fp8_is_refused_where_a_card_has_none(config, settings, cards, named):
    with pytest.raises(ClusterError, match=rf"(?s)multiply in FP8.*{named}.*8\.9.*train\.precision=auto"):
        require_precision(with_settings(config, settings), [card.labels for card in cards])


def test_fp8_goes_where_all_cards_have_it_that_may_train(config, monkeypatch):
    in_fp8 = with_settings(config, {"train.precision": "fp8"})
    labels = [card.labels for card in (NEW, OLD)]
    require_precision(in_fp8, labels[:1])
    require_precision(config, labels)
    monkeypatch.setenv(CARDS_VARIABLE, "card1")
    require_precision(in_fp8, filter(is_usable, labels))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (place_of(NEW, "auto"), ""),
        (place_of(OLD, "auto"), ", without FP8: the card has none"),
        (place_of(CPU, "fp32"), ", without FP8: the card has none"),
        (parse_cards("rtx5090:80,rtx3090:80", "auto")[0], ", if the card has FP8"),
        (parse_cards("cpu:80,cpu:80", "fp32")[0], ", without FP8: the card has none"),
    ],
    ids=["a new GPU", "an old GPU", "a CPU", "a GPU by its name", "a CPU by its name"],
)
def test_a_plan_says_where_a_card_has_no_fp8(config, found, told):
    in_fp8 = with_settings(config, {"train.precision": "fp8"})
    (table,) = make_tables(LLAMA, in_fp8, [offers_of(LLAMA, in_fp8, found)])
    how = dict(zip(table.columns[0].cells, table.columns[3].cells, strict=True))
    assert how["LoRA"].endswith(told)
    assert ("FP8" in how["LoRA"]) == bool(told)
    assert "FP8" not in how["QLoRA"]


def test_a_card_without_fp8_is_planned_without_it(config):
    in_fp8 = with_settings(config, {"train.precision": "fp8"})
    for card, changes in ((NEW, []), (OLD, ["set: train.precision=auto"])):
        offers = [offers_of(LLAMA, in_fp8, place_of(card, "auto")) for card in (card, card)]
        assert show_assignment(assign(offers), in_fp8)[2:] == changes


def test_a_rate_is_told_of_fp8_only_where_it_was_measured(command):
    rows = {
        precision: command("cluster", *COMMAND, "--cards", "h100:79,h100:79", f"train.precision={precision}").out.splitlines()
        for precision in ("auto", "fp8")
    }
    lora = {precision: next(line for line in lines if line.startswith("LoRA")) for precision, lines in rows.items()}
    assert "unknown" not in lora["auto"]
    assert "unknown" in lora["fp8"]
    assert RATES["H100"].is_of(TrainConfig())
    in_fp8 = TrainConfig(precision="fp8", micro_batch_size=1)
    assert not RATES["H100"].is_of(in_fp8)
    measured = Measured(1000.0, 20.0).rate(Step(LLAMA, in_fp8, ROWS, Device(on_gpu=True)))
    assert measured.is_of(in_fp8)
    assert not measured.is_of(TrainConfig(quantization="nf4"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*COMMAND, "--cards", "rtx5090"), "names no cards"),
        ((*COMMAND, "--cards", "a:31,b:15", "--measure"), "--measure takes no --cards"),
        (("plan", str(LORA_FILE), "--model-config", "nowhere.json"), "cannot read nowhere.json"),
        (("plan", "nowhere.yaml"), "no config file"),
        ((*COMMAND, "train.micro_batch_size=0"), "train.micro_batch_size"),
        ((*COMMAND, "train.micro_batch_size=true"), "train.micro_batch_size"),
        ((*COMMAND, "train.gradient_checkpointing=perhaps"), "train.gradient_checkpointing"),
        ((*COMMAND, "--machine", "rtx5090_5060ti"), "no free GPU"),
    ],
)
def test_mistakes_get_one_clear_error(words, says, command):
    ended = command("cluster", *words)
    assert ended.status == 2
    assert says in ended.err
    assert "Traceback" not in ended.err
