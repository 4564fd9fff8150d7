"""The configuration of a run, of options by name."""

from dataclasses import dataclass

from diffusers_dtr.training.config import (
    BelowOne,
    JSONConfig,
    LabelledDataConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    TrainingConfig,
    option,
)


@dataclass(frozen=True)
class AnyModelConfig(ModelConfig):
    """With the options of all scripts."""

    model_preset: str | None = option(None)
    model_config: JSONConfig = option(None)
    unet_config: JSONConfig = option(None)
    transformer_config: JSONConfig = option(None)
    denoiser_config: JSONConfig = option(None)
    class_dropout_prob: BelowOne | None = option(None)


DEFAULT = TrainingConfig(
    RunConfig("run"), LabelledDataConfig(train_data_dir="images"), AnyModelConfig(), text=TextConfig()
)


def run_config(**options) -> TrainingConfig:
    """With captions, a folder of images and an output folder, unless others are given."""
    if "dataset_name" in options:
        options = {"train_data_dir": None, **options}
    return DEFAULT.replace(**options)
