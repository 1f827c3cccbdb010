// Small tensors, one value per channel or per (row, channel), as rows of doubles: what the operators that work on
// statistics and parameters alone read and write. Any floating dtype, any strides.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "view.h"

namespace precisebn::cpu {

// Reads (C), or (G, C). A single row serves for any row number.
class Rows {
 public:
  // `op` and `name` are for the error where t has another shape.
  Rows(const char* op, const char* name, const Tensor& t, int64_t channels);
  Rows(const Rows&) = delete;
  const double* operator[](int64_t row) const { return values_ + row * stride_; }
  int64_t size() const { return size_; }

 private:
  std::optional<Tensor> kept_;     // where it can be read in place
  std::vector<double> converted_;  // where not
  const double* values_;
  int64_t size_, stride_;
};

// The same of a tensor that may be absent.
class OptionalRows {
 public:
  OptionalRows(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels) {
    if (t) rows_.emplace(op, name, *t, channels);
  }
  // Null where there is none.
  const double* operator[](int64_t row) const { return rows_ ? (*rows_)[row] : nullptr; }
  int64_t size() const { return rows_ ? rows_->size() : 1; }

 private:
  std::optional<Rows> rows_;
};

// How many rows operands have together, each of them one or that many.
int64_t common_rows(const char* op, std::initializer_list<int64_t> sizes);

// One number per row, float64: () or (G).
class Counts {
 public:
  Counts(const char* op, const Tensor& t, int64_t rows);
  double operator[](int64_t row) const { return values_[row * stride_]; }

 private:
  const double* values_;
  int64_t stride_;
};

// By what rows are divided that are sums over values: the count, 1 where it is 0; or 1 everywhere where there is none.
class Divisors {
 public:
  Divisors(const char* op, const std::optional<Tensor>& count, int64_t rows) {
    if (count) counts_.emplace(op, *count, rows);
  }
  double operator[](int64_t row) const { return counts_ && (*counts_)[row] > 1.0 ? (*counts_)[row] : 1.0; }

 private:
  std::optional<Counts> counts_;
};

// Rounds a row of doubles into row `row` of t: (C), or (G, C).
void write_row(const Tensor& t, int64_t row, const double* values, int64_t channels);

}  // namespace precisebn::cpu
