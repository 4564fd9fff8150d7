"""Two processes with half a batch each train what one process does with the whole."""

import pytest
import torch
from process_pair import ProcessPair
from two_processes import balance_sharded_denoiser, train


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair():
    pair = ProcessPair()
    yield pair
    pair.close()


# The balancing, and how often it is updated, in how many micro-batches, whether the loss is
# wrapped in DDP, the denoiser by FSDP2 instead of DDP, and whether it is called cluster by cluster.
@pytest.mark.parametrize(
    "settings",
    [
        *(("uniform",), ("uncertainty", 1, 2), ("uncertainty", 1, 1, True), ("continuous_uncertainty",)),
        *(("own",), ("nash_mtl",), ("pcgrad", 2, 2)),
        *(("nash_mtl", 1, 1, False, True), ("pcgrad", 2, 2, False, True), ("uncertainty", 1, 1, False, True)),
        *(("pcgrad", 1, 1, False, False, False), ("nash_mtl", 1, 1, False, True, False)),
    ],
    ids=str,
)
def test_two_processes_train_what_one_does_and_stay_alike_to_the_bit(pair, settings):
    alone, together = train(*settings), pair.run(train, *settings)
    for part in ("denoiser", "loss_fn"):
        torch.testing.assert_close(together[0][part], alone[part], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[1][part], together[0][part], rtol=0, atol=0)
    mean_losses = torch.tensor([process["losses"] for process in together]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(alone["losses"]), rtol=1e-5, atol=1e-5)


def test_other_shards_than_those_of_fsdp2_are_refused(pair):
    for message in pair.run(balance_sharded_denoiser):
        assert "`module` must hold its parameters whole" in message
