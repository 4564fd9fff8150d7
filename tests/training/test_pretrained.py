import pytest

from diffusers_dtr.training.config import ModelConfig
from diffusers_dtr.training.pretrained import pretrained_options


def test_variant_that_a_folder_has_no_weights_of_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").touch()
    assert pretrained_options(ModelConfig(str(tmp_path), variant="fp16"))["variant"] == "fp16"
    with pytest.raises(ValueError, match=r"`--variant` must be one that .* has weights of, .* got 'bf16'"):
        pretrained_options(ModelConfig(str(tmp_path), variant="bf16"))
