"""New adapters by PEFT's names of modules."""

from gemma_jax.decoder.model import Gemma
from gemma_jax.training.lora import Chosen, Lora

from .modules import Module, modules_of, prefix_of, tensor_rows
from .peft_rules import PeftRules


def chosen_by_peft(model: Gemma, settings: Lora) -> tuple[Chosen, set[str]]:
    """What settings with `target_modules` mean in a model, as PEFT would have it in transformers.

    Raises:
      ValueError: A name or pattern that means nothing here.
    """
    rules = rules_of(settings)
    rules.check()
    chosen, whole = {}, set()
    for path, module in modules_of(model).items():
        spelled = prefix_of(path, model.cfg) + path
        if rules.targets(spelled):
            chosen[module.name] = (rules.rank(spelled), rules.scale(spelled))
    for theirs, (name, _) in tensor_rows(model).items():
        if saves(rules, theirs, model):
            whole.add(name)
    _refuse_unused(rules, model, modules_of(model))
    return chosen, whole


def rules_of(settings: Lora) -> PeftRules:
    """The settings as fields of an `adapter_config.json`."""
    targets = settings.target_modules
    return PeftRules(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets if isinstance(targets, str | None) else list(targets),
        modules_to_save=list(settings.whole),
        layers_to_transform=None if settings.layers is None else list(settings.layers),
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        use_rslora=settings.rslora,
    )


def saves(rules: PeftRules, theirs: str, model: Gemma) -> bool:
    """Whether a tensor is in a module that is saved whole."""
    inside = theirs.rpartition(".")[0]
    return bool(inside) and rules.saves(prefix_of(theirs, model.cfg) + inside)


def _refuse_unused(rules: PeftRules, model: Gemma, modules: dict[str, Module]) -> None:
    spelled = [prefix_of(path, model.cfg) + path for path in modules]
    targets = rules.target_modules or []
    each = [targets] if isinstance(targets, str) else targets
    for name in each:
        alone = name if isinstance(targets, str) else [name]
        if not any(PeftRules(1, 1, target_modules=alone).targets(path) for path in spelled):
            raise ValueError(
                f"target_modules {name!r} means no linear map or table of this model; modules are "
                f"such as {spelled[1]}"
            )
    for name in rules.modules_to_save:
        rule = PeftRules(1, 1, modules_to_save=[name])
        if not any(saves(rule, theirs, model) for theirs in tensor_rows(model)):
            raise ValueError(f"whole: {name!r} is the end of no module's path in this model")
