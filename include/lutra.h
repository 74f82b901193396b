/* The C API of lutra: runs compiled models, without Python. docs/c-api.md explains it.
 *
 * A model is read from a compiled file (`lutra compile model.lutra -o model.lutrac`) and never
 * changes. A session is a run of a model at a time, with its inputs and outputs. Any number of
 * threads may use a model; a session is for one thread at a time.
 *
 * Functions that can fail return a lutra_status. After a failure lutra_last_error() says, in one
 * sentence, what is wrong; what a function should have written is then as it was. Every pointer
 * argument must be valid unless its comment allows NULL. */
#ifndef LUTRA_H
#define LUTRA_H

#include <stddef.h>
#include <stdint.h>

#if defined(LUTRA_STATIC)
#define LUTRA_API
#elif defined(_WIN32) && defined(LUTRA_BUILDING)
#define LUTRA_API __declspec(dllexport)
#elif defined(_WIN32)
#define LUTRA_API __declspec(dllimport)
#else
#define LUTRA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lutra_status {
  LUTRA_OK = 0,
  LUTRA_ERROR_ARGUMENT = 1, /* an argument of the call is wrong: an index, a shape, a NULL */
  LUTRA_ERROR_FILE = 2,     /* the file cannot be read */
  LUTRA_ERROR_FORMAT = 3,   /* the content is damaged, no compiled model, or of another version */
  LUTRA_ERROR_CPU = 4,      /* the instruction set or the threads asked for cannot be had here */
  LUTRA_ERROR_INPUT = 5,    /* an input has content that the model cannot work on */
  LUTRA_ERROR_MEMORY = 6,   /* there is too little memory, or more than `max_memory` is needed */
  LUTRA_ERROR_INTERNAL = 7  /* a mistake of lutra */
} lutra_status;

typedef enum lutra_dtype { LUTRA_FLOAT32 = 0, LUTRA_INT32 = 1 } lutra_dtype;

#define LUTRA_MAX_RANK 8

/* An input or an output of a model. */
typedef struct lutra_value {
  const char* name; /* UTF-8; as long as the model is there */
  lutra_dtype dtype;
  size_t rank;
  int64_t shape[LUTRA_MAX_RANK]; /* -1: any size, the same for all inputs on axis 0, the batch */
} lutra_value;

/* How a model is opened. All zeros, or NULL in its place: the defaults. */
typedef struct lutra_options {
  const char* isa;     /* "scalar", "avx2", ...; NULL: the fastest one here */
  int threads;         /* the caller's included, 1..1024; 0: the cores of the machine */
  int allow_nonfinite; /* 0: lutra_run refuses inputs with NaN and infinity */
  uint64_t max_memory; /* bytes of working memory and outputs of a run; 0: no limit */
} lutra_options;

typedef struct lutra_model lutra_model;
typedef struct lutra_session lutra_session;

/* "0.1.0" */
LUTRA_API const char* lutra_version(void);
/* What the last failed call of this thread says, until its next one; "" if none has failed. */
LUTRA_API const char* lutra_last_error(void);

/* Reads a compiled model. `options` may be NULL. The memory is no longer needed afterwards. */
LUTRA_API lutra_status lutra_open(const char* path, const lutra_options* options,
                                  lutra_model** model);
LUTRA_API lutra_status lutra_open_memory(const void* data, size_t size,
                                         const lutra_options* options, lutra_model** model);
/* Sessions of the model stay usable. `model` may be NULL. */
LUTRA_API void lutra_close(lutra_model* model);

LUTRA_API size_t lutra_input_count(const lutra_model* model);
LUTRA_API size_t lutra_output_count(const lutra_model* model);
LUTRA_API lutra_status lutra_input(const lutra_model* model, size_t index, lutra_value* value);
LUTRA_API lutra_status lutra_output(const lutra_model* model, size_t index, lutra_value* value);
/* What the file says about the model, as JSON: classes, preprocess, ... */
LUTRA_API const char* lutra_metadata(const lutra_model* model);
/* The instruction set in use. */
LUTRA_API const char* lutra_isa(const lutra_model* model);

LUTRA_API lutra_status lutra_session_new(const lutra_model* model, lutra_session** session);
/* `session` may be NULL. */
LUTRA_API void lutra_session_free(lutra_session* session);
/* Tells where an input is: float or int32_t of its dtype, C-contiguous, in `shape` of the rank of
 * the input. The memory stays the caller's, and is read by every lutra_run from now on. With a
 * `shape` of NULL the input has its own shape, with a batch of 1. */
LUTRA_API lutra_status lutra_set_input(lutra_session* session, size_t index, const void* data,
                                       const int64_t* shape);
/* Runs the model on inputs that have all been set. A run that fails leaves no outputs. */
LUTRA_API lutra_status lutra_run(lutra_session* session);
/* An output of the last lutra_run, C-contiguous, and its shape, of the rank of the output. Both
 * are there until the next lutra_run or lutra_session_free. `shape` may be NULL. */
LUTRA_API lutra_status lutra_get_output(const lutra_session* session, size_t index,
                                        const float** data, const int64_t** shape);

#ifdef __cplusplus
}
#endif

#endif
