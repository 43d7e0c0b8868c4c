// The public tables are usable from C++11 as they stand: the toys and their tests once more.
#include "toys.c"
