"""The simulated set is what its description says, byte for byte, and says that it is simulated."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import combinations

from rlhf_audit_nb.demo import SIMULATED, SIMULATED_FILE, load_preferences, public_texts
from rlhf_audit_nb.demo.simulate import PROFILES, render, rows

DESCRIPTION = SIMULATED_FILE.with_name("SIMULATED.md").read_text(encoding="utf-8")


def test_the_shipped_file_is_made_again_byte_for_byte():
    assert SIMULATED_FILE.read_bytes() == render()


def test_the_description_states_the_numbers_of_the_file():
    votes = load_preferences(SIMULATED).to_list()
    per_annotator = Counter(v["annotator_id"] for v in votes)
    pairs = defaultdict(list)
    for vote in votes:
        low, high = sorted((vote["chosen"], vote["rejected"]))
        pairs[vote["prompt"], low, high].append(vote["chosen"] == low)
    agree = [a == b for sides in pairs.values() for a, b in combinations(sides, 2)]
    assert (len(votes), len(per_annotator), len(pairs)) == (472, 48, 161)
    assert (min(per_annotator.values()), max(per_annotator.values())) == (4, 16)
    assert f"{len(votes)} votes of {len(per_annotator)} simulated annotators" in DESCRIPTION
    assert f"agree in {100 * sum(agree) / len(agree):.0f} % of the cases" in DESCRIPTION.replace("\n", " ")
    assert "No person voted here" in DESCRIPTION


def test_the_description_lists_each_profile_with_its_weights():
    table = {line.split("|")[1].strip(): line for line in DESCRIPTION.splitlines() if line.startswith("| ")}
    for profile in PROFILES:
        numbers = re.findall(r"−?\d+\.?\d*", table[profile.name])
        weights = [float(n.replace("−", "-")) for n in numbers[:5]]
        assert weights == [profile.annotators, profile.right, profile.careful, profile.long, profile.warm]
    assert sum(p.annotators for p in PROFILES) == 48


def test_every_annotator_says_that_she_is_simulated_and_every_choice_is_real():
    for row in rows():
        assert row["annotator_id"].startswith("simulated-")
        assert row["chosen"] != row["rejected"]


def test_answers_are_made_of_the_public_texts_alone():
    parts = sorted(public_texts(), key=len, reverse=True)
    for row in rows():
        rest = row["chosen"]
        for part in parts:
            rest = rest.replace(part, "")
        assert rest.strip() == ""
