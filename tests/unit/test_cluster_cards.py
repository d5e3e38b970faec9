"""Cards of every kind of machine, from GPUs that are written by hand."""

import re

import pytest

from cluster.cards import Gpu, find_cards, find_gpus
from cluster.placement import num_threads
from configs.errors import ClusterError
from configs.loader import load_machine
from configs.schema import CardConfig, MachineConfig

# The syntax of Kubernetes' labels, which Ray took over.
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def gpu(index: int, name: str, memory_gib: float, capability: float = 12.0) -> Gpu:
    return Gpu(str(index), f"NVIDIA GeForce {name}", memory_gib, memory_gib, "580.1", capability)


SMALL, LARGE, THIRD = gpu(0, "RTX 5060 Ti", 15), gpu(1, "RTX 5090", 31), gpu(2, "RTX 4090", 24)


def machine(*cards: tuple[str, str | None]) -> MachineConfig:
    return MachineConfig(cards=[CardConfig(pool=pool, gpu=name) for pool, name in cards])


def placed(config: MachineConfig, gpus: list[Gpu]) -> list[tuple[str, str | None]]:
    return [(card.pool, card.gpu.index if card.gpu else None) for card in find_cards(config, gpus)]


def test_without_a_gpu_the_cpu_makes_a_card_of_each_pool():
    cards = find_cards(MachineConfig(), [])
    assert [(card.name, card.pool, card.gpu, card.accelerator) for card in cards] == [
        ("card0", "serve", None, "cpu"),
        ("card1", "train", None, "cpu"),
    ]
    assert all(card.num_cpus >= 1 and card.memory_gib > 0 for card in cards)
    assert cards[0].memory_gib == cards[1].memory_gib


def test_cards_may_have_cores_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr("cluster.limits.GROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    cards = find_cards(MachineConfig(cards=[CardConfig(pool="train", cores="4-6,1"), CardConfig(pool="serve", cores="0")]), [])
    assert [(card.pool, card.cores, card.num_cpus, card.labels["own-cores"]) for card in cards] == [
        ("serve", (0,), 1, "1"),
        ("train", (4, 5, 6, 1), 4, "4"),
    ]
    assert cards[1].kept_to_cores(["ray", "start"]) == ["taskset", "--cpu-list", "4,5,6,1", "ray", "start"]
    assert all(num_threads(card.labels, num_sharing=2) == card.num_cpus for card in cards)
    sharing = find_cards(MachineConfig(), [])[0]
    assert (sharing.cores, sharing.kept_to_cores(["ray"]), num_threads(sharing.labels, 2)) == ((), ["ray"], 4)


def test_a_gpus_card_may_have_cores_of_its_own_too(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    wanted = [CardConfig(pool="serve", gpu="0", cores="0-1"), CardConfig(pool="train", gpu="1", cores="2-7")]
    cards = find_cards(MachineConfig(cards=wanted), [SMALL, LARGE])
    assert [(card.num_cpus, card.labels["own-cores"], card.labels["gpu-share"]) for card in cards] == [(2, "2", "1"), (6, "6", "1")]


@pytest.mark.parametrize(
    ("cores", "others", "why"),
    [
        ("0-2,2", "3", "core 2 is named twice"),
        ("0-2", "2-3", "core 2 is named twice"),
        ("3-1", "4", "names no cores"),
        ("0,5-3", "6", "names no cores"),
        ("0-", "1", "names no cores"),
        ("-1", "2", "names no cores"),
        ("", "1", "names no cores"),
        ("0,9", "1", "no core 9 here"),
        ("0", None, "or none has"),
    ],
)
def test_cores_that_cannot_be_a_cards_own_are_refused(monkeypatch, cores, others, why):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    with pytest.raises((ValueError, ClusterError), match=why):
        find_cards(MachineConfig(cards=[CardConfig(pool="serve", cores=cores), CardConfig(pool="train", cores=others)]), [])


def test_without_taskset_no_card_has_cores_of_its_own(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    with pytest.raises(ClusterError, match="util-linux"):
        find_cards(MachineConfig(cards=[CardConfig(pool="serve", cores="0"), CardConfig(pool="train", cores="1")]), [])


def test_one_gpu_is_shared_half_and_half():
    cards = find_cards(MachineConfig(), [LARGE])
    assert [(card.pool, card.gpu, card.gpu_share, card.memory_gib) for card in cards] == [
        ("serve", LARGE, 0.5, 15.5),
        ("train", LARGE, 0.5, 15.5),
    ]
    assert [card.labels["gpu-share"] for card in cards] == ["0.5", "0.5"]


@pytest.mark.parametrize("gpus", [[SMALL, LARGE], [LARGE, SMALL]])
def test_of_two_gpus_the_larger_trains(gpus):
    cards = find_cards(MachineConfig(), gpus)
    assert [(card.pool, card.gpu, card.gpu_share, card.memory_gib) for card in cards] == [("serve", SMALL, 1, 15), ("train", LARGE, 1, 31)]


def test_two_equal_gpus_are_two_cards():
    assert placed(MachineConfig(), [gpu(0, "RTX 3090", 24), gpu(1, "RTX 3090", 24)]) == [("serve", "1"), ("train", "0")]


def test_of_three_gpus_the_largest_and_the_smallest_train():
    assert placed(MachineConfig(), [SMALL, LARGE, THIRD]) == [("serve", "2"), ("train", "1"), ("train", "0")]


def test_gpus_are_named_by_part_of_their_name_in_any_case():
    assert placed(load_machine("rtx5090_5060ti"), [LARGE, SMALL]) == [("serve", "0"), ("train", "1")]
    assert placed(machine(("train", "rtx 5090"), ("serve", "5060")), [SMALL, LARGE]) == [("serve", "0"), ("train", "1")]


def test_a_number_names_a_gpu_even_where_it_stands_in_anothers_name():
    # "0" stands in every name here.
    assert placed(machine(("serve", "1"), ("train", "0")), [SMALL, LARGE]) == [("serve", "1"), ("train", "0")]


def test_two_gpus_of_one_name_are_two_cards():
    assert placed(machine(("serve", "RTX 3090"), ("train", "RTX 3090")), [gpu(0, "RTX 3090", 24), gpu(1, "RTX 3090", 24)]) == [
        ("serve", "0"),
        ("train", "1"),
    ]


def test_a_cpu_card_may_stand_beside_a_gpu():
    assert placed(machine(("serve", None), ("train", "5090")), [LARGE]) == [("serve", None), ("train", "1")]


@pytest.mark.parametrize("wanted", ["RTX 4090", "7"])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(wanted):
    with pytest.raises(ClusterError, match=r"(?s)no free GPU.*0: NVIDIA GeForce RTX 5060 Ti, 1: NVIDIA GeForce RTX 5090.*cluster up auto"):
        find_cards(machine(("serve", "5060"), ("train", wanted)), [SMALL, LARGE])
    with pytest.raises(ClusterError, match="GPUs here: none"):
        find_cards(machine(("serve", None), ("train", wanted)), [])


@pytest.mark.parametrize("name", ["0", "RTX 5060"])
def test_one_gpu_named_twice_is_refused(name):
    with pytest.raises(ClusterError, match="no free GPU"):
        find_cards(machine(("serve", name), ("train", name)), [SMALL, LARGE])


@pytest.mark.parametrize(
    "name", ["RTX 5060 Ti", "GTX 1650 with Max-Q Design", "TITAN X (Pascal)", "Quadro RTX 6000/8000", "GRID A100D-1-10C MIG 1g.10gb"]
)
def test_labels_are_what_ray_allows(name):
    for gpus in ([], [gpu(0, name, 15.4)], [gpu(0, name, 15.4), LARGE]):
        for card in find_cards(MachineConfig(), gpus):
            assert [f"{key}={value}" for key, value in card.labels.items() if not LABEL.fullmatch(value) or not LABEL.fullmatch(key)] == []


def test_labels_say_pool_card_accelerator_and_memory():
    assert find_cards(MachineConfig(), [SMALL, LARGE])[0].labels == {
        "machine": "head",
        "pool": "serve",
        "card": "card0",
        "accelerator": "NVIDIA-GeForce-RTX-5060-Ti",
        "memory-gib": "15",
        "gpu-share": "1",
        "bf16": "true",
        "fp8": "true",
    }


def test_bf16_begins_with_ampere():
    assert [gpu(0, "x", 1, capability).has_bf16 for capability in (7.5, 8.0, 12.0)] == [False, True, True]


def test_fp8_begins_with_ada():
    assert [gpu(0, "x", 1, capability).has_fp8 for capability in (8.0, 8.6, 8.9, 9.0, 12.0)] == [False, False, True, True, True]


LISTED = """\
0, NVIDIA GeForce RTX 5060 Ti, 16311, 15000, 580.95.05, 12.0
1, NVIDIA GeForce RTX 5090, 32607, 32000, 580.95.05, 12.0
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of this name on the PATH, in the place of the driver's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(prints: str, status: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}END\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_gpus_are_read_from_nvidia_smi(nvidia_smi):
    nvidia_smi(LISTED)
    found = find_gpus()
    assert [(entry.index, entry.name, entry.driver, entry.has_bf16) for entry in found] == [
        ("0", "NVIDIA GeForce RTX 5060 Ti", "580.95.05", True),
        ("1", "NVIDIA GeForce RTX 5090", "580.95.05", True),
    ]
    assert found[1].memory_gib == pytest.approx(31.84, abs=0.01)


@pytest.mark.parametrize(("visible", "seen"), [("1", ["1"]), ("0,1", ["0", "1"]), ("", []), ("-1", [])])
def test_gpus_that_cuda_may_not_see_are_left_out(visible, seen, nvidia_smi, monkeypatch):
    nvidia_smi(LISTED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [entry.index for entry in find_gpus()] == seen


def test_a_driver_that_does_not_answer_is_a_machine_without_gpus(nvidia_smi):
    nvidia_smi("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.\n", status=9)
    assert find_gpus() == []
    nvidia_smi("")
    assert find_gpus() == []


def test_a_gpu_that_shares_the_hosts_memory_does_not_stop_us(nvidia_smi):
    """Such as a GB10: it has no memory of its own to tell of."""
    nvidia_smi("0, NVIDIA GB10, [N/A], [N/A], 580.95.05, 12.1\n")
    assert [entry.name for entry in find_gpus()] == ["NVIDIA GB10"]
