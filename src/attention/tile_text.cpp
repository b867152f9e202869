#include "src/attention/tile_text.h"

namespace veloxquant::attention {
namespace {

constexpr int kStagedHalves = 2048;  // a table of 4 KB is copied into threadgroup memory

bool has_levels(const CodeFormat& f) {
  return f.kind == TileKind::scalar || f.kind == TileKind::sketched;
}

bool staged(const CodeFormat& f) {
  if (has_levels(f)) return true;
  return f.kind == TileKind::vecinfer && f.tables == 1 &&
         f.n_centroids * f.sub_dim <= kStagedHalves;
}

// Of the slots of this head: behind the scale, [H][DIM / 2][2].
std::string turning_text() {
  return R"(    $_tile.turning.numbers = smooth + 1 + head * DIM;
    $_tile.turning.scale = smooth[0];
    $_tile.turning.position = position;
)";
}

// $ stands for the side, @ for the same in capitals.
std::string of_side(const std::string& side, const std::string& text) {
  return replaced(replaced(text, "$", side), "@", side == "k" ? "K" : "V");
}

}  // namespace

std::string replaced(std::string text, const std::string& name, const std::string& with) {
  for (size_t at = 0; (at = text.find(name, at)) != std::string::npos; at += with.size()) {
    text.replace(at, name.size(), with);
  }
  return text;
}

int piece_dims(const CodeFormat& f) {
  switch (f.kind) {
    case TileKind::vecinfer:
    case TileKind::pairs:
      return f.sub_dim;
    case TileKind::scalar:
    case TileKind::sketched:
      return f.by_token ? 4 : 1;
    case TileKind::halves:
      return 4;
    case TileKind::commvq:
      return 2;
    default:
      return 1;
  }
}

const char* word_type(const CodeFormat& f) {
  return f.kind == TileKind::outliers ? "uint8_t" : "uint32_t";
}

std::string stage_text(const char* side, const CodeFormat& f) {
  if (!staged(f)) return "";
  return of_side(side, has_levels(f) ? "  threadgroup float $_stage[16 * @STAGES];\n"
                                     : "  threadgroup half $_stage[@C * @SUB];\n");
}

int stage_bytes(const CodeFormat& f) {
  if (!staged(f)) return 0;
  return has_levels(f) ? 64 * f.stages : 2 * f.n_centroids * f.sub_dim;
}

std::string table_text(const char* side, const CodeFormat& f) {
  std::string text;
  if (f.kind == TileKind::vecinfer || f.kind == TileKind::pairs) {
    text = R"(    const device half* $_given = $_tables +
        ((int64_t)($_tables_shape[0] == 1 ? 0 : batch) * n_heads + head) * (@TABLES * @C * @SUB);
)";
  }
  if (staged(f)) {
    text +=
        has_levels(f)
            ? "    for (uint i = self; i < 16 * @STAGES; i += n_threads) "
              "$_stage[i] = $_tables[i];\n"
            : "    for (uint i = self; i < @C * @SUB; i += n_threads) $_stage[i] = $_given[i];\n";
  }
  return of_side(side, text);
}

std::string tile_text(const char* side, const CodeFormat& f) {
  std::string text;
  switch (f.kind) {
    case TileKind::vecinfer:
      text = "VecInferTile<@ROWS, @SUB, @C, @BITS, @TABLES, const device uint32_t*, ";
      text += staged(f) ? "decltype(&$_stage[0])> $_tile;\n    $_tile.table = $_stage;\n"
                        : "const device half*> $_tile;\n    $_tile.table = $_given;\n";
      break;
    case TileKind::scalar:
      text =
          R"(ScalarTile<@ROWS, @STAGES, @BITS, @BY_TOKEN, const device uint32_t*,
                           decltype(&$_stage[0])> $_tile;
    $_tile.levels = $_stage;
)";
      break;
    case TileKind::planes:
      text = "PlaneTile<@ROWS, @BITS, @MEAN, const device uint32_t*, const ";
      // MLX binds fewer than 8 numbers as `constant`.
      text += f.mean ? "device float*> $_tile;\n    $_tile.mean = $_tables + 1 + head * DIM;\n"
                     : "constant float*> $_tile;\n    $_tile.mean = $_tables;\n";
      text += "    $_tile.factor_of_all = $_tables[0];\n";
      break;
    case TileKind::halves:
      text = "SixteenBitTile<@ROWS, @BFLOAT, const device uint32_t*> $_tile;\n";
      break;
    case TileKind::sketched:
      text =
          R"(SketchedTile<@ROWS, @BITS, @BY_TOKEN, const device uint32_t*,
                             decltype(&$_stage[0])> $_tile;
    $_tile.levels = $_stage;
)";
      break;
    case TileKind::outliers:
      text = R"(OutlierTile<@ROWS, @M, @M_OUT, @OUTLIERS, @FIXED, const device uint8_t*,
                            const device float*> $_tile;
    $_tile.numbers = $_tables;
    $_tile.channels = $_tables + 2 + DIM * (@M + @M_OUT) + (@FIXED ? head * @OUTLIERS : 0);
)";
      break;
    case TileKind::pairs:
      text =
          R"(PairsTile<@ROWS, @SUB, @C, @BITS, @TABLES, const device uint32_t*, const device half*,
                          const device float*> $_tile;
    $_tile.codes.table = $_given;
)" + turning_text();
      break;
    case TileKind::commvq:
      text = R"(CommVQTile<@ROWS, @STAGES, @C, const device uint32_t*, const device half*,
                           const device float*> $_tile;
    $_tile.entries = $_tables + (int64_t)head * (@STAGES * @C * DIM);
)" + turning_text();
      break;
  }
  return of_side(side, "    veloxquant::" + text);
}

void add_tile_arguments(const std::string& side, const CodeFormat& f, int rows,
                        std::vector<metal::TemplateArgument>& arguments) {
  arguments.push_back({side + "ROWS", rows});
  arguments.push_back({side + "BITS", f.bits});
  switch (f.kind) {
    case TileKind::vecinfer:
    case TileKind::pairs:
      arguments.push_back({side + "SUB", f.sub_dim});
      arguments.push_back({side + "C", f.n_centroids});
      arguments.push_back({side + "TABLES", f.tables});
      break;
    case TileKind::scalar:
      arguments.push_back({side + "STAGES", f.stages});
      arguments.push_back({side + "BY_TOKEN", f.by_token ? 1 : 0});
      break;
    case TileKind::planes:
      arguments.push_back({side + "MEAN", f.mean ? 1 : 0});
      break;
    case TileKind::halves:
      arguments.push_back({side + "BFLOAT", f.bfloat ? 1 : 0});
      break;
    case TileKind::sketched:
      arguments.push_back({side + "STAGES", 1});
      arguments.push_back({side + "BY_TOKEN", f.by_token ? 1 : 0});
      break;
    case TileKind::outliers:
      arguments.push_back({side + "M", f.bits});
      arguments.push_back({side + "M_OUT", f.m_out});
      arguments.push_back({side + "OUTLIERS", f.outliers});
      arguments.push_back({side + "FIXED", f.fixed ? 1 : 0});
      break;
    case TileKind::commvq:
      arguments.push_back({side + "STAGES", f.stages});
      arguments.push_back({side + "C", f.n_centroids});
      break;
  }
}

}  // namespace veloxquant::attention
