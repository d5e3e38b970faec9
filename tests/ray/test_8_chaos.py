"""What is killed comes back by itself: MLflow, a card's raylet and the head, under a job that goes on and a chat that answers again."""

import httpx

from cluster.job_queue import CANCELLED, RUNNING
from tests.ray.stack import Stack, wait_for
from tests.ray.test_7_queue import handovers, job, submit

SAVE_EVERY = 50


def test_a_job_and_chat_outlive_mlflow_a_card_and_the_head(stack: Stack, config, served, secret, tiny_model):
    stack.serve(config, "serve.scaling.min_replicas=1", "serve.scaling.use_train_cards=false")
    number = submit(stack, config, "train.max_steps=100000", f"train.checkpoint_every_steps={SAVE_EVERY}", "name=survivor")
    began = wait_for(lambda: (now := job(stack, number)).step > SAVE_EVERY and now, timeout_s=180)

    (mlflow,) = stack.parts("python", "mlflow server")
    (of_card,) = stack.parts("raylet", began.cards[0])
    killed_at = job(stack, number).step
    mlflow.kill()  # each step is told to it
    of_card.kill()
    after_card = wait_for(lambda: (now := job(stack, number)).step > killed_at + SAVE_EVERY and now, timeout_s=240)
    assert after_card.run_id == began.run_id
    assert after_card.num_lost <= 1, "it goes on when the card is back, or is begun again on another, by what of it was there"
    assert mlflow.pid not in [process.pid for process in stack.parts("python", "mlflow server")]

    (core,) = stack.parts("", "EngineCore")
    core.kill()
    assert ask(stack, tiny_model.name, secret) in (503, 200), "refused at once, or answered by the next engine"

    (head,) = stack.parts("gcs_server")
    killed_at = job(stack, number).step
    head.kill()
    wait_for(lambda: not head.is_running())
    answer = wait_for(lambda: (got := ask(stack, tiny_model.name, secret)) == 200 and got, timeout_s=300)
    assert answer == 200
    # A job that waits has still the steps of before.
    begun_again = lambda now: now.state == RUNNING and now.submission != after_card.submission and now.num_steps  # noqa: E731
    after_head = wait_for(lambda: begun_again(now := job(stack, number)) and now, timeout_s=300)
    assert after_head.run_id == began.run_id
    # The checkpoint of the step that it was killed at may have been under way.
    assert after_head.first_step >= (killed_at // SAVE_EVERY - 1) * SAVE_EVERY > 0, "it goes on from its last checkpoint"
    assert stack.run("cluster", "cancel", str(number)).returncode == 0
    wait_for(lambda: job(stack, number).state == CANCELLED, timeout_s=120)
    assert "chat is deployed again" in handovers(stack)


def ask(stack: Stack, model: str, secret: str) -> int:
    """Ask once; the status, or 0 where nobody answers."""
    try:
        return stack.ask(model, secret=secret, timeout_s=120).status_code
    except httpx.HTTPError:
        return 0
