from __future__ import annotations

import pytest

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.trail import Level


def test_epsilon_is_rounded_up_and_never_down():
    assert words.epsilon_text(6.2041) == "6.21"
    assert words.epsilon_text(6.2) == "6.20"
    assert words.epsilon_text(8.0000000000001) == "8.00"
    assert words.epsilon_text(8.0001) == "8.01"
    assert words.epsilon_text(1e-7, 4) == "0.0001"


@pytest.mark.parametrize("value", ["Infinity", "NaN", float("inf")])
def test_an_epsilon_that_is_no_number_reads_infinite(value):
    assert words.epsilon_text(value) == "∞"


def test_an_accountant_that_gave_a_reason_is_quoted_and_not_turned_into_a_figure():
    said = words.accountants_text(
        {"pld": 6.2041, "pld_grid": 1e-4, "prv": "not computed: too large", "rdp": "Infinity"}
    )
    assert said == "PLD 6.2041 (grid 10⁻⁴), PRV not computed: too large, RDP ∞"


def test_every_level_of_a_verdict_has_words_and_no_other():
    assert set(words.LEVELS) == {level.name for level in Level}
    assert [name for name in words.LEVELS if not words.LEVELS[name].trusted] == ["INVALID", "DIVERGED"]
    with pytest.raises(ReportError, match="FINE"):
        words.level_words("FINE")


def test_no_words_of_ours_call_anything_compliant():
    assert not any("complian" in text for level in words.LEVELS.values() for text in (level.shows, level.not_shown))


def test_characters_that_hide_or_turn_text_are_made_visible():
    assert words.visible("a\u202eb\x1b[0m\u200dc\n") == "a[U+202E]b[U+001B][0m[U+200D]c\n"
    assert words.visible("naïve 数据 ε") == "naïve 数据 ε"


def test_sizes_times_and_powers_read_as_people_write_them():
    assert words.delta_text(1e-5) == "10⁻⁵"
    assert words.delta_text(0.0) == "0"
    assert words.number_text(2.5e-5) == "2.5×10⁻⁵"
    assert words.size_text(5_012_345) == "5.0 MB"
    assert words.duration_text(3_725_000_000) == "1\u00a0h 2\u00a0min"
    assert words.hardware_text({"cores": 2, "memory_bytes": 25_276_502_016, "gpus": []}) == (
        "cores: 2; gpus: none; memory: 25.3 GB"
    )
