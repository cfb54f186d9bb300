"""Which of a kernel's implementations serves a call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def first_that_can(
    kernel: str,
    implementations: Mapping[str, Callable[..., Any]],
    automatic: Sequence[str],
    implementation: str | None,
    *operands: Any,
    **options: Any,
) -> Any:
    """Calls the implementation that is named, or the first one that can serve the call.

    Args:
      kernel: Its name for people.
      implementations: By name; one that cannot serve a call raises `NotImplementedError`.
      automatic: Names that are tried in this order.
      implementation: `None` or `"auto"` tries those; a name takes that one or fails.

    Returns:
      What it returns for `operands` and `options`.

    Raises:
      ValueError: The name is unknown.
      NotImplementedError: The named implementation, or every one, cannot serve this call.

    Examples:
      >>> from gemma_kernels.implementations import first_that_can
      >>> first_that_can("sum", {"plain": sum}, ("plain",), None, [1, 2])
      3
    """
    if implementation not in (None, "auto"):
        if implementation not in implementations:
            known = ", ".join(["auto", *implementations])
            raise ValueError(f"unknown {kernel} {implementation=}; choose one of: {known}")
        return implementations[implementation](*operands, **options)
    reasons = []
    for name in automatic:
        try:
            return implementations[name](*operands, **options)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no {kernel} implementation fits: " + "; ".join(reasons))
