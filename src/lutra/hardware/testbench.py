"""Testbenches in Verilog, for Verilator and Icarus: words from ``.mem`` files, every answer
compared, cycles counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Bench", "testbench"]


@dataclass(frozen=True)
class Bench:
    """What a testbench does.

    Attributes:
        inputs: Bits and words of each input stream by its name, the command first.
        sums: Bits and words of the sums that must come out.
        codes: Bits and codes that must be shown, or None where the circuit shows none.
        cycles: What the model says, or None where it says nothing.
        slow: Streams that belong to the encoder's clock.
    """

    inputs: Mapping[str, tuple[int, list[int]]]
    sums: tuple[int, list[int]]
    codes: tuple[int, list[int]] | None = None
    cycles: int | None = None
    slow: tuple[str, ...] = field(default=())

    def images(self) -> dict[str, str]:
        """Memory images by file name: a word in hexadecimal in each line."""
        files = {**self.inputs, "sums": self.sums}
        if self.codes is not None:
            files["code"] = self.codes
        return {f"{name}.mem": _image(*given) for name, given in files.items()}


def _image(bits: int, words: list[int]) -> str:
    digits = -(-bits // 4)
    return "".join(f"{word:0{digits}x}\n" for word in words)


def testbench(bench: Bench) -> str:
    """A testbench as text. ``+bubbles`` lets every stream wait in half of all cycles; then cycles
    are not compared. The sums go to ``sums.out``."""
    slow = bench.slow
    parts = [
        """\
// Feeds an accelerator from memory images and compares every answer.
`timescale 1ns / 1ps
/* verilator lint_off WIDTH */
/* verilator lint_off UNUSEDSIGNAL */
module testbench;
  reg clk = 0, rst = 1, bubbles = 0;
  always #5 clk = ~clk;
  integer cycle = 0, first = -1, wrong = 0, idle = 0, got = 0, coded = 0;
"""
    ]
    if slow:
        parts.append("  reg encoder_clk = 0;\n  always #7 encoder_clk = ~encoder_clk;\n")
    ports = ["    .clk(clk), .rst(rst)"]
    if slow:
        ports.append("    .encoder_clk(encoder_clk)")
    loads = []
    for name, (bits, words) in bench.inputs.items():
        clock = "encoder_clk" if name in slow else "clk"
        parts.append(f"""
  // {name}
  reg [{bits - 1}:0] {name}_words [0:{len(words) - 1}];
  integer {name}_at = 0;
  reg {name}_go = 1;
  wire {name}_ready;
  wire {name}_valid = {name}_go && !rst && {name}_at < {len(words)};
  wire [{bits - 1}:0] {name}_word = {name}_words[{name}_at < {len(words)} ? {name}_at : 0];
  always @(posedge {clock}) begin
    if ({name}_valid && {name}_ready) {name}_at <= {name}_at + 1;
    if (!{name}_go || {name}_ready) {name}_go <= !bubbles || $urandom % 2 == 0;
  end
""")
        ports.append(
            f"    .{name}__payload({name}_word), .{name}__valid({name}_valid), "
            f".{name}__ready({name}_ready)"
        )
        loads.append(f'    $readmemh("{name}.mem", {name}_words);')
    bits, words = bench.sums
    command = next(iter(bench.inputs))
    ports.append(
        "    .sums__payload(sums_word), .sums__valid(sums_valid), .sums__ready(sums_ready)"
    )
    loads.append('    $readmemh("sums.mem", sums_words);')
    coded = 0
    if bench.codes is not None:
        code_bits, codes = bench.codes
        coded = len(codes)
        clock = "encoder_clk" if slow else "clk"
        ports.append("    .code(code), .code_valid(code_valid)")
        loads.append('    $readmemh("code.mem", code_words);')
        parts.append(f"""
  // codes that the encoder shows
  reg [{code_bits - 1}:0] code_words [0:{coded - 1}];
  wire [{code_bits - 1}:0] code;
  wire code_valid;
  always @(posedge {clock}) if (!rst && code_valid) begin
    if (coded >= {coded} || code !== code_words[coded]) begin
      wrong <= wrong + 1;
      if (wrong < 8) $display("code %0d is %0d", coded, code);
    end
    coded <= coded + 1;
  end
""")
    cycles = -1 if bench.cycles is None else bench.cycles
    parts.append(f"""
  // sums, in two's complement, the first output in the lowest bits
  reg [{bits - 1}:0] sums_words [0:{len(words) - 1}];
  wire [{bits - 1}:0] sums_word;
  wire sums_valid;
  reg sums_ready = 1;
  integer differ = 0, file;
  always @(posedge clk) begin
    sums_ready <= !bubbles || $urandom % 2 == 0;
    if (!rst) begin
      cycle <= cycle + 1;
      if ({command}_valid && {command}_ready && first < 0) first <= cycle;
      idle <= idle + 1;
      if (sums_valid && sums_ready) begin
        idle <= 0;
        got <= got + 1;
        $fdisplay(file, "%h", sums_word);
        if (sums_word !== sums_words[got]) begin
          differ = differ + 1;
          if (differ < 8) $display("sums %0d: %h, not %h", got, sums_word, sums_words[got]);
        end
        if (got == {len(words) - 1}) begin
          $display("%s: %0d codes and %0d words of sums, %0d wrong; cycles %0d, model {cycles}",
            wrong + differ == 0 && coded == {coded}
              && (bubbles || {cycles} < 0 || cycle - first + 1 == {cycles}) ? "PASS" : "FAIL",
            coded, got + 1, wrong + differ, cycle - first + 1);
          $fclose(file);
          $finish;
        end
      end
      if (idle > 50000000) begin
        $display("FAIL: stuck after %0d words of sums", got);
        $finish;
      end
    end
  end

  accelerator dut (
{",".join(chr(10) + port for port in ports).lstrip(chr(10))}
  );

  initial begin
{chr(10).join(loads)}
    file = $fopen("sums.out", "w");
    bubbles = $test$plusargs("bubbles") != 0;
    repeat (8) @(posedge clk);
    #1 rst = 0;
  end
endmodule
""")
    return "".join(parts)
