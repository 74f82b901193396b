"""The search finds the front of all combinations, without counting all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lutra.hardware import Design, HardwareError
from lutra.hardware.explore import LayerShape, explore
from lutra.hardware.explore_page import exploration_page

NETWORK = [LayerShape("conv1", 100, 144, 32), LayerShape("conv2", 40, 288, 64)]
RANGES = {
    "encoder": ["l2", "l1"], "v": [3, 9], "k": [8, 16], "tile": [4, 16, 64],
    "elements": [1, 4, 8, 16],
}  # fmt: skip


def error_of(name: str, v: int, k: int, encoder: str) -> float:
    return (1 + (name == "conv2")) * v / k * (1.1 if encoder == "l1" else 1.0)


class Counter:
    """Cells by a formula, and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, design: Design) -> int:
        self.calls += 1
        each = 300 if design.encoder == "l2" else 60
        return design.elements * design.v * each + design.tile * 200


def test_front_is_that_of_all_combinations() -> None:
    counter = Counter()
    found = explore(NETWORK, error_of, RANGES, cells=counter)
    assert counter.calls == len(found.measured)
    assert found.pruned > 5
    assert found.combinations == len(found.measured) + found.pruned
    # every combination alone is a search that leaves nothing out
    every = []
    for encoder in RANGES["encoder"]:
        for v in RANGES["v"]:
            for k in RANGES["k"]:
                for tile in RANGES["tile"]:
                    for elements in RANGES["elements"]:
                        if k % elements == 0:  # type: ignore[operator]
                            one = {"encoder": [encoder], "v": [v], "k": [k], "tile": [tile],
                                   "elements": [elements]}  # fmt: skip
                            every += explore(NETWORK, error_of, one, cells=Counter()).measured
    assert len(every) == found.combinations
    front = {one for one in every if not any(other.beats(one) for other in every)}
    assert {(c.error, c.cycles, c.cells) for c in found.front} == {
        (c.error, c.cycles, c.cells) for c in front
    }


def test_limits() -> None:
    found = explore(NETWORK, error_of, RANGES, cells=Counter(), max_error=1.0, max_cycles=30_000)
    assert found.front
    for one in found.measured:
        assert one.error <= 1.0
        assert one.cycles <= 30_000


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    store = tmp_path / "search.json"

    class Stops(Counter):
        def __call__(self, design: Design) -> int:
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().__call__(design)

    with pytest.raises(KeyboardInterrupt):
        explore(NETWORK, error_of, RANGES, cells=Stops(), store=store)
    counter, whole = Counter(), Counter()
    again = explore(NETWORK, error_of, RANGES, cells=counter, store=store)
    assert again == explore(NETWORK, error_of, RANGES, cells=whole)
    assert counter.calls == whole.calls - 5
    store.write_text("[]")
    with pytest.raises(HardwareError, match="is no file of a search"):
        explore(NETWORK, error_of, RANGES, cells=counter, store=store)


def test_page() -> None:
    text = exploration_page("a <network>", explore(NETWORK, error_of, RANGES, cells=Counter()))
    assert "a &lt;network&gt;: accelerators" in text
    assert text.count("<circle") > 10
    assert "<script" not in text


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"v": [9]}, "ranges must have exactly"),
        ({**RANGES, "speed": [1]}, "ranges must have exactly"),
        ({**RANGES, "encoder": ["cosine"]}, "encoder='cosine'; choose from"),
    ],
)
def test_mistakes(ranges: dict[str, list[int]], message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        explore(NETWORK, error_of, ranges, cells=Counter())
