/* A live pipe, or agent, whose peer is a stranger's socket. */
#define FUZZ_SHM 0
#include "live.h"
