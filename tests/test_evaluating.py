import pytest
from torch import nn

from diffusers_dtr.evaluating import evaluating


def test_every_module_returns_to_the_mode_it_was_in():
    mixed, trained = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())), nn.ReLU()
    mixed[1].eval()
    modules = [*mixed.modules(), trained]
    before = [module.training for module in modules]

    def fail():
        with evaluating(mixed, trained):
            assert not any(module.training for module in modules)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in modules] == before == [True, True, True, False, False, True]
