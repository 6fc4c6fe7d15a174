#include "cpu/shifted_window_attention.h"
#define SIMMIM_FAST_LEVEL baseline
#include "cpu/shifted_window_attention_kernels.h"
