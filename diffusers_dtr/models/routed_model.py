"""What all routed models have: their routing, and configs that are checked."""

from __future__ import annotations

import os
from functools import cache, wraps
from itertools import chain
from typing import Any, ClassVar

from diffusers import ModelMixin
from torch import nn

from ..config_types import built_from_file, check_types, constructor_types
from ..diffusers_registration import register_lora_scales
from ..hub import HubMixin, check_token
from ..routing import ChannelRouting
from .family import ROUTING_PARAMETERS, ROUTING_TYPES


@cache
def config_types(model_class: type[RoutedModelMixin]) -> dict[str, Any]:
    """Type hints of what the config of a routed class may hold."""
    routing = {name: ROUTING_TYPES[name] for name in ROUTING_PARAMETERS}
    # A derived constructor has no annotations of its own.
    derived = hasattr(model_class.__init__, "__signature__")
    return {**constructor_types(model_class.plain_class if derived else model_class), **routing}


def check_no_weights_missing(model: nn.Module) -> None:
    """Refuse a model that was loaded without all of its weights: diffusers leaves them without data, and warns."""
    # One that is spread over devices keeps some of its weights elsewhere.
    tensors = () if hasattr(model, "hf_device_map") else chain(model.named_parameters(), model.named_buffers())
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise ValueError(
            f"The weights of a {type(model).__name__} must have what its config tells of, but {missing[0]} is missing"
            + (f", and {len(missing) - 1} more." if len(missing) > 1 else ".")
        )


class RoutedModelMixin(HubMixin):
    """Gives a diffusers model the routing that its config describes, and what [`HubMixin`] does with the Hub.

    Attributes:
        plain_class: The diffusers class that is routed.
        routing: Computes the masks of a forward call.
        routed_widths: Channels of the routed blocks, each width once, in ascending order.
    """

    plain_class: ClassVar[type[ModelMixin]]
    routing: ChannelRouting
    routed_widths: tuple[int, ...]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        models = (base for base in cls.__mro__ if issubclass(base, ModelMixin))
        plain = next((base for base in models if not issubclass(base, RoutedModelMixin)), None)
        if plain is not None:
            cls.plain_class = plain
            register_lora_scales(cls, plain)

    def register_to_config(self, **config: Any) -> None:
        """Set config values, as diffusers' constructors do before anything is built; a ValueError for wrong types."""
        check_types(config_types(type(self)), config, f"the config of {type(self).__name__}")
        super().register_to_config(**config)

    @classmethod
    def from_config(cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs) -> Any:
        """Make a model of a config, as diffusers does; a ValueError for one of which none can be made."""
        with built_from_file(f"A {cls.__name__}"):
            return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        """Load from a folder or repository as diffusers does, with its arguments.

        Raises:
            ValueError: For an invalid `token`, a config of which no model can be made, and missing weights.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        check_no_weights_missing(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    # Wrapped, because pipelines look at the arguments.
    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102 - that of diffusers
        check_token(kwargs.get("token"))
        super().save_pretrained(*args, **kwargs)

    def _init_routing(self, widths: set[int]) -> None:
        """Read the routing from the config; call it before any layer is built, so that a bad value costs nothing."""
        self.routed_widths = tuple(sorted(widths))
        self.routing = ChannelRouting(*(self.config[name] for name in ROUTING_PARAMETERS), widths=widths)

    def set_routing_beta(self, beta: float | None) -> None:
        """Route with another share of active channels from now on, such as in a warm-up from the unrouted model.

        The config, and so what is saved, does not change. A compiled model has one graph for all shares set here.

        Args:
            beta: Share of active channels, in (0, 1], or None for `config.routing_beta`.

        Raises:
            ValueError: For a `beta` outside (0, 1], or one that leaves a block no active channel.
        """
        self.routing.set_beta(beta)
