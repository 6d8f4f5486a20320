// Words of Metal as clang's "C++ for OpenCL" has them: there address spaces are real.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define thread __private
// `constant` is a word of OpenCL too. A kernel is an ordinary function here: OpenCL has rules for
// kernels that Metal has not.
#define kernel

// Words that OpenCL reserves and Metal does not.
#define global zmlx_word_global
#define local zmlx_word_local
#define generic zmlx_word_generic
#define pipe zmlx_word_pipe
#define read_only zmlx_word_read_only
#define write_only zmlx_word_write_only
#define read_write zmlx_word_read_write
#define atomic_int zmlx_word_atomic_int
#define atomic_uint zmlx_word_atomic_uint
#define atomic_ulong zmlx_word_atomic_ulong
#define atomic_float zmlx_word_atomic_float

#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __METAL_FAST_MATH__ true
#define __METAL_PRECISE_MATH__ false
#define __METAL_MAYBE_FAST_MATH__ false

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef decltype(sizeof(0)) size_t;
typedef long ptrdiff_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.40282346638528859812e+38f
#define FLT_MAX MAXFLOAT
#define FLT_MIN 1.17549435082228750797e-38f
#define FLT_EPSILON 1.19209289550781250000e-07f
#define HALF_MAX 65504.0h
#define HALF_MIN 6.103515625e-05h
#define HALF_EPSILON 9.765625e-04h
#define HUGE_VALF INFINITY
#define SCHAR_MIN (-128)
#define SCHAR_MAX 127
#define UCHAR_MAX 255
#define CHAR_MIN SCHAR_MIN
#define CHAR_MAX SCHAR_MAX
#define SHRT_MIN (-32768)
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define INT_MIN (-2147483647 - 1)
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u
#define LONG_MIN (-9223372036854775807l - 1)
#define LONG_MAX 9223372036854775807l
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.785398163397448309616f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
#define M_PI_H 3.14159265358979323846h

// What the checker puts in the place of a `threadgroup` variable: a reference to storage whose
// size it reads from the compiled text.
void zmlx_threadgroup_bytes(ulong bytes);
struct zmlx_threadgroup_storage {
  template <typename T>
  operator threadgroup T&() const {
    zmlx_threadgroup_bytes(sizeof(T));
    return *static_cast<threadgroup T*>(nullptr);
  }
};
