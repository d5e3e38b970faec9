"""What `tests/parts` says of FP8, on a real GPU: products and gradients of a layer, and a run's losses; skipped where there is none."""

import pytest

from cluster.cards import find_gpus
from tests.parts.conftest import traced  # noqa: F401 (a fixture)
from tests.parts.test_train_fp8 import (  # noqa: F401 (collected here too: each night these run alone, on a GPU)
    test_a_run_has_the_losses_of_bf16_and_recomputing_changes_none,
    test_compiled_blocks_have_the_losses_of_ours_and_are_compiled_whole,
    test_products_and_gradients_are_those_of_bf16,
    test_the_kernel_gives_the_numbers_of_torch,
)

pytestmark = pytest.mark.skipif(not find_gpus(), reason="this machine has no GPU")
