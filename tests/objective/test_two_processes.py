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


@pytest.mark.parametrize(
    "settings",
    [
        {"balancing": "uniform"},
        {"balancing": "uncertainty"},
        {"balancing": "uncertainty", "micro_batches": 2},
        {"balancing": "uncertainty", "prepare_loss": True},
        {"balancing": "continuous_uncertainty"},
        {"balancing": "own"},
        {"balancing": "pcgrad"},
        {"balancing": "nash_mtl"},
        {"balancing": "pcgrad", "micro_batches": 2, "update_every": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_two_processes_train_what_one_does(pair, settings):
    alone = train(**settings)
    together = pair.run(train, *settings_in_order(**settings))
    for process in together:
        torch.testing.assert_close(process["denoiser"], alone["denoiser"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(process["loss_fn"], alone["loss_fn"], rtol=1e-5, atol=1e-5)
    mean_losses = torch.tensor([process["losses"] for process in together]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(alone["losses"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"balancing": name} for name in ("uncertainty", "own", "pcgrad")])
def test_processes_stay_alike_to_the_bit(pair, settings):
    first, second = pair.run(train, *settings_in_order(**settings))
    torch.testing.assert_close(first["denoiser"], second["denoiser"], rtol=0, atol=0)
    torch.testing.assert_close(first["loss_fn"], second["loss_fn"], rtol=0, atol=0)


def test_sharded_denoisers_are_refused(pair):
    for message in pair.run(balance_sharded_denoiser):
        assert "`module` must hold its parameters whole" in message


def settings_in_order(balancing, update_every=1, micro_batches=1, prepare_loss=False):
    return balancing, update_every, micro_batches, prepare_loss
