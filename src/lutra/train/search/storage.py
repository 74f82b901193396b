"""Where the trials of a study are kept: in memory, or in a journal that outlives the process.

The journal is a file of Optuna's: every finished trial is one line, written and synced before the
next trial begins. Several processes may write to it. A process that is killed loses the trial that
was in flight and nothing else: half a line at the end is cut off before the next is written, and
the lock is one that the system takes back from dead processes.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from lutra.errors import LutraError
from lutra.train.search.trial import Trial

_STUDY: Final = "lutra"
_RECORD: Final = "record"
_STARTED: Final = "started"
_SETTINGS: Final = "settings"
_NOTES: Final = "notes:"


class Storage(Protocol):
    """The trials of a study, and notes beside them."""

    def start(self, choice: Mapping[str, str]) -> int:
        """Says that a trial begins; returns its number."""

    def claim(self, choice: Mapping[str, str]) -> int | None:
        """As `start`; None where another process was first with the choice."""

    def finish(self, number: int, trial: Trial) -> None:
        """Keeps what came of a trial that was started."""

    def trials(self) -> list[Trial]:
        """All that are finished, in the order in which they began."""

    def running(self) -> list[dict[str, str]]:
        """The choices that other processes are at."""

    def note(self, name: str, value: Any) -> None:
        """Keeps a JSON value under a name."""

    def notes(self, name: str) -> Any:
        """What `note` kept; None where nothing was."""


class Memory:
    """Trials that are gone with the process."""

    def __init__(self) -> None:
        self._trials: dict[int, Trial | None] = {}
        self._notes: dict[str, Any] = {}

    def start(self, choice: Mapping[str, str]) -> int:
        self._trials[len(self._trials)] = None
        return len(self._trials) - 1

    def claim(self, choice: Mapping[str, str]) -> int | None:
        return self.start(choice)

    def finish(self, number: int, trial: Trial) -> None:
        self._trials[number] = trial

    def trials(self) -> list[Trial]:
        return [trial for trial in self._trials.values() if trial is not None]

    def running(self) -> list[dict[str, str]]:
        return []

    def note(self, name: str, value: Any) -> None:
        self._notes[name] = value

    def notes(self, name: str) -> Any:
        return self._notes.get(name)


class _Lock:
    """A lock of a file that the system releases when its holder dies.

    Args:
        path: the journal.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Waits for the lock, and cuts off what a dead process wrote half."""
        import fcntl

        handle = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._handle = handle
        cut_half_line(self._path)
        return True

    def release(self) -> None:
        """Gives the lock back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def cut_half_line(path: str) -> None:
    """Cuts off what follows the last line end of a file; its lock must be held."""
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep:
            start = max(0, keep - 65536)
            file.seek(start)
            block = file.read(keep - start)
            place = block.rfind(b"\n")
            if place >= 0:
                keep = start + place + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


class Journal:
    """Trials in a file of Optuna's journal storage.

    Args:
        path: the file; it is made where it is missing.
        settings: JSON values that decide what trials mean.

    Raises:
        LutraError: Optuna is not installed, the file cannot be used, or it belongs to a study with
            other settings.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        try:
            optuna = importlib.import_module("optuna")
            journal = importlib.import_module("optuna.storages.journal")
        except ModuleNotFoundError as error:
            raise LutraError(
                f"optimize: storage={str(path)!r} needs {error.name}, which is not installed; "
                "install it with pip install 'lutra[search]', or leave the storage out"
            ) from None
        self._optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        name = os.fspath(path)
        if not Path(name).parent.is_dir():
            raise LutraError(
                f"optimize: storage={name!r}: the folder {str(Path(name).parent)!r} does not exist"
            )
        lock = _Lock(name)
        try:
            Path(name).touch()
            lock.acquire()  # so that half a line is gone before anything is read
            lock.release()
            backend = journal.JournalFileBackend(name, lock_obj=lock)
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name=_STUDY,
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
            known = self._study.user_attrs.get(_SETTINGS)
            if known is None:
                self._study.set_user_attr(_SETTINGS, json.loads(json.dumps(settings)))
        except OSError as error:
            raise LutraError(
                f"optimize: storage={name!r} cannot be used ({error.strerror or error}); give a "
                "file that can be written"
            ) from error
        except Exception as error:  # what Optuna raises about a file of another kind
            raise LutraError(
                f"optimize: storage={name!r} is no journal of Optuna ({type(error).__name__}: "
                f"{error}); give a new file"
            ) from error
        own = json.loads(json.dumps(settings))
        if known is not None and known != own:
            other = sorted(key for key in {*known, *own} if known.get(key) != own.get(key))
            raise LutraError(
                f"optimize: storage={name!r} belongs to a study with another {', '.join(other)}; "
                "give another file"
            )

    def start(self, choice: Mapping[str, str]) -> int:
        trial = self._study.ask()
        started = {"choice": dict(choice), "host": socket.gethostname(), "process": os.getpid()}
        trial.set_user_attr(_STARTED, started)
        return int(trial.number)

    def claim(self, choice: Mapping[str, str]) -> int | None:
        number = self.start(choice)
        for entry in self._study.get_trials(deepcopy=False):
            started = entry.user_attrs.get(_STARTED)
            if entry.number >= number or started is None or started["choice"] != dict(choice):
                continue
            if _RECORD in entry.user_attrs or (not entry.state.is_finished() and _alive(started)):
                self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
                return None
        return number

    def finish(self, number: int, trial: Trial) -> None:
        storage = self._study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        # The one line that counts; what follows is for tools of Optuna's.
        storage.set_trial_user_attr(trial_id, _RECORD, trial.to_dict())
        if trial.failed:
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(number, [trial.drop, trial.ms])

    def trials(self) -> list[Trial]:
        found = [entry.user_attrs.get(_RECORD) for entry in self._study.get_trials(deepcopy=False)]
        return [Trial.from_dict(entry) for entry in found if entry is not None]

    def running(self) -> list[dict[str, str]]:
        found = []
        for entry in self._study.get_trials(deepcopy=False):
            started = entry.user_attrs.get(_STARTED)
            if _RECORD in entry.user_attrs or started is None or entry.state.is_finished():
                continue
            if started["process"] != os.getpid() and _alive(started):
                found.append(dict(started["choice"]))
        return found

    def note(self, name: str, value: Any) -> None:
        self._study.set_user_attr(_NOTES + name, value)

    def notes(self, name: str) -> Any:
        return self._study.user_attrs.get(_NOTES + name)


def open_storage(
    storage: str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> Memory | Journal:
    """The storage of a study.

    Args:
        storage: a file; None keeps the trials in memory.
        settings: see `Journal`.

    Raises:
        LutraError: as `Journal` says.
    """
    return Memory() if storage is None else Journal(storage, settings)


def _alive(started: Mapping[str, Any]) -> bool:
    """Whether the process that began a trial may still be at it."""
    if started["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(started["process"]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
