"""Problems of one kind are counted, and the first of them are listed."""

from sdxl_finetune.errors import SHOWN, Problem, Tally


def test_a_tally_lists_the_first_of_each_kind() -> None:
    tally = Tally(Problem(f"{side}x{side} is too narrow", file=f"{side}.png") for side in range(1_000))
    tally.add(Problem("not readable (Permission denied)", file="a.png"))
    tally.add(Problem("the caption is not UTF-8 (byte 7)", file="a.txt"), 30)
    listed = [str(problem) for problem in tally.problems()]
    assert len(tally) == 1_031
    assert listed[:2] == ["0.png: 0x0 is too narrow", "1.png: 1x1 is too narrow"]
    assert listed[SHOWN : SHOWN + 2] == [
        "and 980 more of this kind: 19x19 is too narrow",
        "a.png: not readable (Permission denied)",
    ]
    assert listed[SHOWN + 2 :] == [
        "a.txt: the caption is not UTF-8 (byte 7)",
        "and 29 more of this kind: the caption is not UTF-8 (byte 7)",
    ]
    assert not Tally()
