"""Old module paths of the training side."""

from __future__ import annotations

import sys

import pytest
from moved import check_old_paths
from test_moved import FORWARDED, FUNCTIONS

import lutra.train
from lutra._moved import MOVED_TRAINING


@pytest.mark.parametrize("raises", [True, False])
def test_old_paths_work_with_a_warning(raises: bool) -> None:
    paths = {old: (new, None) for old, new in MOVED_TRAINING.items()}
    paths |= {"lutra.train.layers": FORWARDED["lutra.train.layers"]}
    assert check_old_paths(paths, package="lutra.train", raises=raises)


def test_functions_are_not_hidden_by_old_modules() -> None:
    for name in FUNCTIONS:
        assert name in sys.modules
        function = getattr(lutra.train, name.rpartition(".")[2])
        assert callable(function)
        with pytest.warns(DeprecationWarning, match=f"^{name}"):
            assert getattr(sys.modules[name], function.__name__) is function
