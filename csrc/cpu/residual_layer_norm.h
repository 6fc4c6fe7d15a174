// What the operator residual_layer_norm and the kernels of each SIMD level share. Formulas:
// simmim_fast/ops/residual_layer_norm. A row is what is normalised together. The source is what is normalised: the sum,
// or x without a delta, or delta.

#pragma once

#include <algorithm>

#include "checks.h"
#include "cpu/simd.h"
#include "integers.h"

namespace simmim_fast::residual_layer_norm {

// Stream is the dtype of x and the sum, Branch that of delta and the norm; both are computed in the same.
template <typename Stream, typename Branch>
struct Args {
  using Sum = Accumulator<Stream>;

  const Sum* weight;      // (channels)
  const Sum* gamma;       // (channels) or null
  const Sum* keep;        // (rows / rows_per_sample) or null
  const Sum* delta_bias;  // (channels) or null
  int64_t rows, rows_per_sample, channels;

  Sum keep_of(int64_t row) const { return keep ? keep[row / rows_per_sample] : Sum(1); }
};

template <typename Stream, typename Branch>
struct ForwardArgs : Args<Stream, Branch> {
  using Sum = Accumulator<Stream>;

  const Stream* x;      // (rows, channels)
  const Branch* delta;  // (rows, channels) or null
  const Sum* bias;      // (channels)
  Stream* stream;       // (rows, channels) or null: the sum
  Branch* normed;       // (rows, channels) or null, where delta is normalised
  Sum* mean;            // (rows)
  Sum* rstd;            // (rows)
  Sum eps;
};

template <typename Stream, typename Branch>
struct BackwardArgs : Args<Stream, Branch> {
  using Sum = Accumulator<Stream>;

  const void* grad_normed;    // (rows, channels) of Branch; of Stream where delta is normalised
  const void* source;         // (rows, channels) of Stream; of Branch where delta is normalised
  const Sum* bias;            // (channels) or null
  const Stream* grad_stream;  // (rows, channels) or null
  const Branch* delta;        // (rows, channels) or null
  bool adds_delta;            // to what the source points to
  const Sum* mean;            // (rows)
  const Sum* rstd;            // (rows)
  Stream* grad_x;             // (rows, channels) or null, as the following
  Branch* grad_delta;
  Branch* normed;        // the norm again
  Sum* weight_partials;  // (chunks, channels)
  Sum* bias_partials;
  Sum* gamma_partials;
  Sum* delta_bias_partials;

  // Rows that one unit adds up; by the shape alone, so that sums repeat.
  int64_t chunk_rows() const { return std::clamp<int64_t>(32768 / this->channels, 16, 256); }
  int64_t chunks() const { return ceil_div(this->rows, chunk_rows()); }
};

template <typename Stream, typename Branch>
struct Kernels {
  using Forward = void (*)(const ForwardArgs<Stream, Branch>& args, int64_t begin, int64_t end);
  using Backward = void (*)(const BackwardArgs<Stream, Branch>& args, int64_t begin, int64_t end);

  Forward forward;              // rows [begin, end)
  Backward backward;            // chunks
  Forward forward_norms_delta;  // the same where delta is normalised
  Backward backward_norms_delta;

  template <Simd kAt>
  static Kernels at();
};

}  // namespace simmim_fast::residual_layer_norm
