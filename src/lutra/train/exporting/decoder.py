"""From a language model to a file that continues texts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lutra.errors import InputError, LutraError
from lutra.format import save_graph
from lutra.graph import Graph
from lutra.node import Array
from lutra.ops.limits import MAX_TOKENS
from lutra.preprocess.tokens import KEY, LOGITS, PICKED, START, TOKENS, Decoding, Tokenizer
from lutra.reference.compare import difference
from lutra.runtime.session import Session
from lutra.train.exporting.cached import with_cache
from lutra.train.exporting.export import export_graph, with_golden
from lutra.train.exporting.last_axis import with_affines_along_last
from lutra.train.exporting.parity import ROUNDING_FACTOR, Rounding

_SAMPLES: Final = 2  # of the check where no ids are given
_EXAMPLE: Final = 12  # their tokens


class _Scores(nn.Module):
    """A language model that takes ids (N, T) only and gives scores (N, T, V) only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._options = {"use_cache": False} if hasattr(model, "config") else {}

    def forward(self, tokens: Tensor) -> Tensor:
        given = self.model(tokens, **self._options)
        scores: Tensor = given if isinstance(given, Tensor) else given.logits
        return scores


def export_decoder(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_length: int,
    tokenizer: Tokenizer | None = None,
    bos: int | None = None,
    eos: int | Sequence[int] | None = None,
    example: Tensor | None = None,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-3,
) -> Graph:
    """Write a language model as a `.lutra` file for `lutra.Generator`.

    Keys and values of earlier tokens are remembered from run to run, so one file takes prompts and
    continues them. The file is checked to compute what torch does, and to give the same bits for a
    text at once and token by token.

    Args:
        model: A decoder: takes ids (N, T) and gives scores (N, T, vocabulary), as they are or as
            `logits`. The models of transformers with rotary or learned positions, such as
            `LlamaForCausalLM`, `Qwen2ForCausalLM` and `GPT2LMHeadModel`, dense or converted.
        path: The file to write.
        max_length: The most tokens of a text, prompt included: that many positions, and room for
            keys and values as a text grows.
        tokenizer: How text becomes tokens and back; without it the file takes and gives ids.
        bos: The token that every text begins with; None for none.
        eos: The token that ends a text, or several; `()` for none. By default those of the model:
            `eos_token_id` of its `generation_config`, or of its `config`, as far as it has such
            tokens.
        example: Ids (N, T) for the check, T at least 4; random ones without it.
        metadata: Stored in the file: anything JSON can hold.
        tolerance: The largest difference from torch allowed, as a share of the largest output.

    Returns:
        The graph that was written.

    Raises:
        InputError: A length, ids or tokenizer that do not fit the model.
        UnsupportedModelError: The model is no such decoder.
        LutraError: As `lutra.train.export` does, or the graph does not compute token by token what
            it computes at once.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lutra.train import export_decoder
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> graph = export_decoder(LlamaForCausalLM(config), "tiny.lutra", max_length=20)
        >>> [value.name for value in graph.inputs]
        ['tokens', 'start', 'picked']
    """
    if type(max_length) is not int or not 4 <= max_length <= MAX_TOKENS:
        raise InputError(
            f"export_decoder: max_length={max_length!r} must be a whole number in 4..{MAX_TOKENS}"
        )
    vocabulary = _vocabulary(model)
    ends = _ends(model, vocabulary) if eos is None else _listed(eos)
    decoding = Decoding(max_length, tokenizer, bos, ends, vocabulary)
    ids = _example(example, max_length, vocabulary)
    plain, _, rounding = export_graph(
        _Scores(model),
        (ids,),
        dynamic_axes=(0, 1),
        metadata=metadata,
        tolerance=tolerance,
        longest=max_length,
    )
    graph = with_affines_along_last(_renamed(with_cache(plain, max_length)))
    graph.validate()
    tokens = ids.numpy().astype(np.int32)
    _check(plain, graph, tokens, tolerance, rounding)
    graph = replace(graph, metadata={**graph.metadata, KEY: decoding.to_dict()})
    graph = with_golden(graph, feeds(tokens))
    save_graph(graph, path)
    return graph


def feeds(tokens: Array) -> dict[str, Array]:
    """Inputs of a run that is alone and gives the scores of all its tokens."""
    batch, count = tokens.shape
    picked = np.tile(np.arange(count, dtype=np.int32), (batch, 1))
    return {TOKENS: tokens, START: np.zeros(batch, np.int32), PICKED: picked}


def _vocabulary(model: nn.Module) -> int:
    """Rows of the first embedding."""
    for module in model.modules():
        count = getattr(module, "num_embeddings", None)
        if isinstance(count, int):
            return count
    raise InputError(
        "export_decoder: the model has no embedding of tokens; give one that takes ids (N, T)"
    )


def _ends(model: nn.Module, vocabulary: int) -> tuple[int, ...]:
    """The tokens with which a model of transformers says that a text ends.

    Configurations of models of few tokens often name an end that is none of them: it never comes.
    """
    for name in ("generation_config", "config"):
        ends = getattr(getattr(model, name, None), "eos_token_id", None)
        if ends is not None:
            return tuple(end for end in _listed(ends) if 0 <= end < vocabulary)
    return ()


def _listed(ends: int | Sequence[int]) -> tuple[int, ...]:
    return (ends,) if isinstance(ends, int) else tuple(ends)


def _example(given: Tensor | None, length: int, vocabulary: int) -> Tensor:
    if given is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (_SAMPLES, min(length, _EXAMPLE)), generator=generator)
    if given.ndim != 2 or not 4 <= given.shape[1] <= length or given.shape[0] < 1:
        raise InputError(
            f"export_decoder: example has the shape {tuple(given.shape)}; give ids (N, T), with "
            f"4..{length} tokens"
        )
    if int(given.min()) < 0 or int(given.max()) >= vocabulary:
        raise InputError(
            f"export_decoder: example has the ids {int(given.min())}..{int(given.max())}, and the "
            f"model has tokens 0..{vocabulary - 1}"
        )
    example = given.detach().cpu().long()
    return example if len(example) > 1 else example.repeat(2, 1)


def _renamed(graph: Graph) -> Graph:
    """The graph with the names of the model's modules, without the wrapper around it."""

    def short(name: str) -> str:
        return name.removeprefix("model.")

    nodes = tuple(
        replace(
            node,
            name=short(node.name),
            inputs=tuple(map(short, node.inputs)),
            output=short(node.output),
            tensors={role: short(name) for role, name in node.tensors.items()},
        )
        for node in graph.nodes
    )
    return replace(
        graph, nodes=nodes, tensors={short(name): array for name, array in graph.tensors.items()}
    )


def _check(plain: Graph, graph: Graph, tokens: Array, tolerance: float, rounding: Rounding) -> None:
    """Raises LutraError unless the graph with a cache gives what the plain one does, in any cut.

    Attention adds up in another order with a cache, and layers of few bits make that larger: what
    rounding explains is allowed, as in `check_graph`.
    """
    (want,) = Session(plain).run(None, {plain.inputs[0].name: tokens})
    session = Session(graph)
    (whole,) = session.run(None, feeds(tokens))
    moved = difference(whole, want)
    if moved > tolerance and moved > tolerance + ROUNDING_FACTOR * rounding():
        raise LutraError(
            f"export_decoder: with a cache the scores differ by {moved:.3g} of the largest "
            f"(tolerance {tolerance:.3g}): the model looks at tokens in a way that lutra does not "
            "know; export it with lutra.train.export"
        )
    cache = session.new_cache(len(tokens))
    first = tokens.shape[1] // 2
    cuts = [0, *range(first, tokens.shape[1] + 1)]
    for begin, end in itertools.pairwise(cuts):
        given = feeds(tokens[:, begin:end])
        given[START] = np.full(len(tokens), begin, np.int32)
        (part,) = session.run([LOGITS], given, cache=cache)
        if not np.array_equal(part, whole[:, begin:end]):
            raise LutraError(
                f"export_decoder: the scores of the tokens {begin}..{end - 1} are others after a "
                "run that ended before them than at once: the model looks at tokens in a way that "
                "lutra does not know; export it with lutra.train.export"
            )
