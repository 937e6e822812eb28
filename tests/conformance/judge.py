"""Compares the outcomes of the tests with SpikeLoRA with their outcomes with LoRA."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .rules import EXCLUSIONS, REFUSALS

Outcome = dict[str, Any]  # a line of the plugin's
VERDICTS = ("passed", "refused", "excluded", "failed")


@dataclass
class Verdicts:
    """What became of the tests that pass for LoRA: the verdicts by file, and the reasons."""

    by_file: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    refusals: Counter[str] = field(default_factory=Counter)
    exclusions: Counter[str] = field(default_factory=Counter)  # by pattern
    failures: dict[str, str] = field(default_factory=dict)  # by test, why
    without_counterpart: list[str] = field(default_factory=list)  # not counted, see `_has_counterpart`
    gates: int = 0  # made in tests that passed

    @property
    def total(self) -> Counter[str]:
        return sum(self.by_file.values(), Counter())


def is_case(lora: Outcome) -> bool:
    """Whether a test, as it went with LoRA, is one that SpikeLoRA has to answer for."""
    return lora["lora"] and lora["outcome"] == "passed"


def judge(with_lora: Iterable[Outcome], with_spikelora: Iterable[Outcome]) -> Verdicts:
    """The verdict on each test that used a `LoraConfig` and passed with LoRA."""
    ended = {outcome["test"]: outcome for outcome in with_spikelora}
    verdicts = Verdicts()
    for lora in filter(is_case, with_lora):
        test = lora["test"]
        if not _has_counterpart(ended.get(test)):
            verdicts.without_counterpart.append(test)
            continue
        verdict, why = _verdict(lora, ended.get(test))
        patterns = [pattern for pattern in EXCLUSIONS if _matches(test, pattern)]
        if patterns and verdict == "failed":
            verdict = "excluded"
            verdicts.exclusions[patterns[0]] += 1
        elif patterns and verdict == "passed":
            verdict, why = "failed", f"it passes, but is excluded by {patterns[0]!r}"
        if verdict == "refused":
            verdicts.refusals[why] += 1
        elif verdict == "failed":
            verdicts.failures[test] = why
        elif verdict == "passed":
            verdicts.gates += ended[test]["gates"]
        verdicts.by_file[test.partition("::")[0]][verdict] += 1
    return verdicts


def stale(verdicts: Verdicts) -> list[str]:
    """The rules that no test needs, where all tests were run."""
    return [
        *(f"no test is refused for: {reason}" for reason in REFUSALS if reason not in verdicts.refusals),
        *(f"no test needs the exclusion {pattern!r}" for pattern in EXCLUSIONS if pattern not in verdicts.exclusions),
    ]


def _has_counterpart(spike: Outcome | None) -> bool:
    """Whether a test asks for SpikeLoRA at all; some have PEFT turn another method's adapter into plain LoRA."""
    return spike is None or spike["lora"] or bool(spike["errors"])


def _verdict(lora: Outcome, spike: Outcome | None) -> tuple[str, str]:
    if spike is None:
        return "failed", "it was not run"
    if spike["outcome"] == "passed":
        # As many gates as adapters: an adapter without one would be plain LoRA.
        if spike["gates"] < spike["adapters"]:
            return "failed", f"{spike['adapters']} adapters had {spike['gates']} gates"
        if lora["adapters"] and not spike["gates"]:
            return "failed", "LoRA had adapters, and SpikeLoRA none"
        return "passed", ""
    reasons = [reason for reason, message in REFUSALS.items() if re.search(message, spike["refused"], re.DOTALL)]
    if reasons and spike["outcome"] == "failed":
        return "refused", reasons[0]
    return "failed", f"{spike['outcome']}, line {spike['where']}: {spike['error']}"


def _matches(test: str, pattern: str) -> bool:
    # Brackets are parameters here, not sets of characters.
    return fnmatchcase(test.removeprefix("tests/"), pattern.replace("[", "[[]"))
