"""`save_pretrained`: a converted model as a folder of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_model
from torch import nn

from lutra.errors import InputError, LutraError
from lutra.format import graph_to_bytes, load_graph
from lutra.graph import Graph
from lutra.hub import MODEL, need_hub
from lutra.train.conversion.structure import Structure, structure_of
from lutra.train.exporting.capture import ExampleInput
from lutra.train.exporting.export import export
from lutra.train.importing.examples import example_inputs, example_of
from lutra.train.layers.base import QuantizedLayer
from lutra.train.layers.int8_embedding import Int8Embedding
from lutra.train.publishing.card import Metrics, check_metrics, make_card
from lutra.train.publishing.dense import GRAPH, ONNX, class_of, describe
from lutra.train.publishing.load import CONFIG, FORMAT, WEIGHTS, from_pretrained
from lutra.train.recipe import Recipe, recipe_to_json
from lutra.train.report import ConversionReport

CARD: Final = "README.md"
_SAMPLES: Final = 8
_NO_METRICS: Final[Metrics] = {}
_NOTHING: Final[Mapping[str, Any]] = {}


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    dense: str | os.PathLike[str] | Graph | None = None,
    example_input: ExampleInput | None = None,
    file: str | os.PathLike[str] | Graph | None = None,
    export_arguments: Mapping[str, Any] = _NOTHING,
    recipe: Recipe | None = None,
    report: ConversionReport | None = None,
    metrics: Metrics = _NO_METRICS,
    title: str | None = None,
    description: str = "",
    card: Mapping[str, Any] | None = _NOTHING,
) -> Path:
    """Writes a model as a folder that the Hugging Face hub shows, and that others can load.

    The folder gets `model.safetensors` with all that can be trained, `config.json` with the
    structure, `model.lutra`, which runs without PyTorch, and the model card `README.md`. It holds
    no code. `from_pretrained` builds the model again from its dense model: one that its caller
    gives, one of `transformers`, or a file in the folder.

    Args:
        model: as `convert` or `finetune` returns it, with layers that can be trained; a dense model
            does too.
        folder: is made where it is missing. Files of an earlier save in it are replaced.
        dense: the graph, `.lutra` or `.onnx` file that the dense model was read from by
            `from_graph` or `load_onnx`. It is put into the folder, which then needs nothing else.
            Models of classes of `transformers` need none.
        example_input: as of `export`, which makes `model.lutra` with it. Imported models need none.
        file: the `.lutra` file or graph of the model where it is exported already. Without it and
            an example the folder has no `model.lutra`.
        export_arguments: further arguments of `export`: `dynamic_axes`, `metadata`, `tables`.
        recipe: of the conversion, for the card; None takes the methods of the layers.
        report: of the conversion, for card and configuration.
        metrics: figures for the card: a number or text for each name, or a mapping of several such
            as `{"test accuracy, %": {"float32": 91.7, "lutra": 90.9}}`.
        title: of the card; None takes the name of the folder.
        description: paragraphs of the card in front of the figures.
        card: entries for the head of the card, such as
            `{"license": "mit", "datasets": ["cifar10"]}`; None writes no card and leaves a
            `README.md` as it is.

    Returns:
        The path of the folder.

    Raises:
        InputError: a path, figure or example that cannot be used.
        LutraError: the model is frozen, its dense model cannot be made again from what is given, or
            the folder cannot be written; `export` has errors of its own. Then files of the folder
            are as they were.

    Examples:
        >>> import torch
        >>> from lutra.train import Int8, convert, from_pretrained, save_pretrained
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
        >>> x = torch.rand(64, 8)
        >>> model, report = convert(build(), {"*": Int8()}, [x])
        >>> folder = save_pretrained(model, "small", example_input=x, report=report)
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'config.json', 'model.lutra', 'model.safetensors']
        >>> again = from_pretrained("small", build)
        >>> with torch.no_grad():
        ...     torch.equal(again(x), model.eval()(x))
        True
    """
    check_metrics(metrics)
    if example_input is not None and file is not None:
        raise InputError(
            "save_pretrained: example_input exports the model and file is one that is exported; "
            "give one of them"
        )
    structure = structure_of(model)
    entry, dense_bytes = describe(model, dense)
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lutra-", dir=target) as temporary:
            made = Path(temporary)
            save_model(model, str(made / WEIGHTS), metadata={"format": "pt"})
            sizes = {WEIGHTS: (made / WEIGHTS).stat().st_size}
            if _engine_file(model, made / MODEL, example_input, file, export_arguments):
                sizes[MODEL] = (made / MODEL).stat().st_size
            if entry is not None and dense_bytes is not None:
                (made / entry["file"]).write_bytes(dense_bytes)
            config = _config(model, structure, entry, recipe, report, metrics)
            (made / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            if entry is not None:
                _check(made)
            if card is not None:
                text = make_card(
                    title=target.resolve().name if title is None else title,
                    model_class=class_of(model).__name__,
                    structure=structure,
                    files=sizes,
                    float_bytes=_float_bytes(model),
                    needs_model=entry is None,
                    entries=card,
                    description=description,
                    metrics=metrics,
                    recipe=recipe,
                    report=report,
                )
                (made / CARD).write_text(text, encoding="utf-8")
            for name in (WEIGHTS, MODEL, GRAPH, ONNX, CARD, CONFIG):
                if (made / name).exists():
                    os.replace(made / name, target / name)
                elif name != CARD:  # of an earlier save, of another model
                    (target / name).unlink(missing_ok=True)
    except OSError as error:
        raise LutraError(
            f"save_pretrained: cannot write {os.fspath(folder)!r} ({error.strerror or error}); "
            "choose a folder that can be written"
        ) from error
    return target


def push_to_hub(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload a model of lutra",
) -> str:
    """Uploads a folder that `save_pretrained` wrote to the Hugging Face hub.

    Needs `pip install 'lutra[hub]'`.

    Args:
        folder: from `save_pretrained`.
        repository: `owner/name`; it is made where it is missing.
        private: whether a new repository is private; None takes the setting of the account.
        token: of the hub; None takes what is logged in.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: the folder holds no model.
        LutraError: `huggingface_hub` is not installed, or the hub refuses.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise InputError(
            f"push_to_hub: {os.fspath(folder)!r} holds no {CONFIG} and {WEIGHTS}; write it with "
            "save_pretrained"
        )
    api = need_hub("push_to_hub").HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=path, commit_message=message,
            allow_patterns=[WEIGHTS, MODEL, GRAPH, ONNX, CARD, CONFIG],
        )  # fmt: skip
    except Exception as error:  # of the network, of HTTP, of names
        reason = " ".join(str(error).split())[:300]
        raise LutraError(
            f"push_to_hub: the hub did not take {repository!r}: {type(error).__name__}: {reason}; "
            "check the name, the network and the token"
        ) from error
    return str(commit)


def _engine_file(
    model: nn.Module,
    path: Path,
    example: ExampleInput | None,
    file: str | os.PathLike[str] | Graph | None,
    arguments: Mapping[str, Any],
) -> bool:
    """Writes the file that the engine runs, if there is one."""
    if isinstance(file, Graph):
        path.write_bytes(graph_to_bytes(file))
        return True
    if file is not None:
        load_graph(file)  # which says what is wrong with it
        path.write_bytes(Path(file).read_bytes())
        return True
    if example is None and example_of(model) is not None:
        example = example_inputs(model, _SAMPLES)
    if example is None:
        return False
    export(model, path, example, **arguments)
    return True


def _config(
    model: nn.Module,
    structure: Structure,
    dense: Mapping[str, Any] | None,
    recipe: Recipe | None,
    report: ConversionReport | None,
    metrics: Metrics,
) -> dict[str, Any]:
    """What stands in config.json."""
    return {
        "library_name": "lutra",
        "lutra_version": metadata.version("lutra"),
        "format": FORMAT,
        "model_class": class_of(model).__name__,
        "dense": dense,
        "structure": structure.to_dict(),
        "recipe": None if recipe is None else recipe_to_json(recipe),
        "report": None if report is None else report.to_dict(),
        "metrics": {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in metrics.items()
        },
    }


def _check(folder: Path) -> None:
    """Loads a folder that needs nothing from the caller.

    Raises:
        LutraError: the dense model is another one than that behind the converted model.
    """
    try:
        from_pretrained(folder)
    except LutraError as error:
        raise LutraError(
            f"save_pretrained: the model cannot be built from its dense model again ({error}); "
            "give as dense the file that the model was read from before it was converted"
        ) from error


def _float_bytes(model: nn.Module) -> int:
    """Bytes of the weights and biases in float32, without codebooks and tables."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, QuantizedLayer) or name in ("weight", "bias"):
                counts[id(parameter)] = parameter.numel()
        if isinstance(module, Int8Embedding):
            counts[id(module)] = module.int8_weight.numel()
    return 4 * max(1, sum(counts.values()))
