#include "src/attention/pair_text.h"

#include "src/attention/tile_text.h"
#include "veloxquant/error.h"

namespace veloxquant::attention {
namespace {

constexpr int kStagedHalves = 2048;  // a table of 4 KB is copied into threadgroup memory

bool staged(const CodeFormat& f) {
  return f.kind == TileKind::vecinfer && f.tables == 1 &&
         f.n_centroids * f.sub_dim <= kStagedHalves;
}

// Dimensions that a look-up brings at once, at most four, and the type of them.
int unit_dims(const CodeFormat& f) { return f.sub_dim % 4 == 0 ? 4 : f.sub_dim == 2 ? 2 : 1; }
const char* unit_type(const CodeFormat& f) {
  const int dims = unit_dims(f);
  return dims == 4 ? "uint2" : dims == 2 ? "uint" : "ushort";
}

// Words of the table of a scalar codec: ScalarPairs of turboquant/metal_pairs.h.
int level_pairs(const CodeFormat& f) {
  const int code = f.stages * f.bits;
  return 1 << (code <= 3 ? 2 * code : code);
}

// $ stands for the side, @ for the same in capitals, # for the type of look-ups.
std::string of_side(const std::string& side, const CodeFormat& f, const std::string& text) {
  return replaced(replaced(replaced(text, "$", side), "@", side == "k" ? "K" : "V"), "#",
                  unit_type(f));
}

}  // namespace

std::string pair_stage_text(const char* side, const CodeFormat& f) {
  if (f.kind == TileKind::scalar) {
    return of_side(side, f, "  threadgroup uint $_stage[@PAIRS];\n");
  }
  return staged(f) ? of_side(side, f, "  threadgroup # $_stage[@UNITS];\n") : "";
}

std::string pair_tile_text(const char* side, const CodeFormat& f) {
  std::string text;
  switch (f.kind) {
    case TileKind::vecinfer:
      text = R"(    const device #* $_given = (const device #*)($_tables +
        ((int64_t)($_tables_shape[0] == 1 ? 0 : batch) * n_heads + head) * (@TABLES * @C * @SUB));
)";
      if (staged(f)) {
        text += "    for (uint i = self; i < @UNITS; i += n_threads) $_stage[i] = $_given[i];\n";
      }
      text +=
          "    veloxquant::VecInferPairs<@ROWS, @SUB, @C, @BITS, @TABLES, @VALUES, @CHUNKS, "
          "const device uint32_t*, ";
      text += staged(f) ? "decltype(&$_stage[0])> $_tile;\n    $_tile.table = $_stage;\n"
                        : "const device #*> $_tile;\n    $_tile.table = $_given;\n";
      break;
    case TileKind::scalar:
      text = R"(    for (uint i = self; i < @PAIRS; i += n_threads)
      $_stage[i] = veloxquant::level_pair<@STAGES, @BITS>($_tables, i);
    veloxquant::ScalarPairs<@ROWS, @STAGES, @BITS, const device uint32_t*,
                            decltype(&$_stage[0])> $_tile;
    $_tile.pairs = $_stage;
)";
      break;
    case TileKind::planes:
      text = R"(    veloxquant::PlanePairs<@ROWS, @BITS, const device uint32_t*> $_tile;
    $_tile.factor_of_all = $_tables[0];
)";
      break;
    default:
      fail("[cuda] attention: got a codec without tiles of pairs, wanted one of device_codec()");
  }
  return of_side(side, f, text);
}

void add_pair_arguments(const std::string& side, const CodeFormat& f, int rows,
                        std::vector<metal::TemplateArgument>& arguments) {
  add_tile_arguments(side, f, rows, arguments);
  if (f.kind == TileKind::vecinfer) {
    arguments.push_back({side + "VALUES", side == "V" ? 1 : 0});
    arguments.push_back({side + "CHUNKS", f.chunks});
    if (staged(f)) {
      arguments.push_back({side + "UNITS", f.n_centroids * f.sub_dim / unit_dims(f)});
    }
  } else if (f.kind == TileKind::scalar) {
    arguments.push_back({side + "PAIRS", level_pairs(f)});
  }
}

}  // namespace veloxquant::attention
