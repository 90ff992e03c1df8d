// How host code of either backend reads, checks and makes tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "portable.h"

namespace normatch {

using torch::stable::Tensor;

// A matrix whose rows are dense and `stride` values apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  NM_HD T* operator[](int64_t row) const { return data + row * stride; }
};

// A tensor with dense rows; a copy only where the given one has none.
inline Tensor dense_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
Rows<const T> read_rows(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0)};
}

template <typename T>
Rows<T> write_rows(const Tensor& tensor) {
  return {tensor.mutable_data_ptr<T>(), tensor.stride(0)};
}

inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, type);
}

inline Tensor new_like(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, tensor.sizes(), tensor.scalar_type());
}

}  // namespace normatch
