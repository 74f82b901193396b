"""The page of examples/web: features of sound as in Python, and the page itself in Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wasm
from c_library import ROOT
from graphs import Array

from lutra import Session, load_graph
from lutra.preprocess.audio import AudioPreprocess, read_wav

pytestmark = pytest.mark.slow
PAGE = ROOT / "examples" / "web"
KEYWORDS = ("dscnn_speech_commands", "resnet_speech_commands")


def chirp(rate: int = 16000) -> Array:
    """A second of something between a word and a whistle, int16."""
    t = np.arange(rate) / rate
    tones = ((220, 0.5), (700, 0.3), (1900, 0.2), (3100, 0.1))
    x = sum(a * np.sin(2 * np.pi * f * t * (1 + 0.2 * t)) for f, a in tones)
    x = x * np.exp(-(((t - 0.45) / 0.18) ** 2)) + np.random.default_rng(0).normal(size=rate) / 300
    return (x / np.abs(x).max() * 26000).astype(np.int16)


def write_wav(file: Path, samples: Array, rate: int = 16000) -> Path:
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file


@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.parametrize("count", [16000, 9000])
def test_features(tmp_path: Path, name: str, count: int) -> None:
    if shutil.which("node") is None:
        pytest.skip("needs node: apt-get install nodejs")
    front = AudioPreprocess.from_metadata(load_graph(ROOT / "zoo" / f"{name}.lutra").metadata)
    assert front is not None
    sound = chirp()[:count].astype(np.float32) / 32768
    sound.tofile(tmp_path / "sound")
    (tmp_path / "entry.json").write_text(json.dumps(front.to_dict()))
    program = f"""
      import {{ readFileSync, writeFileSync }} from "node:fs";
      import {{ AudioPreprocess }} from {json.dumps((PAGE / "audio.js").as_uri())};
      const [folder] = process.argv.slice(1);
      const entry = JSON.parse(readFileSync(`${{folder}}/entry.json`, "utf8"));
      const bytes = new Uint8Array(readFileSync(`${{folder}}/sound`));
      const made = new AudioPreprocess(entry).apply(new Float32Array(bytes.buffer));
      writeFileSync(`${{folder}}/features`, made);
    """
    words = ["node", "--input-type=module", "--eval", program, str(tmp_path)]
    subprocess.run(words, check=True)
    made = np.fromfile(tmp_path / "features", np.float32)
    wanted = front.apply(sound[None]).ravel()
    # Sums have another order: a level may be the next one, and that seldom.
    step = np.float32(0 if front.levels is None else front.levels.step) / np.float32(front.std)
    assert np.abs(made - wanted).max() <= max(1.01 * step, 1e-5)
    assert (np.abs(made - wanted) > 1e-5).mean() < 0.01


def answers(lines: list[Any]) -> dict[str, int]:
    return {label: int(share.removesuffix(" %")) for label, share in lines}


def test_page(tmp_path: Path) -> None:
    wasm.build("wasm")
    if shutil.which(os.environ.get("CHROMIUM", "chromium")) is None:
        pytest.skip("needs chromium: apt-get install chromium")
    if not (PAGE / "node_modules").is_dir():
        pytest.skip("needs playwright-core: make examples/web/node_modules")
    if not (ROOT / "build" / "digits.lutra").is_file():
        pytest.skip("needs build/digits.lutra: make demo")
    wasm.build("web")
    sound = write_wav(tmp_path / "sound.wav", chirp())
    pictures = ROOT / "build" / "web-pictures"
    done = subprocess.run(
        ["node", str(PAGE / "check.mjs"), str(ROOT / "build" / "web"), str(sound), str(pictures)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["errors"] == []
    assert said["overflow"] <= 0
    for digit, lines in said["digits"].items():
        assert lines[0][0] == digit
    session = Session(ROOT / "zoo" / "dscnn_speech_commands.lutra")
    front = AudioPreprocess.from_metadata(session.graph.metadata)
    assert front is not None
    scores = session(front.apply(read_wav(sound)[0][None]))[0]
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    for label, share in answers(said["words"]).items():
        index = session.graph.metadata["classes"].index(label)
        assert abs(share - 100 * shares[index]) < 2
    assert said["microphone"] == "Stop"
    for name in ("wide", "narrow"):
        assert (pictures / f"{name}.png").stat().st_size > 10_000
