"""The class-conditional diffusion transformer (DiT, arXiv 2212.09748) with routed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import accelerate
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import LabelEmbedding, PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from ..call_timesteps import timestep_batch
from ..config_types import built_from_file
from .dit_block import (
    PER_BLOCK_CLASS_NAMES,
    DTRTransformerBlock,
    TimestepLabelEmbedding,
    initialize_dit,
    share_embedders,
    unpatchify,
)
from .presets import DIT_PRESETS
from .routed_model import RoutedModelMixin


class DTRTransformer2DModel(RoutedModelMixin, DiTTransformer2DModel, AttentionMixin, PeftAdapterMixin):
    r"""A class-conditional or unconditional diffusion transformer with Denoising Task Routing (arXiv 2310.07138).

    A [`~diffusers.DiTTransformer2DModel`] whose blocks each see the window of channels that belongs to the timestep.
    Unlike its base class it embeds the conditioning once per forward call and not once per block, so that it has the
    original DiT's parameter count, and a label is dropped in all blocks or in none. New models are initialised as DiT
    is (adaLN-Zero). Inputs may be rectangular.

    Parameters are those of the base class, with its defaults, and:
        sample_size (`int`): Side of the (latent) images that the position table is made for.
        out_channels (`int`, *optional*): Channels of the output; twice `in_channels` where the model learns its
            variance. Defaults to `in_channels`.
        num_embeds_ada_norm (`int`, *optional*): Number of classes, or None for an unconditional model.
        norm_eps (`float`): Epsilon of the norm before the MLP. The original DiT uses 1e-6.
        class_dropout_prob (`float`): Probability with which a label is replaced by the null class in training mode,
            in [0, 1). At 0 there is no null class.
        freq_shift (`int`): Sinusoid frequencies are $10000^{-i / (128 - freq\_shift)}$. The original DiT uses 0.
        routing_alpha (`float`): How late the channel window starts to slide, > 0.
        routing_beta (`float`): Share of the channels that are active, in (0, 1]; 1 is the unrouted model, to the bit.
        routing_type (`str`): `"dtr"`, `"random"` (the paper's baseline) or `"none"`.
        routing_seed (`int`): Seed of random routing.
        routing_timestep_range (`tuple[float, float]`, *optional*): The timesteps between which the window slides.
            Defaults to (0, 999).

    Raises:
        ValueError: For values that describe no model, before any memory is spent.
    """

    _no_split_modules = ("DTRTransformerBlock",)
    _repeated_blocks = ("DTRTransformerBlock",)
    _supports_group_offloading = True
    # As in the base class, where the embedders are part of the blocks' norms.
    _skip_layerwise_casting_patterns = ("pos_embed", "norm", "^emb$")

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        class_dropout_prob: float = 0.1,
        freq_shift: int = 1,
        routing_alpha: float = 4.0,
        routing_beta: float = 0.8,
        routing_type: str = "dtr",
        routing_seed: int = 0,
        routing_timestep_range: Sequence[float] | None = None,
    ):
        # Not the base class's constructor: it gives every block a timestep and a label embedder of its own.
        super(DiTTransformer2DModel, self).__init__()
        self.inner_dim = num_attention_heads * attention_head_dim
        self._init_routing({self.inner_dim})
        if norm_type != "ada_norm_zero":
            raise ValueError(f'`norm_type` must be "ada_norm_zero", got {norm_type!r}.')
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"`class_dropout_prob` must be in [0, 1), got {class_dropout_prob!r}.")
        if num_embeds_ada_norm is not None and num_embeds_ada_norm < 1:
            raise ValueError(f"`num_embeds_ada_norm` (classes) must be >= 1 or None, got {num_embeds_ada_norm!r}.")
        if sample_size % patch_size != 0:
            raise ValueError(f"`sample_size` must be a multiple of `patch_size`={patch_size}, got {sample_size}.")

        self.attention_head_dim = attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        # diffusers' DiTPipeline computes with the config's value, which must therefore be a number.
        self.register_to_config(out_channels=self.out_channels)
        self.gradient_checkpointing = False
        self.height = self.width = sample_size
        self.patch_size = patch_size

        self.pos_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, self.inner_dim)
        self.emb = TimestepLabelEmbedding(self.inner_dim, num_embeds_ada_norm, class_dropout_prob, freq_shift)
        self.transformer_blocks = nn.ModuleList(
            DTRTransformerBlock(self.inner_dim, self.config) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(self.inner_dim, 2 * self.inner_dim)
        self.proj_out_2 = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels)
        initialize_dit(self)

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no label", or None for a model that was not trained with one."""
        has_null_class = self.config.num_embeds_ada_norm is not None and self.config.class_dropout_prob > 0
        return self.config.num_embeds_ada_norm if has_null_class else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.LongTensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Denoise.

        Args:
            hidden_states: Noisy input, `(batch, in_channels, height, width)`; both sides multiples of `patch_size`.
            timestep: Scalar or `(batch,)`, integers or real numbers.
            class_labels: `(batch,)`, in [0, num_embeds_ada_norm], the last being the null class where there is one.
                None means the null class, or the only class of a model that has just one.
            cross_attention_kwargs: Passed on to the attention processors.
            return_dict: Whether to return an output object rather than a tuple.

        Returns:
            The prediction, `(batch, out_channels, height, width)`, as `sample` or as the only element of a tuple.

        Raises:
            ValueError: For arguments of other shapes, and labels that are missing or that the model does not take.
        """
        batch_size, _, height, width = hidden_states.shape
        if height % self.patch_size or width % self.patch_size:
            allowed = f"multiples of `patch_size`={self.patch_size}"
            raise ValueError(f"Height and width of `hidden_states` must be {allowed}, got {height}x{width}.")
        if class_labels is not None and self.config.num_embeds_ada_norm is None:
            raise ValueError("`class_labels` must be None: the model is unconditional.")
        timestep = timestep_batch(timestep, hidden_states, one_for_all=True)
        mask = self.routing.mask(timestep, self.inner_dim)
        mask = None if mask is None else mask[:, None, :]

        hidden_states = self.pos_embed(hidden_states)
        if class_labels is None:
            class_labels = self._default_labels(batch_size, hidden_states.device)
        conditioning = self.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)

        for block in self.transformer_blocks:
            arguments = (hidden_states, conditioning, mask, cross_attention_kwargs)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = block(*arguments)

        shift, scale = self.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        hidden_states = self.norm_out(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        hidden_states = self.proj_out_2(hidden_states)
        output = unpatchify(hidden_states, height // self.patch_size, width // self.patch_size, self.patch_size)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @torch.no_grad()
    def replace_classes(self, num_classes: int | None, keep: bool = False) -> None:
        """Prepare for fine-tuning on other classes: a new label embedding, in which only the null class is kept.

        Args:
            num_classes: Number of the new classes, >= 1, or None for no labels at all.
            keep: Whether the classes that there are keep their labels and embeddings too, and others are added.
        """
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, or None, got {num_classes!r}.")
        old, num_kept = self.emb.class_embedder, (self.config.num_embeds_ada_norm or 0) if keep else 0
        if num_kept > (num_classes or 0):
            raise ValueError(f"`num_classes` must be at least the {num_kept} that are kept, got {num_classes!r}.")
        self.emb.class_embedder = None
        if num_classes is not None:
            new = LabelEmbedding(num_classes, self.inner_dim, self.config.class_dropout_prob)
            nn.init.normal_(new.embedding_table.weight, std=0.02)
            if num_kept:
                new.embedding_table.weight[:num_kept] = old.embedding_table.weight[:num_kept]
            if old is not None and self.null_class is not None:
                new.embedding_table.weight[-1] = old.embedding_table.weight[-1]
            self.emb.class_embedder = new.to(self.device, self.dtype).train(self.training)
        self.register_to_config(num_embeds_ada_norm=num_classes)

    def _default_labels(self, batch_size: int, device: torch.device) -> torch.Tensor | None:
        num_classes = self.config.num_embeds_ada_norm
        if num_classes is None:
            return None
        if self.null_class is None and num_classes > 1:
            raise ValueError(f"`class_labels` must be given: the model has {num_classes} classes and no null class.")
        label = 0 if self.null_class is None else self.null_class
        return torch.full((batch_size,), label, device=device)

    @classmethod
    def from_preset(cls, preset: str, **config) -> DTRTransformer2DModel:
        """A new model of one of the published sizes, with the original's epsilon and frequencies.

        Args:
            preset: "DiT-S/2" and so on: S, B, L or XL, and a patch size of 2, 4 or 8; a ValueError for another.
            **config: Config values that differ from the published ones.
        """
        if preset not in DIT_PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(DIT_PRESETS)}, got {preset!r}.")
        return cls(**{**DIT_PRESETS[preset], **config})

    @classmethod
    def from_transformer(cls, transformer: DiTTransformer2DModel, **routing) -> DTRTransformer2DModel:
        """As [`RoutedTransformerMixin.from_transformer`]; a ValueError too if the embedders of blocks differ."""
        if not isinstance(transformer, DiTTransformer2DModel):
            raise TypeError(f"`transformer` must be a `DiTTransformer2DModel`, got a `{type(transformer).__name__}`.")
        return cls._from_state(transformer, copy=True, **routing)

    @classmethod
    def _from_state(cls, source: DiTTransformer2DModel, *, copy: bool, **config) -> DTRTransformer2DModel:
        """A model of this class with the config, mode and weights of `source`, but for `config`."""
        # Not `from_config`, which ignores unknown names, and new values of what the source had left at its default.
        # Unknown names in the source's config are those of older diffusers, which loading keeps.
        known = signature(cls).parameters
        source_config = {name: value for name, value in source.config.items() if name in known}
        with accelerate.init_empty_weights():
            model = cls(**{**source_config, **config})
        state_dict = share_embedders(source.state_dict())
        if copy:
            state_dict = {key: value.clone() for key, value in state_dict.items()}
        model.load_state_dict(state_dict, strict=True, assign=True)
        # Those that no state dict has.
        for name, value in source.named_buffers():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, value.clone() if copy else value)
        return model.train(source.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> DTRTransformer2DModel:
        """Load as diffusers does, also checkpoints of diffusers' own DiT, which repeat the embedders in every block.

        Args:
            pretrained_model_name_or_path: Folder or repository.
            **kwargs: As in diffusers, and config values such as `routing_beta` that replace saved ones.

        Raises:
            ValueError: If embedders differ between blocks, or `device_map` or `quantization_config` is given for a
                checkpoint of diffusers' DiT.
        """
        config = cls.load_config(pretrained_model_name_or_path, **kwargs)
        if config.get("_class_name") not in PER_BLOCK_CLASS_NAMES:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

        for name in ("device_map", "quantization_config"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` does not work for a checkpoint of `{config['_class_name']}`, which is converted while "
                    f"loading. Load it without, save it, and load that with `{name}`."
                )
        own_config = signature(cls).parameters.keys() - signature(DiTTransformer2DModel).parameters.keys()
        overrides = {name: kwargs.pop(name) for name in own_config & kwargs.keys()}
        # diffusers' constructor refuses nothing; ours, which does, costs no memory on this device.
        with built_from_file(f"A {cls.__name__}"), torch.device("meta"):
            cls(**{name: config[name] for name in signature(cls).parameters if name in config} | overrides)
        with_info = kwargs.pop("output_loading_info", False)
        plain, info = DiTTransformer2DModel.from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        model = cls._from_state(plain, copy=False, **overrides)
        return (model, info) if with_info else model
