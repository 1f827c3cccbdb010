#include "view.h"

#include <algorithm>
#include <vector>

#include "../torch.h"

namespace precisebn::cpu {
namespace {

// Planes up to this length are taken as part of a row, see View. A plane of a vector or less would be mostly overhead.
constexpr int64_t kShortPlane = 16;
// Rows narrower than this are only efficient where several can be joined into one, so they must be adjacent.
constexpr int64_t kNarrowRow = 16;

struct Axis {
  int64_t size, stride;
};

// Several dimensions as one, in memory order; nothing where the steps between their elements are not all equal.
std::optional<Axis> collapse(std::vector<Axis> axes) {
  std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  Axis whole{1, 1};
  for (const Axis& axis : axes) {
    if (axis.size == 1) continue;
    if (whole.size == 1) {
      whole = axis;
    } else if (axis.stride == whole.stride * whole.size) {
      whole.size *= axis.size;
    } else {
      return std::nullopt;
    }
  }
  return whole;
}

// Whether x fills its memory without gaps or overlaps; not said of every such x.
bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  int64_t expected = 1;
  const auto step = [&](int64_t d) {
    const bool fits = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return fits;
  };
  bool channels_last = step(1);
  for (int64_t d = x.dim() - 1; d >= 0; --d) channels_last = channels_last && (d == 1 || step(d));
  return channels_last;
}

Tensor new_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, Dtype dtype) {
  static const int32_t types[kNumDtypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                            aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16()};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, types[dtype], aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace

std::optional<View> view_of(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<Axis> spatial;
  View view{};
  view.batch = sizes[0];
  view.channels = sizes[1];
  view.length = 1;
  for (size_t d = 2; d < sizes.size(); ++d) {
    view.length *= sizes[d];
    spatial.push_back({sizes[d], strides[d]});
  }
  view.sample_stride = strides[0];
  if (view.empty()) return view;

  const auto inside = collapse(spatial);
  if (!inside) return std::nullopt;
  const bool one_value = view.length == 1;
  const int64_t channel_stride = view.channels == 1 ? view.length : strides[1];
  const bool planes_are_adjacent = channel_stride == view.length;
  const int64_t sample_stride = view.batch == 1 ? view.channels * view.length : view.sample_stride;

  if (!one_value && inside->stride == 1 && view.length > kShortPlane) {
    view.by_rows = false;
    view.plane_stride = channel_stride;
    return view;
  }
  view.by_rows = true;
  if (planes_are_adjacent && (one_value || inside->stride == 1)) {
    view.sample_rows = 1;
    view.width = view.channels * view.length;
    view.row_stride = sample_stride;
    view.inner = view.length;
  } else if (channel_stride == 1) {
    view.sample_rows = view.length;
    view.width = view.channels;
    view.row_stride = inside->stride;
    view.inner = 1;
  } else {
    return std::nullopt;
  }
  if (view.width < kNarrowRow && view.row_stride != view.width) return std::nullopt;
  return view;
}

Tensor with_view(const Tensor& x) {
  if (view_of(x)) return x;
  using torch::headeronly::MemoryFormat;
  const bool channels_inside = x.stride(1) == 1 && x.size(1) > 1;
  const auto format = !channels_inside ? MemoryFormat::Contiguous
                      : x.dim() == 4   ? MemoryFormat::ChannelsLast
                      : x.dim() == 5   ? MemoryFormat::ChannelsLast3d
                                       : MemoryFormat::Contiguous;
  return torch::stable::contiguous(x, format);
}

Dtype dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, "precisebn: x must be float32, float64, float16 or bfloat16");
  }
}

Tensor new_statistic(std::array<int64_t, 2> size, int64_t dim, Dtype dtype) {
  const int64_t strides[] = {dim == 2 ? size[1] : 1, 1};
  return new_strided(dim, size.data(), strides, dtype);
}

Tensor new_like(const Tensor& x) {
  if (!is_dense(x)) return torch::stable::empty_like(x);
  return new_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype_of(x));
}

void check_group(const char* op, const std::optional<Tensor>& group, int64_t batch, int64_t num_groups) {
  STD_TORCH_CHECK(num_groups >= 1, "precisebn::", op, ": num_groups must be at least 1");
  if (!group) return;
  STD_TORCH_CHECK(group->dim() == 1 && group->size(0) == batch, "precisebn::", op,
                  ": group must have one element per sample of x");
  const int64_t *id = group->const_data_ptr<int64_t>(), stride = group->stride(0);
  for (int64_t i = 0; i < batch; ++i, id += stride) {
    STD_TORCH_CHECK(*id >= 0 && *id < num_groups, "precisebn::", op, ": group holds ", *id, ", but there are ",
                    num_groups, " groups");
  }
}

}  // namespace precisebn::cpu
