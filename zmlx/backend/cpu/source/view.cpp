#include "view.h"

namespace zmlx {
namespace {

// Axes [axis, ndim) of both views; `inner` bytes at the end lie in order in both.
void copy_axis(
    const View& from, const View& to, int axis, int last, size_t inner, const char* source,
    char* target) {
  if (axis == last) {
    std::memcpy(target, source, inner);
    return;
  }
  const int64_t item = int64_t(from.item());
  for (int64_t i = 0; i < from.shape[axis]; ++i) {
    copy_axis(
        from, to, axis + 1, last, inner, source + i * from.strides[axis] * item,
        target + i * to.strides[axis] * item);
  }
}

} // namespace

View repeated(const View& in, const View& like) {
  View wide(like.shape, in.dtype, in.data);
  const int added = like.ndim() - in.ndim();
  for (int axis = 0; axis < like.ndim(); ++axis) {
    const bool same = axis >= added && in.shape[axis - added] == like.shape[axis];
    wide.strides[axis] = same ? in.strides[axis - added] : 0;
  }
  return wide;
}

void copy_elements(const View& from, const View& to) {
  if (from.size == 0) {
    return;
  }
  // The trailing axes that lie in order in both are copied in one piece.
  int last = from.ndim();
  int64_t inner = 1;
  for (; last > 0; --last) {
    const int64_t extent = from.shape[last - 1];
    if (extent != 1 && (from.strides[last - 1] != inner || to.strides[last - 1] != inner)) {
      break;
    }
    inner *= extent;
  }
  copy_axis(from, to, 0, last, size_t(inner) * from.item(), from.data, to.data);
}

} // namespace zmlx
