"""Which schedulers of diffusers can sample an scRDiT model, why others cannot, and the default one."""

import inspect
from typing import NamedTuple

from diffusers import ModelMixin, SchedulerMixin, UniPCMultistepScheduler

_NOISE = ("epsilon", "v_prediction")
_ALL = (*_NOISE, "sample")


class SchedulerVerdict(NamedTuple):
    """Whether a scheduler can sample an scRDiT model.

    Parameters
    ----------
    prediction_types
        Prediction types for which it reproduces mean and standard deviation of an exact denoiser; if empty, the
        scheduler is refused.
    reason
        Why it fails for the others.
    any_schedule
        If `False`, the noise schedule must leave some signal at the last timestep, as the linear one does.
    """

    prediction_types: tuple[str, ...]
    reason: str = ""
    any_schedule: bool = True


_NO_SAMPLE = "it does not implement models that predict the clean cell"
_FLOW = SchedulerVerdict((), "it follows a flow from noise to data, not the noise process of this model")
_KARRAS = SchedulerVerdict(
    (), "it adds noise without scaling down the cell (EDM), not as in the training of this model"
)
_TOKENS = SchedulerVerdict((), "it unmasks discrete tokens")
_INVERSE = SchedulerVerdict((), "it goes from cells to noise")
# Every scheduler of diffusers. tests/test_schedulers.py measures each, with each prediction type and noise schedule.
SCHEDULERS: dict[str, SchedulerVerdict] = {
    "DDIMParallelScheduler": SchedulerVerdict(_ALL),
    "DDIMScheduler": SchedulerVerdict(_ALL),
    "DDPMParallelScheduler": SchedulerVerdict(_ALL),
    "DDPMScheduler": SchedulerVerdict(_ALL),
    "DEISMultistepScheduler": SchedulerVerdict(_ALL),
    "DPMSolverMultistepScheduler": SchedulerVerdict(_ALL),
    "DPMSolverSinglestepScheduler": SchedulerVerdict(_ALL),
    "EulerDiscreteScheduler": SchedulerVerdict(_ALL),
    "LMSDiscreteScheduler": SchedulerVerdict(_ALL),
    "SASolverScheduler": SchedulerVerdict(_ALL),
    "UniPCMultistepScheduler": SchedulerVerdict(_ALL),
    "DPMSolverSDEScheduler": SchedulerVerdict(_NOISE, _NO_SAMPLE),
    "EulerAncestralDiscreteScheduler": SchedulerVerdict(_NOISE, _NO_SAMPLE),
    "KDPM2DiscreteScheduler": SchedulerVerdict(_NOISE, _NO_SAMPLE),
    # On the cosine schedule, the first step of these extrapolates over noise levels hundreds of times apart.
    "HeunDiscreteScheduler": SchedulerVerdict(_ALL, any_schedule=False),
    "KDPM2AncestralDiscreteScheduler": SchedulerVerdict(_NOISE, _NO_SAMPLE, any_schedule=False),
    "PNDMScheduler": SchedulerVerdict(("epsilon",), "its extrapolation is made for models of the noise", False),
    # Refused.
    "CMStochasticIterativeScheduler": SchedulerVerdict((), "it needs a consistency model"),
    "CogVideoXDDIMScheduler": SchedulerVerdict((), "its noise schedule is shifted for videos"),
    "CogVideoXDPMScheduler": SchedulerVerdict((), "its noise schedule is shifted for videos"),
    "ConsistencyDecoderScheduler": SchedulerVerdict((), "it needs a consistency model"),
    "DDPMWuerstchenScheduler": SchedulerVerdict((), "it has a noise process with continuous time of its own"),
    "IPNDMScheduler": SchedulerVerdict((), "it ignores the noise schedule and the prediction type"),
    "LCMScheduler": SchedulerVerdict((), "it needs a model distilled for it and distorts the cells of any other"),
    "RePaintScheduler": SchedulerVerdict((), "it fills in masked images"),
    "SCMScheduler": SchedulerVerdict((), "it needs a consistency model"),
    "TCDScheduler": SchedulerVerdict((), "it needs an adapter distilled for it (`scrdit distill`)"),
    "UnCLIPScheduler": SchedulerVerdict((), "it has a noise schedule and a variance of its own"),
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "CosineDPMSolverMultistepScheduler": _KARRAS,
    "EDMDPMSolverMultistepScheduler": _KARRAS,
    "EDMEulerScheduler": _KARRAS,
    "KarrasVeScheduler": _KARRAS,
    "ScoreSdeVeScheduler": _KARRAS,
    "ScoreSdeVpScheduler": SchedulerVerdict((), "it has a noise process with continuous time of its own"),
    "FlowMapEulerDiscreteScheduler": _FLOW,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
    "HeliosDMDScheduler": _FLOW,
    "HeliosScheduler": _FLOW,
    "LTXEulerAncestralRFScheduler": _FLOW,
    "MiniMaxH3Scheduler": _FLOW,
    "PiflowScheduler": _FLOW,
    "RFD4ProteinaScheduler": _FLOW,
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
}
# Config entries that another scheduler must share with the pipeline's own.
NOISE_PROCESS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
_ALTERNATIVE = "use UniPCMultistepScheduler, DDIMScheduler or EulerDiscreteScheduler."

# As good as 25 evenly spaced ones, if counts are drawn at the last. Much is decided at high noise (LOG, 2026-11-27).
FAST_TIMESTEPS = [999, 950, 850, 720, 580, 450, 320, 200]

DISTILLED = "distilled_for"  # entry of an adapter's `auto_mapping` that names the scheduler it was distilled for
DISTILLED_STEPS = 2  # network calls with such an adapter, if a call does not say how many


def default_scheduler(
    prediction_type: str = "sample", beta_schedule: str = "squaredcos_cap_v2", num_train_timesteps: int = 1000
) -> UniPCMultistepScheduler:
    """Make the scheduler that trained pipelines ship with: UniPC, with every argument explicit.

    No argument of UniPC means something else to another scheduler (DPM-Solver's `algorithm_type` would break
    SA-Solver). The config also carries arguments of other schedulers, above all `clip_sample=False`, so that
    `DDIMScheduler.from_config(pipe.scheduler.config)` and the like sample the model correctly.

    Parameters
    ----------
    prediction_type
        What the transformer was trained to predict: "epsilon", "v_prediction" or "sample".
    beta_schedule
        Noise schedule of the training.
    num_train_timesteps
        Number of timesteps T of the training.
    """
    # Defaults are made explicit too, because an in-memory from_config would drop them.
    parameters = inspect.signature(UniPCMultistepScheduler).parameters
    config = {name: parameter.default for name, parameter in parameters.items()}
    config |= dict(
        num_train_timesteps=num_train_timesteps,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        solver_order=3,  # better than 2 with few steps
        final_sigmas_type="zero",
    )
    # Read by DDPM and DDIM only.
    config |= dict(clip_sample=False, set_alpha_to_one=True, variance_type="fixed_small")
    return UniPCMultistepScheduler.from_config(config)


def distilled_for(transformer: ModelMixin) -> str | None:
    """Name of the scheduler for which an active adapter of a transformer was distilled; `None` if there is none."""
    adapters = getattr(transformer, "peft_config", {})
    names = {name for name, config in adapters.items() if DISTILLED in (config.auto_mapping or {})}
    layers = [layer for layer in transformer.modules() if hasattr(layer, "lora_A")] if names else []
    active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    return next((adapters[name].auto_mapping[DISTILLED] for name in sorted(names & active)), None)


def check_scheduler(scheduler: SchedulerMixin, needed: str | None = None) -> None:
    """Raise ValueError, with the reason and an alternative, for a scheduler that cannot sample an scRDiT model.

    Parameters
    ----------
    scheduler
        The scheduler.
    needed
        Output of [`distilled_for`]: the only scheduler that can sample a model with a distilled adapter.
    """
    name = type(scheduler).__name__
    if needed is not None and name != needed:
        raise ValueError(
            f"{name} cannot sample a model with an adapter distilled for {needed}: "
            f"pipe.scheduler = {needed}.from_config(pipe.scheduler.config), or pipe.unload_lora_weights()."
        )
    config = scheduler.config
    verdict = next((SCHEDULERS[base.__name__] for base in type(scheduler).__mro__ if base.__name__ in SCHEDULERS), None)
    if verdict is None and type(scheduler).__module__.startswith("diffusers."):
        raise ValueError(f"{name} is newer than this package and was not tried with it; {_ALTERNATIVE}")
    if verdict is None and not (hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(
            f"{name} has no init_noise_sigma and alphas_cumprod, the noise process of this model; {_ALTERNATIVE}"
        )
    if verdict is not None and needed is None:
        prediction_type = config.get("prediction_type", "epsilon")
        if not verdict.prediction_types:
            raise ValueError(f"{name} cannot sample this model: {verdict.reason}; {_ALTERNATIVE}")
        if prediction_type not in verdict.prediction_types:
            raise ValueError(
                f"{name} cannot sample a model with prediction_type={prediction_type!r}: {verdict.reason}; "
                f"{_ALTERNATIVE}"
            )
        if not verdict.any_schedule and scheduler.alphas_cumprod[-1] < 1e-6:
            raise ValueError(
                f"{name} distorts cells on this noise schedule: it cannot cross the first, very large noise levels of "
                f"{config.get('beta_schedule')!r}; {_ALTERNATIVE}"
            )
    for setting in ("clip_sample", "thresholding"):
        if config.get(setting):
            raise ValueError(
                f"{name} has {setting}=True, which cuts off cells: model space is not bounded by -1 and 1. "
                f"Make it by `{name}.from_config(pipe.scheduler.config)` from the config of the shipped one."
            )
