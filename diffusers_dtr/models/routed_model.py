"""What all routed models share: their routing, and making one from a plain diffusers model."""

from __future__ import annotations

from inspect import signature

import accelerate
import torch
from diffusers import ModelMixin

from ..hub.shared import HubMixin
from ..routing import ChannelRouting
from .config_limits import check_config, check_size


class RoutedModelMixin(HubMixin):
    """Gives a diffusers model the routing that its config describes, and what [`HubMixin`] does with the Hub.

    Attributes:
        plain_class: The diffusers class that is routed.
        routing: Computes the masks of a forward call.
        routed_widths: Channels of the routed blocks, each width once, in ascending order.
    """

    plain_class: type[ModelMixin]
    routing: ChannelRouting
    routed_widths: tuple[int, ...]

    def register_to_config(self, **config) -> None:
        """Set config values, as diffusers' constructors do before anything is built.

        Raises:
            ValueError: For values that no model has, see [`~diffusers_dtr.models.config_limits.check_config`].
        """
        check_config(type(self), config)
        super().register_to_config(**config)

    def _init_routing(self, widths: set[int]) -> None:
        """Read the routing from the config; call it before any layer is built, so that a bad value costs nothing."""
        config = self.config
        check_size(config, max(widths, default=0))
        self.routed_widths = tuple(sorted(widths))
        self.routing = ChannelRouting(
            alpha=config.routing_alpha,
            beta=config.routing_beta,
            routing_type=config.routing_type,
            seed=config.routing_seed,
            timestep_range=config.routing_timestep_range,
            widths=widths,
        )

    def set_routing_beta(self, beta: float | None) -> None:
        """Route with another share of active channels from now on; None returns to `config.routing_beta`.

        For warming up from the unrouted model: a fine-tuning run that starts at 1 starts exactly at the pretrained
        model. The config, and so what is saved, does not change. A compiled model has one graph for all shares set
        here, and another for the configured one.

        Args:
            beta: Share of active channels, in (0, 1], or None.

        Raises:
            ValueError: For a `beta` outside (0, 1], or one that leaves a block no active channel.
        """
        self.routing.set_beta(beta)

    @classmethod
    def _from_plain(cls, model: ModelMixin, argument: str, config: dict) -> ModelMixin:
        if not isinstance(model, cls.plain_class):
            raise TypeError(f"`{argument}` must be a `{cls.plain_class.__name__}`, got a `{type(model).__name__}`.")
        return cls._from_state(model, cls._routed_state_dict(model), copy=True, **config)

    @staticmethod
    def _routed_state_dict(plain: ModelMixin) -> dict[str, torch.Tensor]:
        """The weights of a plain model under the names of the routed one."""
        return plain.state_dict()

    @classmethod
    def _from_state(
        cls, source: ModelMixin, state_dict: dict[str, torch.Tensor], *, copy: bool, **config
    ) -> ModelMixin:
        """A model of this class with the config and mode of `source`, but for `config`, and exactly these weights."""
        # Not `from_config`, which ignores unknown names, and new values of what the source had left at its default.
        # Unknown names in the source's config are those of older diffusers, which loading keeps.
        known = signature(cls).parameters
        source_config = {name: value for name, value in source.config.items() if name in known}
        with accelerate.init_empty_weights():
            model = cls(**{**source_config, **config})
        if copy:
            state_dict = {key: value.clone() for key, value in state_dict.items()}
        model.load_state_dict(state_dict, strict=True, assign=True)
        buffers = dict(source.named_buffers())
        for name, buffer in list(model.named_buffers()):
            if name in buffers:
                module, _, attribute = name.rpartition(".")
                value = buffers[name].clone() if copy else buffers[name]
                assert buffer.shape == value.shape
                setattr(model.get_submodule(module), attribute, value)
        return model.train(source.training)


def timestep_batch(timestep: torch.Tensor | float | None, sample: torch.Tensor) -> torch.Tensor:
    """One timestep per sample, on the sample's device.

    Args:
        timestep: Scalar or `(batch,)`.
        sample: `(batch, ...)`.

    Returns:
        `(batch,)`.

    Raises:
        ValueError: If `timestep` is None, or neither a scalar nor of shape `(batch,)` or `(1,)`.
    """
    if timestep is None:  # as it is by default in some of diffusers' models
        raise ValueError("`timestep` must be given: the conditioning and the routing depend on it.")
    if not torch.is_tensor(timestep):
        timestep = torch.tensor(timestep, device=sample.device)
    if timestep.ndim > 1 or timestep.numel() not in (1, sample.shape[0]):
        raise ValueError(
            f"`timestep` must be a scalar or of shape (batch,) = ({sample.shape[0]},), got {tuple(timestep.shape)}."
        )
    return timestep.to(sample.device).reshape(-1).expand(sample.shape[0])
