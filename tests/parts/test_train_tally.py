"""What a training process counts: steps that a run had logged after its checkpoint are lost; on a real MLflow store."""

from mlflow.entities import Metric as Logged

from train.tally import last_logged_step


def test_the_last_logged_step_of_a_run_is_found_in_its_history(registry, make_run):
    run_id = make_run().manifest.run_id
    assert last_logged_step(registry.client, run_id) == 0
    for step in (10, 20, 30, 20):  # at 20 it was taken up again
        registry.client.log_batch(run_id, metrics=[Logged("loss", 1.0, 1000 + step, step)])
    registry.client.log_batch(run_id, metrics=[Logged("eval_loss", 1.0, 2000, 40)])
    assert last_logged_step(registry.client, run_id) == 30
