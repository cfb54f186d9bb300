"""Optimizers by their settings, the same for layers that lie in one array as for separate ones.

Local letters: O outputs; I inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import jax
import optax
from flax import nnx

from gemma_jax.decoder.model import Gemma
from gemma_jax.training.adam import scale_by_adam
from gemma_jax.training.decay import DecayRule, decays
from gemma_jax.training.param_letters import LettersOf, letters_of
from gemma_jax.training.schedules import SCHEDULES, Schedule, listed_rate, scheduled_rate
from gemma_jax.training.transforms import clip_by_norm, computed_in_float32, per_matrix
from gemma_jax.weights.tree import ParamPath, flat_params

# The settings that one optimizer reads and others do not.
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps"),
    "adafactor": ("least_factored",),
    "muon": ("betas", "eps", "momentum"),
    "sgd": ("momentum",),
}


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Says how what is trained is moved: the rule, its rate over time, decay and clipping.

    Moments are float32 always, and so are norms.

    Attributes:
      name: `"adamw"` (Loshchilov and Hutter, 2019); `"adafactor"` (Shazeer and Stern, 2018, with
        updates clipped at an RMS of 1 and in units of the parameter's RMS); `"muon"` (Jordan, 2024)
        for linear maps, with Adam for all else; `"sgd"`.
      rate: The highest learning rate.
      schedule: What becomes of it after the warm-up: `"constant"`, `"linear"` or `"cosine"`.
      warmup: Steps of a linear warm-up; the first has `rate / warmup`, not 0 as elsewhere.
      final_share: The share of `rate` that is left at the end of the run.
      rates: The rate of every step, in the place of the four fields above.
      betas: Of Adam's moments.
      eps: Added to the root of Adam's second moment.
      momentum: Of SGD (default 0) or Muon (default 0.95).
      least_factored: Adafactor keeps row and column sums alone of matrices whose sides are both at
        least this long.
      weight_decay: Share of a parameter taken off per step, times the rate.
      decay: Which parameters decay: `"matrices"` (tables and all with rows and columns, but no norm
        scales or biases), `"all"`, `"none"`, or a list of rules; see `training.decay`.
      clip: Most that the norm of all gradients may be; `None` for no limit. Larger ones are scaled
        by `clip / (norm + 1e-6)`, as in torch.
      masters: `"float32"` keeps a float32 copy of each narrower parameter beside the moments, so
        that small updates add up: 4 bytes per parameter. `None` does not: in bfloat16, updates
        below some 0.2 % of a parameter are then lost.

    Raises:
      ValueError: A value out of range, or a setting that this optimizer does not read.

    Examples:
      >>> import gemma_jax as gj
      >>> settings = gj.OptimizerSettings(rate=1e-3, schedule="cosine", warmup=4, clip=1.0)
      >>> [round(float(settings.rate_at(step, steps=8)) * 1e3, 2) for step in range(8)]
      [0.25, 0.5, 0.75, 1.0, 0.9, 0.65, 0.35, 0.1]
    """

    name: Literal["adamw", "adafactor", "muon", "sgd"] = "adamw"
    rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup: int = 0
    final_share: float = 0.0
    rates: tuple[float, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float | None = None
    least_factored: int = 128
    weight_decay: float = 0.0
    decay: DecayRule = "matrices"
    clip: float | None = None
    masters: Literal["float32"] | None = "float32"

    def __post_init__(self):
        if self.name not in OWN_SETTINGS:
            raise ValueError(f"optimizer {self.name!r} must be one of: {', '.join(OWN_SETTINGS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of: {', '.join(SCHEDULES)}")
        if self.masters not in (None, "float32"):
            raise ValueError(f"masters={self.masters!r} must be 'float32' or None")
        self._check_ranges()
        read = OWN_SETTINGS[self.name]
        others = {name for names in OWN_SETTINGS.values() for name in names} - set(read)
        self._refuse(others, f"{self.name} does not read")
        if self.rates:
            self._refuse({"rate", "schedule", "warmup", "final_share"}, "`rates` replaces")

    def _refuse(self, names: set[str], why: str) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if extra := [name for name in given if name in names]:
            raise ValueError(f"{why} {', '.join(extra)}: leave out one or the other")

    def _check_ranges(self) -> None:
        shares = {"betas[0]": self.betas[0], "betas[1]": self.betas[1], "momentum": self.momentum}
        for name, value in shares.items():
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} must lie in [0, 1)")
        for name in ("rate", "warmup", "final_share", "eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not self.final_share <= 1:
            raise ValueError(f"final_share={self.final_share} must be 1 at most")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be above 0; None is no limit")
        if bad := [rate for rate in self.rates if not rate >= 0]:
            raise ValueError(f"rates must not be negative, got {bad[0]}")

    def rate_at(self, step: jax.typing.ArrayLike, *, steps: int) -> jax.Array:
        """Computes the learning rate of a step, a float32 scalar.

        Args:
          step: How many came before it.
          steps: Of the whole run.
        """
        if self.rates:
            return listed_rate(step, self.rates)
        return scheduled_rate(
            step,
            steps=steps,
            peak=self.rate,
            schedule=self.schedule,
            warmup=self.warmup,
            final_share=self.final_share,
        )


def make_optimizer(
    settings: OptimizerSettings, known: Gemma | Mapping[ParamPath, tuple[str, str]], steps: int
) -> optax.GradientTransformation:
    """Makes the optimizer of a run.

    Stacked layers are moved as separate ones are, by every optimizer. What is trained may have any
    dtype; updates are float32, and so are moments.

    Args:
      known: The model whose parameters, or adapters beside them, are trained; or what the letters
        of its parameters are: path -> `(dims, inputs)`.
      steps: Of the whole run, over which the rate falls.

    Raises:
      ValueError: `rates` that are not one per step. At `init`: rules of decay that match nothing.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits")
      >>> settings = gj.OptimizerSettings(name="adafactor", rate=1e-2, weight_decay=0.1)
      >>> optimizer = gj.make_optimizer(settings, model, steps=100)
      >>> moments = optimizer.init(gj.trainable(model).trained)
    """
    if settings.rates and len(settings.rates) != steps:
        raise ValueError(f"{len(settings.rates)} rates for {steps} steps: give one rate per step")
    letters = letters_of(known)
    parts = [] if settings.clip is None else [clip_by_norm(settings.clip)]
    parts.append(_direction(settings, letters))
    if settings.weight_decay:
        mask = partial(decays, settings.decay, letters)
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask))
    parts.append(optax.scale_by_learning_rate(partial(settings.rate_at, steps=steps)))
    return computed_in_float32(optax.chain(*parts), masters=settings.masters is not None)


def _direction(settings: OptimizerSettings, letters: LettersOf) -> optax.GradientTransformation:
    """Where an optimizer goes, before decay and rate."""
    (b1, b2), eps = settings.betas, settings.eps
    if settings.name == "adamw":
        return scale_by_adam(b1, b2, eps)
    if settings.name == "sgd":
        return optax.trace(settings.momentum) if settings.momentum else optax.identity()
    if settings.name == "adafactor":
        return per_matrix(_adafactor(settings.least_factored), letters)
    momentum = 0.95 if settings.momentum is None else settings.momentum
    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(beta=momentum), optax.stateless(_scale_by_shape)
    )

    def kinds(params):
        maps = {path: letters(path, array.ndim).is_map for path, array in params.items()}
        return {path: "muon" if is_map else "adam" for path, is_map in maps.items()}

    adam = scale_by_adam(b1, b2, eps)
    return optax.partition({"muon": per_matrix(orthogonal, letters), "adam": adam}, kinds)


def _adafactor(least_factored: int) -> optax.GradientTransformation:
    """Of one matrix; as `optax.adafactor`."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=least_factored),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _scale_by_shape(update_OI: jax.Array, param_OI: jax.Array | None = None) -> jax.Array:
    """Lets wide matrices move as narrow ones do; as `optax.contrib.muon`."""
    outputs, inputs = update_OI.shape
    return update_OI * max(1, outputs / inputs) ** 0.5


def muon(model: Gemma, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Makes Muon for the linear maps of a model and Adam for all else.

    Args:
      model: What `trainable` is asked about; any part of it may be trained.
      rate: Of both.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits")
      >>> trained, frozen, join = gj.trainable(model, lambda path, param: "attn" in path)
      >>> moments = gj.muon(model, 1e-3).init(trained)
    """
    matrices = {path: _matrix(param) for path, param in flat_params(model).items()}

    def of_what_is_trained(trained: Any) -> dict[ParamPath, Any]:
        return {path: matrices[path] for path in trained}

    return optax.contrib.muon(
        rate,
        muon_weight_dimension_numbers=of_what_is_trained,
        weight_decay=0.01,
        adam_weight_decay=0.01,
    )


def _matrix(param: nnx.Param) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are its rows and columns; `None` for what is no linear map."""
    inputs, dims = (param.get_metadata().get(name, "") for name in ("inputs", "dims"))
    if not inputs or "V" in dims:
        return None
    ndim = len(param.get_value().shape)
    columns, first = ndim - len(inputs), ndim - len(dims)
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(columns, ndim)), output_axis=tuple(range(first, columns))
    )
