"""Many small cases in one test, and a quick choice from many slow ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest


def sweep(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Any], Any]:
    """Calls a test for each of the values, as one test; a failure names its case.

    Takes what ``pytest.mark.parametrize`` takes. For thousands of cases of a millisecond each,
    where most of the time would be pytest's own.

    Args:
        names: The argument of the test, or a tuple of several.
        values: The values of the argument, or tuples with one value for each.
    """
    cases = [
        {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
        for value in values
    ]
    assert cases

    def decorate(test: Callable[..., None]) -> Any:
        signature = inspect.signature(test)
        rest = [p for name, p in signature.parameters.items() if name not in cases[0]]
        assert len(rest) == len(signature.parameters) - len(cases[0]), f"{test} lacks {names}"

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for case in cases:
                try:
                    test(*args, **kwargs, **case)
                except (Exception, pytest.fail.Exception) as error:
                    text = ", ".join(f"{name}={value!r}" for name, value in case.items())
                    raise AssertionError(f"with {text}: {error}") from error

        run.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
        return run

    return decorate


def quick_cover(ops: Mapping[str, Sequence[str] | None]) -> list[Any]:
    """Values for ``parametrize``: all names, of which those that add no operator are slow.

    Args:
        ops: Operators of each model by its name; None, unknown ones, are always quick.
    """
    seen: set[str] = set()
    values: list[Any] = []
    for name, of_model in ops.items():
        is_quick = of_model is None or not seen.issuperset(of_model)
        values.append(name if is_quick else pytest.param(name, marks=pytest.mark.slow))
        seen.update(of_model or ())
    return values
