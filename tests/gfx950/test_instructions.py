"""Instructions that are easy to get wrong, each against NumPy. What is pinned here was learnt from AITER's kernels."""

import ml_dtypes
import numpy as np
import pytest
import software_gpu

F8, FNUZ, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.bfloat16


@pytest.fixture(params=[F8, FNUZ], ids=["gfx950", "gfx942"])
def fp8(request, monkeypatch):
    """The format of a machine's fp8 numbers."""
    if request.param is FNUZ:
        monkeypatch.setenv("GFX950_ARCHITECTURE", "gfx942")
    return request.param


LANES = np.arange(64, dtype=np.uint32)


def registers(matrix, per_lane, rows):
    """[rows, k] numbers -> registers: lane l holds row l % rows, columns per_lane * (l // rows) and on."""
    lanes = np.stack([matrix[lane % rows, per_lane * (lane // rows) :][:per_lane] for lane in range(64)])
    return list(np.ascontiguousarray(lanes).view(np.uint32).T)


@pytest.mark.parametrize(("name", "m", "k", "dtype"), [
    ("v_mfma_f32_16x16x32_fp8_fp8", 16, 32, F8),
    ("v_mfma_f32_16x16x32_fp8_fp8", 16, 32, FNUZ),
    ("v_mfma_f32_16x16x128_f8f6f4", 16, 128, F8),
    ("v_mfma_f32_32x32x64_f8f6f4", 32, 64, F8),
    ("v_mfma_f32_16x16x16_bf16", 16, 16, BF16),
    ("v_mfma_f32_32x32x8_bf16", 32, 8, BF16),
    ("v_mfma_f32_32x32x16_bf16", 32, 16, BF16),
    ("v_mfma_f32_16x16x32_bf16", 16, 32, BF16),
])  # fmt: skip
def test_matrix_layout(assembler, monkeypatch, name, m, k, dtype):
    monkeypatch.setenv("GFX950_ARCHITECTURE", "gfx942" if dtype is FNUZ else "gfx950")
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, shape).astype(dtype) for shape in ((m, k), (k, m)))
    per_lane, out = m * k // 64, m * m // 64
    n = per_lane * a.itemsize // 4
    inputs = registers(a, per_lane, m) + registers(np.ascontiguousarray(b.T), per_lane, m)
    operands = f"v[{10}:{9 + n}], v[{10 + n}:{9 + 2 * n}]"
    body = f"{name} v[40:{39 + out}], {operands}, 0\n s_nop 15\n {name} v[40:{39 + out}], {operands}, v[40:{39 + out}]"
    d = assembler(body, inputs, out).view(np.float32)
    want = 2 * a.astype(np.float32) @ b.astype(np.float32)
    for r in range(out):
        for lane in range(64):
            assert d[r, lane] == want[8 * (r // 4) + 4 * (lane // m) + r % 4, lane % m]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transposing_lds_read(assembler, dtype):
    """In 16 lanes, each supplies 8 bytes of a matrix of 16 columns, row by row; lane c receives column c."""
    bits = 8 * np.dtype(dtype).itemsize
    rows = np.random.default_rng(1).integers(0, 2**bits, (4, 64 // bits, 16)).astype(dtype)  # four groups of 16 lanes
    words = rows.reshape(64, -1).view(np.uint32)
    body = f"""v_lshlrev_b32 v3, 3, v0
      ds_write_b32 v3, v10
      ds_write_b32 v3, v11 offset:4
      s_waitcnt lgkmcnt(0)
      ds_read_b64_tr_b{bits} v[40:41], v3
      s_waitcnt lgkmcnt(0)"""
    out = assembler(body, [words[:, 0], words[:, 1]], 2)
    received = np.ascontiguousarray(out.T).view(dtype).reshape(4, 16, 64 // bits)
    np.testing.assert_array_equal(received, rows.transpose(0, 2, 1))


@pytest.mark.parametrize("row", [16, 32])
def test_permlane_swap(assembler, row):
    a, b = LANES, LANES + 100
    body = f"v_mov_b32 v40, v10\n v_mov_b32 v41, v11\n s_nop 4\n v_permlane{row}_swap_b32 v40, v41"
    x, y = assembler(body, [a, b], 2)
    upper = (LANES & row) != 0
    np.testing.assert_array_equal(x, np.where(upper, b[LANES ^ row], a))
    np.testing.assert_array_equal(y, np.where(upper, b, a[LANES ^ row]))


@pytest.mark.parametrize(("control", "source"), [
    ("row_newbcast:5", lambda lane: (lane & ~15) | 5),
    ("quad_perm:[3,0,2,1]", lambda lane: (lane & ~3) | [3, 0, 2, 1][lane & 3]),
    ("row_ror:3", lambda lane: (lane & ~15) | (lane - 3) & 15),
    ("row_mirror", lambda lane: lane ^ 15),
    ("row_half_mirror", lambda lane: lane ^ 7),
])  # fmt: skip
def test_dpp(assembler, control, source):
    (out,) = assembler(f"v_mov_b32_dpp v40, v10 {control} row_mask:0xf bank_mask:0xf", [LANES + 7])
    np.testing.assert_array_equal(out, [source(lane) + 7 for lane in range(64)])


def test_dpp_without_a_source(assembler):
    """row_shr beyond the row: no write without bound_ctrl, 0 with it. row_mask leaves whole rows alone."""
    body = """v_mov_b32 v40, 99
      v_mov_b32 v41, 99
      s_nop 4
      v_mov_b32_dpp v40, v10 row_shr:2 row_mask:0xf bank_mask:0xf
      v_mov_b32_dpp v41, v10 row_shr:2 row_mask:0x5 bank_mask:0xf bound_ctrl:0"""
    kept, zeroed = assembler(body, [LANES], 2)
    np.testing.assert_array_equal(kept, np.where(LANES % 16 < 2, 99, LANES - 2))
    np.testing.assert_array_equal(zeroed, np.where(LANES // 16 % 2, 99, np.where(LANES % 16 < 2, 0, LANES - 2)))


def test_conversion_to_fp8(assembler, fp8):
    rng = np.random.default_rng(2)
    x = np.concatenate(
        [[0.0, -0.0, 448.0, 463.0, 465.0, 2**-9, 2**-10, 3 * 2**-10, 0.0155, np.nan, -np.inf, 1.0625],
         [240.0, 247.9, 248.0, -249.0, 2**-11, -(2**-11), 3 * 2**-11, 0.0077], rng.normal(size=44) * 30]
    )  # fmt: skip
    y = rng.normal(size=64) * 0.05
    x, y = x.astype(np.float32), y.astype(np.float32)
    body = """v_mov_b32 v40, 0x11223344
      v_cvt_pk_fp8_f32 v40, v10, v11 op_sel:[0,0,1]
      v_mov_b32 v41, 0x11223344
      v_cvt_pk_fp8_f32 v41, v10, v11"""
    high, low = assembler(body, [x, y], 2)
    pair = x.astype(fp8).view(np.uint8).astype(np.uint32) | y.astype(fp8).view(np.uint8).astype(np.uint32) << 8
    # NaN's sign is the hardware's own business.
    nan = ~np.isfinite(x.astype(fp8).astype(np.float32))
    np.testing.assert_array_equal(np.where(nan, 0, high), np.where(nan, 0, pair << 16 | 0x3344))
    np.testing.assert_array_equal(np.where(nan, 0, low), np.where(nan, 0, 0x11220000 | pair))
    assert np.isnan((high >> 16 & 0xFF).astype(np.uint8).view(fp8).astype(np.float32)[nan]).all()


def test_every_fp8_number(assembler, fp8):
    """As the products see it: each code times 1."""
    codes = np.arange(256, dtype=np.uint8).view(fp8)
    for first in range(0, 256, 16):
        a, b = np.zeros((16, 32), fp8), np.zeros((16, 32), fp8)
        a[:, 0], b[:, 0] = codes[first : first + 16], 1
        inputs = registers(a, 8, 16) + registers(b, 8, 16)
        d = assembler("v_mfma_f32_16x16x32_fp8_fp8 v[40:43], v[10:11], v[12:13], 0", inputs, 4).view(np.float32)
        want = codes[first : first + 16].astype(np.float32)
        np.testing.assert_array_equal(d[:, ::16].T.ravel(), want)


def test_conversion_from_fp8(assembler):
    """Two of four numbers, times a power of two. The source may be among the destination."""
    codes = np.arange(256, dtype=np.uint8)
    body = """v_mov_b32 v40, v10
      v_cvt_scalef32_pk_f32_fp8 v[40:41], v40, 1.0
      v_cvt_scalef32_pk_f32_fp8 v[42:43], v10, 4.0 op_sel:[1,0,0]"""
    out = assembler(body, [codes.view(np.uint32)], 4).view(np.float32)
    want = codes.view(F8).astype(np.float32).reshape(64, 4).T
    np.testing.assert_array_equal(out, want * np.float32([1, 1, 4, 4])[:, None])


def test_conversion_to_bf16(assembler):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 64)).astype(np.float32)
    x[:3] = [np.inf, -0.0, 1 + 2**-8]  # a tie goes to even
    (out,) = assembler("v_cvt_pk_bf16_f32 v40, v10, v11", [x, y])
    want = np.stack([x, y], -1).astype(BF16).view(np.uint16)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(64, 2), want)


def test_byte_permute(assembler):
    """Selectors 0-3 take bytes of the second source, 4-7 of the first, 12 is zero, 13 and above are 0xff."""
    (out,) = assembler("s_mov_b32 s20, 0x0d0c0701\n v_perm_b32 v40, v10, v11, s20", [LANES + 0x44332200, LANES + 0xAABBCC00])
    want = [0xFF << 24 | 0x44 << 8 | 0xCC for _ in LANES]
    np.testing.assert_array_equal(out, want)


def test_packed_halves(assembler):
    """Of two scalars: the low half of the result is of the first source, the high one of the second."""
    packed = "".join(f"s_pack_{which}_b32_b16 s22, s20, s21\n v_mov_b32 v{40 + i}, s22\n " for i, which in enumerate(("ll", "lh", "hh")))
    found = assembler(f"s_mov_b32 s20, 0x12345678\n s_mov_b32 s21, 0x9abcdef0\n {packed}", [LANES], 3)
    np.testing.assert_array_equal(found, np.broadcast_to([[0xDEF05678], [0x9ABC5678], [0x9ABC1234]], found.shape))


def test_relative_register_numbers(assembler):
    """s_set_gpr_idx_on adds to the first source's number, through M0, until off."""
    body = """s_mov_b32 s20, 1
      s_set_gpr_idx_on s20, gpr_idx(SRC0)
      v_add_u32_e32 v40, v10, v10
      s_set_gpr_idx_off
      v_add_u32_e32 v41, v10, v10"""
    shifted, plain = assembler(body, [LANES, LANES + 1000], 2)
    np.testing.assert_array_equal(shifted, 2 * LANES + 1000)
    np.testing.assert_array_equal(plain, 2 * LANES)


def test_packed_fma_with_a_scalar_pair(assembler):
    a, b, c, d = np.random.default_rng(4).normal(size=(4, 64)).astype(np.float32)
    body = """s_mov_b32 s20, 2.0
      s_mov_b32 s21, 0.5
      v_pk_fma_f32 v[40:41], v[10:11], s[20:21], v[12:13]
      v_pk_mul_f32 v[42:43], v[10:11], v[12:13] op_sel:[1,0] op_sel_hi:[0,1] neg_lo:[1,0]"""
    low, high, crossed_low, crossed_high = assembler(body, [a, b, c, d], 4).view(np.float32)
    np.testing.assert_array_equal(low, a * np.float32(2) + c)
    np.testing.assert_array_equal(high, b * np.float32(0.5) + d)
    np.testing.assert_array_equal(crossed_low, -b * c)
    np.testing.assert_array_equal(crossed_high, a * d)


def test_max_ignores_nan(assembler):
    x = np.where(LANES % 3 == 0, np.nan, LANES).astype(np.float32)
    (out,) = assembler("v_max3_f32 v40, v10, v11, v11", [x, np.full(64, 5, np.float32)])
    np.testing.assert_array_equal(out.view(np.float32), np.fmax(x, 5))


def test_masked_lanes_keep_their_value(assembler):
    body = """v_mov_b32 v40, 7
      v_cmp_gt_u32 vcc, 20, v10
      s_and_saveexec_b64 s[20:21], vcc
      v_mov_b32 v40, v10
      v_cmp_lt_u32 s[22:23], 10, v10
      s_mov_b64 exec, s[20:21]
      v_mov_b32 v41, s22
      v_mov_b32 v42, s23"""
    value, low, high = assembler(body, [LANES], 3)
    np.testing.assert_array_equal(value, np.where(LANES < 20, LANES, 7))
    assert low[0] == sum(1 << lane for lane in range(11, 20))
    assert high[0] == 0


def test_buffer_bounds(assembler):
    """Without an index, num_records counts bytes: dwords out of range load 0 and their stores vanish."""
    body = """s_mov_b32 s8, s6
      s_and_b32 s9, s7, 0xffff
      s_mov_b32 s10, 40
      s_mov_b32 s11, 0x20000
      v_mov_b32 v3, 1
      buffer_store_dword v3, v1, s[8:11], 0 offen
      s_waitcnt vmcnt(0)
      v_lshlrev_b32 v4, 2, v0
      buffer_load_dwordx2 v[40:41], v4, s[8:11], 0 offen
      s_waitcnt vmcnt(0)"""
    low, high = assembler(body, [LANES], 2)
    np.testing.assert_array_equal(low, LANES < 10)
    np.testing.assert_array_equal(high, LANES < 9)


@pytest.mark.parametrize("load", [
    "buffer_load_dword v1, s[8:11], 0 offen offset:4 lds",
    "global_load_lds_dword v1, s[4:5] offset:4",
])  # fmt: skip
def test_direct_to_lds(assembler, load):
    """The instruction's offset counts on both sides: the memory address and M0's LDS address."""
    body = f"""s_mov_b32 s8, s4
      s_and_b32 s9, s5, 0xffff
      s_mov_b32 s10, 512
      s_mov_b32 s11, 0x20000
      s_mov_b32 m0, 64
      s_nop 4
      {load}
      s_waitcnt vmcnt(0)
      ds_read_b32 v40, v1 offset:68
      s_waitcnt lgkmcnt(0)"""
    (out,) = assembler(body, [LANES, LANES + 64])
    np.testing.assert_array_equal(out, LANES + 1)


def test_data_arrive_late(assembler):
    """A load that is not waited for has not happened yet; after the wait it has."""
    body = """v_mov_b32 v40, 5
      global_load_dword v40, v1, s[4:5]
      v_mov_b32 v41, v40
      s_waitcnt vmcnt(0)
      v_mov_b32 v42, v40"""
    landed, early, late = assembler(body, [LANES + 100], 3)
    assert (early == 5).all()
    np.testing.assert_array_equal(late, LANES + 100)
    np.testing.assert_array_equal(landed, LANES + 100)


def test_hazard_mode_names_the_weak_wait(gpu, assembler):
    gpu.options(hazards=True)
    body = """ds_write_b32 v1, v10
      s_waitcnt lgkmcnt(0)
      ds_read_b32 v40, v1
      ds_read_b32 v41, v1
      s_waitcnt lgkmcnt({wait})
      v_mov_b32 v42, v40
      s_waitcnt lgkmcnt(0)"""
    assembler(body.format(wait=1), [LANES], 3)
    assert gpu.hazards() == []
    assembler(body.format(wait=2), [LANES], 3)
    (hazard,) = gpu.hazards()
    assert "v40 used at" in hazard
    assert "the wait lgkmcnt(2)" in hazard
    assert "would have to be lgkmcnt(1)" in hazard


def test_hazard_mode_sees_lds_races(gpu, assembler):
    gpu.options(hazards=True)
    body = """v_xor_b32 v3, 0x100, v1
      ds_write_b32 v1, v10
      {guard}
      ds_read_b32 v40, v3
      s_waitcnt lgkmcnt(0)"""
    inputs = [np.arange(128, dtype=np.uint32)]
    for guard, found in [
        ("s_waitcnt lgkmcnt(0)\n s_barrier", None),
        ("s_waitcnt lgkmcnt(0)", "without a barrier between"),
        ("s_barrier", "no lgkmcnt wait lies between"),
    ]:
        assembler(body.format(guard=guard), inputs, waves=2)
        hazards = gpu.hazards()
        assert (found in hazards[0]) if found else not hazards


def test_any_function_of_three_bits(assembler):
    """By a table whose index has the first source's bit on top. With 16 bits, op_sel picks halves; the destination's other half stays."""
    a, b, c = np.random.default_rng(7).integers(0, 2**32, (3, 64), dtype=np.uint32)
    body = """v_mov_b32 v40, 0x11223344
      v_bitop3_b16 v40, v10, v11, v12 bitop3:0x34 op_sel:[1,0,0,1]
      v_bitop3_b16 v41, v10, v11, v12 bitop3:0xca
      v_bitop3_b32 v42, v10, v11, v12 bitop3:0xca"""
    high, low, whole = assembler(body, [a, b, c], 3)
    np.testing.assert_array_equal(whole, (a & b) | (~a & c))
    np.testing.assert_array_equal(high, (((a >> 16) & ~b | ~(a >> 16) & b & ~c) & 0xFFFF) << 16 | 0x3344)
    np.testing.assert_array_equal(low & 0xFFFF, ((a & b) | (~a & c)) & 0xFFFF)


@pytest.mark.parametrize(("pattern", "source"), [
    ("swizzle(QUAD_PERM, 3, 0, 2, 1)", lambda lane: (lane & ~3) | [3, 0, 2, 1][lane & 3]),
    ("swizzle(SWAP, 16)", lambda lane: lane ^ 16),
    ("swizzle(BROADCAST, 8, 5)", lambda lane: (lane & ~7) | 5),
    ("swizzle(REVERSE, 32)", lambda lane: lane ^ 31),
])  # fmt: skip
def test_swizzle(assembler, pattern, source):
    (out,) = assembler(f"ds_swizzle_b32 v40, v10 offset:{pattern}\n s_waitcnt lgkmcnt(0)", [LANES + 7])
    np.testing.assert_array_equal(out, [source(lane) + 7 for lane in range(64)])


def test_largest_with_nan(assembler):
    """maximum3 and minimum3: a NaN wins, and +0 is above -0."""
    x, y = np.where(LANES % 3 == 0, np.nan, LANES).astype(np.float32), np.full(64, 5, np.float32)
    zeros = np.where(LANES % 2, 0.0, -0.0).astype(np.float32)
    body = """v_maximum3_f32 v40, v10, v11, v11
      v_minimum3_f32 v41, v10, v11, v11
      v_maximum3_f32 v42, v12, 0, 0
      v_minimum3_f32 v43, v12, 0, 0"""
    largest, smallest, largest_zero, smallest_zero = assembler(body, [x, y, zeros], 4).view(np.float32)
    np.testing.assert_array_equal(largest, np.maximum(x, y))
    np.testing.assert_array_equal(smallest, np.minimum(x, y))
    assert not np.signbit(largest_zero).any()
    np.testing.assert_array_equal(np.signbit(smallest_zero), np.signbit(zeros))


def test_dot_product_of_bf16_pairs(assembler):
    x, y = np.random.default_rng(8).integers(-8, 9, (2, 64, 2)).astype(BF16)
    packed = [np.ascontiguousarray(pair).view(np.uint32).ravel() for pair in (x, y)]
    (out,) = assembler("v_mov_b32 v40, 2.0\n v_dot2c_f32_bf16 v40, v10, v11", packed)
    np.testing.assert_array_equal(out.view(np.float32), 2 + (x.astype(np.float32) * y.astype(np.float32)).sum(-1))


def test_high_product_of_24_bits(assembler):
    a, b = np.random.default_rng(10).integers(0, 2**32, (2, 64), dtype=np.uint32)
    (out,) = assembler("v_mul_hi_u32_u24 v40, v10, v11", [a, b])
    np.testing.assert_array_equal(out, (a & 0xFFFFFF).astype(np.uint64) * (b & 0xFFFFFF) >> 32)


@pytest.mark.parametrize("suffix", ["", "_x2"])
def test_compare_and_swap(assembler, suffix):
    """The lanes that expect what is there store their number; all see what was there before."""
    wide = bool(suffix)
    data, old = ("v[20:23]", "v[40:41]") if wide else ("v[20:21]", "v40")
    body = f"""v_lshlrev_b32 v3, 3, v0
      v_mov_b32 v24, 7
      v_mov_b32 v25, 9
      global_store_dwordx2 v3, v[24:25], s[6:7]
      s_waitcnt vmcnt(0)
      v_add_u32 v20, 100, v0
      v_mov_b32 v21, {"0" if wide else "v10"}
      v_mov_b32 v22, v10
      v_mov_b32 v23, 9
      global_atomic_cmpswap{suffix} {old}, v3, {data}, s[6:7] sc0
      s_waitcnt vmcnt(0)
      global_load_dwordx2 v[42:43], v3, s[6:7]
      s_waitcnt vmcnt(0)"""
    expects = np.where(LANES % 2, 7, 8).astype(np.uint32)
    before, _, now, now_high = assembler(body, [expects], 4)
    assert (before == 7).all()
    np.testing.assert_array_equal(now, np.where(expects == 7, LANES + 100, 7))
    np.testing.assert_array_equal(now_high, np.where((expects == 7) & wide, 0, 9))


def test_calls(assembler):
    """s_swappc jumps and leaves the return address, to which s_setpc goes."""
    body = """s_getpc_b64 s[20:21]
    base:
      s_add_u32 s20, s20, function-base
      s_addc_u32 s21, s21, 0
      s_swappc_b64 s[30:31], s[20:21]
      v_mov_b32 v41, 2
      s_branch done
    function:
      v_mov_b32 v40, 1
      s_setpc_b64 s[30:31]
    done:"""
    first, second = assembler(body, outputs=2)
    assert (first == 1).all()
    assert (second == 2).all()


@pytest.mark.parametrize("qualifier", ["", "volatile"], ids=["scratch", "flat"])
def test_scratch(gpu, assembler, qualifier):
    """Arrays of each work-item's own that are too large for registers, of words and of bytes. Volatile ones are reached by addresses that
    might as well be global."""
    source = """
    extern "C" __attribute__((global, amdgpu_flat_work_group_size(128, 128))) void f(const int* x, int* out) {
      const int t = __builtin_amdgcn_workgroup_id_x() * 128 + __builtin_amdgcn_workitem_id_x();
      QUALIFIER int own[300];
      QUALIFIER unsigned char bytes[300];
      for (int k = 0; k < 300; ++k) own[(k * 7 + t) % 300] = x[t] + k, bytes[(k * 11 + t) % 300] = x[t] * k;
      int sum = 0;
      for (int k = 0; k < 300; ++k) sum += (k + 1) * own[(x[t] + k) % 300] + bytes[k];
      out[t] = sum;
    }"""
    t = np.arange(256)
    x = np.random.default_rng(11).integers(0, 100, 256).astype(np.int32)
    a, b = gpu.array(x), gpu.array(np.zeros(256, np.int32))
    code = software_gpu.compile_hip(source.replace("QUALIFIER", qualifier))
    assert gpu.not_modelled(code) == []
    gpu.launch(gpu.function(code, "f"), 2, 128, np.uint64([a.pointer, b.pointer]).tobytes())
    own, stored = np.zeros((2, 300, 256), np.int32)
    for k in range(300):
        own[(k * 7 + t) % 300, t], stored[(k * 11 + t) % 300, t] = x + k, x * k % 256
    np.testing.assert_array_equal(b.read(), sum((k + 1) * own[(x + k) % 300, t] + stored[k] for k in range(300)))


def test_scratch_bounds(assembler):
    with pytest.raises(software_gpu.HipError, match="scratch address 0 is outside the 0 bytes of a lane"):
        assembler("scratch_load_dword v40, off, off")


@pytest.mark.parametrize(("body", "message"), [
    ("v_mov_b32 v2, 0x400000\n global_load_dword v40, v2, s[4:5]", "read of .* is not live"),
    ("v_mov_b32 v2, 0x400000\n global_store_dword v2, v1, s[6:7]", "write to .* is not live"),
    ("s_add_u32 s4, s4, 0x400000\n s_addc_u32 s5, s5, 0\n s_load_dword s20, s[4:5], 0x0", "read of .* is not live"),
    ("v_mov_b32 v2, 4096\n ds_read_b32 v40, v2", "LDS address 4096 of lane 0 is outside"),
    ("global_store_dword v1, v0, s[0:1]", "write to read-only"),
    ("v_sin_f32 v40, v0", "unknown instruction v_sin_f32"),
    ("s_trap 2", "trapped"),
])  # fmt: skip
def test_faults_say_what_happened(assembler, body, message):
    with pytest.raises(software_gpu.HipError, match=message):
        assembler(body)


def test_division_rounds_correctly(gpu, assembler):
    """Clang's sequence of div_scale, rcp, fma, div_fmas, div_fixup, over all exponents: quotients that overflow, that are subnormal."""
    source = """
    extern "C" __attribute__((global)) void divide(const float* x, const float* y, float* out) {
      const int i = __builtin_amdgcn_workgroup_id_x() * 64 + __builtin_amdgcn_workitem_id_x();
      out[i] = x[i] / y[i];
    }"""
    rng = np.random.default_rng(6)
    exponents = np.stack(np.meshgrid(np.arange(-140, 128, 9), np.arange(-140, 128, 9))).reshape(2, -1)
    x, y = np.ldexp(rng.choice([-1, 1], exponents.shape) * rng.uniform(1, 2, exponents.shape), exponents).astype(np.float32)
    corners = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1.0])
    x, y = (np.concatenate([a, b]) for a, b in zip((x, y), np.stack(np.meshgrid(corners, corners)).reshape(2, -1)))
    x, y = (np.resize(a, -(-len(a) // 64) * 64) for a in (x, y))
    a, b, out = gpu.array(x), gpu.array(y), gpu.array(np.zeros_like(x))
    arguments = np.uint64([a.pointer, b.pointer, out.pointer]).tobytes()
    gpu.launch(gpu.function(software_gpu.compile_hip(source), "divide"), len(x) // 64, 64, arguments)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out.read(), x / y)


def test_compiled_kernel(gpu, assembler):
    """What clang makes of a reduction with divergence, LDS, division and 64-bit addresses."""
    source = """
    #define GLOBAL __attribute__((global, amdgpu_flat_work_group_size(256, 256)))
    extern "C" GLOBAL void mean_of_positive(const float* x, float* out, int n) {
      __attribute__((shared)) static float sums[256];
      __attribute__((shared)) static int counts[256];
      const int t = __builtin_amdgcn_workitem_id_x();
      const float* row = x + (long)__builtin_amdgcn_workgroup_id_x() * n;
      float sum = 0; int count = 0;
      for (int k = t; k < n; k += 256) if (row[k] > 0) sum += row[k], ++count;
      sums[t] = sum; counts[t] = count;
      for (int step = 128; step; step >>= 1) {
        __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
        __builtin_amdgcn_s_barrier();
        __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
        if (t < step) sums[t] += sums[t + step], counts[t] += counts[t + step];
      }
      if (t == 0) out[__builtin_amdgcn_workgroup_id_x()] = sums[0] / counts[0];
    }"""
    gpu.options(hazards=True)
    x = np.random.default_rng(5).normal(size=(3, 1000)).astype(np.float32)
    a, b = gpu.array(x), gpu.array(np.zeros(3, np.float32))
    code = software_gpu.compile_hip(source)
    gpu.launch(gpu.function(code, "mean_of_positive"), 3, 256, np.uint64([a.pointer, b.pointer]).tobytes() + np.int32(1000).tobytes())
    np.testing.assert_allclose(b.read(), [r[r > 0].mean() for r in x], rtol=1e-6)
    assert gpu.hazards() == []  # the compiler's waits are right, and the detector does not cry wolf
