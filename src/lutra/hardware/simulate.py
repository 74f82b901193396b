"""Simulation of generated accelerators with Amaranth's own simulator: no other tool is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Final

from amaranth import ClockDomain, ClockSignal, Module
from amaranth.sim import Simulator

from lutra.hardware.accelerator import Accelerator
from lutra.hardware.design import Design, HardwareError
from lutra.hardware.words import Words

__all__ = ["Run", "always", "simulate", "simulate_streams"]

#: Whether a stream offers its next word, or takes one, in each cycle; endless.
Pattern = Iterator[bool]
_PATIENCE: Final = 5000  # cycles without any word, after which a simulation is stuck
_RESET_CYCLES: Final = 8


@dataclass
class Run:
    """What a simulation gave.

    Attributes:
        code: Codes in the order in which they were made; none of a design that multiplies.
        sums: Words of sums.
        first: The cycle of the first command.
        last: The cycle of the last sum.
    """

    code: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    first: int = -1
    last: int = -1

    @property
    def cycles(self) -> int:
        """Cycles from the first command to the last sum, both counted."""
        return self.last - self.first + 1


def always() -> Pattern:
    """The pattern of a stream that never waits."""
    return repeat(True)


class _Source:
    """Offers words to a stream; a word that was offered stays until it is taken."""

    def __init__(self, stream: Any, words: list[int], pattern: Pattern) -> None:
        payload = stream.payload
        self.stream, self.words, self.pattern = stream, words, pattern
        self.raw = payload.as_value() if hasattr(payload, "as_value") else payload
        self.place, self.offered = 0, False

    @property
    def left(self) -> bool:
        return self.place < len(self.words)

    def before(self, ctx: Any) -> None:
        if not self.offered and self.left and next(self.pattern):
            self.offered = True
            ctx.set(self.raw, self.words[self.place])
        ctx.set(self.stream.valid, self.offered)

    def after(self, ready: int) -> bool:
        """Whether a word was taken."""
        if not (self.offered and ready):
            return False
        self.offered, self.place = False, self.place + 1
        return True

    def restart(self) -> None:
        self.place, self.offered = 0, False


def simulate(
    design: Design,
    words: Words,
    *,
    pattern: Callable[[str], Pattern] = lambda name: always(),
    reset_at: int | None = None,
    encoder_period: float = 1.0,
) -> Run:
    """Runs words through an accelerator.

    Args:
        design: What it is built for.
        words: What goes in; see ``layer_words``.
        pattern: The pattern of a stream by its name: command, codebook, x, tables, sums.
        reset_at: A cycle in which everything is reset and begins again.
        encoder_period: Period of the encoder's clock of a design with two clocks, in periods of
            the other one.

    Returns:
        What came out, from the last reset on.

    Raises:
        HardwareError: If nothing moves for a long time.
    """
    inputs = words.inputs
    slow = ("x", "codebook") if design.two_clocks else ()
    return simulate_streams(
        Accelerator(design), inputs, len(words.sums), slow=slow, pattern=pattern,
        reset_at=reset_at, encoder_period=encoder_period,
    )  # fmt: skip


def simulate_streams(
    dut: Any,
    inputs: Mapping[str, list[int]],
    count: int,
    *,
    slow: Sequence[str] = (),
    pattern: Callable[[str], Pattern] = lambda name: always(),
    reset_at: int | None = None,
    encoder_period: float = 1.0,
) -> Run:
    """Runs words through any circuit with input streams and the output stream ``sums``.

    Args:
        dut: The circuit.
        inputs: Words of each input stream by its name; the first one is the command.
        count: Words of sums that must come out.
        slow: Streams that belong to the encoder's clock, if there is one.
        pattern: The pattern of a stream by its name.
        reset_at: A cycle in which everything is reset and begins again.
        encoder_period: Period of the encoder's clock in periods of the other one.

    Raises:
        HardwareError: If nothing moves for a long time.
    """
    m, clock = Module(), ClockDomain("sync")
    m.domains += clock
    m.submodules.dut = dut
    run, done = Run(), [False]
    sources = {
        name: _Source(getattr(dut, name), given, pattern(name)) for name, given in inputs.items()
    }
    taking = pattern("sums")
    sums = dut.sums.payload.as_value()
    codes = [dut.code_valid, dut.code] if hasattr(dut, "code_valid") else []

    async def bench(ctx: Any) -> None:
        used = [source for name, source in sources.items() if name not in slow]
        shown = [] if slow else codes
        cycle = idle = 0
        while len(run.sums) < count:
            if cycle == reset_at:
                ctx.set(clock.rst, 1)
                for _ in range(_RESET_CYCLES):
                    await ctx.tick()
                    cycle += 1
                ctx.set(clock.rst, 0)
                for source in sources.values():
                    source.restart()
                run.__init__()  # type: ignore[misc]
            for source in used:
                source.before(ctx)
            ready = next(taking)
            ctx.set(dut.sums.ready, ready)
            _, _, valid, word, *values = await ctx.tick().sample(
                dut.sums.valid, sums, *(source.stream.ready for source in used), *shown
            )
            moved = [source.after(value) for source, value in zip(used, values, strict=False)]
            if moved[0] and run.first < 0:
                run.first = cycle
            if shown and values[-2]:
                run.code.append(values[-1])
            if valid and ready:
                run.sums.append(word)
                run.last = cycle
            idle = 0 if any(moved) or valid else idle + 1
            if idle > _PATIENCE:
                raise HardwareError(
                    f"the simulation is stuck in cycle {cycle} with {len(run.sums)} of {count} "
                    "sums; please report the design and the layer"
                )
            cycle += 1
        done[0] = True

    async def encoder_bench(ctx: Any) -> None:
        used = [sources[name] for name in slow]
        while not done[0]:
            for source in used:
                source.before(ctx)
            _, _, coded, code, *values = await ctx.tick("encoder_bench").sample(
                *codes, *(source.stream.ready for source in used)
            )
            for source, value in zip(used, values, strict=True):
                source.after(value)
            if coded and not ctx.get(clock.rst):
                run.code.append(code)

    if slow:
        m.domains += ClockDomain("encoder_bench", reset_less=True)
        m.d.comb += dut.encoder_clk.eq(ClockSignal("encoder_bench"))
    simulator = Simulator(m)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    if slow:
        simulator.add_clock(1e-6 * encoder_period, domain="encoder_bench")
        simulator.add_testbench(encoder_bench, background=True)
    simulator.run()
    return run
