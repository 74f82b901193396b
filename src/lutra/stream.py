"""Keyword spotting on a stream: sound in blocks of any size, an answer for each window."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

import numpy as np

from lutra.errors import InputError
from lutra.graph import Graph
from lutra.node import Array
from lutra.preprocess.audio import AudioPreprocess
from lutra.preprocess.image import KEY
from lutra.runtime.session import Session

__all__ = ["Answer", "Stream", "probabilities"]


@dataclass(frozen=True)
class Answer:
    """What a model says about a window of a stream.

    Attributes:
        end: Samples of the stream up to the end of the window.
        seconds: The same in seconds.
        scores: Output of the model for the window, float32 (classes,).
        probabilities: Softmax of the scores, float64 (classes,), averaged over the last windows
            where the stream smooths.
        index: The largest of the probabilities.
        label: Its class, as the metadata of the file name it, or the index as text.
    """

    end: int
    seconds: float
    scores: Array
    probabilities: Array
    index: int
    label: str


class Stream:
    """Runs a model of sound on a stream and keeps what it needs of the past.

    A window is what the model calls a clip, a second for example. The first window begins with the
    stream, the next one ``every`` hops of the front end later. So nothing is said before the first
    window is full. Its answer has the same bits as ``session(preprocess.apply(window))``: the front
    end is the file's, and features of frames that windows share are computed once.

    Args:
        model: Path of a ``.lutra`` file, a graph or a session. Its metadata must hold a
            ``preprocess`` entry of the kind ``audio``, its output must be scores (N, classes).
        every: Hops from a window to the next; 1 is an answer for every hop (20 ms).
        smooth: Windows whose probabilities are averaged; 1 for none.
        threads: Threads of a new session. One is enough for the small models of this task, and a
            stream leaves the other cores alone.

    Raises:
        InputError: If the model is not one of sound, or a number is below 1.

    Examples:
        A model whose scores are the means of the 40 log-mel bands, on 1.1 seconds of silence in
        blocks of 20 ms:

        >>> import numpy as np
        >>> import lutra
        >>> from lutra.preprocess.audio import AudioPreprocess
        >>> front = AudioPreprocess()
        >>> mean = lutra.Node("mean", "scores", ("x",), "y", {"axes": (1, 2), "keepdims": False})
        >>> sound = lutra.Value("x", "float32", (None, 1, front.frames, front.width))
        >>> entries = {"preprocess": front.to_dict()}
        >>> graph = lutra.Graph((sound,), ("y",), (mean,), metadata=entries)
        >>> stream = lutra.Stream(graph, every=5)
        >>> for block in np.zeros((55, 320), np.int16):
        ...     answer = stream(block)
        ...     if answer is not None:
        ...         print(answer.seconds, answer.label)
        1.0 0
        1.1 0
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Graph | Session,
        *,
        every: int = 1,
        smooth: int = 1,
        threads: int = 1,
    ) -> None:
        for name, number in (("every", every), ("smooth", smooth)):
            if type(number) is not int or number < 1:
                raise InputError(f"Stream: {name}={number!r} is not a whole number of at least 1")
        self._session = model if isinstance(model, Session) else Session(model, threads=threads)
        graph = self._session.graph
        self._preprocess = need_audio(graph)
        pre = self._preprocess
        value = graph.inputs[0]
        if value.shape not in ((None, 1, pre.frames, pre.width), (1, 1, pre.frames, pre.width)):
            raise InputError(
                f"Stream: the model takes {value.shape}, but its front end makes "
                f"(N, 1, {pre.frames}, {pre.width})"
            )
        names = graph.metadata.get("classes")
        self._classes = names if isinstance(names, list) else []
        self._softmax = not has_softmax(graph)
        self._every = every
        self._recent: deque[Array] = deque(maxlen=smooth)
        # Twice as long as a window: sound moves to the front once in a window, not for every block.
        self._sound = np.zeros(2 * pre.samples, np.float32)
        self.reset()

    @property
    def preprocess(self) -> AudioPreprocess:
        """The front end of the model."""
        return self._preprocess

    @property
    def session(self) -> Session:
        """The session that runs the model."""
        return self._session

    def reset(self) -> None:
        """Forgets everything: the next sample is the first of a new stream."""
        pre = self._preprocess
        self._start = 0  # the sample of the stream that sound[0] is
        self._filled = 0  # samples in sound
        self._window = 0  # hops from the start of the stream to that of the next window
        self._known = 0  # frames of the next window whose energies are there, from its start
        self._energies = np.zeros((pre.frames, pre.bands))
        self._gain: Array = np.zeros(())  # that the features were made with; none is 0
        self._finished = 0  # frames of the next window whose features are there
        dtype = np.float32 if pre.levels is None else pre.levels.dtype
        self._features = np.zeros((pre.frames, pre.width), dtype)
        self._recent.clear()

    def __call__(self, block: Array) -> Answer | None:
        """Takes a block of sound.

        Args:
            block: int16 or float32 (n,), n >= 0, of the rate of the model.

        Returns:
            The newest answer, or None where no window ended in the block.

        Raises:
            InputError: If the block is something else, or holds NaN; it is then not part of the
                stream.
        """
        answers = self.push(block)
        return answers[-1] if answers else None

    def push(self, block: Array) -> list[Answer]:
        """As calling does, but returns the answers of all windows that ended in the block."""
        pre = self._preprocess
        sound = pre.waveforms(block)
        if sound.ndim != 1:
            raise InputError(
                f"Stream: the block has shape {sound.shape}; give one channel, (samples,)"
            )
        answers = []
        done = 0
        while done < len(sound):
            end = self._window * pre.hop + pre.samples  # of the next window
            if self._filled == len(self._sound):
                self._forget()
            missing = end - self._start - self._filled
            room = len(self._sound) - self._filled
            taken = min(len(sound) - done, missing, room)
            self._sound[self._filled : self._filled + taken] = sound[done : done + taken]
            self._filled += taken
            done += taken
            if taken == missing:
                answers.append(self._answer(end))
                self._next()
        return answers

    def _forget(self) -> None:
        """Moves what the next windows need to the front of the buffer."""
        first = min(self._window * self._preprocess.hop - self._start, self._filled)
        kept = self._filled - first
        self._sound[:kept] = self._sound[first : self._filled].copy()
        self._filled = kept
        self._start += first

    def _answer(self, end: int) -> Answer:
        pre = self._preprocess
        first = end - pre.samples - self._start
        window = self._sound[first : first + pre.samples]
        for row in range(self._known, pre.frames):
            at = row * pre.hop
            self._energies[row] = pre.energies(window[at : at + pre.frame])
        gain = pre.gains(window)
        # Frames that the last window had too need no second logarithm, unless the gain changed.
        begin = self._finished if gain == self._gain else 0
        self._features[begin:] = pre.finish(self._energies[begin:], gain)
        self._gain, self._known, self._finished = gain, pre.frames, pre.frames
        scores = self._session(pre.values(self._features[None]))[0]
        self._recent.append(probabilities(scores) if self._softmax else scores.astype(np.float64))
        mean = np.mean(self._recent, axis=0) if len(self._recent) > 1 else self._recent[0]
        index = int(mean.argmax())
        label = str(self._classes[index]) if index < len(self._classes) else str(index)
        return Answer(end, end / pre.rate, scores, mean, index, label)

    def _next(self) -> None:
        """Goes on to the next window: its first frames are the last of this one."""
        kept = max(0, self._preprocess.frames - self._every)
        for ring in (self._energies, self._features):
            ring[:kept] = ring[len(ring) - kept :].copy()
        self._known = self._finished = kept
        self._window += self._every


def need_audio(graph: Graph) -> AudioPreprocess:
    """The front end of a model of sound.

    Raises:
        InputError: If the graph is not one, input, front end and scores (N, classes) all counted.
        FormatError: If its metadata make no sense.
    """
    preprocess = AudioPreprocess.from_metadata(graph.metadata)
    if preprocess is None:
        raise InputError(
            "the model does not say how to prepare sound; export it with "
            f"metadata={{{KEY!r}: AudioPreprocess(...).to_dict()}}"
        )
    outputs = [graph.values[name].shape for name in graph.outputs]
    if len(graph.inputs) != 1 or len(outputs) != 1 or len(outputs[0]) != 2:
        raise InputError(
            f"the model has {len(graph.inputs)} inputs and outputs of the shapes {outputs}; one of "
            "sound has one input and one output (N, classes)"
        )
    return preprocess


def has_softmax(graph: Graph) -> bool:
    """Whether the first output is that of a softmax, so that scores are probabilities."""
    return any(node.output == graph.outputs[0] and node.op == "softmax" for node in graph.nodes)


def probabilities(scores: Array) -> Array:
    """Softmax over the last axis, float64."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
