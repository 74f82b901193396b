"""One HTML page about a model that needs nothing else: no network, no scripts."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lutra.atomic import write_whole
from lutra.errors import LutraError
from lutra.formatting import shape_text
from lutra.graph import Graph
from lutra.node import Array
from lutra.runtime.cpu import cpu_info
from lutra.runtime.profile import Profile

_TEMPLATE: Final = Path(__file__).with_name("page.html.j2")
#: What a study in the metadata of a file must have to be shown.
_STUDY: Final = frozenset(
    {"message", "reached", "measure", "target", "max_drop", "settings", "trials", "choice",
     "layers", "recipe", "final", "peers", "worst", "seconds"}
)  # fmt: skip


def need_packages() -> None:
    """Finds out before the work whether the packages of the extra are there.

    Raises:
        LutraError: one is not installed.
    """
    for name in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise LutraError(
                f"report needs {name}, which is not installed; install it with "
                "pip install 'lutra[report]'"
            )


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Writes a page, all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(Path(os.path.realpath(path)), text.encode())


def page(
    name: str,
    graph: Graph,
    profile: Profile | None,
    *,
    study: Mapping[str, Any] | None = None,
    inputs: Sequence[Sequence[Array]] = (),
    size: int | None = None,
) -> str:
    """The page of a model as text.

    Args:
        name: of the file.
        graph: what is in it.
        profile: where its time goes; None leaves that out.
        study: what `Study.to_dict` gave; None takes what the metadata of the file hold, if they
            hold a study.
        inputs: of the worst samples of the study, in its order; images among them are shown.
        size: bytes of the file.

    Raises:
        LutraError: a package of the extra `report` is not installed, or the metadata hold a study
            that makes no sense.
    """
    need_packages()
    jinja2 = importlib.import_module("jinja2")
    from lutra.reporting.charts import front_chart, image_of

    found = graph.metadata.get("study") if study is None else study
    chart, worst = "", []
    if found is not None:
        try:
            if not isinstance(found, Mapping) or not found.keys() >= _STUDY:
                raise TypeError("entries are missing")
            chart = front_chart(found)
            images = [image_of(sample) for sample in inputs]
            worst = [
                {"name": None, **entry, "image": images[i] if i < len(images) else None}
                for i, entry in enumerate(found["worst"])
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LutraError(
                f"{name!r} holds a study that is not sound ({type(error).__name__}: {error}); "
                "the report of the file without it needs the metadata 'study' to be taken out"
            ) from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figures"] = figures
    environment.filters["grouped"] = lambda value: f"{int(value):,}"
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    text: str = template.render(
        name=name,
        graph=_facts(graph, size),
        profile=None if profile is None else profile.to_json(),
        study=found,
        chart=chart,
        worst=worst,
        recipe=json.dumps(found["recipe"], indent=1) if found is not None else "",
        cpu=cpu_info()["model"],
    )
    return text


def figures(value: float | None, count: int = 3) -> str:
    """A number with so many significant figures, without an exponent; a dash for None."""
    if value is None:
        return "–"  # noqa: RUF001
    if value == 0:
        return "0"
    text = f"{value:.{count}g}"
    return f"{float(text):,.6f}".rstrip("0").rstrip(".") if "e" in text else text


def _facts(graph: Graph, size: int | None) -> dict[str, Any]:
    """What is in a file: inputs, outputs, parameters, work."""
    sizes = graph.nominal_sizes()
    cost = None if sizes is None else graph.total_cost(sizes)
    ops: dict[str, int] = {}
    for node in graph.nodes:
        ops[node.op] = ops.get(node.op, 0) + 1
    values = graph.values
    return {
        "inputs": [f"{v.name} {v.dtype} {shape_text(v.shape)}" for v in graph.inputs],
        "outputs": [
            f"{name} {values[name].dtype} {shape_text(values[name].shape)}"
            for name in graph.outputs
        ],
        "nodes": len(graph.nodes),
        "ops": sorted(ops.items(), key=lambda item: (-item[1], item[0])),
        "parameter_bytes": graph.parameter_bytes(),
        "size": size,
        "macs": None if cost is None else cost.macs + cost.dense_macs,
        "lookups": None if cost is None else cost.lookups,
        "producer": str(graph.metadata.get("producer", "")),
        "golden": graph.golden is not None,
    }
