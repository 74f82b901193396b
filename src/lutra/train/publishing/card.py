"""The model card of a folder: what the model is, what it became, figures, how to run it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lutra.errors import InputError
from lutra.train.conversion.structure import Structure
from lutra.train.recipe import Method, Recipe, recipe_to_json
from lutra.train.report import ConversionReport

#: Numbers of the user: by name one, or several by what they belong to.
Metrics = Mapping[str, float | str | Mapping[str, float | str]]

_TAGS: Final = ("lutra", "lookup-table", "cpu")
_VALUE: Final = "value"


def front_matter(entries: Mapping[str, Any]) -> str:
    """The head of a card, which the hub reads: YAML, whose values are written as JSON.

    Raises:
        InputError: an entry is no JSON value.
    """
    tags = entries.get("tags", [])
    own = [tags] if isinstance(tags, str) else list(tags)
    every = {
        "library_name": "lutra",
        **entries,
        "tags": [*_TAGS, *(tag for tag in own if tag not in _TAGS)],
    }
    try:
        lines = [
            f"{json.dumps(str(name))}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
            for name, value in every.items()
        ]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"save_pretrained: card={dict(entries)!r} cannot be written ({error}); give JSON "
            "values, such as {'license': 'apache-2.0'}"
        ) from error
    return "\n".join(["---", *lines, "---"])


def check_metrics(metrics: Any) -> None:
    """Refuses what is no table of figures.

    Raises:
        InputError: says which entry.
    """
    if not isinstance(metrics, Mapping):
        raise InputError(
            f"save_pretrained: metrics is a {type(metrics).__name__}; give a mapping such as "
            "{'test accuracy, %': {'float32': 91.7, 'lutra': 90.9}}"
        )
    for name, value in metrics.items():
        values = value.values() if isinstance(value, Mapping) else [value]
        for each in values:
            number = isinstance(each, int | float) and not isinstance(each, bool)
            if not isinstance(each, str) and not (number and abs(each) < float("inf")):
                raise InputError(
                    f"save_pretrained: metrics[{name!r}] holds {each!r}; give finite numbers or "
                    "texts"
                )


def make_card(
    *,
    title: str,
    model_class: str,
    structure: Structure,
    files: Mapping[str, int],
    float_bytes: int,
    needs_model: bool,
    entries: Mapping[str, Any],
    description: str,
    metrics: Metrics,
    recipe: Recipe | None,
    report: ConversionReport | None,
) -> str:
    """The text of README.md.

    Args:
        title: of the card.
        model_class: name of the class of the model.
        structure: which layers were converted, and how.
        files: bytes of the files that run, by name.
        float_bytes: of the parameters in float32, without codebooks and tables.
        needs_model: whether loading for training takes the dense model from the caller.
        entries: of the head, such as the licence.
        description: paragraphs in front of the figures.
        metrics: figures of the user.
        recipe: of the conversion.
        report: of the conversion.
    """
    methods = Counter(_method_text(method) for method in structure.layers.values())
    parts = [front_matter(entries), f"# {_line(title)}"]
    if description:
        parts.append(description.strip())
    parts.append(
        f"A {model_class} whose layers run by table lookup or in integers on a CPU, by lutra."
        if structure.layers
        else f"A {model_class} in float32, for a CPU."
    )
    if metrics:
        parts += ["## Figures", _metrics_table(metrics)]
    sizes = [[name, f"{count:,}", f"{count / float_bytes:.2f}"] for name, count in files.items()]
    sizes.append(["parameters in float32", f"{float_bytes:,}", "1.00"])
    parts += ["## Size", _table(["", "bytes", "share"], sizes)]
    if methods:
        rows = [[text, str(count)] for text, count in methods.most_common()]
        parts += ["## Layers", _table(["method", "layers"], rows)]
    if structure.tables:
        parts.append(f"Functions of {len(structure.tables)} modules are read from tables.")
    if report is not None:
        parts.append(_folded("What happened to each layer", str(report)))
    shown = recipe_to_json(recipe if recipe is not None else structure.layers)
    if shown:
        parts.append(_folded("Recipe", json.dumps(shown, indent=1), "json"))
    parts += ["## Use", _use(bool(set(files) - {"model.safetensors"}), needs_model)]
    return "\n\n".join(parts) + "\n"


def _method_text(method: Method) -> str:
    """A method and those settings of it that differ from the defaults."""
    usual = type(method)().settings()
    own = {name: value for name, value in method.settings().items() if usual.get(name) != value}
    own.pop("otherwise", None)
    return ", ".join([f"`{method.name}`", *(f"{name}={value}" for name, value in own.items())])


def _metrics_table(metrics: Metrics) -> str:
    columns: list[str] = []
    for value in metrics.values():
        columns += [c for c in (value if isinstance(value, Mapping) else [_VALUE])
                    if c not in columns]  # fmt: skip
    rows = [
        [
            name,
            *(
                _figure((value if isinstance(value, Mapping) else {_VALUE: value}).get(column, ""))
                for column in columns
            ),
        ]
        for name, value in metrics.items()
    ]
    return _table(["", *columns], rows)


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """A text on one line."""
    return " ".join(str(text).split())


def _folded(title: str, text: str, kind: str = "text") -> str:
    fence = "`" * max(
        3, 1 + max((len(run) for run in text.split() if set(run) == {"`"}), default=0)
    )
    return f"<details><summary>{title}</summary>\n\n{fence}{kind}\n{text}\n{fence}\n\n</details>"


def _use(runs: bool, needs_model: bool) -> str:
    dense = ", model=build_the_dense_model" if needs_model else ""
    run = (
        "Without PyTorch (`pip install 'lutra[hub]'`):\n\n```python\nimport lutra\n\n"
        'session = lutra.Session.from_pretrained("FOLDER_OR_REPOSITORY")\noutputs = session(x)\n```'
    )
    train = (
        "To train it further (`pip install 'lutra[train,hub]'`):\n\n```python\nimport lutra.train\n"
        f'\nmodel = lutra.train.from_pretrained("FOLDER_OR_REPOSITORY"{dense})\n```'
    )
    return f"{run}\n\n{train}" if runs else train
