"""The verdicts of the conformance suite, on outcomes made up here; `make conformance` runs the suite itself."""

import pytest
from conformance import judge

TEST = "tests/test_a.py::test_b[c-LoraConfig]"
LORA = {"test": TEST, "outcome": "passed", "lora": True, "adapters": 2, "gates": 0, "errors": []}
PASSED = LORA | {"gates": 2}
FAILED = PASSED | {"outcome": "failed", "error": "AssertionError: no", "where": 7, "refused": ""}
REFUSED = FAILED | {"refused": "A SpikeLoRA adapter cannot be merged.", "lora": False, "errors": ["A SpikeLoRA ..."]}


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    monkeypatch.setattr(judge, "REFUSALS", {"merging": "cannot be merged"})
    monkeypatch.setattr(judge, "EXCLUSIONS", {})


@pytest.mark.parametrize(
    ("spike", "verdict"),
    [
        (PASSED, "passed"),
        (REFUSED, "refused"),
        (REFUSED | {"refused": "Another reason."}, "failed"),
        (FAILED, "failed"),
        (FAILED | {"outcome": "skipped"}, "failed"),
        (PASSED | {"gates": 1}, "failed"),
        (PASSED | {"gates": 0, "adapters": 0}, "failed"),
        (None, "failed"),
    ],
    ids=["passes", "refused", "other refusal", "fails", "skips", "adapter without gate", "no adapter", "not run"],
)
def test_a_test_that_passes_for_lora_has_a_verdict(spike, verdict):
    verdicts = judge.judge([LORA], [spike] if spike else [])
    assert dict(verdicts.total) == {verdict: 1}
    assert bool(verdicts.failures) == (verdict == "failed")


@pytest.mark.parametrize("lora", [LORA | {"outcome": "failed"}, LORA | {"lora": False}])
def test_what_fails_for_lora_or_has_none_is_no_case(lora):
    assert not judge.judge([lora], [FAILED]).total


def test_lora_that_peft_makes_itself_has_no_counterpart():
    verdicts = judge.judge([LORA], [PASSED | {"gates": 0, "lora": False}])
    assert not verdicts.total
    assert verdicts.without_counterpart == [TEST]


@pytest.mark.parametrize(
    ("pattern", "spike", "verdict", "needed"),
    [
        ("test_a.py::test_b[*-LoraConfig]", FAILED, "excluded", True),
        ("test_a.py::*", REFUSED, "refused", False),
        ("test_a.py::*", PASSED, "failed", False),
        ("test_a.py::test_c*", FAILED, "failed", False),
    ],
)
def test_an_exclusion_holds_for_failing_tests_that_it_names(monkeypatch, pattern, spike, verdict, needed):
    monkeypatch.setattr(judge, "EXCLUSIONS", {pattern: "a reason"})
    verdicts = judge.judge([LORA], [spike])
    assert dict(verdicts.total) == {verdict: 1}
    assert any(pattern in problem for problem in judge.stale(verdicts)) == (not needed)
