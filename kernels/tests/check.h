// What the test programs share.
#pragma once
#include <stdio.h>
#include <string.h>

#include "../longspan.h"

inline int failures = 0;

#define CHECK(condition, ...)                                 \
  do {                                                        \
    if (!(condition) && ++failures <= 20) {                   \
      printf("line %d: %s is false: ", __LINE__, #condition); \
      printf(__VA_ARGS__);                                    \
      printf("\n");                                           \
    }                                                         \
  } while (0)

// Calls body(name) with each instruction set in use that this CPU and this build have.
template <class Body>
void with_each_set(Body body) {
  for (const char* set : {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"}) {
    if (longspan_use_instruction_set(set) != LONGSPAN_OK) continue;
    CHECK(strcmp(longspan_instruction_set(), set) == 0, "%s was not chosen", set);
    body(set);
  }
}
