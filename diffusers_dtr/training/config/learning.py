"""How a run learns: optimizer, average, noise, objective and routing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from ...objective.balancing import BALANCINGS
from ...objective.clustering import COSTS
from ...objective.gramian_weighting import GRADIENT_BALANCINGS
from ...objective.weighting import WEIGHTINGS
from ...ranges import Range
from ...routing import ALPHA_RANGE, BETA_RANGE, ROUTING_TYPES, SEED_RANGE
from .options import BelowOne, Count, Finite, NonNegative, Options, Positive, Share, Whole, option


@dataclass(frozen=True)
class OptimizerConfig(Options):
    """The optimizer and the learning rate."""

    _argument_group_name = "optimizer"

    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "prodigy", "muon"] = option(
        "adamw", "What trains the denoiser. muon: AdamW for all but matrices; prodigy: for a --learning_rate of 1."
    )
    learning_rate: NonNegative = option(1e-4, "Peak learning rate.")
    scale_lr: bool = option(
        False, "Multiply the learning rate by the images of a step: processes, accumulation and batch size."
    )
    # Those of diffusers' `get_scheduler` that the flags say enough for.
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "Course of the learning rate.")
    lr_warmup_steps: Whole = option(0, "Steps over which the learning rate rises.")
    lr_num_cycles: Count | None = option(None, "Cycles of cosine_with_restarts. Default 1.")
    lr_power: Positive | None = option(None, "Power of polynomial. Default 1.")
    adam_beta1: BelowOne = option(0.9)
    adam_beta2: BelowOne = option(0.999)
    adam_weight_decay: NonNegative = option(0.0)
    adam_epsilon: Positive = option(1e-8)
    max_grad_norm: NonNegative = option(1.0, "Gradients are scaled down to this norm. 0: not at all.")

    def __post_init__(self):
        super().__post_init__()
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            raise ValueError("`--lr_warmup_steps` has no effect on --lr_scheduler constant: use constant_with_warmup.")
        for name, schedule in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            self.effect_only(self.lr_scheduler == schedule, f"on --lr_scheduler {schedule}", name)
        adam = ("adam_beta1", "adam_beta2", "adam_epsilon")
        self.effect_only(self.optimizer != "adafactor", "on another --optimizer than adafactor", *adam)
        package = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(self.optimizer)
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f'`--optimizer {self.optimizer}` needs {package}: pip install "diffusers-dtr[optimizers]".'
            )
        if self.optimizer == "prodigy" and self.learning_rate == 0:
            raise ValueError("`--learning_rate` must be a number > 0 for --optimizer prodigy, got 0.")


@dataclass(frozen=True)
class EMAConfig(Options):
    """The moving average of the weights."""

    _argument_group_name = "average of the weights"

    use_ema: bool = option(False, "Average the weights, and save and sample the average.")
    ema_type: Literal["warmup", "power"] = option(
        "warmup", "How the decay grows: up to a largest one, or by the power function of EDM2 (arXiv 2312.02696)."
    )
    ema_sigma_rel: Annotated[float, Range("[0.001, 0.28]")] | None = option(
        None,
        "Relative standard deviation of the power function's window over the steps, in [0.001, 0.28]. Default 0.1.",
    )
    ema_max_decay: Share = option(0.9999, "Largest decay of the average.")
    ema_inv_gamma: Positive = option(1.0, "Inverse gamma of the decay's warm-up.")
    ema_power: Positive = option(0.75, "Power of the decay's warm-up.")
    offload_ema: bool = option(False, "Keep the average in the CPU's memory between steps.")

    def __post_init__(self):
        super().__post_init__()
        self.effect_only(self.use_ema, "with --use_ema", *(name for name in self.names() if name != "use_ema"))
        self.effect_only(self.ema_type == "power", "on --ema_type power", "ema_sigma_rel")
        warmup = ("ema_max_decay", "ema_inv_gamma", "ema_power")
        self.effect_only(self.ema_type == "warmup", "on --ema_type warmup", *warmup)


@dataclass(frozen=True)
class NoiseConfig(Options):
    """The noise schedule, which is a pretrained pipeline's unless given, and the noise itself."""

    _argument_group_name = "noise"

    noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] | None = option(
        None, "`beta_schedule` of the DDPMScheduler. Default linear."
    )
    num_train_timesteps: Count | None = option(
        None,
        "Number of timesteps T. Default 1000. The betas of other schedules than squaredcos_cap_v2 are scaled by the "
        "old number over the new one, so that the noisiest timestep stays as noisy.",
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(None, "Default epsilon.")
    learn_sigma: bool = option(False, "Learn the variance too, by the variational bound.")
    noise_offset: NonNegative = option(
        0.0, "Scale of what is added to the noise of a whole channel, for darker and brighter images."
    )
    input_perturbation: NonNegative = option(
        0.0, "Scale of noise that the denoiser's input has and its target has not; 0.1 is recommended."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.input_perturbation and self.learn_sigma:
            raise ValueError("`--input_perturbation` does not go with --learn_sigma, whose bound knows one noise.")


@dataclass(frozen=True)
class ObjectiveConfig(Options):
    """Weighting by noise level, clusters of timesteps, and their balancing."""

    _argument_group_name = "loss, clusters and balancing"

    loss_weighting: Literal[tuple(WEIGHTINGS)] = option(
        "constant", "How squared errors are weighted by noise level; logit_normal is for flow matching alone."
    )
    snr_gamma: Positive | None = option(None, "γ of min_snr and soft_min_snr. Default 5.")
    num_clusters: Count = option(8, "Number of clusters of timesteps.")
    cluster_cost: Literal[(*COSTS, "affinity")] = option(
        "snr", "What clusters minimise; the task affinity of --affinity_path they maximise."
    )
    affinity_path: str | None = option(None, "File of compute_task_affinity.py, for --cluster_cost affinity.")
    balancing: Literal[(*BALANCINGS, *GRADIENT_BALANCINGS)] = option(
        "uniform", "How clusters are weighed against each other."
    )
    balancing_update_every: Count | None = option(
        None, "Optimizer steps for which gradient balancing uses the same weights. Default 1."
    )
    timestep_sampling: Literal["uniform", "clusters", "loss", "variance", "logit_normal"] | None = option(
        None,
        "How timesteps are drawn: uniformly (the default without balancing), equally many in every cluster (the "
        "default with it), following the clusters' loss or its variance, with the loss corrected for it, or by the "
        "logit-normal distribution of Stable Diffusion 3, for flow matching.",
    )
    logit_mean: Finite | None = option(
        None,
        "Location of logit_normal; above 0 favours noisy timesteps, as in the paper of Stable Diffusion 3. Default 0.",
    )
    logit_std: Positive | None = option(None, "Scale of logit_normal, > 0. Default 1.")
    train_cluster: Whole | None = option(
        None, "Train on the timesteps of this one cluster alone, to measure what training on all costs it."
    )

    def __post_init__(self):
        super().__post_init__()
        snr = self.loss_weighting in ("min_snr", "soft_min_snr")
        self.effect_only(snr, "on --loss_weighting min_snr or soft_min_snr", "snr_gamma")
        gradients = self.balancing in GRADIENT_BALANCINGS
        self.effect_only(gradients, f"on --balancing {', '.join(GRADIENT_BALANCINGS)}", "balancing_update_every")
        if gradients and find_spec("torchjd") is None:
            raise ValueError(f'`--balancing {self.balancing}` needs torchjd: pip install "diffusers-dtr[balancing]".')
        if (self.cluster_cost == "affinity") != (self.affinity_path is not None):
            raise ValueError("--cluster_cost affinity and --affinity_path need each other.")
        logit_normal = self.timestep_sampling == "logit_normal"
        self.effect_only(logit_normal, "on --timestep_sampling logit_normal", "logit_mean", "logit_std")
        if self.train_cluster is None:
            return
        if self.train_cluster >= self.num_clusters:
            raise ValueError(
                f"`--train_cluster` must be below --num_clusters {self.num_clusters}, got {self.train_cluster}."
            )
        if self.balancing != "uniform" or self.timestep_sampling is not None:
            raise ValueError("`--train_cluster` leaves nothing to balance by --balancing or --timestep_sampling.")


@dataclass(frozen=True)
class RoutingConfig(Options):
    """Denoising Task Routing; what is not given is the pretrained model's, or the default."""

    _argument_group_name = "denoising task routing"

    routing_alpha: Annotated[float, ALPHA_RANGE] | None = option(
        None, "How late the channel window slides, > 0. Default 4."
    )
    routing_beta: Annotated[float, BETA_RANGE] | None = option(
        None, "Share of active channels, in (0, 1]; 1 is unrouted. Default 0.8."
    )
    routing_type: Literal[tuple(ROUTING_TYPES)] | None = option(None, "Default dtr.")
    routing_seed: Annotated[int, SEED_RANGE] | None = option(None, "Seed of random routing.")
    routing_timestep_range: list[Finite] | None = option(
        None,
        "Timesteps at which the channel window stands at the first and last channels. Default all of the noise "
        "schedule.",
        nargs=2,
        metavar=("CLEANEST", "NOISIEST"),
    )
    routing_warmup_steps: Whole = option(
        0, "Steps over which the share falls from 1, the unrouted model, to its target."
    )

    def __post_init__(self):
        super().__post_init__()
        ends = self.routing_timestep_range
        if ends is not None and not (len(ends) == 2 and ends[0] != ends[1]):
            raise ValueError(f"`--routing_timestep_range` must be the cleanest and noisiest timestep, got {[*ends]}.")

    @property
    def given(self) -> dict[str, Any]:
        """The config values of a model that are given."""
        given = {name: getattr(self, name) for name in self.names() if name != "routing_warmup_steps"}
        return {name: value for name, value in given.items() if value is not None}
