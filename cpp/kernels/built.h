// What the kernels of this build can do at all: the WebAssembly module has one set of them, and
// what only others need is not linked.
#pragma once

namespace lutra {

#ifdef LUTRA_NO_SCALAR
inline constexpr bool kHaveUnits = false;  // codes in units of several bytes
inline constexpr bool kHaveConv8 = false;  // convolutions that read quads where they are
#else
inline constexpr bool kHaveUnits = true;
inline constexpr bool kHaveConv8 = true;
#endif

}  // namespace lutra
