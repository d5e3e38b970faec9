"""What `tests/parts` says of steps as CUDA graphs, and of blocks unpacked from 4 bit, on a real GPU; skipped where there is none."""

import pytest

from cluster.cards import find_gpus
from tests.parts.test_train_graphs import (  # noqa: F401 (collected here too: each night these run alone, on a GPU)
    captures,
    test_graphs_have_the_losses_of_steps_without_them,
    test_of_more_shapes_than_there_may_be_graphs_the_one_used_least_lately_leaves,
    test_one_is_tried_and_used_or_not,
    test_packed_rows_as_graphs_have_the_losses_of_those_without,
    test_what_asks_the_gpu_for_a_number_goes_on_without_graphs_and_learns_the_same,
)

pytestmark = pytest.mark.skipif(not find_gpus(), reason="this machine has no GPU")
