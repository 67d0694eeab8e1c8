"""Kernels of GPUs that are not here: what torch's compiler writes, what their machine code is made of, what follows."""

import pytest
import torch

from benchmarks import records
from benchmarks.ahead import flex, sass, table, work
from benchmarks.gpu import kernels, predicted, runner
from benchmarks.gpu.work import Work
from dpop_kernels import aot

LISTING = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/              @P1  LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R6.64] ;
        /*0040*/                   STL.64 [R1], R4 ;
        /*0050*/            @!UPT  UIADD3 URZ, URZ, URZ, URZ ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/          BRA.U !UP0, `(.L_x_1) ;
.L_x_0:
        /*0090*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*00a0*/               @P0 EXIT ;
        /*00b0*/                   STG.E [R2.64], R8 ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
        /*00e0*/                   NOP;
.L_x_4:
"""


def test_a_listing_is_read():
    """One loop within another; behind the last exit stands what fills the code up."""
    code = sass.parse(LISTING)
    (loop,) = code.loops
    assert loop == ("LDGSTS.E.BYPASS.LTC128B.128", "STL.64", "UIADD3", "BRA")
    assert (loop.number(*sass.LOADS), loop.number(*sass.LOADS, bits=128), loop.number(*sass.LOCAL)) == (1, 1, 1)
    assert code.straight == ("LDC", "BRA", "LDG.E.U16", "EXIT", "STG.E", "EXIT")
    assert (code.straight.number("LDG"), code.straight.number("LDG", bits=128)) == (1, 0)
    assert code.products == {"wgmma"}
    assert len(code.whole) == 13


def test_no_element_is_counted_twice_and_none_is_forgotten():
    """A tile's launch by hand: fp32 in, bf16 out, an id, a maximum, a sum and the target's logit for each row."""
    launches = aot.all_launches()
    elements, num_bytes = work.elements_and_bytes(launches["tile -> bf16"])
    assert (elements, num_bytes) == (1024 * 8192, 1024 * (8192 * (4 + 2) + 8 + 3 * 4))
    # fp32 products and a row of W in, bf16 gradients out; m, S, z_y, the id; log-prob, log-normaliser, 1 - p
    elements, num_bytes = work.elements_and_bytes(launches["rows, bf16"])
    assert (elements, num_bytes) == (1024 * 4096, 1024 * (4096 * (4 + 2 + 2) + 3 * 4 + 8 + 4 + 8 + 4))
    assert work.elements_and_bytes(launches["segment sum, int32 bounds"]) is None
    # a loop of 250 instructions for 16 elements of each of 256 threads
    assert work.instructions_per_element(launches["bf16"], sass.Part(["FADD"] * 250)) == 250 / 16


def test_every_kernel_has_its_step():
    assert set(work.STEPS) == {launch.kernel.__name__ for launch in aot.all_launches().values()}


def test_predictions_by_hand():
    seconds = work.predicted_seconds(3.2e6, 4.3e6, per_element=10.0)
    assert seconds["bytes"] == pytest.approx(1e-6)
    # a million instructions of a warp on 528 schedulers at 989e12 / (132 * 4096) Hz
    assert seconds["instructions"] == pytest.approx(1e6 / 528 / 1.82920e9, rel=1e-5)

    def loops(*lengths):
        return [sass.Part(["FADD"] * length) for length in lengths]

    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64}
    common = {"tiles": sizes, "num_warps": 8, "num_heads": 32, "head_size": 64, "scores": (5 * 128**2, 3 * 128**2)}
    forward = work.attention_seconds(loops(900, 400), direction="forward", **common)
    assert forward["products"] == pytest.approx(2 * 2 * 8 * 128**2 * 32 * 64 / predicted.PRODUCTS)
    # two tiles of 128 x 64 in a block of 128 x 128
    assert forward["instructions"] == pytest.approx(8 * 32 * 2 * (5 * 900 + 3 * 400) / work.ISSUE)
    backward = work.attention_seconds(loops(900, 400, 500, 1000), direction="backward", **common)
    assert backward["products"] == pytest.approx(3.5 * forward["products"])
    assert backward["instructions"] == pytest.approx(8 * 32 * 2 * (5 * 1900 + 3 * 900) / work.ISSUE)
    assert set(work.attention_seconds(loops(900), direction="forward", **common)) == {"products"}


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="torch's private side, tried with 2.13 alone")
def test_torchs_compiler_writes_flat_attention_for_a_gpu_that_is_not_here():
    """As from the second length on: kernels for any, which cannot know by themselves that rows fill their blocks."""
    heads = flex.Heads(queries=4, keys=2, size=16)
    with torch._dynamo.config.patch(assume_static_by_default=False):
        found = flex.written("sm_90", heads, [torch.full((1, 256), 256)])
    assert {direction for direction, _ in found} == {"forward", "backward"}
    for template in found.values():
        assert template.constants["IS_DIVISIBLE"]
        assert template.constants["GQA_SHARED_HEADS"] == heads.queries // heads.keys
        assert (template.source.signature["arg_Q"], template.source.signature["ks0"]) == ("*bf16", "i32")
    assert not torch.cuda.is_available()


def test_blocks_of_a_mask_by_hand():
    """Two blocks of a plain causal row: both on the diagonal are seen in part, one as a whole, one not at all."""
    assert flex.computed_blocks(torch.full((1, 256), 256)) == (2, 1)


def test_the_records_agree_with_the_launch_constants():
    """By hand, for each thread: bytes of its share of a row over 16."""
    latest = table._latest()
    wide = {"bf16": 4096 * 2 / 256 / 16, "fp32": 4096 * 4 / 256 / 16, "bf16 -> bf16": 4096 * 2 / 256 / 16}
    wide |= {"tile": 8192 * 4 / 256 / 16, "rows, bf16": 1024 * (4 + 2) / 128 / 16}
    for target in table.CARDS:
        for name, loads in wide.items():
            hot = latest[name, target]["hot"]
            assert (name, target, hot["wide_loads"], hot["local"]) == (name, target, loads, 0)
    instructions = {"sm_80": "mma", "sm_90": "wgmma"}
    for (name, target), record in latest.items():
        assert "lengths" in record or record["spill_bytes"] == 0, (name, target)
        if "lengths" in record and target in instructions:
            assert record["products"] == [instructions[target]], name
            assert len(record["loops"]) == {"forward": 2, "backward": 4}[record["direction"]], name


def test_each_kernel_is_measured_beside_its_prediction(tmp_path):
    job = Work(tmp_path, "kernels", seconds=600.0, rehearse=True)
    kernels.run(job, "each")
    assert job.code == runner.COMPLETE
    found = {record["item"]: record for record in records.read(job.path)}
    of_attention = [f"{kernels.ATTENTION}, {direction}, any length" for direction in ("forward", "backward")]
    assert list(found) == [*kernels.REHEARSED, *of_attention]
    for record in found.values():
        assert record["median_s"] > 0
        assert record["predicted"]["seconds"] > 0
