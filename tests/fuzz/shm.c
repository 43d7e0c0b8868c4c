/* A live pipe, or agent, whose peer is a stranger's end of a shared memory connection: he writes into the rings, their
   indices and the socket beside as he likes, also while the live end is reading, and passes descriptors of any kind. */
#define FUZZ_SHM 1
#define FUZZ_MOMENTS 1
#include "live.h"
