// What the public headers of CPython 3.10 to 3.14 read of their configuration, for 64-bit Linux,
// macOS and Windows. An interpreter's own pyconfig.h is for the machine that it was built on; this
// one is for the machine that is compiled for. python_sizes.cc checks sizes; the build adds a line
// for interpreters without the GIL, whose structures are others.
#pragma once

// Python.h includes it but for the stable ABI, and nanobind counts on it.
#include <stdio.h>

#define SIZEOF_INT 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_UINTPTR_T 8
#define SIZEOF_TIME_T 8
#define SIZEOF_PID_T 4
#define SIZEOF__BOOL 1
#define ALIGNOF_MAX_ALIGN_T 16
#define DOUBLE_IS_LITTLE_ENDIAN_IEEE754 1
#define PY_FORMAT_SIZE_T "z"
#define WITH_DOC_STRINGS 1
#define WITH_PYMALLOC 1
#define WITH_MIMALLOC 1
#define HAVE_SSIZE_T 1
#define HAVE_WCHAR_H 1
#define HAVE_ERRNO_H 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_COPYSIGN 1
#define HAVE_HYPOT 1
#define HAVE_ROUND 1
#define HAVE_DECL_ISFINITE 1
#define HAVE_DECL_ISINF 1
#define HAVE_DECL_ISNAN 1

#ifdef _WIN32
#define MS_WIN64 1
#define MS_WIN32 1
#define MS_WINDOWS 1
#define NT_THREADS 1
#define Py_ENABLE_SHARED 1  // functions and data are imported from a DLL
#define HAVE_DECLSPEC_DLL 1
#define SIZEOF_LONG 4
#define SIZEOF_WCHAR_T 2
#else
#define SIZEOF_LONG 8
#define SIZEOF_WCHAR_T 4
#define SIZEOF_PTHREAD_T 8
#define HAVE_PTHREAD_H 1
#define HAVE_FORK 1
#define HAVE_SYS_TIME_H 1
#define HAVE_SYS_SELECT_H 1
#define TIME_WITH_SYS_TIME 1
#define HAVE_LANGINFO_H 1
#define HAVE_CLOCK_GETTIME 1
#endif
