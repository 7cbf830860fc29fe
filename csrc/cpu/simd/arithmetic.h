// Functions of whole vectors, once for all instruction sets. Included after `struct Simd`.

// e^a: degree-6 polynomial on [-ln2/2, ln2/2], relative error below 2e-7 for a in [-87, 88]; below it
// is e^-87, above it e^88. NaN stays NaN.
inline Simd::Floats exponential(Simd::Floats a) {
  // The operand order keeps NaN: x86's min and max return the second operand then.
  a = Simd::max(Simd::set(-87.0f), Simd::min(Simd::set(88.0f), a));
  const Simd::Floats whole = Simd::round(Simd::mul(a, Simd::set(0x1.715476p+0f)));
  Simd::Floats rest = Simd::fma(whole, Simd::set(-0x1.62e4p-1f), a);
  rest = Simd::fma(whole, Simd::set(-0x1.7f7d1cp-20f), rest);
  Simd::Floats sum = Simd::set(1.0f / 720.0f);
  sum = Simd::fma(sum, rest, Simd::set(1.0f / 120.0f));
  sum = Simd::fma(sum, rest, Simd::set(1.0f / 24.0f));
  sum = Simd::fma(sum, rest, Simd::set(1.0f / 6.0f));
  sum = Simd::fma(sum, rest, Simd::set(0.5f));
  sum = Simd::fma(sum, rest, Simd::set(1.0f));
  sum = Simd::fma(sum, rest, Simd::set(1.0f));
  return Simd::mul(sum, Simd::exp2_of_whole(whole));
}

// 1 / (1 + e^-a)
inline Simd::Floats sigmoid(Simd::Floats a) {
  const Simd::Floats one = Simd::set(1.0f);
  return Simd::div(one, Simd::add(one, exponential(Simd::sub(Simd::zero(), a))));
}
