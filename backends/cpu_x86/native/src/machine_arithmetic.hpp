// The arithmetic of the vector machine: every primitive, in the type its values are kept in.
#pragma once

#include "machine_loops.hpp"

namespace {

class Arithmetic : public Loops {
 public:
  using Loops::Loops;

 protected:
  template <class From>
  void cast(From) {
    if (in_.type == Type::kBool) return map<int32_t, From>([](From x) { return x != From(0); });
    by_width(in_.type, [&](auto to) {
      using To = decltype(to);
      if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
        map<To, From>([](From x) { return whole<To>(x); });
      } else {
        map<To, From>([](From x) { return static_cast<To>(x); });
      }
    });
  }

  // What no integer holds is undefined in torch too; here it is the smallest one, as the instruction has it.
  template <class To, class From>
  static To whole(From x) {
    constexpr auto limit = static_cast<From>(sizeof(To) == 8 ? 9223372036854775808.0 : 2147483648.0);
    return x >= -limit && x < limit ? static_cast<To>(x) : std::numeric_limits<To>::min();
  }

  void compute() {
    switch (in_.from) {
      case Type::kF64:
        return floating<double>();
      case Type::kF32:
      case Type::kBF16:
      case Type::kF16:
        return floating<float>();
      case Type::kI64:
        return integral<int64_t>();
      default:
        return integral<int32_t>();
    }
  }

#define THAL_ONE(name, expression) \
  case Op::k_##name:               \
    return map<T, T>([](T x) { return expression; });
#define THAL_TWO(name, expression) \
  case Op::k_##name:               \
    return map_two<T, T>([](T x, T y) { return expression; });
#define THAL_ASK(name, expression) \
  case Op::k_##name:               \
    return map<int32_t, T>([](T x) { return expression; });
#define THAL_COMPARE(name, sign) \
  case Op::k_##name:             \
    return map_two<int32_t, T>([](T x, T y) { return x sign y; });

  template <class T>
  void floating() {
    switch (in_.op) {
      THAL_ONE(neg, -x)
      THAL_ONE(abs, std::fabs(x))
      THAL_ONE(sign, T((x > T(0)) - (x < T(0))))
      THAL_ONE(relu, x > T(0) || x != x ? x : T(0))
      THAL_TWO(add, x + y)
      THAL_TWO(sub, x - y)
      THAL_TWO(mul, x * y)
      THAL_TWO(div, x / y)
      THAL_TWO(min, min_of(x, y))
      THAL_TWO(max, max_of(x, y))
      THAL_TWO(clamp_min, max_of(x, y))
      THAL_TWO(clamp_max, min_of(x, y))
      THAL_ONE(exp, exp_of(x))
      THAL_ONE(exp2, exp2_of(x))
      THAL_ONE(log, log_of(x))
      THAL_ONE(log2, std::log2(x))
      THAL_ONE(log10, std::log10(x))
      THAL_ONE(tanh, tanh_of(x))
      THAL_ONE(sigmoid, T(1) / (T(1) + exp_of(-x)))
      THAL_ONE(sqrt, std::sqrt(x))
      THAL_ONE(rsqrt, T(1) / std::sqrt(x))
      THAL_ONE(reciprocal, T(1) / x)
      THAL_ONE(floor, std::floor(x))
      THAL_ONE(ceil, std::ceil(x))
      THAL_ONE(round, std::nearbyint(x))
      THAL_ONE(trunc, std::trunc(x))
      THAL_ASK(isnan, x != x)
      THAL_ASK(isinf, std::fabs(x) == std::numeric_limits<T>::infinity())
      THAL_ASK(isfinite, x - x == T(0))
      default:
        return library<T>();
    }
  }

  // The C library's, one element at a time: 5 to 30 ns each.
  template <class T>
  void library() {
    switch (in_.op) {
      THAL_ONE(expm1, std::expm1(x))
      THAL_ONE(log1p, std::log1p(x))
      THAL_ONE(sin, std::sin(x))
      THAL_ONE(cos, std::cos(x))
      THAL_ONE(tan, std::tan(x))
      THAL_ONE(asin, std::asin(x))
      THAL_ONE(acos, std::acos(x))
      THAL_ONE(atan, std::atan(x))
      THAL_ONE(sinh, std::sinh(x))
      THAL_ONE(cosh, std::cosh(x))
      THAL_ONE(asinh, std::asinh(x))
      THAL_ONE(acosh, std::acosh(x))
      THAL_ONE(atanh, std::atanh(x))
      THAL_ONE(erf, std::erf(x))
      THAL_ONE(erfc, std::erfc(x))
      THAL_ONE(erfinv, static_cast<T>(erfinv_of(x)))
      THAL_TWO(atan2, std::atan2(x, y))
      THAL_TWO(floordiv, floordiv_of(x, y))
      THAL_TWO(remainder, remainder_of(x, y))
      THAL_TWO(fmod, std::fmod(x, y))
      THAL_TWO(pow, pow_of(x, y))
      default:
        return compare<T>();
    }
  }

  template <class T>
  void compare() {
    switch (in_.op) {
      THAL_COMPARE(eq, ==)
      THAL_COMPARE(ne, !=)
      THAL_COMPARE(lt, <)
      THAL_COMPARE(le, <=)
      THAL_COMPARE(gt, >)
      THAL_COMPARE(ge, >=)
      default:
        return;  // decode lets nothing else through
    }
  }

  // Sums and products wrap, so they are taken of unsigned numbers.
  template <class T>
  void integral() {
    using U = std::make_unsigned_t<T>;
    switch (in_.op) {
      THAL_ONE(neg, negate(x))
      THAL_ONE(abs, x < 0 ? negate(x) : x)
      THAL_ONE(sign, T((x > 0) - (x < 0)))
      THAL_ONE(relu, x > 0 ? x : T(0))
      THAL_TWO(add, T(U(x) + U(y)))
      THAL_TWO(sub, T(U(x) - U(y)))
      THAL_TWO(mul, T(U(x) * U(y)))
      THAL_TWO(min, x < y ? x : y)
      THAL_TWO(max, x > y ? x : y)
      THAL_TWO(clamp_min, x > y ? x : y)
      THAL_TWO(clamp_max, x < y ? x : y)
      THAL_TWO(floordiv, floordiv_of(x, y))
      THAL_TWO(truncdiv, truncdiv_of(x, y))
      THAL_TWO(remainder, remainder_of(x, y))
      THAL_TWO(fmod, fmod_of(x, y))
      THAL_TWO(pow, pow_of(x, y))
      THAL_ONE(bitwise_not, ~x)
      THAL_TWO(bitwise_and, x & y)
      THAL_TWO(bitwise_or, x | y)
      THAL_TWO(bitwise_xor, x ^ y)
      THAL_ONE(logical_not, x == 0)
      THAL_TWO(logical_and, x & y)
      THAL_TWO(logical_or, x | y)
      THAL_TWO(logical_xor, x ^ y)
      case Op::k_shift_left:
      case Op::k_shift_right:
        return shift<T>();
      default:
        return compare<T>();
    }
  }
#undef THAL_ONE
#undef THAL_TWO
#undef THAL_ASK
#undef THAL_COMPARE

  // As torch: shifting out all bits gives 0, or the sign, and so does a negative number of places.
  template <class T>
  void shift() {
    using U = std::make_unsigned_t<T>;
    const T bits = in_.type == Type::kI64 ? 64 : in_.type == Type::kI32 ? 32 : in_.type == Type::kI16 ? 16 : 8;
    if (in_.op == Op::k_shift_left)
      return map_two<T, T>([bits](T x, T y) { return y < 0 || y >= bits ? T(0) : T(U(x) << y); });
    const T most = in_.type == Type::kU8 ? bits : bits - 1;
    map_two<T, T>([most](T x, T y) { return x >> (y < 0 || y > most ? most : y); });
  }

  // After arithmetic in a wider type: 16-bit floating values are rounded, small integers wrap.
  void settle() {
    switch (in_.type) {
      case Type::kBF16:
        return in_place<float>([](float x) { return rounded_to_bf16(x); });
      case Type::kF16:
        return in_place<float>([](float x) { return rounded_to_f16(x); });
      case Type::kI16:
        return in_place<int32_t>([](int32_t x) { return static_cast<int32_t>(static_cast<int16_t>(x)); });
      case Type::kI8:
        return in_place<int32_t>([](int32_t x) { return static_cast<int32_t>(static_cast<int8_t>(x)); });
      case Type::kU8:
        return in_place<int32_t>([](int32_t x) { return x & 0xff; });
      default:
        return;
    }
  }
};

}  // namespace
