"""Machine code is read as it runs: loops, ways through them, branches."""

from __future__ import annotations

from benchmarks import sass


def test_the_loop_that_multiplies_most_counts() -> None:
    I = sass.Instruction  # noqa: E741
    code = [
        I(0, "MOV"),
        I(16, "HMMA.16816.F32"),  # the inner loop: 2048 in 2 instructions
        I(32, "BRA", 16),
        I(48, "HMMA.1688.F32"),
        I(64, "BRA", 0),
        I(80, "EXIT"),
    ]
    assert sass.products_per_issue(code) == 1024
    assert sass.products_per_issue([I(0, "HGMMA.64x64x16.F32"), I(16, "EXIT")]) == 8192
    assert sass.products_per_issue([I(0, "MOV"), I(16, "BRA", 16)]) == 0


def test_of_the_ways_through_a_loop_the_aligned_one_counts() -> None:
    I = sass.Instruction  # noqa: E741
    code = [
        I(0, "ISETP"),
        I(16, "BRA", 96),  # past the loads
        I(32, "BRA", 64),  # to the wide load
        I(48, "BRA", 80, True),  # single values, out of line
        I(64, "LDG.E.128"),
        I(80, "BAR"),
        I(96, "HMMA.16816.F32"),
        I(112, "BRA", 160),  # not this turn's products
        I(128, "HMMA.16816.F32"),
        I(144, "MOV"),
        I(160, "BRA", 0),
        I(176, "EXIT"),
    ]
    # 0, 16, 32, 64, 80, 96, 112, 128, 144 and 160
    assert sass.products_per_issue(code) == round(2 * 2048 / 10)
    code[2] = I(32, "BRA", 80, True)  # nothing leads to the wide load any more
    assert sass.products_per_issue(code) == round(2 * 2048 / 7)  # past the loads is shorter


def test_branches_are_told_apart() -> None:
    listing = """
        /*0000*/                   ISETP.NE.AND P0, PT, R1, RZ, PT ;
        /*0010*/              @!P0 BRA 0x40 ;
        /*0020*/                   BRA P1, 0x40 ;
        /*0030*/                   BRA 0x0 ;
        /*0040*/                   EXIT ;
    """
    found = sass.parse(listing, [80])[0]
    assert [(one.branch, one.always) for one in found[1:4]] == [(64, False), (64, False), (0, True)]
    assert found[4].always
