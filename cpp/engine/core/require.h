// Checks that throw sentences.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "engine/core/shape.h"

namespace lutra {

// What stands in a sentence: a text, a whole number or a shape. It refers to what it was made from,
// so that nothing is written while all is well.
class Word {
 public:
  Word(const char* text) : kind_(kText), at_(text) {}                 // NOLINT
  Word(const std::string& text) : kind_(kText), at_(text.c_str()) {}  // NOLINT
  Word(const Shape& shape) : kind_(kShape), at_(&shape) {}            // NOLINT
  template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
  Word(T number)  // NOLINT
      : kind_(std::is_signed_v<T> ? kNumber : kCount), number_(static_cast<int64_t>(number)) {}

  std::string text() const {
    if (kind_ == kNumber) return std::to_string(number_);
    if (kind_ == kCount) return std::to_string(static_cast<uint64_t>(number_));
    if (kind_ == kShape) return static_cast<const Shape*>(at_)->text();
    return static_cast<const char*>(at_);
  }

 private:
  enum Kind : int32_t { kText, kShape, kNumber, kCount };
  Kind kind_;
  union {
    const void* at_;
    int64_t number_;
  };
};

// Where `pattern` has a %, the next of the words: "% bits", {8} -> "8 bits".
inline std::string sentence(const char* pattern, std::initializer_list<Word> words) {
  std::string text;
  auto word = words.begin();
  for (; *pattern; ++pattern) {
    if (*pattern == '%' && word != words.end()) {
      text += (word++)->text();
    } else {
      text += *pattern;
    }
  }
  return text;
}

// Throws std::invalid_argument. Inline, because plugins link nothing; called, because there are
// hundreds of checks.
#if defined(__GNUC__)
[[gnu::noinline, gnu::cold]]
#endif
[[noreturn]] inline void fail(const char* pattern, std::initializer_list<Word> words) {
  throw std::invalid_argument(sentence(pattern, words));
}

// Throws std::invalid_argument with the sentence unless ok.
template <class... A>
inline void require(bool ok, const char* pattern, const A&... words) {
  if (!ok) fail(pattern, {words...});
}
inline void require(bool ok, const std::string& what) {
  if (!ok) fail("%", {what});
}

}  // namespace lutra
