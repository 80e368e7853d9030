"""The tree against golden roots, all small trees, and an implementation of someone else's."""

from __future__ import annotations

import metamorphic_log
import pytest

from rlhf_audit_nb.trail.merkle import (
    EMPTY_ROOT,
    Frontier,
    LeafHashes,
    check_consistency,
    check_inclusion,
    leaf_hash,
    node_hash,
    prove_consistency,
    prove_inclusion,
    tree_root,
)

SMALL = 66
LEAVES = [leaf_hash(b"entry-%d" % number) for number in range(SMALL)]
READER = LeafHashes(LEAVES)
ROOTS = [tree_root(size, READER) for size in range(SMALL + 1)]


def flipped(node: bytes) -> bytes:
    return bytes([node[0] ^ 1]) + node[1:]


def test_the_roots_of_the_certificate_transparency_tree_are_golden(vectors):
    golden = vectors("merkle")
    leaves = [leaf_hash(bytes.fromhex(text)) for text in golden["ct"]["leaves"]]
    assert EMPTY_ROOT.hex() == golden["empty_root"] == Frontier().root().hex()
    for size, root in golden["ct"]["roots"].items():
        frontier = Frontier()
        frontier.extend(leaves[: int(size)])
        assert frontier.root().hex() == root
        assert tree_root(int(size), LeafHashes(leaves)).hex() == root


def test_the_roots_of_long_trees_are_golden(vectors):
    for size, root in vectors("merkle")["numbered"].items():
        frontier = Frontier()
        frontier.extend(leaf_hash(b"entry-%d" % number) for number in range(int(size)))
        assert frontier.root().hex() == root


def test_a_frontier_agrees_with_the_recursion_at_every_size_and_can_be_put_down_and_taken_up():
    frontier = Frontier()
    for size in range(SMALL + 1):
        assert frontier.root() == ROOTS[size]
        assert Frontier(frontier.size, frontier.nodes).root() == ROOTS[size]
        if size < SMALL:
            frontier.extend([LEAVES[size]])


def test_a_frontier_hands_out_each_complete_subtree_of_height_eight_once():
    leaves = [leaf_hash(b"%d" % number) for number in range(256 * 3 + 5)]
    frontier, found = Frontier(), []
    for start in range(0, len(leaves), 100):
        found += frontier.extend(leaves[start : start + 100])
    reader = LeafHashes(leaves)
    assert found == [(1, number, reader.node(8, number)) for number in range(3)]


def test_a_frontier_of_the_wrong_number_of_hashes_is_refused():
    with pytest.raises(ValueError, match="do not make a frontier"):
        Frontier(3, [LEAVES[0]])


def test_every_inclusion_proof_of_every_small_tree_holds_and_each_of_its_hashes_matters():
    for size in range(1, SMALL + 1):
        for index in range(size):
            proof = prove_inclusion(index, size, READER)
            leaf, root = LEAVES[index], ROOTS[size]
            assert check_inclusion(leaf, index, size, proof, root)
            assert not check_inclusion(flipped(leaf), index, size, proof, root)
            assert not check_inclusion(leaf, index, size, proof, flipped(root))
            assert not check_inclusion(leaf, index, size, [*proof, root], root)
            for at, node in enumerate(proof):
                assert not check_inclusion(leaf, index, size, [*proof[:at], flipped(node), *proof[at + 1 :]], root)
                assert not check_inclusion(leaf, index, size, [*proof[:at], *proof[at + 1 :]], root)


def test_an_inclusion_proof_holds_at_no_other_place():
    for size in range(1, 20):
        for index in range(size):
            proof = prove_inclusion(index, size, READER)
            for other in range(-1, size + 2):
                assert check_inclusion(LEAVES[index], other, size, proof, ROOTS[size]) == (other == index)


def test_every_consistency_proof_of_every_pair_of_small_trees_holds_and_each_of_its_hashes_matters():
    for second in range(SMALL + 1):
        for first in range(second + 1):
            proof = prove_consistency(first, second, READER)
            old, new = ROOTS[first], ROOTS[second]
            assert check_consistency(first, second, proof, old, new)
            assert not check_consistency(first, second, proof, flipped(old), new)
            if first:
                assert not check_consistency(first, second, proof, old, flipped(new))
            assert not check_consistency(first, second, [*proof, new], old, new)
            for at, node in enumerate(proof):
                assert not check_consistency(first, second, [*proof[:at], flipped(node), *proof[at + 1 :]], old, new)
                assert not check_consistency(first, second, [*proof[:at], *proof[at + 1 :]], old, new)


def test_the_edges_of_consistency_are_strict():
    assert check_consistency(0, 5, [], EMPTY_ROOT, ROOTS[5])
    assert not check_consistency(0, 5, [], ROOTS[1], ROOTS[5])
    assert not check_consistency(0, 5, [ROOTS[5]], EMPTY_ROOT, ROOTS[5])
    assert not check_consistency(5, 5, [ROOTS[5]], ROOTS[5], ROOTS[5])
    assert not check_consistency(5, 5, [], ROOTS[5], ROOTS[4])
    assert not check_consistency(6, 5, [], ROOTS[5], ROOTS[5])
    assert not check_consistency(4, 5, [], ROOTS[4], ROOTS[5])
    assert not check_consistency(-1, 5, [], EMPTY_ROOT, ROOTS[5])


def test_hashes_that_are_not_32_bytes_are_refused():
    proof = prove_inclusion(3, 7, READER)
    assert not check_inclusion(LEAVES[3][:31], 3, 7, proof, ROOTS[7])
    assert not check_inclusion(LEAVES[3], 3, 7, [*proof[:-1], proof[-1] + b"\0"], ROOTS[7])


def test_a_leaf_is_never_taken_for_a_node():
    pair = LEAVES[0] + LEAVES[1]
    assert leaf_hash(pair) != node_hash(LEAVES[0], LEAVES[1])


def test_proofs_that_cannot_be_are_refused():
    for index, size in ((0, 0), (5, 5), (-1, 5)):
        with pytest.raises(ValueError, match="is not in a tree"):
            prove_inclusion(index, size, READER)
    with pytest.raises(ValueError, match="not a prefix"):
        prove_consistency(6, 5, READER)


def test_another_implementation_accepts_our_proofs_and_refuses_them_changed():
    for size in (1, 2, 3, 5, 8, 33, SMALL):
        for index in {0, size // 2, size - 1}:
            proof = prove_inclusion(index, size, READER)
            metamorphic_log.verify_inclusion(index, size, LEAVES[index], proof, ROOTS[size])
            with pytest.raises(metamorphic_log.VerifyError):
                metamorphic_log.verify_inclusion(index, size, flipped(LEAVES[index]), proof, ROOTS[size])
        for first in {1, size // 2 or 1, size}:
            proof = prove_consistency(first, size, READER)
            metamorphic_log.verify_consistency(first, size, proof, ROOTS[first], ROOTS[size])
            with pytest.raises(metamorphic_log.VerifyError):
                metamorphic_log.verify_consistency(first, size, proof, flipped(ROOTS[first]), ROOTS[size])
