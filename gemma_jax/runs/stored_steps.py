"""What stored inputs ask for: losses, gradients, and parameters after steps. See `stored_case`."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.losses import final_norm, targets_of, token_losses
from gemma_jax.decoder.model import Gemma
from gemma_jax.runs.stored_case import Arrays, Case, placeholder_of
from gemma_jax.training.divergence import Divergence, Hidden, token_divergences
from gemma_jax.training.model_pair import ModelPair
from gemma_jax.training.objectives import TrainBatch, next_token
from gemma_jax.training.optimizers import OptimizerSettings, make_optimizer
from gemma_jax.training.preference import PreferenceBatch, completion_logps, preferences
from gemma_jax.training.step import make_step


def run_case(case: Case, steps: int) -> Arrays:
    """Computes what the settings ask for, by name, float32.

    Args:
      steps: Of the optimizer, where the settings have one.

    Raises:
      ValueError: Inputs that lack something, or settings that ask for what they do not describe.
    """
    if "input_ids" not in case.arrays and "input_ids_0" not in case.arrays:
        raise ValueError("no input_ids; give the file that has them by a further --inputs")
    if "completion_mask" in case.arrays:
        out = _preferences(case)
    elif case.other is not None:
        out = _distillation(case)
    elif "micro_rows" in case.settings:
        out = _accumulated(case)
    elif "segment_ids" in case.arrays:
        out = _packed(case)
    else:
        out = _steps(case, steps)
    return {name: np.asarray(value, np.float32) for name, value in out.items()}


def _steps(case: Case, steps: int) -> Arrays:
    """Loss and gradients of the first batch, of models with an adapter; then steps."""
    out: Arrays = {}
    adapted = case.merged is not None
    if adapted:
        batch = case.batch(0)
        read = batch.read(case.model)
        out["logits"] = np.asarray(forward(case.model, read).logits)
        loss, gradients = _gradients(case, next_token, batch)
        out |= {"loss": loss, "grad_norm": _norm(gradients)}
        out |= _front("grad.", case.named(gradients, case.wanted("grad.")))
        out |= _front("merged.", case.merged(case.wanted("merged.")))
    if "optimiser" not in case.settings or "no_steps" in case.settings:
        return out
    front = "step_" if adapted else ""
    said, trained = _trained(case, steps)
    out |= {f"{front}loss": said["loss"], f"{front}grad_norm": said["grad_norm"]}
    if not adapted:
        out["update_norm"] = _distance(trained, case.parts.trained)
    return out | _front("param.", case.named(trained, case.wanted("param.")))


def _trained(case: Case, steps: int):
    """What each step said, and the parameters after the last."""
    settings = case.settings["optimiser"]
    optimizer = _optimizer(case, settings, steps)
    init, step = make_step(next_token, optimizer, case.parts.join)
    state, step = init(case.parts.trained, jax.random.key(0)), jax.jit(step)
    said: dict[str, list] = {"loss": [], "grad_norm": []}
    for i in range(steps):
        state, metrics = step(state, case.parts.frozen, case.batch(i))
        for name, values in said.items():
            values.append(np.asarray(metrics[name]))
    return {name: np.stack(values) for name, values in said.items()}, state.trained


def _optimizer(case: Case, settings: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    known = ("betas", "eps", "weight_decay", "clip", "name", "lrs", "decays", "frozen")
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"optimiser has {', '.join(unknown)}; expected {', '.join(known)}")
    if (name := settings.get("name", "AdamW")).lower() != "adamw":
        raise ValueError(f"optimiser {name!r}; expected AdamW")
    rates = [float(rate) for rate in case.arrays.get("lr", settings.get("lrs", ()))]
    if len(rates) < steps:
        raise ValueError(f"{len(rates)} rates for {steps} steps; give one each")
    every = "every" in settings.get("decays", "")
    made = OptimizerSettings(
        rates=tuple(rates[:steps]),
        betas=tuple(settings.get("betas", (0.9, 0.999))),
        eps=settings.get("eps", 1e-8),
        weight_decay=settings.get("weight_decay", 0.0),
        decay="all" if every else "matrices",
        clip=settings.get("clip"),
    )
    return make_optimizer(made, case.model, steps)


def _accumulated(case: Case) -> Arrays:
    """Loss and gradients of all targets together, and what each micro-batch adds."""
    sums, counts, total = [], [], None
    for first, last in case.settings["micro_rows"]:
        batch = case.batch(0, slice(first, last))
        loss, gradients = _gradients(case, next_token, batch)
        count = int((batch.targets_BT >= 0).sum())
        sums.append(loss * count)
        counts.append(count)
        scaled = jax.tree.map(lambda g, n=count: g * n, gradients)
        total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
    gradients = jax.tree.map(lambda g: g / sum(counts), total)
    means = [one / count for one, count in zip(sums, counts)]
    out = {
        "loss": np.asarray([sum(sums) / sum(counts)]),
        "micro_loss_sum": np.asarray(sums),
        "micro_target_tokens": np.asarray(counts),
        "wrong_mean_of_micro_means": np.asarray([np.mean(means)]),
        "grad_norm": _norm(gradients),
    }
    return out | _front("grad.", case.named(gradients, case.wanted("grad.")))


def _packed(case: Case) -> Arrays:
    """Of packed rows, and of the same texts each in a row of its own."""
    batch = case.batch()
    loss, gradients = _gradients(case, next_token, batch)
    out = {"packed_loss": loss, "grad_norm": _norm(gradients)}
    out |= _front("grad.", case.named(gradients, case.wanted("grad.")))
    out["packed_token_losses"] = _losses(case.model, batch)[:, :-1]
    losses = []
    for i, alone in enumerate(_texts(case)):
        found = _losses(alone.model, alone.batch())
        out[f"separate_token_losses_{i}"] = found[:, :-1]
        losses.append((found.sum(), int((alone.batch().targets_BT >= 0).sum())))
    total, count = (sum(part) for part in zip(*losses))
    return out | {"separate_loss": np.asarray([total / count])}


def _texts(case: Case):
    """Each text of packed rows as a case of its own."""
    segments_BT, used = case.arrays["segment_ids"], {"pixel_values": 0, "input_features": 0}
    for row, segments_T in enumerate(segments_BT):
        for text in range(1, int(segments_T.max()) + 1):
            places = np.flatnonzero(segments_T == text)
            cut = (slice(row, row + 1), slice(places[0], places[-1] + 1))
            arrays = {
                name: array[cut] if array.shape == segments_BT.shape else array
                for name, array in case.arrays.items()
            }
            arrays["segment_ids"] = np.ones_like(arrays["segment_ids"])
            for key, name in (("pixel_values", "image"), ("input_features", "audio")):
                if key not in arrays:
                    continue
                placeholder = placeholder_of(case.cfg, name)
                all_places = int((case.arrays["input_ids"] == placeholder).sum())
                per_item = all_places // len(case.arrays[key])
                count = int((arrays["input_ids"] == placeholder).sum()) // per_item
                for one in (key, f"{key}_mask"):
                    if one in arrays:
                        arrays[one] = case.arrays[one][used[key] : used[key] + count]
                used[key] += count
            yield replace(case, arrays=arrays)


def _preferences(case: Case) -> Arrays:
    """Of every kind of loss that is asked for."""
    if case.other is None:
        raise ValueError("preferences need a reference; name it by --reference")
    answers_BT = case.arrays["completion_mask"].astype(np.float32)
    rows = replace(case.batch(), weights_BT=answers_BT)
    out: Arrays = {}
    for who, model in (("policy", case.model), ("reference", case.other)):
        logps_B = jax.jit(completion_logps)(model, rows)[0][:, 0]
        out[f"{who}_chosen_logps"], out[f"{who}_rejected_logps"] = np.split(logps_B, 2)
    for tag in _tags(case, ".per_pair"):
        options = _of_preference(tag)

        def objective(model, batch, key=None, options=options):
            pairs = preferences(ModelPair(model, case.other), PreferenceBatch(batch), **options)
            return jnp.mean(pairs.losses), {"pairs": pairs}

        loss, gradients, pairs = _gradients(case, objective, rows, extra="pairs")
        out |= _tagged(case, tag, loss, gradients)
        out[f"{tag}.per_pair"] = pairs.losses[:, 0]
        out[f"rewards_chosen_beta{options['beta']:g}"] = pairs.rewards_chosen[:, 0]
        out[f"rewards_rejected_beta{options['beta']:g}"] = pairs.rewards_rejected[:, 0]
    return out


def _distillation(case: Case) -> Arrays:
    """Of every kind of divergence that is asked for."""
    batch, teacher = case.batch(), case.other
    assert teacher is not None
    targets_BT = batch.targets_BT
    if targets_BT is None:
        raise ValueError("distillation needs labels, which say what counts")
    counts_BT = (targets_BT >= 0).astype(np.float32)
    real_BT = batch.batch.positions_BT >= 0
    logits_BTV = np.asarray(forward(teacher, batch.read(teacher)).logits)
    out = {"teacher_logits": (logits_BTV * real_BT[:, :, None])[:, :-1]}
    for tag in _tags(case, ".per_token"):
        options = _of_divergence(tag, case.settings)

        def objective(model, batch, key=None, options=options):
            read = batch.read(model)
            of_teacher = Hidden.of(teacher, batch.read(teacher))
            each_BT = token_divergences(Hidden.of(model, read), of_teacher, Divergence(**options))
            each_BT *= counts_BT
            return each_BT.sum() / counts_BT.sum(), {"each": each_BT}

        loss, gradients, each_BT = _gradients(case, objective, batch, extra="each")
        out |= _tagged(case, tag, loss, gradients)
        out[f"{tag}.per_token"] = each_BT[:, :-1]
    return out


def _of_divergence(tag: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options in a name such as `topk_full_student_T2` or `jsd_T1`."""
    name, _, temperature = tag.rpartition("_T")
    options = {"kind": name, "temperature": float(temperature), "top_k": None, "form": None}
    if form := re.fullmatch(r"topk_(\w+?)(_student)?", name):
        options |= {"kind": "forward_kl", "top_k": settings["k"], "form": form[1]}
    return options


def _of_preference(tag: str) -> dict[str, Any]:
    """Options in a name such as `sigmoid_smoothed_beta0.1_eps0.1`."""
    kind, _, numbers = tag.partition("_beta")
    beta, _, eps = numbers.partition("_eps")
    kind = {"sigmoid_smoothed": "smoothed"}.get(kind, kind)
    try:
        return {"kind": kind, "beta": float(beta), "label_smoothing": float(eps or 0)}
    except ValueError:
        raise ValueError(f"{tag!r}: expected KIND_betaB or KIND_betaB_epsE") from None


def _gradients(case: Case, objective, batch: TrainBatch, extra: str | None = None):
    """Loss and gradients of what is trained."""

    def loss(trained, frozen, batch):
        value, metrics = objective(case.parts.join(trained, frozen), batch, None)
        return value, metrics[extra] if extra else None

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, found), gradients = run(case.parts.trained, case.parts.frozen, batch)
    value = np.asarray(value).reshape(1)
    return (value, gradients, found) if extra else (value, gradients)


@jax.jit
def _losses(model: Gemma, batch: TrainBatch) -> jax.Array:
    """Of each token, in the place of the one before it; 0 where there is no target."""
    read = batch.read(model)
    targets_BT, weights_BT = targets_of(read, batch.targets_BT, batch.weights_BT)
    return token_losses(model, final_norm(model, read), targets_BT, weights_BT=weights_BT)


def _tagged(case: Case, tag: str, loss, gradients) -> Arrays:
    front = f"{tag}.grad."
    out = {f"{tag}.loss": loss, f"{tag}.grad_norm": _norm(gradients)}
    return out | _front(front, case.named(gradients, case.wanted(front)))


def _tags(case: Case, end: str) -> list[str]:
    return [
        name.removesuffix(end) for name in case.settings.get("outputs", {}) if name.endswith(end)
    ]


def _distance(ours: Any, theirs: Any) -> np.ndarray:
    """In float64: the parts that make it up differ by seven orders of magnitude."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    squares = (np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)) for a, b in pairs)
    return np.sqrt([sum(float(square.sum()) for square in squares)])


def _norm(tree: Any) -> np.ndarray:
    return np.asarray(optax.tree.norm(tree)).reshape(1)


def _front(front: str, arrays: Arrays) -> Arrays:
    return {front + name: array for name, array in arrays.items()}
