// Compiled for every target before a wheel is: pyconfig.h says what the compiler says.
#include <Python.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <ctime>

static_assert(sizeof(int) == SIZEOF_INT);
static_assert(sizeof(long) == SIZEOF_LONG);
static_assert(sizeof(long long) == SIZEOF_LONG_LONG);
static_assert(sizeof(void*) == SIZEOF_VOID_P);
static_assert(sizeof(size_t) == SIZEOF_SIZE_T);
static_assert(sizeof(uintptr_t) == SIZEOF_UINTPTR_T);
static_assert(sizeof(time_t) == SIZEOF_TIME_T);
static_assert(sizeof(wchar_t) == SIZEOF_WCHAR_T);
static_assert(sizeof(Py_ssize_t) == sizeof(void*));
static_assert(sizeof(Py_hash_t) == sizeof(void*));
