"""Triton kernels of the skip-token path: index building, grouped products over live picks alone, sums per token.

A *pick* is one of a token's K choices, numbered p = t·K + k. Live picks are those of resident experts; `order` lists
them expert by expert, in the order of their tokens, and `offsets` says where each expert's begin. All products run
over tiles of BM rows of that list that never cross from one expert to the next, so a tile has one weight matrix.

How many tiles there are is known on the device alone. The grid is as large as it could become, T·K/BM + R tiles, and a
program behind the last live tile ends at once: no row is padded, nothing is copied for a skipped pick, and the host
never waits. Programs that share rows of tokens (neighbouring columns) are next to each other in the grid, so that the
rows, and the one or two experts' weights that all multiprocessors work on at a time, are read from the second-level
cache.

Nothing is added atomically: each output has one program that sums in a fixed order, and results repeat to the bit.

Copies of absent experts are multiplied by the same kernels, on their part of the offsets: then R stands for the copies.

Shapes: T tokens, D model, R resident experts, K picks of a token, P = T·K picks, L live picks, I input width of an
expert (F, or 2F with swiglu: gate beside up), F expert width.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def count_picks(slots_P, counts_BR, n_picks, BLOCK: tl.constexpr, STEP: tl.constexpr, RP: tl.constexpr):
    """Count each slot's picks in a block of BLOCK picks; RP is R rounded up to a power of two."""
    block = tl.program_id(0)
    slot = tl.arange(0, RP)
    count = tl.zeros([RP], tl.int32)
    for start in range(0, BLOCK, STEP):
        pick = block * BLOCK + start + tl.arange(0, STEP)
        found = tl.load(slots_P + pick, mask=pick < n_picks, other=RP)
        count += tl.sum((found[:, None] == slot[None, :]).to(tl.int32), axis=0)
    tl.store(counts_BR + block * RP + slot, count)


@triton.jit
def scan_counts(counts_BR, offsets_R1, n_blocks, n_resident, STEP: tl.constexpr, RP: tl.constexpr):
    """Turn counts, in place, into the place of each block's first pick of each slot. One program."""
    slot = tl.arange(0, RP)
    total = tl.zeros([RP], tl.int32)
    for start in range(0, n_blocks, STEP):
        block = start + tl.arange(0, STEP)
        at = block[:, None] * RP + slot[None, :]
        total += tl.sum(tl.load(counts_BR + at, mask=block[:, None] < n_blocks, other=0), axis=0)
    total = tl.where(slot < n_resident, total, 0)
    ends = tl.cumsum(total, axis=0)
    tl.store(offsets_R1 + slot + 1, ends, mask=slot < n_resident)
    tl.store(offsets_R1 + slot, ends - total, mask=slot == 0)
    place = ends - total
    for start in range(0, n_blocks, STEP):
        block = start + tl.arange(0, STEP)
        at = block[:, None] * RP + slot[None, :]
        count = tl.load(counts_BR + at, mask=block[:, None] < n_blocks, other=0)
        tl.store(counts_BR + at, place[None, :] + tl.cumsum(count, axis=0) - count, mask=block[:, None] < n_blocks)
        place += tl.sum(count, axis=0)


@triton.jit
def place_picks(
    slots_P, places_BR, order_P, place_P, n_picks, n_resident, BLOCK: tl.constexpr, STEP: tl.constexpr, RP: tl.constexpr
):
    """Write where each pick's row lies (-1 for a ghost's), and of each row, which pick it is."""
    block = tl.program_id(0)
    slot = tl.arange(0, RP)
    first = tl.load(places_BR + block * RP + slot)
    for start in range(0, BLOCK, STEP):
        pick = block * BLOCK + start + tl.arange(0, STEP)
        found = tl.load(slots_P + pick, mask=pick < n_picks, other=RP)
        same = (found[:, None] == slot[None, :]).to(tl.int32)
        place = tl.sum(same * (first[None, :] + tl.cumsum(same, axis=0) - 1), axis=1)
        live = found < n_resident
        tl.store(order_P + place, pick, mask=live)
        tl.store(place_P + pick, tl.where(live, place, -1), mask=pick < n_picks)
        first += tl.sum(same, axis=0)


@triton.jit
def _tile(offsets_R1, n_resident, n_columns, BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr):
    """Return what this program works on: the expert (R behind the last live tile), rows, which are live, columns.

    Each program finds its own tile, once, in R numbers. Programs that go through many tiles read a list of them instead
    (`list_tiles`).
    """
    across = tl.cdiv(n_columns, BN)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    slot = tl.arange(0, RP)
    start = tl.load(offsets_R1 + slot, mask=slot < n_resident, other=0)
    end = tl.load(offsets_R1 + slot + 1, mask=slot < n_resident, other=0)
    tiles = (end - start + BM - 1) // BM
    last = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((last <= tile) & (slot < n_resident)).to(tl.int32), axis=0)
    own = slot == expert
    row = tl.sum(tl.where(own, start + (tile - last + tiles) * BM, 0), axis=0)
    row_M = row + tl.arange(0, BM)
    return expert, row_M, row_M < tl.sum(tl.where(own, end, 0), axis=0), column


@triton.jit
def up(
    x_TD, order_P, offsets_R1, w_in_RDI, gates_P, pre_LI, h_LF, D, F, n_resident,
    K: tl.constexpr, SWIGLU: tl.constexpr, WITH_PRE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Write h = gate · activation(x[token] @ w_in[expert]), and with WITH_PRE what is inside the activation.

    The tokens' rows are gathered while the product reads them. The two halves of swiglu are two accumulators of one
    program, so the activation needs no other program's numbers. The gate multiplies here, where a row has F channels
    instead of D.
    """
    expert, row_M, live_M, column = _tile(offsets_R1, n_resident, F, BM, BN, RP)
    if expert >= n_resident:
        return
    pick_M = tl.load(order_P + row_M, mask=live_M, other=0)
    f_N = column * BN + tl.arange(0, BN)
    in_N = f_N < F
    k_K = tl.arange(0, BK)
    width = 2 * F if SWIGLU else F
    x_MK = x_TD + (pick_M // K)[:, None].to(tl.int64) * D + k_K[None, :]
    w_KN = w_in_RDI + expert.to(tl.int64) * D * width + k_K[:, None] * width + f_N[None, :]
    first_MN = tl.zeros([BM, BN], tl.float32)
    second_MN = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        a = tl.load(x_MK + k, mask=live_M[:, None] & (k + k_K < D)[None, :], other=0.0)
        inside = (k + k_K < D)[:, None] & in_N[None, :]
        b = tl.load(w_KN + k * width, mask=inside, other=0.0)
        first_MN = tl.dot(a, b, first_MN, input_precision=PRECISION)
        if SWIGLU:
            b = tl.load(w_KN + k * width + F, mask=inside, other=0.0)
            second_MN = tl.dot(a, b, second_MN, input_precision=PRECISION)
    write = live_M[:, None] & in_N[None, :]
    row_M = row_M.to(tl.int64)
    if WITH_PRE:
        pre_MN = pre_LI + row_M[:, None] * width + f_N[None, :]
        tl.store(pre_MN, first_MN.to(pre_LI.dtype.element_ty), mask=write)
        if SWIGLU:
            tl.store(pre_MN + F, second_MN.to(pre_LI.dtype.element_ty), mask=write)
    h_MN = first_MN * tl.sigmoid(first_MN)
    if SWIGLU:
        h_MN *= second_MN
    h_MN *= tl.load(gates_P + pick_M, mask=live_M, other=0.0)[:, None]
    tl.store(h_LF + row_M[:, None] * F + f_N[None, :], h_MN.to(h_LF.dtype.element_ty), mask=write)


@triton.jit
def rows_times_weight(
    a_LC, offsets_R1, w, y_LN, C, N, stride_r, stride_c, stride_n, n_resident,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """y[row] = a[row] @ w[expert], where w[expert] is (C,N) by its strides: `w_out`, or `w_in` transposed."""
    expert, row_M, live_M, column = _tile(offsets_R1, n_resident, N, BM, BN, RP)
    if expert >= n_resident:
        return
    row_M = row_M.to(tl.int64)
    n_N = column * BN + tl.arange(0, BN)
    in_N = n_N < N
    c_K = tl.arange(0, BK)
    a_MK = a_LC + row_M[:, None] * C + c_K[None, :]
    w_KN = w + expert.to(tl.int64) * stride_r + c_K[:, None] * stride_c + n_N[None, :] * stride_n
    y_MN = tl.zeros([BM, BN], tl.float32)
    for c in range(0, C, BK):
        a = tl.load(a_MK + c, mask=live_M[:, None] & (c + c_K < C)[None, :], other=0.0)
        b = tl.load(w_KN + c * stride_c, mask=(c + c_K < C)[:, None] & in_N[None, :], other=0.0)
        y_MN = tl.dot(a, b, y_MN, input_precision=PRECISION)
    write = live_M[:, None] & in_N[None, :]
    tl.store(y_LN + row_M[:, None] * N + n_N[None, :], y_MN.to(y_LN.dtype.element_ty), mask=write)


@triton.jit
def list_tiles(offsets_R1, tiles_N4, n_resident, BM: tl.constexpr, BLOCK: tl.constexpr, RP: tl.constexpr):
    """Write of each tile of BM rows: its expert (R behind the last tile), first row, the end of the expert's rows.

    In the fourth place of each how many tiles there are: nobody else knows.
    """
    tile_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, RP)
    start = tl.load(offsets_R1 + slot, mask=slot < n_resident, other=0)
    end = tl.load(offsets_R1 + slot + 1, mask=slot < n_resident, other=0)
    tiles = (end - start + BM - 1) // BM
    last = tl.cumsum(tiles, axis=0)
    before = (last[None, :] <= tile_N[:, None]) & (slot < n_resident)[None, :]
    expert_N = tl.sum(before.to(tl.int32), axis=1)
    own = slot[None, :] == expert_N[:, None]
    row = start[None, :] + (tile_N[:, None] - last[None, :] + tiles[None, :]) * BM
    tl.store(tiles_N4 + tile_N * 4, expert_N)
    tl.store(tiles_N4 + tile_N * 4 + 1, tl.sum(tl.where(own, row, 0), axis=1))
    tl.store(tiles_N4 + tile_N * 4 + 2, tl.sum(tl.where(own, end[None, :], 0), axis=1))
    tl.store(tiles_N4 + tile_N * 4 + 3, tl.sum(tiles, axis=0) + tile_N * 0)  # as long as the others


@triton.jit
def rows_times_weight_by_descriptor(
    a, w, tiles_N4, y_LN, C: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `rows_times_weight`, for GPUs whose copy engine fetches whole tiles, and sizes that tiles divide.

    `a` describes (P,C) in blocks (BM,BK); `w` describes (R·C,N) in blocks (BK,BN), or with TRANSPOSED (R·N,C) in blocks
    (BN,BK). A tile's rows behind its expert's last one are another expert's, or nobody's: they are computed and not
    written. There is one program a multiprocessor, whose shared memory it fills. It goes through many tiles in one
    loop (`flatten` makes one of the two), and fetches the first blocks of one while it writes the one before: without
    that, at half the experts' width, a third of the time is filling and emptying.
    """
    across: tl.constexpr = N // BN
    for i in tl.range(tl.program_id(0), tl.load(tiles_N4 + 3) * across, tl.num_programs(0), flatten=True):
        tile = tiles_N4 + (i // across) * 4
        expert, row, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        column = (i % across) * BN
        y_MN = tl.zeros([BM, BN], tl.float32)
        for c in range(0, C, BK):
            b = tl.trans(w.load([expert * N + column, c])) if TRANSPOSED else w.load([expert * C + c, column])
            y_MN = tl.dot(a.load([row, c]), b, y_MN, input_precision=PRECISION)
        row_M = row + tl.arange(0, BM)
        at = y_LN + row_M[:, None].to(tl.int64) * N + (column + tl.arange(0, BN))[None, :]
        tl.store(at, y_MN.to(y_LN.dtype.element_ty), mask=(row_M < end)[:, None])


@triton.jit
def sum_picks(y_LD, place_P, y_TD, D, K: tl.constexpr, BLOCK: tl.constexpr):
    """y[t] = Σ_k y[place of pick (t,k)] over the live picks, in float32; zero where a token has none."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(place_P + token * K + k).to(tl.int64)
        width = tl.where(place >= 0, D, 0)
        total += tl.load(y_LD + place * D + d, mask=d < width, other=0.0).to(tl.float32)
    tl.store(y_TD + token * D + d, total.to(y_TD.dtype.element_ty), mask=d < D)


@triton.jit
def down_backward(
    dy_TD, order_P, offsets_R1, w_out_RFD, gates_P, pre_LI, dpre_LI, h_LF, dgate_parts, D, F, n_picks, n_resident,
    K: tl.constexpr, SWIGLU: tl.constexpr, WITH_H: tl.constexpr, WITH_DPRE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """From the tokens' gradients back to inside the activation: dpre; h recomputed, and the gates' gradients.

    dh = dy[token] @ w_out[expert]ᵀ meets the activation's input while it is still in registers. h is recomputed
    rather than kept from the forward pass: one multiplication here against F·L numbers in memory for the whole step.
    Each column of programs writes its part of Σ_f dh·h to a row of its own.
    """
    expert, row_M, live_M, column = _tile(offsets_R1, n_resident, F, BM, BN, RP)
    if expert >= n_resident:
        return
    pick_M = tl.load(order_P + row_M, mask=live_M, other=0)
    f_N = column * BN + tl.arange(0, BN)
    in_N = f_N < F
    d_K = tl.arange(0, BK)
    dy_MK = dy_TD + (pick_M // K)[:, None].to(tl.int64) * D + d_K[None, :]
    w_KN = w_out_RFD + expert.to(tl.int64) * F * D + d_K[:, None] + f_N[None, :] * D
    dh_MN = tl.zeros([BM, BN], tl.float32)
    for d in range(0, D, BK):
        a = tl.load(dy_MK + d, mask=live_M[:, None] & (d + d_K < D)[None, :], other=0.0)
        b = tl.load(w_KN + d, mask=(d + d_K < D)[:, None] & in_N[None, :], other=0.0)
        dh_MN = tl.dot(a, b, dh_MN, input_precision=PRECISION)
    row_M = row_M.to(tl.int64)
    gate_M = tl.load(gates_P + pick_M, mask=live_M, other=0.0)
    # In two halves of the columns: what the activation needs of all at once does not fit into the registers.
    left_MH, right_MH = tl.split(tl.permute(tl.reshape(dh_MN, (BM, 2, BN // 2)), (0, 2, 1)))
    f_H = column * BN + tl.arange(0, BN // 2)
    part_M = _activation_backward(
        left_MH, gate_M, pre_LI, dpre_LI, h_LF, row_M, live_M, f_H, F, SWIGLU, WITH_H, WITH_DPRE
    )
    part_M += _activation_backward(
        right_MH, gate_M, pre_LI, dpre_LI, h_LF, row_M, live_M, f_H + BN // 2, F, SWIGLU, WITH_H, WITH_DPRE
    )
    tl.store(dgate_parts + column.to(tl.int64) * n_picks + pick_M, part_M, mask=live_M)


@triton.jit
def _activation_backward(
    dh_MN, gate_M, pre_LI, dpre_LI, h_LF, row_M, live_M, f_N, F,
    SWIGLU: tl.constexpr, WITH_H: tl.constexpr, WITH_DPRE: tl.constexpr,
):  # fmt: skip
    """Write dpre and gate · h of some columns, if asked for; return Σ_f dh·h of each row."""
    write = live_M[:, None] & (f_N < F)[None, :]
    width = 2 * F if SWIGLU else F
    at_MN = row_M[:, None] * width + f_N[None, :]
    out_type = dpre_LI.dtype.element_ty
    pre_MN = tl.load(pre_LI + at_MN, mask=write, other=0.0).to(tl.float32)
    sigmoid_MN = tl.sigmoid(pre_MN)
    h_MN = pre_MN * sigmoid_MN
    slope_MN = sigmoid_MN * (1 + pre_MN * (1 - sigmoid_MN))
    if SWIGLU:
        up_MN = tl.load(pre_LI + at_MN + F, mask=write, other=0.0).to(tl.float32)
        if WITH_DPRE:
            tl.store(dpre_LI + at_MN + F, (dh_MN * gate_M[:, None] * h_MN).to(out_type), mask=write)
        h_MN *= up_MN
        slope_MN *= up_MN
    if WITH_DPRE:
        tl.store(dpre_LI + at_MN, (dh_MN * gate_M[:, None] * slope_MN).to(out_type), mask=write)
    if WITH_H:
        tl.store(h_LF + row_M[:, None] * F + f_N[None, :], (h_MN * gate_M[:, None]).to(out_type), mask=write)
    return tl.sum(tl.where(write, dh_MN * h_MN, 0.0), axis=1)


@triton.jit
def weight_gradient(
    a, b, order_P, offsets_R1, dw_RAB, A: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, PRECISION: tl.constexpr,
    BA: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dw[expert] = Σ_row a[row]ᵀ b[row] over an expert's rows; one of the two is gathered from the tokens (T,·).

    One program has one expert's BA × BB numbers and sums over all its rows; an expert without rows gets zeros. Rows
    are masked in the last step alone: a mask in each costs a third of the speed.
    """
    n_a, n_b = tl.cdiv(A, BA), tl.cdiv(B, BB)
    expert = tl.program_id(0) // (n_a * n_b)
    inner = tl.program_id(0) % (n_a * n_b)
    a_A = (inner // n_b) * BA + tl.arange(0, BA)
    b_B = (inner % n_b) * BB + tl.arange(0, BB)
    first, end = tl.load(offsets_R1 + expert), tl.load(offsets_R1 + expert + 1)
    whole = first + (end - first) // BK * BK
    dw_AB = tl.zeros([BA, BB], tl.float32)
    for start in range(first, whole, BK):
        a_KA = _rows(a, order_P, start, end, a_A, A, K, GATHER_A, False, BA, BK)
        b_KB = _rows(b, order_P, start, end, b_B, B, K, GATHER_B, False, BB, BK)
        dw_AB = tl.dot(tl.trans(a_KA), b_KB, dw_AB, input_precision=PRECISION)
    if whole < end:
        a_KA = _rows(a, order_P, whole, end, a_A, A, K, GATHER_A, True, BA, BK)
        b_KB = _rows(b, order_P, whole, end, b_B, B, K, GATHER_B, True, BB, BK)
        dw_AB = tl.dot(tl.trans(a_KA), b_KB, dw_AB, input_precision=PRECISION)
    at = expert.to(tl.int64) * A * B + a_A[:, None] * B + b_B[None, :]
    tl.store(dw_RAB + at, dw_AB.to(dw_RAB.dtype.element_ty), mask=(a_A < A)[:, None] & (b_B < B)[None, :])


@triton.jit
def _rows(
    of, order_P, start, end, columns, width: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Load BK rows, or what is left of them with LAST; of picks where they lie, or with GATHER of their tokens."""
    row_K = start + tl.arange(0, BK)
    live_K = row_K < end
    if GATHER:
        at_K = (tl.load(order_P + row_K, mask=live_K, other=0) if LAST else tl.load(order_P + row_K)) // K
    else:
        at_K = row_K
    at = of + at_K[:, None].to(tl.int64) * width + columns[None, :]
    if LAST:
        return tl.load(at, mask=live_K[:, None] & (columns < width)[None, :], other=0.0)
    if width % BLOCK != 0:
        return tl.load(at, mask=(columns < width)[None, :], other=0.0)
    return tl.load(at)
