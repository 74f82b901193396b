"""Everything of a release but publishing it.

    python wheels/release.py 0.2.0

Writes the version into pyproject.toml and CHANGELOG.md, builds the source archive and from it, in
an empty environment, a wheel, then the wheels of all platforms; checks all of them and runs those
that this machine can run. Where a step fails both files are as before. Nothing is committed,
tagged or uploaded: the last lines say how.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = Path(__file__).resolve().parent
MODEL = ROOT / "zoo" / "dscnn_speech_commands.lutra"
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)((?:a|b|rc)\d+)?")


def parsed(text: str) -> tuple[int, int, int, str]:
    """A version, so that tuples are ordered as versions are; an error in one sentence else."""
    match = VERSION.fullmatch(text)
    if not match:
        raise SystemExit(f"release: {text!r} is not a version like 1.2.3 or 1.2.3rc1")
    # a final release is above its candidates
    return int(match[1]), int(match[2]), int(match[3]), match[4] or "~"


def with_version(project: str, version: str) -> str:
    """pyproject.toml with another version."""
    match = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    if not match:
        raise SystemExit("release: pyproject.toml has no line: version = ...")
    if parsed(match[1]) > parsed(version):
        raise SystemExit(f"release: version {version} is below {match[1]} of pyproject.toml")
    return f'{project[: match.start()]}version = "{version}"{project[match.end() :]}'


def with_release(changes: str, version: str) -> str:
    """CHANGELOG.md with what was unreleased under the version, and nothing unreleased."""
    if re.search(rf"^## {re.escape(version)}$", changes, re.MULTILINE):
        raise SystemExit(f"release: CHANGELOG.md has version {version} already")
    match = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", changes, re.MULTILINE | re.DOTALL)
    if not match or not re.search(r"^\* \S", match[1], re.MULTILINE):
        raise SystemExit("release: CHANGELOG.md has no changes under '## Unreleased'")
    head = f"## Unreleased\n\n## {version}\n"
    return changes[: match.start()] + head + match[1] + changes[match.end() :]


def run(*command: str | Path) -> None:
    print("==", " ".join(map(str, command)), flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT)


def build(dist: Path) -> None:
    """Builds, checks and runs everything in an empty folder."""
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", dist)  # the wheel is built from the archive
    (local,) = dist.glob("*.whl")
    run(sys.executable, ROOT / "tests" / "wheel_smoke.py", local, MODEL)
    local.unlink()  # it is for this machine only
    run(sys.executable, WHEELS / "build_wheels.py", "--output", dist)
    wheels = sorted(dist.glob("*.whl"))
    run(sys.executable, WHEELS / "check_wheels.py", *wheels)
    builds = sorted((ROOT / "build" / "wheels").glob("*/cmake"))
    run(sys.executable, WHEELS / "instructions.py", *builds)
    run(sys.executable, WHEELS / "run_wheels.py", *wheels)


def release(version: str) -> None:
    """A release, up to its publication."""
    parsed(version)
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    if status.stdout.strip():
        raise SystemExit("release: there are changes that are not committed; commit them first")
    files = ROOT / "pyproject.toml", ROOT / "CHANGELOG.md"
    before = [path.read_text() for path in files]
    after = [with_version(before[0], version), with_release(before[1], version)]
    for path, text in zip(files, after, strict=True):
        path.write_text(text)
    try:
        build(ROOT / "dist")
    except BaseException:
        for path, text in zip(files, before, strict=True):
            path.write_text(text)
        raise
    print(f"dist has release {version}. To publish it:")
    print(f'  git commit -am "Release {version}" && git tag v{version} && git push --tags')
    print("  python -m twine upload dist/*")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python wheels/release.py VERSION")
    try:
        release(sys.argv[1])
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"release: a step failed ({error}); the files are as before") from None
