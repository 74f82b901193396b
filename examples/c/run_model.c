/* Runs a compiled model on files of raw numbers and prints the largest entries of each answer:
 *
 *   run_model MODEL.lutrac INPUT[:SHAPE]... [-o OUTPUT]...
 *
 * There is one INPUT for each input of the model: float32 or int32 values, C-contiguous. A SHAPE,
 * such as 2x3x24x24, is needed where more than the number of samples is open. An OUTPUT gets the
 * raw float32 values of the output of its place. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lutra.h"

enum { SHOWN = 3, MOST = 64 };

static int complain(const char* what) {
  fprintf(stderr, "run_model: %s\n", what);
  return 1;
}

/* The bytes of a file, NULL where it cannot be read. */
static void* read_whole(const char* path, size_t* size) {
  FILE* const file = fopen(path, "rb");
  void* data = NULL;
  long length = -1;
  if (file == NULL) return NULL;
  if (fseek(file, 0, SEEK_END) == 0) length = ftell(file);
  rewind(file);
  if (length > 0) data = malloc((size_t)length);
  if (data != NULL && fread(data, 1, (size_t)length, file) != (size_t)length) {
    free(data);
    data = NULL;
  }
  fclose(file);
  *size = (size_t)length;
  return data;
}

/* The shape of an input of so many bytes: the one that is given, or else the batch is what is left.
 * Returns 0 if there is none. */
static int find_shape(const lutra_value* value, const char* given, size_t bytes, int64_t* shape) {
  size_t left = bytes / 4; /* numbers, of either dtype */
  memcpy(shape, value->shape, value->rank * sizeof *shape);
  for (size_t i = 0; i < value->rank && given != NULL; ++i) {
    char* end;
    shape[i] = strtoll(given, &end, 10);
    given = *end == 'x' ? end + 1 : NULL;
  }
  for (size_t i = value->rank; i-- > 0;) {
    if (i == 0 && shape[0] < 0) shape[0] = (int64_t)left;
    if (shape[i] < 1 || left % (size_t)shape[i] != 0) return 0;
    left /= (size_t)shape[i];
  }
  return left == 1 && bytes % 4 == 0;
}

static void print_answers(const char* name, const float* data, const int64_t* shape, size_t rank) {
  size_t sample = 1;
  for (size_t i = 1; i < rank; ++i) sample *= (size_t)shape[i];
  for (int64_t n = 0; n < shape[0]; ++n, data += sample) {
    size_t best[SHOWN];
    size_t count = 0;
    for (size_t i = 0; i < sample; ++i) { /* sorted by value, the largest first */
      size_t at = count;
      while (at > 0 && data[best[at - 1]] < data[i]) --at;
      if (at == SHOWN) continue;
      if (count < SHOWN) ++count;
      memmove(best + at + 1, best + at, (count - at - 1) * sizeof *best);
      best[at] = i;
    }
    printf("%s[%lld]:", name, (long long)n);
    for (size_t i = 0; i < count; ++i) printf(" %zu (%g)", best[i], (double)data[best[i]]);
    printf("\n");
  }
}

static int run(const lutra_model* model, lutra_session* session, char** inputs,
               const char** outputs) {
  void* data[MOST] = {NULL};
  int status = 0;
  for (size_t i = 0; i < lutra_input_count(model) && status == 0; ++i) {
    lutra_value value;
    int64_t shape[LUTRA_MAX_RANK];
    size_t size = 0;
    char* const given = strrchr(inputs[i], ':');
    if (given != NULL) *given = '\0';
    data[i] = read_whole(inputs[i], &size);
    if (data[i] == NULL) {
      status = complain("an input cannot be read");
    } else if (lutra_input(model, i, &value) != LUTRA_OK) {
      status = complain(lutra_last_error());
    } else if (!find_shape(&value, given ? given + 1 : NULL, size, shape)) {
      status = complain("an input has not the size of whole samples, or it needs a SHAPE");
    } else if (lutra_set_input(session, i, data[i], shape) != LUTRA_OK) {
      status = complain(lutra_last_error());
    }
  }
  if (status == 0 && lutra_run(session) != LUTRA_OK) status = complain(lutra_last_error());
  for (size_t i = 0; i < lutra_output_count(model) && status == 0; ++i) {
    lutra_value value;
    const float* answer;
    const int64_t* shape;
    if (lutra_output(model, i, &value) != LUTRA_OK ||
        lutra_get_output(session, i, &answer, &shape) != LUTRA_OK) {
      status = complain(lutra_last_error());
      break;
    }
    print_answers(value.name, answer, shape, value.rank);
    if (i < MOST && outputs[i] != NULL) {
      size_t size = 1;
      FILE* const file = fopen(outputs[i], "wb");
      for (size_t k = 0; k < value.rank; ++k) size *= (size_t)shape[k];
      if (file == NULL || fwrite(answer, sizeof *answer, size, file) != size) {
        status = complain("an output cannot be written");
      }
      if (file != NULL && fclose(file) != 0) status = complain("an output cannot be written");
    }
  }
  for (size_t i = 0; i < MOST; ++i) free(data[i]);
  return status;
}

int main(int argc, char** argv) {
  char* inputs[MOST] = {NULL};
  const char* outputs[MOST] = {NULL};
  size_t given = 0, wanted = 0;
  lutra_model* model = NULL;
  lutra_session* session = NULL;
  int status;
  for (int i = 2; i < argc && given < MOST && wanted < MOST; ++i) {
    if (strcmp(argv[i], "-o") == 0 && i + 1 < argc) {
      outputs[wanted++] = argv[++i];
    } else {
      inputs[given++] = argv[i];
    }
  }
  if (argc < 3) return complain("usage: run_model MODEL.lutrac INPUT[:SHAPE]... [-o OUTPUT]...");
  if (lutra_open(argv[1], NULL, &model) != LUTRA_OK) return complain(lutra_last_error());
  if (given != lutra_input_count(model)) {
    status = complain("the model has another number of inputs");
  } else if (lutra_session_new(model, &session) != LUTRA_OK) {
    status = complain(lutra_last_error());
  } else {
    printf("lutra %s, %s\n", lutra_version(), lutra_isa(model));
    status = run(model, session, inputs, outputs);
  }
  lutra_session_free(session);
  lutra_close(model);
  return status;
}
