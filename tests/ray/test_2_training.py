"""Training on a real cluster: as a job, killed, stopped, resumed; on a tiny model, because quality does not matter here."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.registry import Version
from tests.ray.stack import REGISTERED, RUN_ID, Stack, wait_for

# So long that a run is still going on when it is asked to stop.
NUM_STEPS = 160
# And of so small steps that what two workers round otherwise than one does not grow over them.
LONG = (f"train.max_steps={NUM_STEPS}", "train.learning_rate=1.0e-3")
AT_THE_END = (*LONG, f"train.checkpoint_every_steps={NUM_STEPS}")
ON_THE_WAY = (*LONG, f"train.checkpoint_every_steps={NUM_STEPS // 4}")


@pytest.fixture(scope="module")
def undisturbed(stack: Stack, config) -> tuple[Version, Version]:
    """Two runs that nothing disturbs, side by side: one through all its steps, and one that stops early."""
    early = ["train.learning_rate=0.5", "train.eval_every_steps=1", "train.early_stopping_patience=1", "train.max_steps=24"]
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(stack.train, config, *AT_THE_END)
        stopped = pool.submit(stack.train, config, *early, "train.num_checkpoints_kept=4")
        return whole.result(), stopped.result()


@pytest.fixture(scope="module")
def unbroken(stack: Stack, undisturbed):
    """The loss of each step, where nothing disturbs."""
    version, _ = undisturbed
    losses = stack.losses(version.run_id)
    assert sorted(losses) == list(range(1, NUM_STEPS + 1))
    assert losses[NUM_STEPS] < losses[1]
    return losses


def read_until(process, pattern, also=lambda: True):
    """Read a command's lines until one matches; return the match and all lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if (found := pattern.search(line)) and also():
            return found, lines
    raise AssertionError("".join(lines))


def test_a_job_registers_a_version_with_its_manifest(stack: Stack, guide):
    folder = stack.registry.download(guide)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rank"] == 4
    assert manifest["system_prompt"] == "Be brief."
    assert manifest["run_id"] == guide.run_id
    for name in ("base_fingerprint", "data_fingerprint", "config_fingerprint", "git_commit"):
        assert guide.tags[name] == manifest[name] != ""
    assert [len(md5) for md5 in manifest["data_sources"].values()] == [32], "the version of the data, as DVC writes it"
    run = stack.registry.client.get_run(guide.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lora.rank"] == "4"
    assert {"loss", "eval_loss", "tokens_per_s", "learning_rate"} <= set(run.data.metrics)
    kept = {file.path for file in stack.registry.client.list_artifacts(guide.run_id)}
    assert {"adapter", "config.json", "environment.txt"} <= kept


def test_workers_train_together_as_one_does_and_go_on_from_their_checkpoint_when_one_is_killed(stack: Stack, config, unbroken):
    """Each takes its part of every batch, on a card of its own; the losses are those of one worker."""
    num_cards = sum(card["pool"] == "train" for card in json.loads((stack.home / "cluster.json").read_text())["cards"])
    num_workers = min(2, num_cards)
    run = stack.begin("train", str(config), *ON_THE_WAY, f"train.num_workers={num_workers}")
    found, _ = read_until(run, RUN_ID)
    history = stack.home / "runs" / found[1]
    # The second is begun only when the first one is whole.
    wait_for(lambda: len(list(history.glob("checkpoint_*/"))) >= 2)
    workers = stack.workers("RayTrainWorker")
    assert len(workers) == num_workers
    assert not stack.workers("TrainController"), "the driver has it, and need not wait until a process of its own has imported all again"
    workers[-1].kill()
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text
    steps = [metric.step for metric in stack.registry.client.get_metric_history(found[1], "loss")]
    assert steps.count(1) == 1, "it did not begin anew"
    assert stack.losses(found[1]) == pytest.approx(unbroken, rel=0.02, abs=0.02)
    kept = {file.name for file in next(iter(history.glob("checkpoint_*/"))).glob("rng_state_*")}
    assert kept == ({"rng_state_0.pth", "rng_state_1.pth"} if num_workers == 2 else {"rng_state.pth"})


def test_a_stopped_job_leaves_a_checkpoint_and_is_resumed_with_the_same_losses(stack: Stack, config, unbroken):
    command = ["ray", "job", "submit", "--submission-id", "to-stop", "--working-dir", ".", "--", "python", "-m", "train", str(config)]
    job = stack.begin(*command, *AT_THE_END, job=True)
    found, _ = read_until(job, RUN_ID)
    run_id = found[1]
    wait_for(lambda: stack.losses(run_id))
    stack.stop_job("to-stop")
    job.communicate(timeout=120)
    assert stack.registry.client.get_run(run_id).info.status == "KILLED"
    assert len(stack.losses(run_id)) < NUM_STEPS
    (checkpoint,) = (stack.home / "runs" / run_id).glob("checkpoint_*/")
    assert (checkpoint / "adapter_model.safetensors").is_file()
    done = stack.run("train", str(config), "--resume", run_id)
    assert done.returncode == 0, done.stdout + done.stderr
    assert REGISTERED.search(done.stdout)
    assert stack.registry.client.get_run(run_id).info.status == "FINISHED"
    assert stack.losses(run_id) == pytest.approx(unbroken, abs=1e-4)


def test_early_stopping_registers_the_best_checkpoint(stack: Stack, undisturbed):
    _, version = undisturbed
    history = stack.registry.client.get_metric_history(version.run_id, "eval_loss")
    assert len(history) < 24
    assert json.loads(version.tags["scores"])["eval_loss"] == pytest.approx(min(metric.value for metric in history))


def test_a_run_that_is_refused_says_why_at_once_and_registers_nothing(stack: Stack, config):
    before = [version.name for version in stack.registry.versions()]
    done = stack.run("train", str(config), "train.lora.target_modules=[nothing]")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[0] == "error: train.lora.target_modules names no layer of this model"
    assert "no linear layer is named nothing" in done.stderr
    assert "Try: train.lora.target_modules=all-linear" in done.stderr
    assert "Traceback" not in done.stderr
    assert "--resume" not in done.stderr, "it would be refused again"
    assert not RUN_ID.search(done.stdout), "nothing was begun"
    assert [version.name for version in stack.registry.versions()] == before
