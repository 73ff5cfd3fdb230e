"""Laws of the types that travel from the probe to the wire."""

from sidelight.types import Judgement, Verdict


def test_of_two_judgements_the_newer_one_holds_for_a_probe_in_both():
    old, new = (Verdict("a", "x", ("x",), {"x": p}, flagged=False) for p in (0.2, 0.8))
    other = Verdict("b", "x", ("x",), {"x": 0.5}, flagged=False)
    assert Judgement((old, other), ("c",)) | Judgement((new,), ("d",)) == Judgement(
        (other, new), ("c", "d")
    )
    assert Judgement((old,)) | Judgement((), ("a",)) == Judgement((), ("a",))
    assert Judgement((), ("a",)) | Judgement((old,)) == Judgement((old,))
