"""Text in, vectors or classes out: ``SentenceEncoder``, in the manner of sentence-transformers.

The file of the model carries its tokenizer (see ``lutra.preprocess.text``), which the package
``tokenizers`` runs: ``pip install "lutra[text]"``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, overload

import numpy as np

from lutra.errors import FormatError, InputError, LutraError
from lutra.formatting import shape_text
from lutra.graph import Graph
from lutra.hub import MODEL, find_file
from lutra.node import Array
from lutra.preprocess.image import shown
from lutra.preprocess.text import TextPreprocess, takes_text, text_preprocess
from lutra.runtime.session import Session
from lutra.stream import has_softmax, probabilities

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SentenceEncoder", "TextPreprocess", "takes_text", "text_preprocess"]

#: Texts that are in the hands of the tokenizer at once.
_CHUNK: Final = 4096

#: How ``encode`` may store vectors.
_PRECISIONS: Final = ("float32", "binary", "ubinary")

Texts: TypeAlias = str | Iterable[str]


class SentenceEncoder:
    """Vectors or classes of texts, by a model whose file carries its tokenizer.

    May be used by several threads at the same time.

    Examples:
        >>> encoder = SentenceEncoder("minilm.lutra", threads=2)
        >>> vectors = encoder.encode(["A cat sat on the mat.", "It rained."])
        >>> vectors.shape
        (2, 384)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | Graph | Session,
        *,
        threads: int | None = None,
        isa: str | None = None,
        max_memory: int | None = None,
    ) -> None:
        """Loads a model and its tokenizer.

        Args:
            model: A .lutra file, its bytes, a graph, or a session, which then is as it is.
            threads: See ``Session``; the tokenizer uses those that it likes (the environment
                variable TOKENIZERS_PARALLELISM=false keeps it to one).
            isa: See ``Session``.
            max_memory: See ``Session``.

        Raises:
            FormatError: If the file cannot be read, is not sound, takes no text, or does not fit
                its tokenizer.
            LutraError: If the package ``tokenizers`` is not installed.
        """
        if not isinstance(model, Session):
            model = Session(model, threads=threads, isa=isa, max_memory=max_memory)
        self._session = model
        graph = self._session.graph
        pre = TextPreprocess.from_metadata(graph.metadata)
        if pre is None:
            raise FormatError(
                "SentenceEncoder: the model carries no tokenizer; export it with "
                "metadata={'preprocess': lutra.sentences.text_preprocess(tokenizer)}"
            )
        self._pre = pre
        self._tokenizer = pre.load()
        self._batch, self._length = _check_model(graph, pre, self._tokenizer)
        (output,) = (graph.values[name] for name in graph.outputs)
        self._size = int(output.shape[1] or 0)
        self._classes = _classes(graph.metadata, self._size)
        self._prompts = _prompts_of(graph.metadata)

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike[str],
        *,
        filename: str = MODEL,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        isa: str | None = None,
        max_memory: int | None = None,
    ) -> SentenceEncoder:
        """Loads the model of a folder or of the Hugging Face hub; see ``Session.from_pretrained``.

        Raises:
            InputError: If there is no such folder, or no such file in it.
            LutraError: If the repository cannot be read; see ``SentenceEncoder`` for all others.
        """
        path = find_file(where, filename, revision=revision, token=token, cache_dir=cache_dir)
        return cls(path, threads=threads, isa=isa, max_memory=max_memory)

    @property
    def session(self) -> Session:
        """What runs the model."""
        return self._session

    @property
    def max_length(self) -> int:
        """The most tokens of a text, those that the tokenizer adds included."""
        return self._pre.max_length

    @property
    def dimension(self) -> int:
        """Values of a vector; scores of a classifier."""
        return self._size

    @property
    def max_seq_length(self) -> int:
        """The name that ``SentenceTransformer`` has for ``max_length``."""
        return self.max_length

    def get_sentence_embedding_dimension(self) -> int:
        """The name that ``SentenceTransformer`` has for ``dimension``."""
        return self.dimension

    @property
    def prompts(self) -> dict[str, str]:
        """Texts that can be put in front of all texts, by name: ``prompts`` in the metadata."""
        return dict(self._prompts)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes; None where the file names none."""
        return self._classes

    def encode(
        self,
        sentences: Texts,
        batch_size: int = 32,
        *,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
        normalize_embeddings: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        truncate: bool = True,
    ) -> Any:
        """What the model makes of texts: their vectors, or the scores of a classifier.

        Texts of about the same length run together, filled up to the longest of their batch. Names,
        defaults, shapes and types are those of ``SentenceTransformer.encode``; give options by
        name, as the order differs from version to version there.

        Args:
            sentences: Texts, or one text. An empty one is fine.
            batch_size: Texts that run at once.
            show_progress_bar: Whether to show a bar of batches on standard error (with ``tqdm``).
            output_value: "sentence_embedding"; a file has no other outputs.
            precision: "float32"; or "binary" or "ubinary": a bit for each value, 1 where it is
                above 0, eight of them in an int8 (minus 128) or a uint8.
            convert_to_numpy: Whether the result is an array; otherwise, and without
                convert_to_tensor, it is a list of a PyTorch tensor for each text.
            convert_to_tensor: Whether the result is one PyTorch tensor, on the CPU.
            device: None or "cpu".
            normalize_embeddings: Whether to bring every vector to length 1.
            prompt: Text that is put in front of every text.
            prompt_name: The name of a text of ``prompts``, in place of ``prompt``.
            truncate_dim: Keep so many values of each vector, the first ones, for models that were
                trained so. It comes before the lengths become 1.
            truncate: Whether to cut texts of more than ``max_length`` tokens, as
                sentence-transformers does; otherwise they are an error.

        Returns:
            float32 (n, D) in the order of the texts, or (D,) for one text; (n, D / 8) and (D / 8,)
            of bits.

        Raises:
            InputError: If something is not text, is too long and may not be cut, or an option is
                not supported.
            LutraError: If PyTorch or tqdm is asked for and not installed.
        """
        _check_options(output_value, precision, device, truncate_dim, self._size)
        single = isinstance(sentences, str)
        texts = _as_list(sentences)
        before = self._prompt(prompt, prompt_name)
        if before:
            texts = [before + text for text in texts]
        vectors = self._run(texts, batch_size, truncate, bool(show_progress_bar))
        vectors = vectors[:, :truncate_dim]
        if normalize_embeddings:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(lengths, np.float32(1e-12))
        vectors = _in_bits(vectors, precision)
        if convert_to_tensor or not convert_to_numpy:
            tensor = _torch().from_numpy(np.ascontiguousarray(vectors))
            made = tensor if convert_to_tensor else list(tensor)
            return made[0] if single else made
        return vectors[0] if single else vectors

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        """The text in front of every text."""
        if prompt is not None:
            if not isinstance(prompt, str):
                raise InputError(f"the prompt is a {type(prompt).__name__}; give a str")
            return prompt
        if name is None:
            return ""
        if name not in self._prompts:
            known = ", ".join(map(repr, self._prompts)) or "none"
            raise InputError(
                f"prompt_name={name!r} is not a prompt of the model ({known}); give the text as "
                "prompt=..."
            )
        return self._prompts[name]

    def predict_proba(
        self, sentences: Texts, batch_size: int = 32, *, truncate: bool = True
    ) -> Array:
        """Probabilities of the classes.

        Args:
            sentences: Texts, or one text.
            batch_size: Texts that run at once.
            truncate: See ``encode``.

        Returns:
            float32 (n, classes), or (classes,) for one text: the softmax of the model's scores.

        Raises:
            InputError: See ``encode``.
        """
        scores: Array = self.encode(sentences, batch_size, truncate=truncate)
        return self.shares(scores)

    def shares(self, scores: Array) -> Array:
        """The probabilities of scores that ``encode`` gave, float32 of the same shape."""
        if not len(scores) or has_softmax(self._session.graph):
            return scores
        return probabilities(scores).astype(np.float32)

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too
        self, sentences: str, batch_size: int = ..., *, truncate: bool = ...
    ) -> str | int: ...

    @overload
    def predict(
        self, sentences: Iterable[str], batch_size: int = ..., *, truncate: bool = ...
    ) -> list[str] | list[int]: ...

    def predict(
        self, sentences: Texts, batch_size: int = 32, *, truncate: bool = True
    ) -> list[str] | list[int] | str | int:
        """The class of every text.

        Args:
            sentences: Texts, or one text.
            batch_size: Texts that run at once.
            truncate: See ``encode``.

        Returns:
            The names of the classes, or their numbers where the file has no names; one for one
            text, else a list.

        Raises:
            InputError: See ``encode``.
        """
        single = isinstance(sentences, str)
        scores = self._run(_as_list(sentences), batch_size, truncate)
        best: list[Any] = scores.argmax(axis=1).tolist()
        if self._classes is not None:
            best = [self._classes[index] for index in best]
        answer: list[str] | list[int] | str | int = best[0] if single else best
        return answer

    @staticmethod
    def similarity(a: Array, b: Array) -> Array:
        """Cosine similarities of two sets of vectors.

        Args:
            a: (n, D) or (D,).
            b: (m, D) or (D,).

        Returns:
            float32 (n, m); a vector of zeros has the similarity 0 to everything.
        """
        first, second = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
            raise InputError(
                f"similarity: the vectors have shapes {np.shape(a)} and {np.shape(b)}; give "
                "(n, D) and (m, D)"
            )
        result: Array = (_units(first) @ _units(second).T).astype(np.float32)
        return result

    @staticmethod
    def similarity_pairwise(a: Array, b: Array) -> Array:
        """Cosine similarities of the vectors of two sets, one by one.

        Args:
            a: (n, D) or (D,).
            b: Of the same shape.

        Returns:
            float32 (n,); a vector of zeros has the similarity 0.
        """
        first, second = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        if first.ndim != 2 or first.shape != second.shape:
            raise InputError(
                f"similarity_pairwise: the vectors have shapes {np.shape(a)} and {np.shape(b)}; "
                "give as many of both, (n, D)"
            )
        result: Array = (_units(first) * _units(second)).sum(1).astype(np.float32)
        return result

    def tokenize(self, sentences: Texts, *, truncate: bool = True) -> list[Array]:
        """Token ids of texts, as the model gets them but not filled up.

        Args:
            sentences: Texts, or one text.
            truncate: See ``encode``.

        Returns:
            int32 (tokens,) of every text.

        Raises:
            InputError: See ``encode``.
        """
        texts = _as_list(sentences)
        rows: list[Array] = []
        for first in range(0, len(texts), _CHUNK):
            chunk = texts[first : first + _CHUNK]
            for index, encoding in enumerate(self._encodings(chunk, first), first):
                if encoding.overflowing and not truncate:
                    whole = self._pre.load(truncate=False)
                    raise InputError(
                        f"sentences[{index}] has {len(whole.encode(texts[index]).ids)} tokens and "
                        f"the model takes {self.max_length}; shorten it, or let it be cut with "
                        "truncate=True"
                    )
                rows.append(np.array(encoding.ids, np.int32))
        return rows

    def _encodings(self, texts: list[str], first: int) -> list[Any]:
        """What the tokenizer says about texts, of which the first has this number."""
        try:
            return list(self._tokenizer.encode_batch(texts))
        except Exception as error:
            # Text that is not Unicode (lone surrogates); find out which one it is.
            for index, text in enumerate(texts, first):
                try:
                    text.encode()
                except UnicodeEncodeError as reason:
                    raise InputError(
                        f"sentences[{index}] is not valid Unicode ({reason}); read it with the "
                        "right encoding"
                    ) from error
            raise

    def _run(
        self, texts: list[str], batch_size: int, truncate: bool, progress: bool = False
    ) -> Array:
        """What the model makes of texts, (n, D)."""
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; it must be a whole number above 0")
        rows = self.tokenize(texts, truncate=truncate)
        result = np.empty((len(rows), self._size), np.float32)
        # The longest first: what does not fit in memory fails at once.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        batches: Iterable[list[int]] = self._batches(order, rows, self._batch or batch_size)
        if progress:
            batches = _with_bar(list(batches))
        for chosen in batches:
            (made,) = self._session.run(None, self._feeds([rows[index] for index in chosen]))
            result[chosen] = made[: len(chosen)]
        return result

    def _batches(
        self, order: Sequence[int], rows: Sequence[Array], size: int
    ) -> Iterator[list[int]]:
        """The texts that run together, at most so many."""
        batch: list[int] = []
        # A model without a mask reads padding as text, unless it was made for one length.
        same = "mask" not in self._pre.inputs and self._length is None
        for index in order:
            if len(batch) == size or (same and batch and len(rows[batch[0]]) != len(rows[index])):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _feeds(self, rows: Sequence[Array]) -> dict[str, Array]:
        """The inputs of one run."""
        # A tokenizer that adds nothing makes no token of an empty text; the mask is then all 0.
        length = self._length or max(1, *map(len, rows))
        count = self._batch or len(rows)
        ids = np.full((count, length), self._pre.pad_id, np.int32)
        mask = np.zeros((count, length), np.int32)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        given = {"ids": ids, "mask": mask, "types": np.zeros_like(ids)}
        return {name: given[role] for role, name in self._pre.inputs.items()}


def _check_model(
    graph: Graph, pre: TextPreprocess, tokenizer: Tokenizer
) -> tuple[int | None, int | None]:
    """Batch and tokens of the inputs, None where they are open.

    Raises:
        FormatError: If the model has other inputs or outputs, or fewer rows than tokens.
    """
    names = {value.name for value in graph.inputs}
    if names != set(pre.inputs.values()):
        raise FormatError(
            f"SentenceEncoder: the model has the inputs {', '.join(sorted(names))}, but preprocess "
            f"describes {', '.join(sorted(pre.inputs.values()))}; export it with "
            "text_preprocess(..., inputs={'ids': ..., 'mask': ...})"
        )
    for value in graph.inputs:
        if value.dtype != "int32" or len(value.shape) != 2:
            raise FormatError(
                f"SentenceEncoder: the input {value.name!r} is {value.dtype} "
                f"{shape_text(value.shape)}; token ids and masks are int32 (N, T)"
            )
    shapes = [graph.values[name].shape for name in graph.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] is None:
        raise FormatError(
            f"SentenceEncoder: the model has the outputs {', '.join(map(shape_text, shapes))}; it "
            "must have one of a vector or scores for each text, (N, D)"
        )
    batch, length = graph.inputs[0].shape
    if length is not None and pre.max_length > length:
        raise FormatError(
            f"SentenceEncoder: preprocess allows {pre.max_length} tokens, but the model takes "
            f"{length}; export it with max_length={length}"
        )
    _check_rows(graph, pre, tokenizer)
    return batch, length


def _check_rows(graph: Graph, pre: TextPreprocess, tokenizer: Tokenizer) -> None:
    """Raises FormatError where a table of vectors has no row for a token or a position."""
    for node in graph.nodes:
        if node.op not in ("embedding", "position_embedding"):
            continue
        rows = graph.node_tensors(node)["weight"].shape[0]
        if node.op == "position_embedding" and pre.max_length > rows:
            raise FormatError(
                f"SentenceEncoder: preprocess allows {pre.max_length} tokens, but {node.name!r} "
                f"has {rows} positions; export it with max_length={rows}"
            )
        known = tokenizer.get_vocab_size(True)
        if node.op == "embedding" and node.inputs[0] == pre.inputs["ids"] and known > rows:
            raise FormatError(
                f"SentenceEncoder: the tokenizer knows {known} tokens, but {node.name!r} has "
                f"{rows} rows; export the model with its own tokenizer"
            )


def _classes(metadata: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    """The names of the classes in the metadata."""
    names = metadata.get("classes")
    if names is None:
        return None
    if (
        not isinstance(names, Sequence)
        or isinstance(names, str)
        or len(names) != count
        or not all(isinstance(name, str) for name in names)
    ):
        raise FormatError(
            f"SentenceEncoder: the metadata name the classes {shown(names)}, but the model has "
            f"{count} scores; export it with a name for each"
        )
    return tuple(names)


def _prompts_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The prompts in the metadata."""
    prompts = metadata.get("prompts", {})
    if not isinstance(prompts, Mapping) or not all(
        isinstance(name, str) and isinstance(text, str) for name, text in prompts.items()
    ):
        raise FormatError(
            f"SentenceEncoder: the metadata have the prompts {shown(prompts)}; export the model "
            "with a text for each name"
        )
    return dict(prompts)


def _check_options(
    output_value: str | None,
    precision: str,
    device: str | None,
    truncate_dim: int | None,
    size: int,
) -> None:
    """Raises InputError for options of sentence-transformers that are not supported."""
    if output_value != "sentence_embedding":
        raise InputError(
            f"output_value={output_value!r}: a file has one vector for each text; give "
            "'sentence_embedding', or export a model that returns the tokens and run a Session"
        )
    if precision in ("int8", "uint8"):
        raise InputError(
            f"precision={precision!r} needs the ranges of many vectors, which the file does not "
            "have; take 'float32', and quantise the vectors with the ranges of your own"
        )
    if precision not in _PRECISIONS:
        raise InputError(f"precision={precision!r} is not one of {list(_PRECISIONS)}")
    if device is not None and str(device) != "cpu":
        raise InputError(f"device={str(device)!r}: lutra runs on the CPU; leave it out")
    if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
        raise InputError(
            f"truncate_dim={truncate_dim!r} must be a whole number above 0; vectors have {size} "
            "values"
        )


def _in_bits(vectors: Array, precision: str) -> Array:
    """Vectors (n, D), or their signs, eight in a byte."""
    if precision == "float32":
        return vectors
    bits: Array = np.packbits(vectors > 0, axis=1)
    return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)


def _units(vectors: Array) -> Array:
    """Vectors (n, D) of length 1, or of zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Array = vectors / np.maximum(lengths, 1e-12)
    return units


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise LutraError(
            "encode: tensors need PyTorch, which is not installed; take arrays, or install it "
            "with pip install torch"
        ) from error


def _with_bar(batches: list[list[int]]) -> Iterable[list[int]]:
    """The batches, with a bar on standard error."""
    try:
        tqdm: Any = importlib.import_module("tqdm")
    except ModuleNotFoundError as error:
        raise LutraError(
            "encode: show_progress_bar=True needs tqdm, which is not installed; install it with "
            "pip install tqdm, or leave it out"
        ) from error
    bar: Iterable[list[int]] = tqdm.tqdm(batches, desc="Batches")
    return bar


def _as_list(sentences: Texts) -> list[str]:
    """The texts, every one of which is text."""
    if isinstance(sentences, str):
        return [sentences]
    if isinstance(sentences, (bytes, Mapping)) or not isinstance(sentences, Iterable):
        raise InputError(
            f"the sentences are a {type(sentences).__name__}; give a str or a list of str"
        )
    texts = list(sentences)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"sentences[{index}] is a {type(text).__name__} ({shown(text)}); every text must "
                "be a str"
            )
    # numpy has its own str
    return [str(text) for text in texts]
