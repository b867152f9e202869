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
    // Gaussian, d >= 64
    {{
        // 1 bit
        0.797884561f,
        // 2 bits
        0.452780035f, 1.510417608f,
        // 3 bits
        0.245094179f, 0.756005281f, 1.343909279f, 2.151945705f,
        // 4 bits
        0.128395030f, 0.388048299f, 0.656759119f, 0.942340456f,
        1.256231197f, 1.618046386f, 2.069017227f, 2.732589571f,
    }},
    // d = 8
    {{
        // 1 bit
        0.823146346f,
        // 2 bits
        0.446671149f, 1.427859656f,
        // 3 bits
        0.234220400f, 0.713828087f, 1.233660367f, 1.860307814f,
        // 4 bits
        0.120232667f, 0.362162135f, 0.608680964f, 0.863586176f,
        1.132138121f, 1.422761249f, 1.751779681f, 2.163280297f,
    }},
    // d = 16
    {{
        // 1 bit
        0.810441208f,
        // 2 bits
        0.449956803f, 1.468826326f,
        // 3 bits
        0.239688942f, 0.734715960f, 1.286969880f, 1.996795351f,
        // 4 bits
        0.124253663f, 0.374865405f, 0.632102524f, 0.901557824f,
        1.191190639f, 1.514182520f, 1.897122127f, 2.415578680f,
    }},
    // d = 24
    {{
        // 1 bit
        0.806236872f,
        // 2 bits
        0.450950623f, 1.482633109f,
        // 3 bits
        0.241501917f, 0.741779306f, 1.305553857f, 2.046349921f,
        // 4 bits
        0.125624076f, 0.379215778f, 0.640197195f, 0.914850453f,
        1.212199511f, 1.547361781f, 1.951250462f, 2.513259936f,
    }},
    // d = 32
    {{
        // 1 bit
        0.804141426f,
        // 2 bits
        0.451427884f, 1.489559530f,
        // 3 bits
        0.242404777f, 0.745325033f, 1.314995542f, 2.071926058f,
        // 4 bits
        0.126313558f, 0.381408888f, 0.644293186f, 0.921611767f,
        1.222955386f, 1.564484309f, 1.979472024f, 2.564977222f,
    }},
    // d = 40
    {{
        // 1 bit
        0.802886433f,
        // 2 bits
        0.451707896f, 1.493722102f,
        // 3 bits
        0.242945106f, 0.747456334f, 1.320707987f, 2.087532025f,
        // 4 bits
        0.126728424f, 0.382729942f, 0.646765571f, 0.925704658f,
        1.229489540f, 1.574931426f, 1.996787340f, 2.596973236f,
    }},
    // d = 48
    {{
        // 1 bit
        0.802050748f,
        // 2 bits
        0.451891917f, 1.496499804f,
        // 3 bits
        0.243304695f, 0.748878666f, 1.324535934f, 2.098045511f,
        // 4 bits
        0.127005444f, 0.383612676f, 0.648419802f, 0.928448120f,
        1.233879256f, 1.581969194f, 2.008493001f, 2.618716969f,
    }},
    // d = 56
    {{
        // 1 bit
        0.801454318f,
        // 2 bits
        0.452022058f, 1.498485131f,
        // 3 bits
        0.243561221f, 0.749895289f, 1.327279768f, 2.105609110f,
        // 4 bits
        0.127203519f, 0.384244153f, 0.649604261f, 0.930414960f,
        1.237031234f, 1.587032153f, 2.016934475f, 2.634453937f,
    }},
};

// Of what a quantiser of the same number of bits leaves: the second stage of a residual pair.
constexpr LloydMaxLevels kLloydMaxResidual[8] = {
    // Gaussian, d >= 64
    {{
        // 1 bit
        0.482624199f,
        // 2 bits
        0.150036805f, 0.451258791f,
        // 3 bits
        0.053463289f, 0.160440150f, 0.267568296f, 0.875346642f,
        // 4 bits
        0.017583806f, 0.052753223f, 0.087928054f, 0.123111912f,
        0.177617508f, 0.289281472f, 0.604722642f, 1.098103372f,
    }},
    // d = 8
    {{
        // 1 bit
        0.471233725f,
        // 2 bits
        0.134941036f, 0.406087915f,
        // 3 bits
        0.044967235f, 0.134940267f, 0.225029064f, 0.504395741f,
        // 4 bits
        0.012466948f, 0.037401579f, 0.062338411f, 0.087278914f,
        0.112224558f, 0.141357688f, 0.195552958f, 0.369854111f,
    }},
    // d = 16
    {{
        // 1 bit
        0.477817110f,
        // 2 bits
        0.142648946f, 0.429105885f,
        // 3 bits
        0.048705536f, 0.146155654f, 0.243723376f, 0.664479053f,
        // 4 bits
        0.013468082f, 0.040405040f, 0.067344384f, 0.094287707f,
        0.121236603f, 0.162483620f, 0.244449550f, 0.553993847f,
    }},
    // d = 24
    {{
        // 1 bit
        0.479604003f,
        // 2 bits
        0.145148320f, 0.436586321f,
        // 3 bits
        0.050127880f, 0.150425130f, 0.250847331f, 0.728392245f,
        // 4 bits
        0.013949603f, 0.041849691f, 0.069752421f, 0.097659559f,
        0.125572871f, 0.172828466f, 0.265356832f, 0.636044542f,
    }},
    // d = 32
    {{
        // 1 bit
        0.480426474f,
        // 2 bits
        0.146384223f, 0.440290145f,
        // 3 bits
        0.050887493f, 0.152705641f, 0.254653755f, 0.762606342f,
        // 4 bits
        0.016953919f, 0.050863344f, 0.084777529f, 0.118699652f,
        0.165697711f, 0.257635660f, 0.501781827f, 0.865716391f,
    }},
    // d = 40
    {{
        // 1 bit
        0.480897930f,
        // 2 bits
        0.147121337f, 0.442500887f,
        // 3 bits
        0.051362487f, 0.154131782f, 0.257034510f, 0.783902212f,
        // 4 bits
        0.017072947f, 0.051220467f, 0.085372860f, 0.119533382f,
        0.167924413f, 0.263579033f, 0.520748156f, 0.907809498f,
    }},
    // d = 48
    {{
        // 1 bit
        0.481203213f,
        // 2 bits
        0.147610904f, 0.443969938f,
        // 3 bits
        0.051688383f, 0.155110308f, 0.258668179f, 0.798431473f,
        // 4 bits
        0.017153959f, 0.051463530f, 0.085778055f, 0.120100843f,
        0.169447441f, 0.267643569f, 0.533823682f, 0.937029894f,
    }},
    // d = 56
    {{
        // 1 bit
        0.481416904f,
        // 2 bits
        0.147959694f, 0.445016934f,
        // 3 bits
        0.051926170f, 0.155824305f, 0.259860284f, 0.808976497f,
        // 4 bits
        0.017212707f, 0.051639792f, 0.086071891f, 0.120512353f,
        0.170555512f, 0.270598307f, 0.543380427f, 0.958487178f,
    }},
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

}  // namespace veloxquant
