"""The model of llama2.c with 260 thousand parameters, from its files to the text that it tells."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ci_skips import DATA  # noqa: E402

from lutra import Generator, cli, runnable_isas  # noqa: E402
from lutra.errors import InputError  # noqa: E402
from lutra.train import load_llama2c, load_llama2c_tokenizer  # noqa: E402

#: 200 tokens from the beginning of a text, as test_all.py of https://github.com/karpathy/llama2.c
#: has them.
PUBLISHED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to "
    'do."\n'
    "Lily didn't want to help her mom, so she"
)


@pytest.mark.slow
def test_the_published_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = DATA / "weights" / "stories260K.bin"
    if not weights.exists():
        pytest.skip("needs stories260K: set LUTRA_TEST_DATA to the folder that holds weights/")
    vocabulary = str(DATA / "weights" / "stories260K_tok512.bin")
    path = str(tmp_path / "stories.lutra")
    words = ["convert", str(weights), "--vocabulary", vocabulary, "-o", path]
    assert cli.main(words) == 0
    for isa in runnable_isas():
        made = Generator(path, threads=1, isa=isa).generate("", 200)
        assert made.text == PUBLISHED
    model = load_llama2c(weights)
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False, pad_token_id=0)
    assert tuple(ids[0, 1:].tolist()) == made.tokens
    capsys.readouterr()
    assert cli.main(["generate", path, "--prompt", "Once upon", "-n", "20", "--threads", "1"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl")


def small(path: Path, *, own_head: bool = False, **changes: int) -> Path:
    """A file of a random model of width 8 with 12 tokens."""
    sizes = {"dim": 8, "hidden": 12, "layers": 2, "heads": 2, "kv": 1, "vocab": 12, "length": 16}
    sizes |= changes
    parts = [
        12 * 8,
        2 * 8,
        2 * 64,
        2 * 32,
        2 * 32,
        2 * 64,
        2 * 8,
        2 * 96,
        2 * 96,
        2 * 96,
        8,
        2 * 16 * 2,
    ]
    count = sum(parts) + (12 * 8 if own_head else 0)
    floats = np.random.default_rng(0).normal(size=count).astype("<f4")
    header = [-size if own_head and name == "vocab" else size for name, size in sizes.items()]
    path.write_bytes(struct.pack("<7i", *header) + floats.tobytes())
    return path


def test_small_files(tmp_path: Path) -> None:
    model = load_llama2c(small(tmp_path / "m.bin"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 12)
    other = load_llama2c(small(tmp_path / "m.bin", own_head=True))
    assert other.lm_head.weight is not other.model.embed_tokens.weight
    small(tmp_path / "m.bin")
    whole = (tmp_path / "m.bin").read_bytes()
    cut = tmp_path / "cut.bin"
    for size in (0, 27, 28, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"bytes"):
            load_llama2c(cut)
    with pytest.raises(InputError, match=r"begins with the sizes .*, which no model has"):
        load_llama2c(small(tmp_path / "m.bin", heads=3))
    with pytest.raises(InputError, match="cannot read"):
        load_llama2c(tmp_path / "none.bin")


def test_a_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tok.bin"
    pieces = [b"<unk>", b"<s>", b"</s>", b" ", b"a", b" a", b"<0xC3>", b"<0x9F>"]
    records = (struct.pack("<fi", -i, len(p)) + p for i, p in enumerate(pieces))
    path.write_bytes(struct.pack("<i", 6) + b"".join(records))
    tokens = load_llama2c_tokenizer(path)
    assert tokens.encode("aß") == [5, 6, 7]
    assert tokens.decode([1, 5, 6, 7, 2]) == " aß"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="piece 7 is cut off"):
        load_llama2c_tokenizer(path)
    path.write_bytes(os.urandom(3))
    with pytest.raises(InputError, match=r"is no tokenizer of llama2\.c"):
        load_llama2c_tokenizer(path)


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = str(small(tmp_path / "m.bin")), str(tmp_path / "m.lutra")
    for words, match in (
        (["m.gguf", "--vocabulary", "t.bin"], "--vocabulary is for .bin models"),
        (["net.onnx", "--vocabulary", "t.bin"], "--vocabulary is for .bin files of llama2.c"),
        ([path, "--speed-gate"], "are not for language models"),
        ([str(tmp_path / "none.gguf")], "there is no file"),
        ([str(tmp_path / "none.bin")], "cannot read"),
    ):
        assert cli.main(["convert", *words, "-o", target]) == 2
        assert match in capsys.readouterr().err
    assert not Path(target).exists()


@pytest.mark.slow
def test_converted_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrates on texts that the model generates, and on ids that are given."""
    path, target = str(small(tmp_path / "m.bin")), str(tmp_path / "m.lutra")
    assert cli.main(["convert", path, "--method", "int8", "--keep", "lm_head", "-o", target]) == 0
    assert "calibrates on 32 texts of 16 tokens that it generates" in capsys.readouterr().out
    generator = Generator(target)
    assert sum(node.op == "int8_linear" for node in generator.session.graph.nodes) == 14
    assert len(generator.generate([1, 2], 5).tokens) >= 1
    ids = np.random.default_rng(0).integers(0, 12, (16, 10))
    np.save(tmp_path / "ids.npy", ids)
    data = ["--data", str(tmp_path / "ids.npy")]
    assert cli.main(["convert", path, "--method", "int8", "-o", target, *data]) == 0
    np.save(tmp_path / "ids.npy", ids.astype(np.float32))
    assert cli.main(["convert", path, "--method", "int8", "-o", target, *data]) == 2
    assert "is calibrated with ids (N, T), integers" in capsys.readouterr().err
