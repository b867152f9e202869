#!/usr/bin/env python3
"""Writes src/math/lloyd_max_tables.h: scalar quantisers of one coordinate of a random rotation.

    tools/lloyd_max_tables.py > src/math/lloyd_max_tables.h      (needs numpy)

Levels are the fixed point of Lloyd's iteration (level = mean of its cell, boundary = midpoint), found by
Gauss-Legendre integration of the density. The second stage of a residual quantiser is the same iteration on
the density of what the first stage leaves.
"""

import math

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)
BETA_DIMS = range(8, 64, 8)  # below 64 dimensions the marginal is visibly not Gaussian
EDGE = 9.0  # sqrt(d) * x ends at sqrt(d) < 8 for the Beta marginals


def gaussian(u):
    return np.exp(-0.5 * u * u)


def beta(d):
    """Density of sqrt(d) x_1 for x uniform on the unit sphere of d dimensions, not normalised."""
    return lambda u: np.maximum(0.0, 1.0 - u * u / d) ** ((d - 3) / 2)


def moments(density, left, right, centre=0.0):
    """Mass and first moment about `centre` of the density over [left, right] (arrays)."""
    left, right = np.asarray(left, float), np.maximum(np.asarray(left, float), np.asarray(right, float))
    half = (right - left) / 2
    u = (left + right)[..., None] / 2 + half[..., None] * NODES
    w = density(u) * WEIGHTS * half[..., None]
    return w.sum(-1), (w * (u - np.asarray(centre)[..., None])).sum(-1)


def lloyd(cell_moments, levels):
    """Positive levels of a symmetric quantiser; cell_moments(left, right) of the whole density."""
    for _ in range(200000):
        inner = (levels[1:] + levels[:-1]) / 2
        mass, first = cell_moments(np.concatenate([[0.0], inner]), np.concatenate([inner, [EDGE]]))
        if not mass.all():
            return None  # a level that nothing is nearest to
        moved = first / mass
        if np.abs(moved - levels).max() < 1e-14:
            return moved
        levels = moved
    raise RuntimeError("Lloyd's iteration did not settle")


def first_stage(density, limit, bits):
    n = 2 ** (bits - 1)
    start = (np.arange(n) + 0.5) * min(limit, 3.0) / n

    def cells(left, right):
        return moments(density, np.minimum(left, limit), np.minimum(right, limit))

    return lloyd(cells, start)


def second_stage(density, limit, levels, bits):
    """Levels for r = u - nearest level. The residual's density is symmetric: |r| is enough."""
    full = np.concatenate([-levels[::-1], levels])
    edges = np.concatenate([[-limit], (full[1:] + full[:-1]) / 2, [limit]])

    def cells(left, right):
        left, right = left[:, None], right[:, None]
        # r > 0: u in (level + left, level + right), cut to the cell of the level. r < 0 mirrors.
        lo = np.clip(full + left, edges[:-1], edges[1:])
        hi = np.clip(full + right, edges[:-1], edges[1:])
        mass, first = moments(density, lo, hi, np.broadcast_to(full, lo.shape))
        return 2 * mass.sum(-1), 2 * first.sum(-1)

    def distortion(positive):
        both = np.concatenate([-positive[::-1], positive])
        cuts = np.concatenate([[-EDGE], (both[1:] + both[:-1]) / 2, [EDGE]])
        lo = np.clip(full + cuts[:-1, None], edges[:-1], edges[1:])
        hi = np.clip(full + cuts[1:, None], edges[:-1], edges[1:])
        return squares(density, lo, hi, full + both[:, None])

    # The residual is flat inside and thin outside, so there are several fixed points: the best of many starts.
    widest = max(limit - levels[-1], *np.diff(edges[1:-1]) / 2, full[-1] - edges[-2])
    random = np.random.default_rng(bits)
    n, top = 2 ** (bits - 1), min(1.2, 0.9 * widest)
    starts = [top * random.uniform(0, 1, n) ** (1 + i % 4) for i in range(60)]
    starts += [np.linspace(0, top * part, 2 * n + 1)[1::2] for part in np.linspace(0.1, 1, 10)]
    found = []
    for start in starts:
        levels_found = lloyd(cells, np.sort(start))
        if levels_found is not None:
            found.append((distortion(levels_found), tuple(levels_found)))
    return np.array(min(found)[1])


def squares(density, left, right, centre):
    half = np.maximum(right - left, 0.0) / 2
    u = (left + right)[..., None] / 2 + half[..., None] * NODES
    return (density(u) * WEIGHTS * half[..., None] * (u - centre[..., None]) ** 2).sum()


def rows(tables):
    lines = []
    for d, levels in tables:
        what = "Gaussian, d >= 64" if d == 0 else f"d = {d}"
        lines.append(f"    // {what}\n    {{{{")
        for bits, values in enumerate(levels, 1):
            lines.append(f"        // {bits} bit" + ("s" if bits > 1 else ""))
            for i in range(0, len(values), 4):
                lines.append("        " + ", ".join(f"{v:.9f}f" for v in values[i : i + 4]) + ",")
        lines.append("    }},")
    return "\n".join(lines)


def main():
    first, second = [], []
    for d in [0, *BETA_DIMS]:
        density, limit = (gaussian, EDGE) if d == 0 else (beta(d), math.sqrt(d))
        one = [first_stage(density, limit, bits) for bits in range(1, 5)]
        first.append((d, one))
        second.append((d, [second_stage(density, limit, one[bits - 1], bits) for bits in range(1, 5)]))
    print(HEADER.replace("@FIRST@", rows(first)).replace("@SECOND@", rows(second)))


HEADER = """\
// Lloyd-Max quantisers of one coordinate of a randomly rotated vector, in units where a coordinate
// has variance 1 (a unit vector of d dimensions times sqrt(d)).
//
// Written by tools/lloyd_max_tables.py. The marginal is Beta(d), close to N(0, 1) from d = 64 on
// (the Gaussian table costs less than 0.2 % of the distortion at 128). Quantisers are symmetric:
// the positive levels ascend, boundaries are the midpoints.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

constexpr int kMaxScalarBits = 4;

// Positive levels of 1, 2, 3 and 4 bits one after the other: those of b bits start at 2^(b-1) - 1.
struct LloydMaxLevels {
  float positive[15];
};

// clang-format off
// Of the coordinate itself: [0] Gaussian, [k] Beta of d = 8 k.
constexpr LloydMaxLevels kLloydMax[8] = {
@FIRST@
};

// Of what a quantiser of the same number of bits leaves: the second stage of a residual pair.
constexpr LloydMaxLevels kLloydMaxResidual[8] = {
@SECOND@
};
// clang-format on

VQ_FN int lloyd_max_row(int head_dim) { return head_dim >= 64 ? 0 : (head_dim + 7) / 8; }

// 2^(bits-1) ascending positive levels for vectors of head_dim dimensions; bits in 1..4.
VQ_FN const float* lloyd_max_levels(int head_dim, int bits) {
  return kLloydMax[lloyd_max_row(head_dim)].positive + ((1 << (bits - 1)) - 1);
}
VQ_FN const float* lloyd_max_residual_levels(int head_dim, int bits) {
  return kLloydMaxResidual[lloyd_max_row(head_dim)].positive + ((1 << (bits - 1)) - 1);
}

}  // namespace veloxquant"""

if __name__ == "__main__":
    main()
