"""Many proofs at once are the proofs that the store gives one by one."""

from __future__ import annotations

import random

import pytest

from rlhf_audit_nb.records import proofs
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.merkle import check_inclusion, leaf_hash


@pytest.fixture(scope="module", params=[1, 2, 7, 8, 300])
def reader(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trail")
    with Trail.open(folder / "audit", home=folder / "home") as trail:
        for _ in range(request.param - 1):
            trail.append("card.created", b"{}")
        yield trail.reader()


@pytest.mark.parametrize("gap", [0, 5, 1024])
def test_they_are_the_stores_own_proofs(reader, monkeypatch, gap):
    monkeypatch.setattr(proofs, "GAP", gap)
    chance, root = random.Random(reader.size), reader.root()
    leaves = [leaf_hash(entry.data) for entry in reader.entries()]
    choices = [list(range(reader.size)), [0], [reader.size - 1]]
    choices += [sorted(chance.sample(range(reader.size), chance.randint(1, reader.size))) for _ in range(2)]
    for indices in choices:
        found = proofs.prove_all(reader, indices)
        assert found[0] == tuple(reader.inclusion_proof(indices[0]))
        assert found[-1] == tuple(reader.inclusion_proof(indices[-1]))
        for index, proof in zip(indices, found, strict=True):
            assert check_inclusion(leaves[index], index, reader.size, proof, root)


def test_no_entries_need_no_proofs(reader):
    assert proofs.prove_all(reader, []) == []
