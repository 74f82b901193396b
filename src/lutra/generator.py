"""Language models that continue texts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from lutra._engine import Cache
from lutra.errors import InputError
from lutra.graph import Graph
from lutra.node import Array
from lutra.preprocess.tokens import (
    PICKED,
    START,
    TOKENS,
    Decoding,
    TextStream,
    Tokenizer,
)
from lutra.runtime.session import Session

__all__ = ["Completion", "Generator", "Prompt", "Token", "TokenStream"]

#: A text, or the ids of its tokens, the first one included.
Prompt: TypeAlias = str | Sequence[int] | Array
#: Tokens of a prompt that run at once: more do not make it faster, and take more memory.
_CHUNK: Final = 256


@dataclass(frozen=True)
class Token:
    """A token that was generated.

    Attributes:
        id: Its number.
        text: The text that is certain with it, which may be nothing: a character may have several
            tokens. The texts of all tokens are the text of the completion.
    """

    id: int
    text: str


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
        text: The text behind the prompt; empty where the file has no tokenizer.
        tokens: Its tokens, without one that ends texts.
        reason: Why it ends: "length" (of tokens that were asked for, or that the model can
            remember), "end" (the model ended it) or "stop".
        prompt: The tokens of the prompt, the first one included.
        prompt_seconds: What the prompt took.
        seconds: What the tokens took after that.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    prompt: tuple[int, ...] = field(repr=False)
    prompt_seconds: float = field(repr=False, default=0.0)
    seconds: float = field(repr=False, default=0.0)

    def __str__(self) -> str:
        return self.text

    @property
    def prompt_tokens_per_second(self) -> float:
        """How fast the prompt was read."""
        return len(self.prompt) / self.prompt_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """How fast the tokens after the first one came, which the prompt gives; None without."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from scores.

    Attributes:
        temperature: What scores are divided by; 0 takes the token of the largest.
        top_k: Only so many of the likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together have this probability.

    Raises:
        InputError: If a number is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0.0 <= self.temperature < float("inf")):
            raise InputError(
                f"Generator: temperature={self.temperature!r} must be a number of at least 0"
            )
        if type(self.top_k) is not int or self.top_k < 0:
            raise InputError(
                f"Generator: top_k={self.top_k!r} must be a whole number of at least 0"
            )
        if not (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InputError(f"Generator: top_p={self.top_p!r} must be above 0 and at most 1")

    def choose(self, scores: Array, rng: np.random.Generator) -> int:
        """A token.

        Args:
            scores: float32 (vocabulary,).
            rng: Where chance comes from; one number of it is used, unless the temperature is 0.
        """
        if self.temperature == 0.0:
            return int(scores.argmax())
        order = np.argsort(-scores, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        scaled = scores[order].astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled[0])
        sums = np.cumsum(weights)
        count = int(np.searchsorted(sums, self.top_p * sums[-1])) + 1
        count = min(count, len(sums))
        place = int(np.searchsorted(sums[:count], rng.random() * sums[count - 1], side="right"))
        return int(order[min(place, count - 1)])


class Generator:
    """Continues texts with a language model, without PyTorch.

    The same tokens come out whatever the instruction set, the number of threads, the batch and the
    way a prompt is cut into runs.

    Args:
        model: Path of a ``.lutra`` file that ``lutra.train.export_decoder`` wrote, a graph of one
            or a session.
        threads: Threads of a new session, as of ``lutra.Session``.
        isa: Instruction set of a new session, as of ``lutra.Session``.

    Raises:
        InputError: If the file is no language model.
        FormatError: If it cannot be read, or what it says of its tokens makes no sense.

    Examples:
        >>> import lutra
        >>> generator = lutra.Generator("stories.lutra", threads=1)
        >>> print(generator.generate("Once upon a time", max_tokens=40))
        >>> for token in generator.stream("Once upon a time", temperature=0.8, seed=1):
        ...     print(token.text, end="", flush=True)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Graph | Session,
        *,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        given = isinstance(model, Session)
        session = model if isinstance(model, Session) else Session(model, threads=threads, isa=isa)
        if given and (threads is not None or isa is not None):
            raise InputError("Generator: threads and isa are those of the session; leave them out")
        decoding = Decoding.from_metadata(session.graph.metadata)
        names = [value.name for value in session.inputs]
        if decoding is None or names != [TOKENS, START, PICKED]:
            raise InputError(
                f"Generator: the model takes {names} and is no language model with a cache; export "
                "one with lutra.train.export_decoder"
            )
        self._session, self._decoding = session, decoding

    @property
    def session(self) -> Session:
        """The session that runs the model."""
        return self._session

    @property
    def tokenizer(self) -> Tokenizer | None:
        """How text becomes tokens; None where the file takes ids only."""
        return self._decoding.tokenizer

    @property
    def max_length(self) -> int:
        """The most tokens of a text, the prompt included."""
        return self._decoding.max_length

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return self._decoding.vocabulary

    def tokens(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt: of a text with the token that begins texts, if there is one.

        Raises:
            InputError: If it is empty or longer than the model can remember, or holds what the
                model has no token for.
        """
        known, limit = self._decoding, self.max_length
        if isinstance(prompt, str):
            if known.tokenizer is None:
                raise InputError(
                    "Generator: the file has no tokenizer; give ids, or export it with one"
                )
            first = [] if known.bos is None else [known.bos]
            try:
                ids = [*first, *known.tokenizer.encode(prompt)]
            except InputError as error:
                raise InputError(f"Generator: {error}") from None
        else:
            try:
                array = np.asarray(prompt)
            except ValueError:  # lists of several lengths
                array = np.asarray(None)
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise InputError(
                    f"Generator: the prompt is an array of shape {array.shape} and dtype "
                    f"{array.dtype}; give a text, or ids (T,)"
                )
            ids = [int(each) for each in array]
        if not ids:
            raise InputError("Generator: the prompt is empty; give at least one token")
        wrong = [each for each in ids if not 0 <= each < known.vocabulary]
        if wrong:
            raise InputError(
                f"Generator: the prompt holds the token {wrong[0]}, which the model does not know; "
                f"its tokens are 0..{known.vocabulary - 1}"
            )
        if len(ids) > limit:
            raise InputError(
                f"Generator: the prompt has {len(ids)} tokens and the model remembers {limit}; cut "
                "it"
            )
        return ids

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
    ) -> Completion | list[Completion]:
        """Continues a prompt, or several at once.

        Args:
            prompt: A text or ids; or a list of such, which may have different lengths.
            max_tokens: The most tokens that are made; by default as many as the model can remember.
            temperature: 0 takes the likeliest token; 1 draws from the probabilities of the model;
                less makes likely tokens likelier.
            top_k: Draws from so many of the likeliest tokens; 0 for all.
            top_p: Draws from the likeliest tokens that together have this probability.
            seed: Of what is drawn; each prompt of a list draws numbers of its own, the first one
                those that it draws alone.
            stop: Texts that end a completion; they are not part of it.

        Returns:
            The completion, or one for each prompt of a list.

        Raises:
            InputError: If a prompt or a number makes no sense.
        """
        several = _is_several(prompt)
        prompts: Any = prompt if several else [prompt]
        run = _Run(
            self, [self.tokens(p) for p in prompts], max_tokens,
            Sampling(temperature, top_k, top_p), seed, stop,
        )  # fmt: skip
        for _ in run.steps():
            pass
        made = run.completions()
        return made if several else made[0]

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
    ) -> TokenStream:
        """The tokens of a completion as they come; arguments and errors as of ``generate``.

        ``completion`` of what is returned is the whole of what has come so far. The last token has
        no id of its own (-1) where text was held back that might have been the
        beginning of a stop, or of a character.
        """
        run = _Run(
            self, [self.tokens(prompt)], max_tokens, Sampling(temperature, top_k, top_p), seed, stop
        )
        return TokenStream(run)

    def score(self, prompt: Prompt) -> Array:
        """Natural logarithms of the probabilities of the tokens of a text, but the first.

        Args:
            prompt: A text or ids, at least two tokens.

        Returns:
            float64 (T - 1,): of token i + 1 where the model has read tokens 0..i.

        Raises:
            InputError: As ``tokens`` does, or if there is one token only.
        """
        ids = self.tokens(prompt)
        if len(ids) < 2:
            raise InputError("Generator.score: one token follows nothing; give at least two")
        cache, scores = self._session.new_cache(), []
        for first in range(0, len(ids) - 1, _CHUNK):
            part = np.array([ids[first : min(first + _CHUNK, len(ids) - 1)]], np.int32)
            picked = np.arange(part.shape[1], dtype=np.int32)[None]
            logits = self._logits(part, np.array([first], np.int32), picked, cache)[0]
            wanted = np.array(ids[first + 1 : first + 1 + part.shape[1]])
            scores.append(_log_softmax(logits)[np.arange(len(wanted)), wanted])
        return np.concatenate(scores)

    def perplexity(self, tokens: Sequence[int] | Array, *, context: int | None = None) -> float:
        """Exponential of the mean negative log probability of held-out tokens.

        The tokens are cut into pieces of ``context``, each read on its own; every token but the
        first of a piece counts.

        Args:
            tokens: Ids (T,), any number of at least two.
            context: Tokens of a piece; by default what the model can remember.

        Raises:
            InputError: As ``score`` does, or if the context is out of range.
        """
        context = self.max_length if context is None else context
        if type(context) is not int or not 2 <= context <= self.max_length:
            raise InputError(
                f"Generator.perplexity: context={context!r} must be in 2..{self.max_length}"
            )
        ids = np.asarray(tokens)
        pieces = [ids[first : first + context] for first in range(0, len(ids), context)]
        scores = [self.score(piece) for piece in pieces if len(piece) > 1]
        if not scores:
            raise InputError(
                f"Generator.perplexity: {len(ids)} tokens were given; give at least two"
            )
        return float(np.exp(-np.concatenate(scores).mean()))

    def _logits(self, tokens: Array, start: Array, picked: Array, cache: Cache) -> Array:
        """Scores; the arrays are int32 and fit the model, so nothing is checked again."""
        (logits,) = self._session.run_checked([tokens, start, picked], cache)
        return logits


class _Sequence:
    """A text that is being made."""

    def __init__(
        self, prompt: list[int], most: int, stream: TextStream | None, rng: np.random.Generator
    ) -> None:
        self.prompt, self.most, self.stream, self.rng = prompt, most, stream, rng
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.reason = ""

    def push(self, token: int, ends: Sequence[int]) -> Iterator[Token]:
        """One more token; what can be told of it."""
        if token in ends:
            self.reason = "end"
        else:
            self.tokens.append(token)
            text = "" if self.stream is None else self.stream.push(token)
            self.texts.append(text)
            if self.stream is not None and self.stream.stopped:
                self.reason = "stop"
            elif len(self.tokens) >= self.most:
                self.reason = "length"
            yield Token(token, text)
        if self.reason and self.stream is not None:
            rest = self.stream.finish()
            if rest:
                self.texts.append(rest)
                yield Token(-1, rest)


class _Run:
    """Sequences that are made together."""

    def __init__(
        self,
        generator: Generator,
        prompts: list[list[int]],
        max_tokens: int | None,
        sampling: Sampling,
        seed: int,
        stop: str | Sequence[str] | None,
    ) -> None:
        listed = stop if isinstance(stop, (list, tuple)) else () if stop is None else (stop,)
        stops: tuple[Any, ...] = tuple(listed)
        if not all(isinstance(text, str) and text for text in stops):
            raise InputError(f"Generator: stop={stop!r} must be texts, none of them empty")
        if stops and generator.tokenizer is None:
            raise InputError("Generator: stop needs text, and the file has no tokenizer")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise InputError(
                f"Generator: max_tokens={max_tokens!r} must be a whole number of at least 1"
            )
        if type(seed) is not int or seed < 0:
            raise InputError(f"Generator: seed={seed!r} must be a whole number of at least 0")
        self._generator, self._sampling = generator, sampling
        self._ends = generator._decoding.eos
        self._all = []
        for index, prompt in enumerate(prompts):
            # the last token need not be remembered
            room = generator.max_length - len(prompt) + 1
            most = room if max_tokens is None else min(room, max_tokens)
            begins = prompt == [generator._decoding.bos]
            stream = (
                None
                if generator.tokenizer is None
                else TextStream(generator.tokenizer, stops, begins=begins)
            )
            rng = np.random.default_rng([seed, index] if index else seed)
            self._all.append(_Sequence(prompt, most, stream, rng))
        self._prompt_seconds = self._seconds = 0.0

    def steps(self) -> Iterator[tuple[int, Token]]:
        """Makes the tokens; gives the number of the sequence with each."""
        begin = time.perf_counter()
        cache = self._generator.session.new_cache(len(self._all))
        scores = self._prefill(cache)
        self._prompt_seconds = time.perf_counter() - begin
        alive = list(range(len(self._all)))
        while True:
            begin = time.perf_counter()
            made = []
            for row, index in enumerate(alive):
                each = self._all[index]
                token = self._sampling.choose(scores[row], each.rng)
                made += [(index, token) for token in each.push(token, self._ends)]
            rows = [row for row, index in enumerate(alive) if not self._all[index].reason]
            self._seconds += time.perf_counter() - begin
            yield from made
            if not rows:
                return
            begin = time.perf_counter()
            if len(rows) < len(alive):
                alive = [alive[row] for row in rows]
                cache.select(rows)
            live = [self._all[index] for index in alive]
            tokens = np.array([[each.tokens[-1]] for each in live], np.int32)
            start = np.array([len(e.prompt) + len(e.tokens) - 1 for e in live], np.int32)
            picked = np.zeros((len(live), 1), np.int32)
            scores = self._generator._logits(tokens, start, picked, cache)[:, 0]
            self._seconds += time.perf_counter() - begin

    def _prefill(self, cache: Cache) -> Array:
        """Reads the prompts; the scores (N, vocabulary) of what follows each."""
        lengths = np.array([len(each.prompt) for each in self._all])
        longest = int(lengths.max())
        ids = np.zeros((len(lengths), longest), np.int32)
        for row, each in enumerate(self._all):
            ids[row, : len(each.prompt)] = each.prompt
        scores: Array | None = None
        for first in range(0, longest, _CHUNK):
            part = ids[:, first : first + _CHUNK]
            last = lengths - 1 - first  # where the prompts end
            here = (last >= 0) & (last < part.shape[1])
            picked = np.where(here, last, 0).astype(np.int32)[:, None]
            start = np.full(len(lengths), first, np.int32)
            logits = self._generator._logits(part, start, picked, cache)[:, 0]
            scores = logits if scores is None else np.where(here[:, None], logits, scores)
        assert scores is not None
        return scores

    def completions(self) -> list[Completion]:
        """What was made."""
        return [
            Completion(
                "".join(each.texts),
                tuple(each.tokens),
                each.reason,
                tuple(each.prompt),
                self._prompt_seconds,
                self._seconds,
            )
            for each in self._all
        ]


class TokenStream(Iterator[Token]):
    """Tokens of a completion as they come, see ``Generator.stream``."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._tokens = (token for _, token in run.steps())

    def __next__(self) -> Token:
        return next(self._tokens)

    @property
    def completion(self) -> Completion:
        """What has come so far."""
        return self._run.completions()[0]


def _is_prompt(value: object) -> bool:
    return isinstance(value, (str, list, tuple, np.ndarray))


def _is_several(value: Any) -> bool:
    """Whether what was given as a prompt is a list of prompts."""
    listed = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)
    return listed and len(value) > 0 and _is_prompt(value[0])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _log_softmax(logits: Array) -> Array:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    result: Array = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result
