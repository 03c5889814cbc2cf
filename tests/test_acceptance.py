"""`make acceptance` in its short form: every check runs, with the built-in voice and the tiny checkpoint of CSM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import acceptance
import pytest
from acceptance import FAIL, NOT_HERE, PASS, Options, Results, Row
from conftest import PROJECT, clean_environment

TIMED = {"start", "sentence", "conversion", "long", "cancellation"}  # a busy machine may miss these goals


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("acceptance")


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = clean_environment(folder / "cache") | {"HOME": str(folder)}
    command = [sys.executable, "benchmarks/acceptance.py", "--short", "--quiet", "--folder", str(folder)]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=280, check=False)


def rows_of(folder: Path) -> dict[str, list[Row]]:
    kept = json.loads((folder / "results.json").read_text())["rows"]
    return {check: [Row(**row) for row in rows] for check, rows in kept.items()}


def test_every_check_runs_and_passes(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    rows = rows_of(folder)
    assert list(rows) == list(acceptance.CHECKS), finished.stderr
    assert [row for check in rows for row in rows[check] if "no error" in row.goal] == []
    assert [row for check in rows.keys() - TIMED for row in rows[check] if row.verdict == FAIL] == []
    assert [row.measured.count(",") for row in rows["errors"]] == [7], "all eight errors of the requirements' table"
    built_in = [row for check in rows for row in rows[check] if row.check.endswith(", heart")]
    assert len(built_in) >= 7
    assert all(row.verdict in (PASS, FAIL) for row in built_in)


def test_random_weights_are_never_reported_as_csm(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    csm = [row for rows in rows_of(folder).values() for row in rows if "random weights" in row.check]
    assert {row.check.split(",")[0] for row in csm} >= {"start to ready", "same seed twice", "voice_match compared"}
    assert {row.verdict for row in csm} == {NOT_HERE}
    assert [row.check for row in csm if "voice_match" in row.check and "first audio" in row.measured]
    assert {path.stem for path in folder.glob("*-01.wav")} == {"heart-01", "conversational-01", "conversational-other-layout-01"}


def test_the_report_is_a_markdown_table(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    report = (folder / "report.md").read_text()
    assert report.strip() in finished.stdout
    assert re.search(r"^\| packages \| mlx \d", report, re.MULTILINE)
    lines = [line for line in report.splitlines() if line.startswith("|")]
    assert {len(line.split(" | ")) for line in lines[7:]} <= {1, 4}
    assert (finished.returncode == 1) == (f"| {FAIL} |" in report) == ("## What to look at" in report)


def test_the_next_run_repeats_only_what_has_not_passed(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    options = Options(folder, short=True, quiet=True, kill=True, tiny=True)
    kept = Results(options, again=False)
    assert kept.passed("formats")
    assert not kept.passed("recovery"), "NOT HERE is tried again"
    assert kept.heard["heart"]["words_per_second"] > 1
    assert not Results(options, again=True).passed("formats")
    assert not Results(Options(folder, short=False, quiet=True, kill=True, tiny=True), again=False).passed("formats")


def test_a_failure_says_what_to_look_at(tmp_path: Path) -> None:
    results = Results(Options(tmp_path, short=True, quiet=True, kill=False, tiny=True), again=True)
    for check in acceptance.CHECKS:
        results.rows[check] = [Row(check, "", "", FAIL)]
    advice = acceptance.report(results).split("## What to look at")[1]
    assert [line.split(":")[0] for line in advice.strip().splitlines()] == [f"- {check}" for check in acceptance.CHECKS]


def test_the_layout_with_fewer_wrong_words_is_recommended() -> None:
    good = {"error_rate": 0.02, "retries": 1.0}
    assert acceptance._better({"error_rate": 0.06, "retries": 0.0}, good)
    assert not acceptance._better(good, {"error_rate": 0.06, "retries": 0.0})
    assert acceptance._better({"error_rate": 0.025, "retries": 4.0}, good)
    assert not acceptance._better(good, good)
