"""With LUTRA_CI set, a skip that is not on the list fails, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import ci_skips
import pytest

import lutra

pytest_plugins = ["pytester"]

ONE = "import pytest\n"
PLUGINS = [f"-p{name}" for name in ("ci_skips", "no:xdist", "no:hypothesispytest", "no:anyio")]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs a test file with LUTRA_CI of this value."""

    def run(text: str, value: str | None = "1") -> pytest.RunResult:
        if value is None:
            monkeypatch.delenv(ci_skips.ENVIRONMENT, raising=False)
        else:
            monkeypatch.setenv(ci_skips.ENVIRONMENT, value)
        pytester.makepyfile(test_it=ONE + text)
        return pytester.runpytest_inprocess(*PLUGINS)

    return run


SKIPS = {
    "call": "def test():\n    pytest.skip('no time')",
    "mark": "@pytest.mark.skipif(True, reason='no time')\ndef test(): pass",
    "import": "def test():\n    pytest.importorskip('no_such_module', reason='no time')",
    "fixture": "@pytest.fixture\ndef f(): pytest.skip('no time')\ndef test(f): pass",
}


@pytest.mark.parametrize("text", SKIPS.values(), ids=SKIPS)
def test_a_skip_fails_in_ci_only(run, text: str) -> None:
    failed = run(text)
    outcomes = failed.parseoutcomes()
    assert not {"skipped", "passed"} & set(outcomes), outcomes
    assert failed.ret == pytest.ExitCode.TESTS_FAILED
    failed.stdout.fnmatch_lines(["*test_it.py::test is skipped (no time), but LUTRA_CI=1*"])
    run(text, None).assert_outcomes(skipped=1)


def test_a_file_that_is_skipped_fails(run) -> None:
    text = "pytest.importorskip('no_such_module')\ndef test(): pass"
    failed = run(text)
    failed.assert_outcomes(errors=1)
    failed.stdout.fnmatch_lines(["*could not import 'no_such_module'*LUTRA_CI=1*"])
    run(text, None).assert_outcomes(skipped=1)


def test_failures_and_passes_and_expected_failures_stay(run) -> None:
    text = """
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.xfail(strict=True)
def test_is_known(): assert False
"""
    run(text).assert_outcomes(passed=1, failed=1, xfailed=1)


def test_data_may_be_absent_as_a_whole(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "needs sr/a.npy: set LUTRA_TEST_DATA to the folder that holds sr/"
    text = f"def test(): pytest.skip({reason!r})"
    monkeypatch.setattr(ci_skips, "DATA", tmp_path)
    run(text).assert_outcomes(failed=1)
    monkeypatch.setattr(ci_skips, "DATA", tmp_path / "none")
    run(text).assert_outcomes(skipped=1)
    run("def test(): pytest.skip('needs time')").assert_outcomes(failed=1)


def test_instruction_sets_that_the_machine_lacks(run, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {
        "needs two sets of kernels": 1,
        "needs AVX2": 1,
        "needs a CPU with more than AVX2": 2,
        "needs AVX-512": 2,
    }  # with the number of instruction sets from which on none of them is skipped
    text = "\n".join(f"def test_{i}(): pytest.skip({reason!r})" for i, reason in enumerate(reasons))
    isas = ("scalar", "avx2", "avx512")
    for count in range(3):
        monkeypatch.setattr(lutra, "runnable_isas", lambda count=count: isas[: count + 1])
        skipped = sum(least > count for least in reasons.values())
        run(text).assert_outcomes(skipped=skipped, failed=len(reasons) - skipped)


def test_packages_may_be_missing_where_they_are_not_installed(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
def test_peer(): pytest.skip("needs onnx: pip install 'lutra[bench]'")
def test_torch(): pytest.skip("could not import 'torch': No module named 'torch'")
def test_reader(): pytest.skip("the example's reader needs PyTorch")
def test_part(): pytest.skip("could not import 'PIL.Image': No module named 'PIL'")
"""
    monkeypatch.setattr(ci_skips, "find_spec", lambda name: None)
    run(text).assert_outcomes(skipped=1, failed=3)
    run(text, "runtime").assert_outcomes(skipped=4)
    monkeypatch.setattr(ci_skips, "find_spec", lambda name: "found")
    run(text).assert_outcomes(failed=4)
    run(text, "runtime").assert_outcomes(failed=4)


def test_other_values_are_refused(run) -> None:
    result = run("def test(): pytest.skip('no time')", "yes")
    assert result.ret != 0
    result.stderr.fnmatch_lines(["*LUTRA_CI='yes': set it to 1 or runtime*"])
