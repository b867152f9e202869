// A decode step of one layer by ggml's CPU flash attention, as llama.cpp calls it. C functions for
// ctypes.
//
// Keys and values lie as in llama.cpp's cache: a row holds all heads of one token. llama.cpp also
// passes a mask of zeros; it is left out here, which can only help ggml.

#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Attention {
  ggml_context* context;
  ggml_tensor *q, *keys, *values, *output;  // keys, values: [head_dim * kv_heads, tokens]
  ggml_cgraph* graph;
  ggml_threadpool* pool;
  ggml_cplan plan;
  std::vector<uint8_t> work;
  int64_t head_dim, kv_heads, tokens;
};

char* row(const Attention& a, ggml_tensor* side, int64_t head, int64_t token) {
  return static_cast<char*>(side->data) + token * side->nb[1] +
         head * ggml_row_size(side->type, a.head_dim);
}

// What attention sees: [head_dim, tokens, kv_heads].
ggml_tensor* by_head(const Attention& a, ggml_tensor* side) {
  return ggml_view_3d(a.context, side, a.head_dim, a.tokens, a.kv_heads, side->nb[1],
                      ggml_row_size(side->type, a.head_dim), 0);
}

void fill(const Attention& a, ggml_tensor* side, const float* from) {
  for (int64_t head = 0; head < a.kv_heads; ++head) {
    for (int64_t token = 0; token < a.tokens; ++token) {
      ggml_quantize_chunk(side->type, from, row(a, side, head, token), 0, 1, a.head_dim, nullptr);
      from += a.head_dim;
    }
  }
}

void read(const Attention& a, ggml_tensor* side, float* to) {
  const auto to_float = ggml_get_type_traits(side->type)->to_float;
  for (int64_t head = 0; head < a.kv_heads; ++head) {
    for (int64_t token = 0; token < a.tokens; ++token) {
      to_float(row(a, side, head, token), to, a.head_dim);
      to += a.head_dim;
    }
  }
}

}  // namespace

extern "C" {

// keys, values: [kv_heads][tokens][head_dim]. nullptr for a type that is not one of ggml's.
void* vq_llama_new(const char* type_name, int64_t query_heads, int64_t kv_heads, int64_t head_dim,
                   int64_t tokens, const float* keys, const float* values, float scale,
                   int threads) {
  int type = 0;
  while (type < GGML_TYPE_COUNT && (ggml_blck_size(ggml_type(type)) == 0 ||
                                    std::strcmp(ggml_type_name(ggml_type(type)), type_name) != 0)) {
    ++type;
  }
  if (type == GGML_TYPE_COUNT) return nullptr;
  ggml_cpu_init();
  auto* a = new Attention{};
  a->head_dim = head_dim;
  a->kv_heads = kv_heads;
  a->tokens = tokens;
  const size_t side = ggml_row_size(ggml_type(type), head_dim * kv_heads) * tokens;
  const size_t ends = 2 * query_heads * head_dim * sizeof(float);
  a->context = ggml_init(
      {2 * side + ends + 32 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, false});
  a->q = ggml_new_tensor_3d(a->context, GGML_TYPE_F32, head_dim, 1, query_heads);
  a->keys = ggml_new_tensor_2d(a->context, ggml_type(type), head_dim * kv_heads, tokens);
  a->values = ggml_new_tensor_2d(a->context, ggml_type(type), head_dim * kv_heads, tokens);
  fill(*a, a->keys, keys);
  fill(*a, a->values, values);
  a->output = ggml_flash_attn_ext(a->context, a->q, by_head(*a, a->keys), by_head(*a, a->values),
                                  nullptr, scale, 0.0f, 0.0f);
  a->graph = ggml_new_graph(a->context);
  ggml_build_forward_expand(a->graph, a->output);
  ggml_threadpool_params pool = ggml_threadpool_params_default(threads);
  a->pool = ggml_threadpool_new(&pool);
  a->plan = ggml_graph_plan(a->graph, threads, a->pool);
  a->work.resize(a->plan.work_size);
  a->plan.work_data = a->work.data();
  return a;
}

// q, output: [query_heads][head_dim]. Wakes the threads; they wait for more, spinning, until
// vq_llama_rest.
int vq_llama_attend(void* handle, const float* q, float* output) {
  auto& a = *static_cast<Attention*>(handle);
  std::memcpy(a.q->data, q, ggml_nbytes(a.q));
  const int status = ggml_graph_compute(a.graph, &a.plan);
  std::memcpy(output, a.output->data, ggml_nbytes(a.output));
  return status;
}

void vq_llama_rest(void* handle) { ggml_threadpool_pause(static_cast<Attention*>(handle)->pool); }

// What the cache holds, as floats: [kv_heads][tokens][head_dim].
void vq_llama_held(void* handle, float* keys, float* values) {
  const auto& a = *static_cast<Attention*>(handle);
  read(a, a.keys, keys);
  read(a, a.values, values);
}

int64_t vq_llama_bytes(void* handle) {
  const auto& a = *static_cast<Attention*>(handle);
  return static_cast<int64_t>(ggml_nbytes(a.keys) + ggml_nbytes(a.values));
}

void vq_llama_free(void* handle) {
  auto* a = static_cast<Attention*>(handle);
  ggml_threadpool_free(a->pool);
  ggml_free(a->context);
  delete a;
}

const char* vq_llama_simd() {
  if (ggml_cpu_has_avx512()) return "AVX-512";
  if (ggml_cpu_has_avx2()) return "AVX2";
  if (ggml_cpu_has_neon()) return "NEON";
  return "baseline";
}
}
