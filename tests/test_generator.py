"""Language models that continue texts, without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder
from sequences import norm_tensors

import lutra
from lutra import Generator, Session, cli, runnable_isas
from lutra.errors import InputError
from lutra.graph import Graph
from lutra.preprocess.tokens import CharacterTokenizer, Decoding, Tokenizer

F = np.float32
LETTERS = "abcdefghijklmnop .,\n"
LETTER_TOKENS = CharacterTokenizer(LETTERS)
VOCABULARY, LENGTH = len(LETTERS) + 2, 40
BOS, EOS = VOCABULARY - 2, VOCABULARY - 1


def decoder(
    tokenizer: Tokenizer | None = LETTER_TOKENS,
    *,
    bos: int | None = BOS,
    eos: tuple[int, ...] = (),
    seed: int = 0,
) -> Graph:
    """Two layers of a random decoder with lookups, int8 and float layers."""
    b = Builder(
        ("tokens", (None, None), "int32"), ("start", (None,), "int32"),
        ("picked", (None, None), "int32"), seed=seed,
    )  # fmt: skip
    width = 16
    table = 3 * b.rng.normal(size=(VOCABULARY, width)).astype(F)
    h = b.add("embedding", "tokens", tensors={"weight": table})
    turns = np.arange(LENGTH)[:, None] * np.tile([1.0, 0.1], 2)
    angles = {"cos": np.cos(turns).astype(F), "sin": np.sin(turns).astype(F)}
    for _ in range(2):
        x = b.add("rms_norm", h, tensors=norm_tensors(b.rng, width, bias=False), eps=1e-6)
        q = b.add("rotary", b.linear(x, width, 16), "start", tensors=angles, heads=4)
        k = b.add("rotary", b.int8_linear(x, width, 8), "start", tensors=angles, heads=2)
        y = b.add(
            "cached_attention", q, k, b.pq_linear(x, width, 8), "start",
            heads=4, kv_heads=2, scale=0.5, length=LENGTH,
        )  # fmt: skip
        h = b.add("add", h, b.linear(y, 16, width))
    y = b.add("pick_tokens", h, "picked")
    y = b.add("rms_norm", y, tensors=norm_tensors(b.rng, width, bias=False), eps=1e-6)
    y = b.add("linear", y, name="logits", tensors={
        "weight": 3 * b.rng.normal(size=(VOCABULARY, width)).astype(F),
        "bias": np.zeros(VOCABULARY, F),
    })  # fmt: skip
    graph = b.graph(y)
    last = replace(graph.nodes[-1], output="logits")
    entry = Decoding(LENGTH, tokenizer, bos, eos, VOCABULARY).to_dict()
    return replace(
        graph, nodes=(*graph.nodes[:-1], last), outputs=("logits",), metadata={"decoder": entry}
    )


def scores(graph: Graph, ids: list[int]) -> Array:
    """The scores of all tokens of a text at once."""
    tokens = np.array([ids], np.int32)
    picked = np.arange(len(ids), dtype=np.int32)[None]
    feeds = {"tokens": tokens, "start": np.zeros(1, np.int32), "picked": picked}
    return Session(graph).run(None, feeds)[0][0]


def greedy(graph: Graph, ids: list[int], count: int) -> list[int]:
    """Token after token, each from the whole text so far."""
    made: list[int] = []
    for _ in range(count):
        made.append(int(scores(graph, ids + made)[-1].argmax()))
    return made


def test_greedy_text_is_that_of_whole_runs() -> None:
    graph = decoder()
    want = greedy(graph, [BOS, 2, 0, 1], 20)
    for isa in runnable_isas():
        for threads in (1, 2):
            made = Generator(graph, isa=isa, threads=threads).generate([BOS, 2, 0, 1], 20)
            assert list(made.tokens) == want
            assert made.prompt == (BOS, 2, 0, 1)
            assert made.reason == "length"
    assert len(set(want)) > 3  # it says something


def test_text_and_ids_are_the_same_prompt() -> None:
    generator = Generator(decoder())
    made = generator.generate("cab", 9)
    assert made == replace(
        generator.generate(np.array([BOS, 2, 0, 1]), 9),
        prompt_seconds=made.prompt_seconds,
        seconds=made.seconds,
    )
    assert made.text == "".join(LETTERS[i] for i in made.tokens if i < len(LETTERS))
    assert str(made) == made.text
    assert generator.tokens("cab") == [BOS, 2, 0, 1]
    assert generator.max_length == LENGTH
    assert generator.vocabulary == VOCABULARY
    stream = generator.stream("cab", 9)
    tokens = list(stream)
    assert [token.id for token in tokens] == list(made.tokens)
    assert "".join(token.text for token in tokens) == made.text == stream.completion.text


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    first = greedy(decoder(), [BOS, 0], 30)
    graph = decoder(eos=(first[7],))
    generator = Generator(graph)
    prompts = ["a", "abc,def.", "p" * 38, "no\n", [4, 4], "a"]
    alone = [generator.generate(prompt) for prompt in prompts]
    together = generator.generate(prompts)
    assert isinstance(together, list)
    assert [made.tokens for made in together] == [made.tokens for made in alone]
    assert [made.reason for made in together] == [made.reason for made in alone]
    assert {made.reason for made in together} == {"end", "length"}
    assert together[2].prompt == (BOS, *[15] * 38)
    assert len(together[2].tokens) <= 2  # all that can be remembered, and one more
    endless = Generator(decoder())
    drawn = endless.generate(prompts, 12, temperature=9.0, seed=3)
    assert drawn[0].tokens == endless.generate("a", 12, temperature=9.0, seed=3).tokens
    assert drawn[0].tokens != drawn[5].tokens


def test_chunks_of_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lutra import generator as module

    prompts = ["abcdefghijklmnop" * 2, "a", "abc,d"]
    generator = Generator(decoder())
    want = [made.tokens for made in generator.generate(prompts, 5)]
    known = generator.score(prompts[0])
    for chunk in (1, 3, 7):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert [made.tokens for made in generator.generate(prompts, 5)] == want
        np.testing.assert_array_equal(generator.score(prompts[0]), known)


def test_drawing_follows_the_probabilities() -> None:
    graph = decoder()
    generator = Generator(graph)
    logits = scores(graph, [BOS, 0]).astype(np.float64)[-1]
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    first = [generator.generate("a", 1, temperature=1.0, seed=i).tokens[0] for i in range(400)]
    counts = np.bincount(first, minlength=VOCABULARY) / 400
    assert np.abs(counts - chances).max() < 0.1
    cold = [generator.generate("a", 1, temperature=0.01, seed=i).tokens[0] for i in range(20)]
    assert set(cold) == {int(chances.argmax())}
    order = np.argsort(-chances)
    most = {
        generator.generate("a", 1, temperature=9.0, top_k=3, seed=i).tokens[0] for i in range(60)
    }
    assert most == set(order[:3].tolist())
    sums = np.cumsum(chances[order])
    for p in (0.3, 0.7, 0.99):
        kept = set(order[: int(np.searchsorted(sums, p)) + 1].tolist())
        seen = {
            generator.generate("a", 1, temperature=1.0, top_p=p, seed=i).tokens[0]
            for i in range(100)
        }
        assert seen <= kept
    again = [generator.generate("ab", 20, temperature=1.0, seed=8).tokens for _ in range(2)]
    assert again[0] == again[1]


def test_ends_and_stops() -> None:
    want = greedy(decoder(), [BOS, 2, 0, 1], 20)
    token = want[5]
    ended = Generator(decoder(eos=(token,))).generate("cab", 20)
    assert ended.tokens == tuple(want[: want.index(token)])
    assert ended.reason == "end"
    generator = Generator(decoder())
    text = generator.generate("cab", 20).text
    stopped = generator.generate("cab", 20, stop=["never", text[6:9]])
    assert stopped.text == text[: text.index(text[6:9])]
    assert stopped.reason == "stop"
    shown = "".join(token.text for token in generator.stream("cab", 20, stop=text[6:9]))
    assert shown == stopped.text
    cut = generator.generate("cab", 20, stop=text[-1] + "???")  # held back to the end
    assert cut.text == text


def test_scores_and_perplexity() -> None:
    graph = decoder()
    generator = Generator(graph)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, VOCABULARY, LENGTH)]
    logits = scores(graph, ids).astype(np.float64)
    logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logs -= logits.max(-1, keepdims=True)
    want = logs[np.arange(LENGTH - 1), ids[1:]]
    np.testing.assert_allclose(generator.score(ids), want, rtol=1e-9)
    assert generator.perplexity(ids) == pytest.approx(np.exp(-want.mean()))
    parts = np.concatenate([generator.score(ids[:15]), generator.score(ids[15:30])])
    assert generator.perplexity(ids[:31], context=15) == pytest.approx(np.exp(-parts.mean()))
    with pytest.raises(InputError, match="one token follows nothing"):
        generator.score([3])
    with pytest.raises(InputError, match=r"context=1 must be in 2\.\.40"):
        generator.perplexity(ids, context=1)
    with pytest.raises(InputError, match="1 tokens were given; give at least two"):
        generator.perplexity([1])


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ([], {}, "the prompt is empty; give at least one token"),
        ([1, VOCABULARY], {}, r"holds the token 22, which the model does not know"),
        ([-1], {}, r"holds the token -1, which the model does not know; its tokens are 0\.\.21"),
        ([1] * 41, {}, "the prompt has 41 tokens and the model remembers 40; cut it"),
        ("a" * 40, {}, "the prompt has 41 tokens and the model remembers 40; cut it"),
        ("aX", {}, "the character 'X' at 1, which the model has no token for"),
        ([1.5], {}, "give a text, or ids"),
        ("a", {"max_tokens": 0}, "max_tokens=0 must be a whole number of at least 1"),
        ("a", {"temperature": -1.0}, r"temperature=-1.0 must be a number of at least 0"),
        ("a", {"temperature": float("nan")}, "temperature=nan must be"),
        ("a", {"top_k": -1}, "top_k=-1 must be"),
        ("a", {"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ("a", {"seed": -1}, "seed=-1 must be"),
        ("a", {"stop": ["x", ""]}, "must be texts, none of them empty"),
        ("a", {"stop": 5}, "stop=5 must be texts, none of them empty"),
        ("a", {"temperature": "hot"}, "temperature='hot' must be a number of at least 0"),
        ("a", {"temperature": None}, "temperature=None must be"),
        ("a", {"top_k": 1.5}, "top_k=1.5 must be"),
        ("a", {"top_p": "x"}, "top_p='x' must be above 0"),
        (None, {}, "give a text, or ids"),
        (3, {}, "give a text, or ids"),
        ({"a": 1}, {}, "give a text, or ids"),
        (b"ab", {}, "give a text, or ids"),
    ],
)
def test_what_makes_no_sense_is_refused(prompt: Any, options: dict[str, Any], match: str) -> None:
    generator = Generator(decoder())
    with pytest.raises(InputError, match=match):
        generator.generate(prompt, **options)
    with pytest.raises(InputError, match=match):
        generator.stream(prompt, **options)


def test_files_that_are_no_language_models_or_have_no_tokenizer() -> None:
    b = Builder(("x", (None, 4)))
    with pytest.raises(InputError, match="is no language model with a cache"):
        Generator(b.graph(b.add("relu", "x")))
    with pytest.raises(InputError, match="is no language model with a cache"):
        Generator(replace(decoder(), metadata={}))
    generator = Generator(decoder(None, bos=None))
    with pytest.raises(InputError, match="the file has no tokenizer; give ids"):
        generator.generate("a")
    with pytest.raises(InputError, match="stop needs text, and the file has no tokenizer"):
        generator.generate([1], stop="a")
    assert generator.generate([1], 3).text == ""
    with pytest.raises(InputError, match="the prompt is empty"):
        Generator(decoder(bos=None)).generate("")
    assert Generator(decoder()).generate("", 3).prompt == (BOS,)
    with pytest.raises(InputError, match="threads and isa are those of the session"):
        Generator(Session(decoder()), threads=1)


def test_a_file_in_a_process_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "m.lutra"
    lutra.save_graph(decoder(), path)
    code = (
        "import sys, lutra; g = lutra.Generator(sys.argv[1]); print(g.generate('cab', 9).tokens); "
        "assert not {'torch', 'tokenizers', 'transformers'} & set(sys.modules)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == str(Generator(path).generate("cab", 9).tokens)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "m.lutra")
    lutra.save_graph(decoder(), path)
    want = Generator(path).generate("cab", 9)
    assert cli.main(["generate", path, "--prompt", "cab", "-n", "9", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"cab{want.text}\n"
    assert "4 tokens of the prompt at " in shown.err
    assert " a second" in shown.err
    ids = f"{BOS},2,0,1"
    assert cli.main(["generate", path, "--ids", ids, "-n", "9", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] == list(want.tokens)
    assert answer["text"] == want.text
    assert answer["tokens_per_second"] > 0
    for words, match in (
        (("--prompt", "X"), "has no token for"),
        (("--prompt", "a" * 60), "remembers 40"),
        (("--ids", "1,x"), "must be whole numbers with commas"),
        (("--ids", "99"), "does not know"),
    ):
        assert cli.main(["generate", path, *words]) == 2
        assert match in capsys.readouterr().err
    bare = str(tmp_path / "bare.lutra")
    lutra.save_graph(decoder(None), bare)
    assert cli.main(["generate", bare, "--prompt", "a"]) == 2
    assert "has no tokenizer; give the prompt as --ids" in capsys.readouterr().err
    assert cli.main(["generate", bare, "--ids", "1", "-n", "3"]) == 0
    assert len(capsys.readouterr().out.split()) == 3
