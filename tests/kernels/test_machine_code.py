"""What `machine_code` reads out of a disassembly; the compiler itself is not there where the tests run."""

from tests.kernels import machine_code

# Two nested loops; the inner one waits in a block that stands behind the end of the program.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   MUFU.EX2 R2, R3 ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/               @P2 STL [R1], R7 ;
        /*0070*/               @P3 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5 ;
        /*00a0*/              @!P0 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_2) ;
"""


def test_loops_hold_the_blocks_that_lead_back():
  everything, (outer, inner, waiting) = machine_code.loops(SASS)
  assert [len(x) for x in (everything, outer, inner, waiting)] == [12, 10, 7, 2]
  assert machine_code.count(outer) == "   10 instructions, 1 HGMMA, 1 STL, 1 MUFU"
  assert machine_code.count(inner) == "    7 instructions, 1 HGMMA"


def test_all_words_select_a_case():
  assert machine_code.select("grad-d64", ["grad-d64-full", "fwd-d64-full", "grad-b1-d64"]) == [
    "grad-d64-full",
    "grad-b1-d64",
  ]
  assert {"cache-write", "paged-short", "grad-d64-bfloat16-full"} <= set(machine_code.all_cases())
