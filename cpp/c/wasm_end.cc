// How the C++ library ends a program that it cannot go on with. Its own way prints why, which takes
// 8 KB and which nobody sees in a browser; js/lutra.js reports a trap.
extern "C" [[noreturn]] void abort_message(const char*, ...) { __builtin_trap(); }
