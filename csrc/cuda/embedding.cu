#include <algorithm>

#include "cuda/aligned.h"
#include "cuda/embedding.cuh"
#include "cuda/embedding.h"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {
namespace {

// How a row is divided between blocks of threads.
struct Tiles {
  int64_t count;
  int threads;

  Tiles(int64_t width, int piece) {
    const int64_t pieces = ceil_div(width, piece);
    count = ceil_div(pieces, kTileThreads);
    threads =
        static_cast<int>(ceil_div(ceil_div(pieces, std::max<int64_t>(count, 1)), kWarpSize)) * kWarpSize;
  }
};

template <typename T, typename... Pointers>
bool aligned_rows(int64_t width, Pointers... pointers) {
  return width % Vec<T>::kSize == 0 && aligned(pointers...);
}

}  // namespace

void embedding_forward(const EmbeddingShape& shape, const int64_t* idx, const void* token_weight,
                       const void* position_weight, void* y, cudaStream_t stream) {
  const int64_t n = shape.batch * shape.length, width = shape.width;
  Launch launch("embedding_forward", {shape.batch, shape.length, width}, stream);
  launch.grid(width == 0 ? 0 : ceil_div(n, kTokenWarps)).block(kWarpSize, kTokenWarps);
  dispatch(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(embedding_forward_kernel<T>, idx, static_cast<const T*>(token_weight),
           static_cast<const T*>(position_weight), static_cast<T*>(y), shape.start, n, shape.length,
           shape.vocab_size, width, aligned_rows<T>(width, token_weight, position_weight, y));
  });
}

int64_t embedding_partials(const EmbeddingShape& shape) {
  return 2 * ceil_div(shape.batch * shape.length, kChunk);
}

void embedding_backward(const EmbeddingShape& shape, const void* dy, const int* tokens, const int64_t* order,
                        void* dwt, void* dwp, float* partials, cudaStream_t stream) {
  const int64_t n = shape.batch * shape.length, width = shape.width, vocab_size = shape.vocab_size;
  const std::vector<int64_t> sizes = {shape.batch, shape.length, width};
  dispatch(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Tiles tiles(width, Vec<T>::kSize);
    const bool whole = aligned_rows<T>(width, dy, dwt, dwp, partials);
    Launch add_tokens("embedding_backward (tokens)", sizes, stream);
    add_tokens.grid(tiles.count * ceil_div(n, kGroup)).block(tiles.threads);
    add_tokens(embedding_tokens_kernel<T>, static_cast<const T*>(dy), tokens, order, static_cast<T*>(dwt),
               partials, n, vocab_size, width, tiles.count, whole);
    Launch add_runs("embedding_backward (runs)", sizes, stream);
    add_runs.grid(tiles.count * ceil_div(n, kChunk)).block(tiles.threads);
    add_runs(embedding_runs_kernel<T>, tokens, static_cast<T*>(dwt), partials, n, vocab_size, width,
             tiles.count, whole);
    Launch add_positions("embedding_backward (positions)", sizes, stream);
    add_positions.grid(tiles.count * shape.length).block(tiles.threads);
    add_positions(embedding_positions_kernel<T>, static_cast<const T*>(dy), static_cast<T*>(dwp), shape.start,
                  shape.batch, shape.length, width, tiles.count, whole);
  });
}

}  // namespace fastgpt::cuda
